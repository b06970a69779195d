"""The precision of layer products in Python: the setting, gradients, layers and adapters."""

import numpy as np
import pytest

import pyloss
from pyloss import _core
from pyloss.ops.projection import Projection, project
from pyloss.runtime.precision import has_instructions, matmul_precision
from pyloss.weights.weight import Weight


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def test_the_setting_is_said_and_taken_back():
    assert pyloss.get_matmul_precision() == pyloss.info()["matmul_precision"] == "float32"
    with matmul_precision("bfloat16"):
        assert pyloss.get_matmul_precision() == pyloss.info()["matmul_precision"] == "bfloat16"
        with matmul_precision(None):
            assert pyloss.get_matmul_precision() == "bfloat16"
        with matmul_precision("float32"):
            assert pyloss.get_matmul_precision() == "float32"
        assert pyloss.get_matmul_precision() == "bfloat16"
    assert pyloss.get_matmul_precision() == "float32"
    with pytest.raises(RuntimeError, match="inside"), matmul_precision("bfloat16"):
        raise RuntimeError("inside")
    assert pyloss.get_matmul_precision() == "float32"


@pytest.mark.parametrize("wrong", ["bf16", "bfloat16-emulated", "high", None, 16])
def test_another_precision_is_refused(wrong):
    with pytest.raises(
        ValueError, match=f"matmul precision is {wrong!r}; it must be one of float32, bfloat16"
    ):
        pyloss.set_matmul_precision(wrong)
    assert pyloss.get_matmul_precision() == "float32"


def test_instructions_belong_to_one_instruction_set(isa):
    assert pyloss.info()["bfloat16"] == ("avx512_bf16" if has_instructions() else "emulated")
    assert has_instructions() == (isa == "avx512" and _core.has_bf16_dots())


def gradients(weight, m, dropout=0.0):
    """Output and gradients of a layer with an adapter, under the current precision."""
    rows, (out, inputs) = 40, weight.shape
    x, dy, a, b = normal(rows, inputs), normal(rows, out), normal(inputs, 8), 0.2 * normal(8, out)
    norm = None if m is None else np.abs(m) + 1

    def f(x, a, b, *m):
        return (
            project(x, Projection(weight, None, a, b, 0.5, dropout, 3, *m, norm=norm)) * dy
        ).sum()

    arguments = [x, a, b] + ([] if m is None else [m])
    value, found = pyloss.value_and_grad(f, argnums=tuple(range(len(arguments))))(*arguments)
    return [np.asarray(value), *found]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", ["f32", "q4_1", "nf4"])
def test_gradients_are_those_of_float32_within_the_rounding(format, dora, dropout):
    weight = Weight.quantize(normal(96, 64), format)
    m = np.abs(normal(96, seed=1)) if dora else None
    exact = gradients(weight, m, dropout)
    with matmul_precision("bfloat16"):
        rounded = gradients(weight, m, dropout)
    assert rounded[1].tobytes() != exact[1].tobytes()
    for got, want in zip(rounded[1:], exact[1:], strict=True):
        assert np.linalg.norm(got - want) <= 2.0**-8 * np.linalg.norm(want)
    if not dora:  # these depend only on the inputs and the upstream gradient
        for got, want in zip(rounded[2:], exact[2:], strict=True):
            assert got.tobytes() == want.tobytes()


def test_heads_and_trained_weights():
    """A head's loss follows the setting; a float32 weight's gradient stays float32."""
    hidden, weight, labels = normal(40, 64), normal(300, 64), np.arange(40, dtype=np.int32)
    exact = float(pyloss.linear_cross_entropy(hidden, weight, labels).mean())

    def by_weight():
        return pyloss.grad(lambda w: (project(hidden, Projection(w)) * normal(40, 96)).sum())(
            normal(96, 64)
        )

    before = by_weight()
    with matmul_precision("bfloat16"):
        rounded = float(pyloss.linear_cross_entropy(hidden, weight, labels).mean())
        assert by_weight().tobytes() == before.tobytes()
    assert 0 < abs(rounded - exact) < 2.0**-8 * exact
