"""safetensors files are mapped with the library's values; damaged files are refused by name."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from pyloss.errors import FormatError
from pyloss.io.safetensors import read_safetensors

RNG = np.random.default_rng(0)
ARRAYS = {
    "a": RNG.standard_normal((3, 5)).astype(np.float32),
    "b": RNG.standard_normal((2, 4)).astype(ml_dtypes.bfloat16),
    "c": RNG.standard_normal(7).astype(np.float16),
    "ids": np.arange(3),
}


def file_of(header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def one(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(ARRAYS, path, metadata={"format": "pt"})
    return path


def test_reads_what_the_library_wrote(good):
    file = read_safetensors(good)
    assert file.metadata == {"format": "pt"}
    assert set(file) == set(ARRAYS)
    assert [file.tensor(name).dtype for name in ARRAYS] == ["F32", "BF16", "F16", "I64"]
    for name, array in ARRAYS.items():
        stored = file.tensor(name)
        assert stored.shape == array.shape
        assert stored.data.tobytes() == array.tobytes()
        assert stored.path == str(good)
    for name in "abc":
        np.testing.assert_array_equal(file.tensor(name).array(), ARRAYS[name].astype(np.float32))
    np.testing.assert_array_equal(
        file.tensor("b").weight().dequantize(), ARRAYS["b"].astype(np.float32)
    )


def test_tensors_are_views_of_the_mapped_file(good):
    stored = read_safetensors(good).tensor("a")
    assert not stored.data.flags.owndata and not stored.data.flags.writeable
    assert np.shares_memory(stored.weight().raw, stored.data)


def test_a_header_of_odd_length_leaves_no_unaligned_weight(tmp_path):
    path = tmp_path / "odd.safetensors"
    for padding in range(4):
        path.write_bytes(file_of(json.dumps(one(shape=(1, 2))).encode() + b" " * padding, bytes(8)))
        weight = read_safetensors(path).tensor("w").weight()
        assert weight.raw.ctypes.data % 4 == 0
        np.testing.assert_array_equal(weight.dequantize(), [[0, 0]])


def test_types_that_are_no_weights_say_so(good):
    with pytest.raises(
        FormatError, match="model.safetensors: ids: stored as I64, and pyloss reads F32"
    ):
        read_safetensors(good).tensor("ids").array()


def test_a_folder_with_one_file(good):
    assert set(read_safetensors(good.parent)) == set(ARRAYS)


def sharded(folder, weight_map, metadata=None):
    save_file({"a": ARRAYS["a"]}, folder / "one.safetensors")
    save_file({"b": ARRAYS["b"], "c": ARRAYS["c"]}, folder / "two.safetensors")
    index = {"metadata": metadata or {"total_size": 9}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_folder_of_shards(tmp_path):
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    file = read_safetensors(tmp_path)
    assert set(file) == {"a", "b", "c"}
    assert file.metadata == {"total_size": 9}
    for name in "abc":
        np.testing.assert_array_equal(file.tensor(name).array(), ARRAYS[name].astype(np.float32))
    assert file.tensor("c").path == str(tmp_path / "two.safetensors")
    with pytest.raises(FormatError, match="d: missing"):
        file.tensor("d")


@pytest.mark.parametrize(
    ("weight_map", "what", "reason"),
    [
        ({"a": "three.safetensors"}, "a", "in three.safetensors, and there is no such file"),
        ({"a": "two.safetensors"}, "a", "missing"),
        ({"a": "../one.safetensors"}, "a", "name of a file in this folder"),
        ({"a": 1}, "a", "name of a file"),
        (["a"], "weight_map", "expected objects"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path, weight_map, what, reason):
    sharded(tmp_path, weight_map)
    with pytest.raises(FormatError, match=reason) as caught:
        read_safetensors(tmp_path)
    assert caught.value.what == what


def test_a_single_file_goes_before_an_index_beside_it(tmp_path):
    """As in transformers (tests/parity/test_folders_parity.py): the index is of older shards."""
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    save_file({"a": ARRAYS["a"] + 1}, tmp_path / "model.safetensors")
    file = read_safetensors(tmp_path)
    assert set(file) == {"a"}
    np.testing.assert_array_equal(file.tensor("a").array(), ARRAYS["a"] + 1)


def test_tensors_of_shards_that_the_index_does_not_name_are_there(tmp_path):
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert set(read_safetensors(tmp_path)) == {"a", "b", "c"}


def test_a_header_beyond_the_reference_s_limit_is_refused_unread(tmp_path):
    path = tmp_path / "w.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate(8 + (1 << 30))  # sparse: takes no disk space
    with pytest.raises(
        FormatError,
        match="header: a header of 1073741824 bytes; safetensors files have at most 100000000",
    ):
        read_safetensors(path)


def test_an_empty_folder_says_what_is_missing(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json"
    ):
        read_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("content", "what", "reason"),
    [
        (b"", None, "empty"),
        (b"1234567", "header", "truncated"),
        (struct.pack("<Q", 1 << 62) + b"{}", "header", "truncated, or not a safetensors file"),
        (struct.pack("<Q", 1 << 30), "header", "truncated, or not a safetensors file"),
        (
            file_of(one(shape=[1 << 60] * 5000), bytes(8)),
            "w",
            "shape must be a list of at most 32 sizes",
        ),
        (file_of(one(shape=(1 << 63,)), bytes(8)), "w", "shape must be"),
        (file_of(one(offsets=(0, 1 << 70)), bytes(8)), "w", "data_offsets must be"),
        (file_of(one(dtype="F" * 10**6), bytes(8)), "w", "dtype must be one of .{1,200}$"),
        (file_of(b"{"), "header", "damaged"),
        (file_of(b"\xff"), "header", "damaged"),
        (file_of(b"[" * 100_000), "header", "damaged"),
        (file_of([]), "header", "holds a list"),
        (file_of({"__metadata__": {"a": 1}}), "__metadata__", "object of strings"),
        (file_of({"w": 3}), "w", "expected an object"),
        (file_of(one(dtype="F31"), bytes(8)), "w", "dtype must be one of F64"),
        (file_of(one(dtype=["F32"]), bytes(8)), "w", "dtype must be"),
        (file_of(one(shape=(-2,)), bytes(8)), "w", "shape must be"),
        (file_of(one(shape=(2.0,)), bytes(8)), "w", "shape must be"),
        (file_of(one(shape=(True, 2)), bytes(8)), "w", "shape must be"),
        (file_of({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "w", "shape must be"),
        (file_of(one(offsets=(8, 0)), bytes(8)), "w", "data_offsets must be"),
        (file_of(one(offsets=(0, 8, 9)), bytes(9)), "w", "data_offsets must be"),
        (file_of(one(), bytes(7)), "w", "truncated"),
        (file_of(one(shape=(3,)), bytes(8)), "w", "takes 12 bytes, and it has 8"),
        (file_of(one(shape=(1 << 62, 1 << 62)), bytes(8)), "w", "takes"),
        (file_of(one(offsets=(4, 12)), bytes(12)), "w", "starts at byte 4 of the data, expected 0"),
        (file_of(one(), bytes(9)), None, "take 8 bytes, and the data has 9"),
        (
            file_of({**one(), "v": one()["w"]}, bytes(8)),
            "w",
            "starts at byte 0 of the data, expected 8",
        ),
    ],
)
def test_damage_is_named(tmp_path, content, what, reason):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=reason) as caught:
        read_safetensors(path)
    assert caught.value.path == str(path)
    assert caught.value.what == what


def test_every_truncation_is_a_format_error(good, tmp_path):
    content = good.read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError):
            read_safetensors(path)


def test_no_flipped_byte_raises_anything_else(good, tmp_path):
    content = good.read_bytes()
    path = tmp_path / "flipped.safetensors"
    refused = 0
    for position in range(len(content)):
        for flip in (0x01, 0x02, 0x80):
            damaged = bytearray(content)
            damaged[position] ^= flip
            path.write_bytes(bytes(damaged))
            try:
                read_safetensors(path)
            except FormatError:
                refused += 1
    assert refused > 300
