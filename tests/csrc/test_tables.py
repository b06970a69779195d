"""The core's tables: sizes of weight formats, and arguments that only generated code may index."""

import re
import sys
from pathlib import Path

import pytest

from pyloss import _core
from pyloss.weights.formats import FORMATS

CSRC = Path(__file__).parents[2] / "csrc"


def test_blocks_have_the_sizes_of_ggml():
    gguf = pytest.importorskip("gguf")
    sizes = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    found = {
        name: (elements, bytes) for name, elements, bytes, _ in _core.formats() if name in sizes
    }
    assert {"F32", "BF16", "F16", "Q8_0", "Q4_0", "Q6_K"} <= found.keys()
    assert found == {name: sizes[name] for name in found}


def test_codes_with_scales_beside_them_have_the_bits_that_their_names_say():
    bits = {name: bits for name, _, _, bits in _core.formats() if bits}
    assert bits.pop("NF4") == 4
    assert bits == {f"AFFINE{n}": n for n in (2, 3, 4, 5, 6, 8)}


def test_python_has_the_formats_of_the_core():
    assert list(FORMATS) == [name.lower() for name, *_ in _core.formats()]
    assert [layout.code for layout in FORMATS.values()] == list(range(len(FORMATS)))


def test_kernels_and_launchers_name_their_arguments():
    counted = re.compile(r"(->|\.)(arg|place)\[")
    files = [*CSRC.glob("kernels/**/*.[ch]"), *CSRC.glob("opencl/**/*.[ch]")]
    assert len(files) > 30
    assert not [path.name for path in files if counted.search(path.read_text(encoding="utf-8"))]


@pytest.fixture
def generate(monkeypatch):
    monkeypatch.syspath_prepend(CSRC)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import generate

    yield generate
    del sys.modules["generate"]


def test_arguments_are_read_in_the_order_of_their_line(generate):
    (operation,) = generate.operations(
        'OPERATION f "x:f32[*N] n?:i32[M]<N " "rate:real w:weight[O,I] > =~y:float[*N,V]"'
    )
    assert [(a.name, a.type, a.output) for a in operation.arguments] == [
        ("x", "f32", False), ("n", "i32", False), ("rate", "real", False), ("w", "weight", False), ("y", "float", True)
    ]  # fmt: skip
    assert operation.options is None
    values = re.findall(r"\.(\w+) = (\S+),", generate.arguments_of(operation))
    assert values == [
        ("x", "call->arg[0].in"), ("n", "call->arg[1].in"), ("rate", "call->arg[2].f"), ("w", "&call->arg[3].w"),
        ("y", "&call->arg[4].rows"),
    ]  # fmt: skip
    assert re.findall(r"\.(\w+) = (\S+),", generate.places_of(operation)) == [
        (name, f"operation->place[{i}]")
        for i, name in enumerate(["x", "n", None, "w", "y"])
        if name
    ]


def test_an_option_of_a_loss_has_a_number_of_its_own(generate):
    text = 'OPERATION focal "x:float[*N,V] gamma:real alpha:real dloss?:acc[N] > loss:acc[N]" OPTIONS focal "gamma:real alpha:real"'
    (operation,) = generate.operations(text)
    assert (
        generate.options_of(operation)
        == "enum { focal_none = -1, focal_gamma, focal_alpha, focal_options };\n"
    )
    assert re.findall(r"option\[(\w+)\] = (\S+);", generate.arguments_of(operation)) == [
        ("focal_gamma", "call->arg[1].f"), ("focal_alpha", "call->arg[2].f")
    ]  # fmt: skip


def test_a_table_that_cannot_be_read_is_an_error(generate):
    with pytest.raises(ValueError, match="no operation"):
        generate.operations("int x;")
