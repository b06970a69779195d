"""The precision of layer products in Python: the setting, gradients, layers and adapters."""

from types import SimpleNamespace

import numpy as np
import pytest

import pyloss
from pyloss import _core
from pyloss.ops.projection import Projection, project
from pyloss.runtime import precision
from pyloss.runtime.precision import (
    bfloat16_form,
    has_instructions,
    int8_form,
    keeps_bfloat16,
    matmul_precision,
)
from pyloss.weights.weight import Weight


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def test_the_setting_is_said_and_taken_back():
    assert pyloss.get_matmul_precision() == pyloss.info()["matmul_precision"] == "float32"
    with matmul_precision("bfloat16"):
        assert pyloss.get_matmul_precision() == pyloss.info()["matmul_precision"] == "bfloat16"
        with matmul_precision(None):
            assert pyloss.get_matmul_precision() == "bfloat16"
        with matmul_precision("int8"):
            assert pyloss.get_matmul_precision() == pyloss.info()["matmul_precision"] == "int8"
        with matmul_precision("mixed"):
            assert pyloss.get_matmul_precision() == pyloss.info()["matmul_precision"] == "mixed"
            with matmul_precision("float32"):
                assert pyloss.get_matmul_precision() == "float32" and not keeps_bfloat16()
            assert keeps_bfloat16()
        assert pyloss.get_matmul_precision() == "bfloat16"
    assert pyloss.get_matmul_precision() == "float32"
    with pytest.raises(RuntimeError, match="inside"), matmul_precision("bfloat16"):
        raise RuntimeError("inside")
    assert pyloss.get_matmul_precision() == "float32"


@pytest.mark.parametrize("wrong", ["bf16", "bfloat16-emulated", "int8-tiles", "high", None, 16])
def test_another_precision_is_refused(wrong):
    with pytest.raises(
        ValueError,
        match=f"matmul precision is {wrong!r}; it must be one of float32, bfloat16, mixed, int8",
    ):
        pyloss.set_matmul_precision(wrong)
    assert pyloss.get_matmul_precision() == "float32"


def test_instructions_belong_to_one_instruction_set(isa):
    assert has_instructions() == (isa == "avx512" and _core.has_bf16_dots())
    possible = {"avx512_bf16", "emulated"} if has_instructions() else {"emulated"}
    assert pyloss.info()["bfloat16"] in possible | {"amx_bf16"}


@pytest.fixture
def machine(monkeypatch):
    """A processor with all instructions, whose speeds are given; settings begin empty."""
    for name in ("PYLOSS_BF16", "PYLOSS_AMX", "PYLOSS_NO_AMX", "PYLOSS_ISA"):
        monkeypatch.delenv(name, raising=False)
    asked, missing = [], {}
    times = {"float32": 4.0, "bfloat16": 2.0, "bfloat16-emulated": 6.0, "bfloat16-tiles": 1.0}
    times["int8"] = 2.5

    def amx_missing(request):
        asked.append(request)
        return missing.get("reason")

    monkeypatch.setattr(_core, "isa", lambda: "avx512")
    monkeypatch.setattr(_core, "has_bf16_dots", lambda: True)
    monkeypatch.setattr(_core, "amx_missing", amx_missing)
    monkeypatch.setattr(precision, "_seconds", lambda setting, rows=128: times[setting])
    return SimpleNamespace(asked=asked, missing=missing, times=times)


def test_the_quicker_of_two_forms_of_the_same_bits_is_used(machine):
    machine.missing["reason"] = "the processor has no amx_bf16"
    form = bfloat16_form({})
    assert form.setting == "bfloat16" and form.name == "avx512_bf16"
    assert form.reason == (
        "products run 2.0 times as fast as float32's (no tile unit: the processor has no amx_bf16)"
    )
    machine.times["bfloat16"] = 7.0
    form = bfloat16_form({})
    assert (form.setting, form.name) == ("bfloat16-emulated", "emulated")
    assert form.reason.startswith(
        "products take 1.5 times as long as float32's: it does not pay here ("
    )


def test_the_tile_unit_is_used_where_there_is_one(machine):
    for settings in ({}, {"PYLOSS_AMX": "1"}, {"PYLOSS_BF16": "tiles"}):
        form = bfloat16_form(settings)
        assert (form.setting, form.name) == ("bfloat16-tiles", "amx_bf16")
        assert form.reason == "products run 4.0 times as fast as float32's (by the tile unit)"
    # The system is asked for tiles once it is known that nothing else forbids them.
    assert machine.asked == [False, True] * 3
    # A fixed order of forms of other bits: how fast they are decides nothing.
    machine.times["bfloat16-tiles"] = 9.0
    assert bfloat16_form({}).setting == "bfloat16-tiles"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"PYLOSS_NO_AMX": "1"}, "PYLOSS_NO_AMX is set"),
        ({"PYLOSS_ISA": "avx512"}, "PYLOSS_ISA is set"),
        ({"PYLOSS_AMX": "0"}, "PYLOSS_AMX=0"),
    ],
)
def test_settings_that_switch_the_tile_unit_off(machine, settings, reason):
    form = bfloat16_form({"PYLOSS_AMX": "1"} | settings)
    assert form.setting == "bfloat16" and f"no tile unit: {reason}" in form.reason
    form = bfloat16_form({"PYLOSS_BF16": "tiles"} | settings)
    assert form.setting == "bfloat16-tiles-emulated" and f"tiles, and {reason};" in form.reason
    assert True not in machine.asked


def test_a_machine_without_tile_unit_says_so(machine):
    machine.missing["reason"] = "the processor has no amx_bf16"
    for settings in ({}, {"PYLOSS_AMX": "1"}):
        form = bfloat16_form(settings)
        assert form.setting == "bfloat16"
        assert "no tile unit: the processor has no amx_bf16" in form.reason
    assert bfloat16_form({"PYLOSS_BF16": "tiles"}).name == "amx_bf16, emulated"


def test_the_order_of_sums_can_be_fixed(machine):
    settings = {"PYLOSS_BF16": "portable", "PYLOSS_AMX": "1"}
    assert bfloat16_form(settings).setting == "bfloat16"
    assert bfloat16_form({"PYLOSS_AMX": "emulate"}).setting == "bfloat16-tiles-emulated"
    assert not machine.asked


def test_int8_by_the_instructions_that_there_are(machine, monkeypatch):
    asked = []
    dots = {"avx512": "avx512_vnni", "avx2": "avx_vnni"}
    monkeypatch.setattr(_core, "int8_dots", lambda isa: asked.append(isa) or dots.get(isa))
    form = int8_form({})
    assert (form.setting, form.name) == ("int8-tiles", "avx512_vnni")
    assert form.reason == (
        "a row's product with 4-bit weights runs 1.6 times as fast as float32's; "
        "more than 32 rows are bfloat16 in tiles"
    )
    for settings in ({"PYLOSS_NO_AMX": "1"}, {"PYLOSS_BF16": "portable"}):
        form = int8_form(settings)
        assert form.setting == "int8" and form.reason.endswith("1.6 times as fast as float32's")
    monkeypatch.setattr(_core, "isa", lambda: "avx2")
    assert int8_form({})[:2] == ("int8", "avx_vnni") and asked == ["avx512"] * 3 + ["avx2"]
    monkeypatch.setattr(_core, "int8_dots", lambda isa: None)
    machine.times["int8"] = 8.0
    assert int8_form({}) == (
        "int8",
        "avx2",
        "a row's product with 4-bit weights takes 2.0 times as long as float32's: "
        "it does not pay here",
    )


def test_int8_gives_the_same_bits_on_every_instruction_set(isa, monkeypatch):
    """Through the public setting, for a layer over quantized weights with an adapter."""
    monkeypatch.setenv("PYLOSS_NO_AMX", "1")
    weight = Weight.quantize(normal(96, 64), "q8_0")
    x = normal(40, 64)

    def layer():
        return np.asarray(project(x, Projection(weight)))

    exact = layer()
    with matmul_precision("int8"):
        found = layer()
        for name in _core.isas():
            _core.use_isa(name)
            assert layer().tobytes() == found.tobytes()
        _core.use_isa(isa)
    assert 0.001 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.01
    assert layer().tobytes() == exact.tobytes()


@pytest.mark.parametrize("name", ["PYLOSS_BF16", "PYLOSS_AMX"])
def test_a_wrong_setting_is_refused(name, monkeypatch):
    monkeypatch.setenv(name, "fast")
    with pytest.raises(ValueError, match=f"{name} is 'fast'; it must be one of "):
        pyloss.set_matmul_precision("bfloat16")
    with pytest.raises(ValueError, match=f"{name} is 'fast'; it must be one of "):
        pyloss.set_matmul_precision("int8")
    assert pyloss.get_matmul_precision() == "float32"


def test_products_are_measured_once_and_change_nothing(monkeypatch):
    calls = []
    monkeypatch.setattr(precision, "_times", {})
    monkeypatch.setattr(precision, "_seconds_once", lambda *arrays: calls.append(1) or 0.001)
    with matmul_precision("bfloat16"), matmul_precision("bfloat16"):
        assert "1.0 times" in pyloss.info()["bfloat16_reason"]
        first = len(calls)
    with matmul_precision("bfloat16"):
        assert 0 < len(calls) == first
    assert _core.matmul_precision() == "float32"


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
@pytest.mark.parametrize("order", ["portable", "tiles"])
def test_gradients_are_those_of_float32_within_the_rounding(
    format, dora, dropout, order, monkeypatch
):
    monkeypatch.setenv("PYLOSS_BF16", order)
    weight = Weight.quantize(normal(96, 64), format)
    m = np.abs(normal(96, seed=1)) if dora else None
    exact = gradients(weight, m, dropout)
    with matmul_precision("bfloat16"):
        rounded = gradients(weight, m, dropout)
    assert rounded[1].tobytes() != exact[1].tobytes()
    for got, want in zip(rounded[1:], exact[1:], strict=True):
        assert np.linalg.norm(got - want) <= 2.0**-8 * np.linalg.norm(want)
    # These depend only on the inputs and the upstream gradient. Tiles round both for an adapter
    # that reads the layer's own input.
    if not dora and (order == "portable" or dropout):
        for got, want in zip(rounded[2:], exact[2:], strict=True):
            assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("order", ["portable", "tiles"])
def test_heads_and_trained_weights(order, monkeypatch):
    """A head's loss follows the setting, and a float32 weight's gradient."""
    monkeypatch.setenv("PYLOSS_BF16", order)
    hidden, weight, labels = normal(40, 64), normal(300, 64), np.arange(40, dtype=np.int32)
    exact = float(pyloss.linear_cross_entropy(hidden, weight, labels).mean())

    def by_weight():
        return pyloss.grad(lambda w: (project(hidden, Projection(w)) * normal(40, 96)).sum())(
            normal(96, 64)
        )

    before = by_weight()
    with matmul_precision("bfloat16"):
        rounded = float(pyloss.linear_cross_entropy(hidden, weight, labels).mean())
        after = by_weight()
    assert (after != before).any()
    assert np.linalg.norm(after - before) <= 2.0**-8 * np.linalg.norm(before)
    assert 0 < abs(rounded - exact) < 2.0**-8 * exact
