"""Checkpoints and sums in parts: same bits and random numbers as without them, less memory."""

import numpy as np
import pytest
from tape_cases import Scale, buffers

import pyloss
from pyloss import _core, nn, ops
from pyloss.autograd.checkpointing import checkpoint, sum_in_parts
from pyloss.autograd.differentiation import grad, value_and_grad
from pyloss.autograd.scope import current_tape


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture(autouse=True)
def no_tape_is_left():
    yield
    assert current_tape() is None


class Block(nn.Module):
    """A residual block with its own parameters and one parameter that all blocks share."""

    def __init__(self, rng, shared, dropout):
        super().__init__()
        self.norm = nn.RMSNorm(7)
        self.up, self.down = (
            nn.Linear.from_weight(rng.standard_normal(s).astype(np.float32) / 3)
            for s in ((11, 7), (7, 11))
        )
        self.shared = shared
        self._dropout = dropout

    def __call__(self, x):
        y = ops.swiglu(self.up(self.norm(x)), self.up(x))
        if self._dropout:
            y = ops.dropout(y, self._dropout, pyloss.random.next_seed())
        return ops.add(ops.add(x, self.down(y)), self.shared)


class Stack(nn.Module):
    def __init__(self, rng, dropout=0.3):
        super().__init__()
        self.shared = rng.standard_normal((5, 7)).astype(np.float32)
        self.blocks = [Block(rng, self.shared, dropout) for _ in range(3)]


def through(stack, x, wrap):
    for block in stack.blocks:
        x = wrap(block, x)
    return (x * x).sum()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("frozen", ["nothing", "the first block", "the last block", "norms"])
def test_a_checkpoint_changes_no_bit(rng, dropout, frozen):
    stack = Stack(rng, dropout)
    if frozen == "norms":
        for block in stack.blocks:
            block.norm.freeze()
    elif frozen != "nothing":
        stack.blocks[0 if "first" in frozen else -1].freeze()
    x = rng.standard_normal((5, 7)).astype(np.float32)
    results = []
    for wrap in (
        lambda block, x: block(x),
        checkpoint,
        lambda block, x: checkpoint(lambda y: checkpoint(block, y), x),
    ):
        pyloss.random.seed(5)
        value, grads = nn.value_and_grad(stack, lambda wrap=wrap: through(stack, x, wrap))()
        results.append((value, grads, pyloss.random.state()))
    for value, grads, state in results[1:]:
        assert value == results[0][0] and state == results[0][2]
        assert grads.keys() == results[0][1].keys()
        for name, want in results[0][1].items():
            # The gradient of the shared parameter is summed over the blocks in another order.
            same = (
                np.allclose(grads[name], want, rtol=1e-5)
                if name.endswith("shared")
                else (grads[name] == want).all()
            )
            assert same and want.any(), name


def test_a_checkpoint_of_an_argument_and_of_what_it_closes_over(rng):
    x, y = (rng.standard_normal(6).astype(np.float32) for _ in range(2))

    def f(x, y, wrap):
        return wrap(lambda v: ops.swiglu(v, y * 2), x * 3).sum()

    plain = grad(lambda x, y: f(x, y, lambda g, v: g(v)), (0, 1))(x, y)
    again = grad(lambda x, y: f(x, y, checkpoint), (0, 1))(x, y)
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_gradient_that_reaches_a_parameter_twice_through_checkpoints():
    """`ops.add` hands both inputs the same gradient array, which must still be added twice."""
    model = Scale(np.ones(3, np.float32))
    x = np.ones(3, np.float32)

    def f():
        y = x
        for _ in range(3):
            y = checkpoint(lambda v: ops.add(v, model.weight), y)
        return y.sum()

    np.testing.assert_array_equal(nn.value_and_grad(model, f)()[1]["weight"], [3, 3, 3])


def test_a_checkpoint_without_anything_to_train_is_not_recorded(rng):
    frozen, x = (
        Block(rng, np.zeros(7, np.float32), 0.2),
        rng.standard_normal((7, 7)).astype(np.float32),
    )
    frozen.shared = np.zeros((7, 7), np.float32)
    runs = []

    def counted(v):
        runs.append(v)
        return frozen(v)

    head = Scale(np.ones((7, 7), np.float32))
    _, grads = nn.value_and_grad(
        head, lambda: (ops.add(checkpoint(counted, x), head.weight) * x).sum()
    )()
    assert len(runs) == 1
    np.testing.assert_array_equal(grads["weight"], x)


def test_a_checkpoint_outside_of_a_tape_is_the_function(rng):
    x = rng.standard_normal(4).astype(np.float32)
    np.testing.assert_array_equal(checkpoint(lambda v: ops.add(v, v), x), 2 * x)


def test_backward_frees_what_was_saved(rng):
    stack, x = Stack(rng), rng.standard_normal((5, 7)).astype(np.float32)
    nn.value_and_grad(stack, lambda: through(stack, x, lambda block, x: block(x)))()
    before = buffers()
    for wrap in (lambda block, x: block(x), checkpoint):
        nn.value_and_grad(stack, lambda wrap=wrap: through(stack, x, wrap))()
        assert buffers() == before


def test_a_checkpoint_keeps_its_input_alone(rng):
    stack, x = Stack(rng, 0.0), rng.standard_normal((5, 7)).astype(np.float32)
    stack.blocks *= 6
    held = {}
    for name, wrap in (("plain", lambda block, x: block(x)), ("checkpoint", checkpoint)):

        def f(name=name, wrap=wrap):
            before = buffers()
            out = through(stack, x, wrap)
            held[name] = buffers() - before
            return out

        nn.value_and_grad(stack, f)()
    assert held["checkpoint"] < held["plain"] / 3


def test_an_error_while_computing_again_brings_the_random_state_back():
    calls = []

    def fails_the_second_time(v):
        calls.append(pyloss.random.next_seed())
        if len(calls) == 2:
            raise RuntimeError("again")
        return ops.add(v, v)

    pyloss.random.seed(9)
    with pytest.raises(RuntimeError, match="again"):
        value_and_grad(lambda a: checkpoint(fails_the_second_time, a).sum())(np.ones(2, np.float32))
    assert calls[0] == calls[1] and pyloss.random.state() == {"seed": 9, "counter": 1}


# Sums in parts


def in_parts(stack, x, wrap=lambda block, x: block(x)):
    return sum_in_parts(lambda part: through(stack, part, wrap), x)


@pytest.mark.parametrize("wrap", [lambda block, x: block(x), checkpoint])
@pytest.mark.parametrize(
    "loss", [lambda y: y, lambda y: y * 3 + 1, lambda y: y + y.item() * 0, lambda y: y * y]
)
def test_a_sum_in_parts_is_the_sum(rng, wrap, loss):
    stack, x = Stack(rng, 0.0), rng.standard_normal((3, 5, 7)).astype(np.float32)
    value, grads = nn.value_and_grad(stack, lambda: loss(in_parts(stack, x, wrap)))()
    want, wanted = nn.value_and_grad(
        stack,
        lambda: loss(
            through(stack, x[0], wrap) + through(stack, x[1], wrap) + through(stack, x[2], wrap)
        ),
    )()
    assert value == pytest.approx(want, rel=1e-5) and value.dtype == np.float32
    for name, gradient in wanted.items():
        assert gradient.any()
        np.testing.assert_allclose(
            grads[name], gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max(), err_msg=name
        )


@pytest.mark.parametrize("read", [False, True])
def test_parts_are_computed_once_for_value_and_gradient(read):
    model, runs = Scale(np.arange(3, dtype=np.float32)), []

    def f():
        value = sum_in_parts(
            lambda part: (
                runs.append(part),
                ops.add(model.weight, np.full(3, part, np.float32)).sum(),
            )[1],
            [1, 2],
        )
        if read:
            assert value.item() == value.item() == 15
        return value

    value, grads = nn.value_and_grad(model, f)()
    assert value == 15 and (grads["weight"] == 2).all()
    assert runs == [1, 2] * (1 + read)
    assert sum_in_parts(lambda part: part, [1.5, 2]) == 3.5 and sum_in_parts(float, []) == 0


def test_parts_meet_the_same_random_numbers_forward_and_back(rng):
    """A read without a gradient draws the gradient's random numbers; later calls draw new ones."""
    stack, x = Stack(rng, 0.4), rng.standard_normal((3, 5, 7)).astype(np.float32)
    read, drawn, results = [], [], []
    for reads in (True, False):
        pyloss.random.seed(5)

        def f(reads=reads):
            value = in_parts(stack, x)
            read.extend([value.item()] if reads else [])
            drawn.append(pyloss.random.next_seed())
            return value

        results.append((nn.value_and_grad(stack, f)(), pyloss.random.state()))
    ((value, grads), state), ((again, others), after) = results
    assert value == again == read[0] and state == after and drawn[0] == drawn[1]
    for name, gradient in grads.items():
        assert (others[name] == gradient).all()
    in_parts(Stack(rng, 0.0), x)
    assert pyloss.random.state() == state, (
        "outside of a tape nothing is drawn but what the parts draw"
    )


def test_a_gradient_by_what_parts_close_over(rng):
    x, y = (rng.standard_normal((4, 6)).astype(np.float32) for _ in range(2))

    def f(x, y, total):
        double = y * 2
        return total(lambda part: ops.swiglu(x * 3, double * part).sum(), [1.0, 2.0, -0.5]) * 2

    plain = grad(
        lambda x, y: f(x, y, lambda g, parts: g(parts[0]) + g(parts[1]) + g(parts[2])), (0, 1)
    )(x, y)
    for a, b in zip(plain, grad(lambda x, y: f(x, y, sum_in_parts), (0, 1))(x, y), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_memory_holds_one_part_at_a_time(rng):
    x, weight = (
        rng.standard_normal((6000, 64)).astype(np.float32),
        rng.standard_normal((64, 64)).astype(np.float32),
    )
    peaks = []

    def chain(part, w):
        for _ in range(4):
            part = ops.linear(part, w)
        return part.sum()

    for count in (1, 6):
        _core.trim()
        before = buffers()
        grad(lambda w, count=count: sum_in_parts(lambda part: chain(part, w), np.split(x, count)))(
            weight
        )
        peaks.append(_core.buffer_stats()["peak"] - before)
    assert peaks[1] < peaks[0] / 3  # about a sixth, plus the buffers of a product
