"""The ACT loss head against HRM's formulas in float64: values, metrics, gradients, errors."""

import dataclasses

import numpy as np
import pytest

import pyloss
from pyloss import ACTLossHead, nn, ops, softmax_cross_entropy
from pyloss.autograd.differentiation import value_and_grad
from pyloss.autograd.tape import data

B, T, V = 6, 5, 7
IGNORE = -100
LOSSES = ["stablemax_cross_entropy", "softmax_cross_entropy"]
PADDED = ["reference", "ignore"]
TARGETS = ["none", "given", "next step"]


@dataclasses.dataclass
class Carry:
    steps: np.ndarray
    halted: np.ndarray
    current_data: dict


class Fixed:
    """A model that returns its arguments."""

    def initial_carry(self, *args, **kwargs):
        return args, kwargs

    def __call__(self, carry, batch):
        return carry, batch


class Lookahead(Fixed):
    """A model that can also compute the next step; it counts these calls."""

    halt_max_steps = 4

    def __init__(self, halt, go_on):
        self.next, self.calls = (halt, go_on), 0

    def next_q_logits(self, carry):
        assert isinstance(carry, Carry)
        self.calls += 1
        return self.next


# HRM's formulas, from their definitions


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def bce(x, t):
    return t * softplus(-x) + (1 - t) * softplus(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def token_losses(kind, logits, labels):
    if kind == "softmax_cross_entropy":
        s = np.exp(logits - logits.max(-1, keepdims=True))
    else:
        s = np.where(logits < 0, 1 / (1 - np.minimum(logits, 0)), logits + 1)
    p = np.take_along_axis(s, np.where(labels == IGNORE, 0, labels)[..., None], -1)[..., 0] / s.sum(
        -1
    )
    return np.where(labels == IGNORE, 0, -np.log(p))


def reference(kind, padded, logits, q_halt, q_continue, target, carry, q_factor=0.5):
    """(loss, metrics); without `target` the loss has no q_continue term."""
    labels = carry.current_data["labels"]
    loss = lm_loss = q_halt_loss = q_continue_loss = 0
    metrics = dict.fromkeys(("count", "accuracy", "exact_accuracy", "q_halt_accuracy", "steps"), 0)
    for i, row in enumerate(labels):
        valid = row != IGNORE
        n, right = valid.sum(), (logits[i].argmax(-1) == row)[valid].sum()
        if n or padded == "reference":
            lm_loss += token_losses(kind, logits[i], row).sum() / max(n, 1)
            q_halt_loss += bce(q_halt[i], float(right == n))
            q_continue_loss += 0 if target is None else bce(q_continue[i], target[i])
        if n and carry.halted[i]:
            metrics["count"] += 1
            metrics["accuracy"] += right / n
            metrics["exact_accuracy"] += right == n
            metrics["q_halt_accuracy"] += (q_halt[i] >= 0) == (right == n)
            metrics["steps"] += carry.steps[i]
    loss = lm_loss + q_factor * (q_halt_loss + q_continue_loss)
    return loss, {
        **metrics,
        "lm_loss": lm_loss,
        "q_halt_loss": q_halt_loss,
        "q_continue_loss": q_continue_loss,
    }


def bootstrapped(halt, go_on, last=False):
    return sigmoid(np.where(last, halt, np.maximum(halt, go_on)))


class Case:
    """Six sequences: one correct, one that pads the batch, one with some labels; two halted."""

    def __init__(self, kind="stablemax_cross_entropy", padded="reference", target="none", seed=1):
        rng = np.random.default_rng(seed)
        self.kind, self.padded = kind, padded
        self.logits, self.q_halt, self.q_continue = (
            3 * rng.standard_normal((B, T, V)),
            *(2 * rng.standard_normal((2, B))),
        )
        labels = rng.integers(0, V, (B, T))
        labels[0] = self.logits[0].argmax(-1)
        labels[1] = IGNORE
        labels[2, 1:3] = IGNORE
        halted = np.array([True, True, True, False, False, True])
        self.carry = Carry(
            np.array([1, 4, 2, 3, 4, 4]), halted, {"labels": labels, "inputs": labels}
        )
        self.model, self.extra, self.target = (
            Fixed(),
            {},
            bootstrapped(self.q_halt, self.q_continue),
        )
        if target == "given":
            self.target = rng.uniform(0, 1, B)
            self.extra = {"target_q_continue": self.target}
        if target == "next step":
            halt, go_on = 2 * rng.standard_normal((2, B))
            self.target = bootstrapped(halt, go_on, self.carry.steps >= 4)
            self.model = Lookahead(halt, go_on)

    def head(self, **options):
        return ACTLossHead(self.model, self.kind, padded_rows=self.padded, **options)

    def outputs(self, *values):
        return dict(
            zip(("logits", "q_halt_logits", "q_continue_logits"), values or self.values),
            **self.extra,
        )

    @property
    def values(self):
        return self.logits, self.q_halt, self.q_continue


@pytest.mark.parametrize("q_continue", [True, False])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("padded", PADDED)
@pytest.mark.parametrize("kind", LOSSES)
def test_values_metrics_and_gradients(kind, padded, target, q_continue):
    case = Case(kind, padded, target)
    head, used = case.head(q_continue=q_continue), case.target if q_continue else None

    def exact(*values):
        return reference(kind, padded, *values, used, case.carry)

    loss, metrics = exact(*case.values)
    carry, got, got_metrics, outputs, all_halted = head(carry=case.carry, batch=case.outputs())
    assert carry is case.carry and outputs == {} and all_halted is False
    assert np.shape(got) == () and got.dtype == np.float64
    assert got == pytest.approx(loss, rel=1e-12)
    assert list(got_metrics) == list(metrics) and got_metrics == pytest.approx(metrics, rel=1e-12)
    assert {
        type(got_metrics[k]) for k in ("count", "exact_accuracy", "q_halt_accuracy", "steps")
    } == {int}
    assert {
        type(got_metrics[k]) for k in ("accuracy", "lm_loss", "q_halt_loss", "q_continue_loss")
    } == {float}
    assert getattr(case.model, "calls", 0) == (target == "next step" and q_continue)

    upstream = 1.7
    (traced, traced_metrics), grads = value_and_grad(
        lambda *values: (lambda out: (upstream * out[1], out[2]))(
            head(carry=case.carry, batch=case.outputs(*values))
        ),
        (0, 1, 2),
    )(*case.values)
    assert traced == pytest.approx(upstream * loss, rel=1e-12) and traced_metrics == got_metrics
    for k, (value, gradient) in enumerate(zip(case.values, grads)):
        assert gradient.shape == value.shape and gradient.dtype == np.float64
        # The step is far smaller than the gap between the two largest logits, so no prediction
        # changes.
        for i in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = [v.copy() for v in case.values]
                moved[k][i] += sign * 1e-5
                ends.append(exact(*moved)[0])
            assert gradient[i] == pytest.approx(
                upstream * (ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-8
            ), (k, i)


@pytest.mark.parametrize("kind", LOSSES)
def test_ignored_padding_is_the_batch_without_it(kind):
    case = Case(kind, "ignore")
    full = np.array([0, 2, 3, 4, 5])
    less = Carry(
        case.carry.steps[full],
        case.carry.halted[full],
        {"labels": case.carry.current_data["labels"][full]},
    )

    def run(carry, head):
        return value_and_grad(
            lambda *v: (lambda o: (o[1], o[2]))(head(carry=carry, batch=case.outputs(*v))),
            (0, 1, 2),
        )

    (loss, metrics), grads = run(case.carry, case.head())(*case.values)
    for padded in PADDED:
        (want, want_metrics), want_grads = run(
            less, ACTLossHead(Fixed(), kind, padded_rows=padded)
        )(*(v[full] for v in case.values))
        assert loss == pytest.approx(want, rel=1e-14) and metrics == pytest.approx(
            want_metrics, rel=1e-14
        )
        for gradient, wanted in zip(grads, want_grads):
            np.testing.assert_allclose(gradient[full], wanted, rtol=1e-14)
            assert not gradient[1].any()


@pytest.mark.parametrize("q_factor", [0, 0.25, 2])
def test_the_factor_of_the_q_losses(q_factor):
    case = Case()
    want, metrics = reference(
        case.kind, case.padded, *case.values, case.target, case.carry, q_factor
    )
    _, loss, got, _, _ = case.head(q_factor=q_factor)(carry=case.carry, batch=case.outputs())
    assert loss == pytest.approx(want, rel=1e-12) and got == pytest.approx(metrics, rel=1e-12)


@pytest.mark.parametrize("padded", PADDED)
def test_targets_of_their_own_for_each_step(padded):
    """Sequences have made 1 to 4 steps; there are targets for 3, and the last holds on."""
    case = Case(padded=padded)
    of_step = np.maximum(np.minimum(case.carry.steps, 3), 1) - 1
    rng = np.random.default_rng(5)
    given = rng.integers(0, V, (B, 3, T))
    given[np.arange(B), of_step] = case.carry.current_data["labels"]
    want, metrics = reference(case.kind, padded, *case.values, case.target, case.carry)
    case.carry.current_data["labels"] = given
    _, loss, got, _, _ = case.head()(carry=case.carry, batch=case.outputs())
    assert loss == pytest.approx(want, rel=1e-12) and got == pytest.approx(metrics, rel=1e-12)


def test_padding_as_in_the_reference_has_the_target_one():
    case = Case()
    case.carry.current_data["labels"][:] = IGNORE
    (loss, metrics), (logits, q_halt, _) = value_and_grad(
        lambda *v: (lambda o: (o[1], o[2]))(
            case.head(q_continue=False)(carry=case.carry, batch=case.outputs(*v))
        ),
        (0, 1, 2),
    )(*case.values)
    assert (
        loss == pytest.approx(0.5 * bce(case.q_halt, 1).sum(), rel=1e-12)
        and not logits.any()
        and (q_halt < 0).all()
    )
    assert metrics["count"] == metrics["exact_accuracy"] == metrics["steps"] == 0


@pytest.mark.parametrize("padded", PADDED)
def test_all_halted(padded):
    case = Case(padded=padded)
    for halted, expected in (
        ([1] * 6, True),
        ([1, 1, 1, 1, 1, 0], False),
        ([0] * 6, False),
        ([1, 0, 1, 1, 1, 1], padded == "ignore"),
    ):
        case.carry.halted = np.array(halted, bool)
        assert case.head()(carry=case.carry, batch=case.outputs())[-1] is expected


def test_a_batch_of_padding_alone_has_no_loss():
    case = Case(padded="ignore")
    case.carry.current_data["labels"][:] = IGNORE
    case.logits[:] = np.nan
    _, loss, metrics, _, all_halted = case.head()(carry=case.carry, batch=case.outputs())
    assert loss == 0 and not any(metrics.values()) and all_halted is True


def test_an_empty_batch():
    carry = Carry(np.zeros(0, int), np.zeros(0, bool), {"labels": np.zeros((0, T), int)})
    batch = {
        "logits": np.zeros((0, T, V)),
        "q_halt_logits": np.zeros(0),
        "q_continue_logits": np.zeros(0),
    }
    _, loss, metrics, _, all_halted = ACTLossHead(Fixed(), "stablemax_cross_entropy")(
        carry=carry, batch=batch
    )
    assert loss == 0 and not any(metrics.values()) and all_halted is True


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_other_types_are_computed_in_float32(dtype):
    case = Case()
    values = [v.astype(dtype) for v in case.values]
    want, metrics = reference(
        case.kind,
        case.padded,
        *(v.astype(np.float64) for v in values),
        bootstrapped(*values[1:]),
        case.carry,
    )
    _, loss, got_metrics, _, _ = case.head()(carry=case.carry, batch=case.outputs(*values))
    assert loss.dtype == np.float32 and loss == pytest.approx(
        want, rel=1e-5 if dtype == np.float32 else 1e-3
    )
    assert got_metrics == pytest.approx(metrics, rel=1e-5 if dtype == np.float32 else 1e-3)


def test_extreme_q_logits():
    case = Case()
    case.q_halt[:], case.q_continue[:] = [-1e4, 1e4, 0, 800, -800, 5], [1e4, -1e4, 0, -800, 800, 0]
    loss, grads = value_and_grad(
        lambda *v: case.head()(carry=case.carry, batch=case.outputs(*v))[1], (0, 1, 2)
    )(*case.values)
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in grads)


def test_a_function_as_loss_type():
    case = Case()
    calls = []

    def half(logits, labels, ignore_index):
        calls.append(ignore_index)
        return softmax_cross_entropy(logits, labels, ignore_index=ignore_index) * 0.5

    outcomes = [
        ACTLossHead(Fixed(), kind)(carry=case.carry, batch=case.outputs())[2]
        for kind in (half, "softmax_cross_entropy")
    ]
    assert calls == [IGNORE] and outcomes[0].pop("lm_loss") == pytest.approx(
        outcomes[1].pop("lm_loss") / 2, rel=1e-14
    )
    assert outcomes[0] == outcomes[1]


def test_outputs_are_detached_and_unknown_names_passed_over():
    case = Case()

    def f(logits):
        batch = case.outputs(logits * 1, case.q_halt, case.q_continue)
        _, loss, _, outputs, _ = case.head()(
            ["logits", "q_halt_logits", "inputs"], carry=case.carry, batch=batch
        )
        assert list(outputs) == ["logits", "q_halt_logits"] and all(
            type(v) is np.ndarray for v in outputs.values()
        )
        np.testing.assert_array_equal(outputs["logits"], data(logits))
        return loss

    value_and_grad(f)(case.logits)


def test_initial_carry_is_the_models():
    assert Case().head().initial_carry(1, batch=2) == ((1,), {"batch": 2})


class Thinker(nn.Module):
    """Two linear layers; the next step is a real forward pass."""

    halt_max_steps = 3

    def __init__(self):
        super().__init__()
        self.inner, self.head, self.q = (
            nn.Linear(4, 4),
            nn.Linear(4, V),
            [nn.Linear(4, 1), nn.Linear(4, 1)],
        )

    def forward(self, state):
        state = ops.add(state, self.inner(state))
        return state, [q(state.reshape(B, T, 4).sum(1)).reshape(-1) for q in self.q]

    def next_q_logits(self, carry):
        return self.forward(carry.current_data["state"])[1]

    def __call__(self, carry):
        state, (halt, go_on) = self.forward(carry.current_data["state"])
        following = Carry(
            carry.steps + 1, carry.halted, {**carry.current_data, "state": data(state)}
        )
        logits = self.head(state).reshape(B, T, V)
        return following, {"logits": logits, "q_halt_logits": halt, "q_continue_logits": go_on}


def test_a_module_trains_and_the_next_step_is_a_constant():
    """The model's own next step, as target, has no gradient: it acts like the same number."""
    pyloss.random.seed(3)
    model, case = Thinker(), Case()
    state = np.random.default_rng(0).standard_normal((B * T, 4)).astype(np.float32)
    carry = Carry(case.carry.steps, case.carry.halted, {**case.carry.current_data, "state": state})
    head = ACTLossHead(model, "stablemax_cross_entropy")
    assert list(head.trainable_parameters())[:2] == ["model.inner.weight", "model.inner.bias"]
    loss, grads = nn.value_and_grad(head, lambda: head(carry=carry)[1])()

    following, _ = model(carry)
    halt, go_on = model.next_q_logits(following)
    target = bootstrapped(halt, go_on, following.steps >= 3)

    def given(carry):
        following, outputs = model(carry)
        return following, {**outputs, "target_q_continue": target}

    want, wanted = nn.value_and_grad(
        model, lambda: ACTLossHead(given, "stablemax_cross_entropy")(carry=carry)[1]
    )()
    assert loss == pytest.approx(want, rel=1e-6)
    for name, gradient in wanted.items():
        assert gradient.any()
        np.testing.assert_allclose(grads[f"model.{name}"], gradient, rtol=1e-5, atol=1e-7)
    assert not head.eval().model.training


# Errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ACTLossHead(Fixed(), "hinge"), ValueError, "loss_type is 'hinge'; it must be 'stablemax_cross_entropy' or 'softmax_cross_entropy', or a"),
        (lambda: ACTLossHead(Fixed(), None), ValueError, "loss_type is None"),
        (lambda: ACTLossHead(Fixed(), ["softmax_cross_entropy"]), ValueError, "loss_type is"),
        (lambda: ACTLossHead(3, LOSSES[0]), TypeError, "model must be callable, not int"),
        (lambda: ACTLossHead(Fixed(), LOSSES[0], padded_rows="drop"), ValueError, "padded_rows is 'drop'; it must be 'reference' or 'ignore'"),
        (lambda: Case().head()("logits", carry=None, batch=None), TypeError, "return_keys must be a sequence of names, not the string 'logits'"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_model_that_looks_ahead_must_know_its_last_step():
    model = Lookahead(0, 0)
    assert ACTLossHead(model, LOSSES[0])
    del_max = type("Endless", (Fixed,), {"next_q_logits": lambda self, carry: None})()
    with pytest.raises(ValueError, match="next_q_logits must say its halt_max_steps"):
        ACTLossHead(del_max, LOSSES[0])
    assert ACTLossHead(del_max, LOSSES[0], q_continue=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c, o: c.current_data.pop("labels"),
            "new_carry.current_data must have 'labels'; given: 'inputs'",
        ),
        (
            lambda c, o: o.pop("logits"),
            "the model's outputs must have 'logits'; given: 'q_halt_logits', 'q_continue_logits'",
        ),
        (
            lambda c, o: o.pop("q_halt_logits"),
            "outputs must have 'q_halt_logits'; given: 'logits', 'q_continue_logits'",
        ),
        (lambda c, o: o.pop("q_continue_logits"), "outputs must have 'q_continue_logits'"),
        (
            lambda c, o: o.update(logits=np.zeros((B, T + 1, V))),
            r"got shapes \(6, 6, 7\) and \(6, 5\)",
        ),
        (
            lambda c, o: o.update(logits=np.zeros((B, V))),
            r"logits must be \[B, T, V\] and labels \[B, T\] or \[B, loops, T\], got shapes \(6, 7\)",
        ),
        (
            lambda c, o: c.current_data.update(labels=np.zeros(B, int)),
            r"got shapes \(6, 5, 7\) and \(6,\)",
        ),
        (
            lambda c, o: c.current_data.update(labels=np.zeros((B, 0, T), int)),
            r"got shapes \(6, 5, 7\) and \(6, 0, 5\)",
        ),
        (
            lambda c, o: o.update(q_halt_logits=np.zeros((B, 1))),
            r"q_halt_logits has shape \(6, 1\), expected one value per sequence: \(6,\)",
        ),
        (
            lambda c, o: o.update(q_continue_logits=np.zeros(2)),
            r"q_continue_logits has shape \(2,\)",
        ),
        (
            lambda c, o: o.update(target_q_continue=np.float64(1)),
            r"target_q_continue has shape \(\)",
        ),
        (lambda c, o: setattr(c, "halted", np.ones(2, bool)), r"new_carry.halted has shape \(2,\)"),
        (lambda c, o: setattr(c, "steps", 3), r"new_carry.steps has shape \(\)"),
        (
            lambda c, o: c.current_data["labels"].__setitem__((3, 2), 9),
            r"label 9 at position \(3, 2\) is outside \[0, 7\)",
        ),
    ],
)
def test_wrong_outputs(change, message):
    case = Case()
    outputs = case.outputs()
    change(case.carry, outputs)
    with pytest.raises(ValueError, match=message):
        case.head()(carry=case.carry, batch=outputs)


def test_labels_must_be_integers():
    case = Case()
    case.carry.current_data["labels"] = np.zeros((B, T))
    with pytest.raises(TypeError, match="labels must be integers, not float64"):
        case.head()(carry=case.carry, batch=case.outputs())


@pytest.mark.parametrize("dtype", ["i1", "i2", ">i4", "u1", "u8"])
def test_labels_of_every_integer_type(dtype):
    """Labels of every integer type give the loss and metrics of int64; the function receives int64.

    Unsigned types cannot hold -100, so all their labels are valid.
    """
    case = Case(padded="ignore")
    labels = case.carry.current_data["labels"]
    if np.dtype(dtype).kind == "u":
        labels = np.where(labels == IGNORE, 3, labels)
    seen = []
    head = ACTLossHead(
        case.model,
        lambda x, y, ignore_index: seen.append(y.dtype) or softmax_cross_entropy(x, y),
        q_continue=False,
    )
    results = []
    for kind in ("i8", dtype):
        case.carry.current_data["labels"] = labels.astype(kind)
        results.append(
            [
                *case.head()(carry=case.carry, batch=case.outputs())[1:3],
                *head(carry=case.carry, batch=case.outputs())[1:3],
            ]
        )
    assert results[0] == results[1]
    assert np.dtype(np.int64) == seen[0] and seen[1] in (np.dtype(np.int64), np.dtype(np.uint64))
