"""Files of `torch.save`: what is read, and what is refused without being executed."""

import os
import pickle
import struct

import numpy as np
import pytest
import torch_files
from torch_files import archive, program, tensor, text, whole

from pyloss.errors import FormatError
from pyloss.io.torch_file import read_state_dict, read_torch

X = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.fixture
def written(tmp_path):
    def write(data):
        path = tmp_path / "file.bin"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("kind", ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?"])
def test_tensors_of_each_type(written, kind):
    array = (X % 2 if kind == "?" else X).astype(kind)
    found = read_state_dict(written(torch_files.torch_file({"a": array, "b.c": array[:1]})))
    assert list(found) == ["a", "b.c"]
    np.testing.assert_array_equal(found.tensor("a").values(), array)
    np.testing.assert_array_equal(found.tensor("b.c").values(), array[:1])


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "want"),
    [
        (0, (6, 4), (1, 6), X.T),
        (7, (2, 3), (6, 2), X[1:3, 1::2]),
        (23, (), (), X[3, 5]),
        (24, (0, 3), (3, 1), np.zeros((0, 3))),
        (4, (1, 5), (0, 1), X.reshape(-1)[4:9][None]),
    ],
)
def test_strides(written, offset, shape, strides, want):
    data = archive(program({"a": tensor(0, X, offset, shape, strides)}), {0: X})
    found = read_torch(written(data))["a"]
    assert found.shape == np.shape(want)
    np.testing.assert_array_equal(found.array(), want)


def test_plain_values_and_nested_dicts(written):
    value = {
        "state": {0: {"step": 3.5, "on": True}, 1: None},
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "ids": [0, 1]}],
        "big": -(1 << 80),
        "text": "é",
    }
    for protocol in (2, 3, 4, 5):
        data = archive(pickle.dumps(value, protocol), {})
        assert read_torch(written(data)) == value


def test_metadata_of_a_state_dict_and_parameters(written):
    """`state_dict()` is an OrderedDict with an attribute."""
    parameter = (
        b"ctorch._utils\n_rebuild_parameter\n(" + tensor(0, X) + b"\x88ccollections\n"
        b"OrderedDict\n)RtR"
    )
    code = b"\x80\x02ccollections\nOrderedDict\n)R(" + text("a") + parameter + b"u}"
    code += text("_metadata") + b"}sb."
    found = read_state_dict(written(archive(code, {0: X})))
    np.testing.assert_array_equal(found.tensor("a").array(), X)


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.mkdir, "posix.mkdir"),
        (eval, "builtins.eval"),
        (exec, "builtins.exec"),
        (__import__, "builtins.__import__"),
    ],
)
def test_code_is_refused_by_name_and_not_executed(written, tmp_path, protocol, function, name):
    place = tmp_path / "executed"
    argument = str(place) if function is os.mkdir else f"__import__('os').mkdir({str(place)!r})"
    value = {"a": 1, "b": [Call(function, argument)]}
    if protocol == 2:
        name = name.replace("builtins", "__builtin__")
    with pytest.raises(FormatError, match=f"it names '{name}'; pyloss reads tensors and plain"):
        read_torch(written(archive(pickle.dumps(value, protocol), {})))
    assert not place.exists()


def data_of(code):
    return archive(b"\x80\x02" + code, {0: X})


NAME = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.rest",
            "torch wrote it before version 1.6; writ",
        ),
        (pickle.dumps({"a": 1}), "a pickle without the archive of torch.save"),
        (b"PK", "truncated, or not a file of torch.save"),
        (torch_files.torch_file({"a": X})[:-40], "truncated, or not a file of torch.save"),
        (archive(program({}), {}).replace(b"data.pkl", b"data.pkk"), "it needs one data.pkl"),
        (archive(program({}), {}, stored=8), "is compressed or encrypted"),
        (archive(program({}), {}, order=b"big"), "in the order b'big', not 'little'"),
        (data_of(b"}"), "truncated at byte 3 of 3"),
        (data_of(b"X\xff\xff\xff\xffab"), "truncated at byte"),
        (data_of(b"\x8d" + b"\xff" * 8 + b"."), "truncated at byte"),
        (data_of(b"X\x01\x00\x00\x00\xff."), "is not UTF-8"),
        (data_of(b"h\x05."), "there is no value 5"),
        (data_of(b"j\xff\xff\xff\xff."), "there is no value 4294967295"),
        (data_of(b"."), "its values do not fit together"),
        (data_of(b"e."), "a mark is missing"),
        (data_of(b"NN."), "ends with more than one value"),
        (data_of(b"}(Nu."), "a value is missing"),
        (data_of(b"}NNs."), "a key is None; expected text or an integer"),
        (data_of(b"]NNs."), "its values do not fit together"),
        (data_of(b"i__main__\nx\n."), r"the instruction b'i' at byte 2"),
        (data_of(b"cos\nsystem\n."), "it names 'os.system'"),
        (data_of(b"ctorch\nFloatStorage\n."), "a name stands for a value"),
        (data_of(b"ctorch\nFloatStorage\n)R."), "calls torch.FloatStorage, which is no function"),
        (data_of(b"NQ."), "its values do not fit together"),
        (data_of(text("storage") + b"\x85Q."), "expected a storage"),
        (data_of(NAME + b")R."), "a tensor has no storage"),
        (data_of(b"ctorch._utils\n_rebuild_parameter\n)R."), "a parameter has no tensor"),
        (data_of(b"ccollections\nOrderedDict\nK\x01\x85R."), "is not made of pairs"),
        (data_of(tensor(1, X) + b"."), "data/1: is missing among the file's entries"),
        (data_of(tensor("../0", X) + b"."), r"data/../0: is missing among"),
        (
            data_of(tensor(0, X, count=25) + b"."),
            "25 elements of F32 take 100 bytes, and it has 96",
        ),
        (data_of(tensor(0, X, count=1 << 61) + b"."), "take 9223372036854775808 bytes"),
        (data_of(tensor(0, X, count=-1) + b"."), "is not readable"),
        (data_of(tensor(0, X, kind="ComplexFloatStorage") + b"."), "names 'torch.ComplexFloatSt"),
        (data_of(tensor(0, X, kind="DoubleStorage") + b"."), "24 elements of F64 take 192"),
        (data_of(tensor(0, X, offset=1) + b"."), r"from element 1 does not lie in its 24 elements"),
        (data_of(tensor(0, X, strides=(7, 1)) + b"."), "does not lie in its 24 elements"),
        (data_of(tensor(0, X, strides=(1 << 61, 1)) + b"."), "does not lie in its"),
        (data_of(tensor(0, X, shape=(1 << 40, 1 << 40), strides=(0, 0)) + b"."), "does not lie in"),
        (data_of(tensor(0, X, shape=(1,) * 40) + b"."), "expected an offset, sizes and strides"),
        (data_of(tensor(0, X, strides=(1,)) + b"."), "expected an offset, sizes and strides"),
        (data_of(tensor(0, X, strides=(-6, 1)) + b"."), "expected an offset, sizes and strides"),
        (data_of(tensor(0, X, offset=-1) + b"."), "expected an offset, sizes and strides"),
    ],
)
def test_malformed_files(written, data, message):
    with pytest.raises(FormatError, match=message):
        read_torch(written(data))


def test_a_storage_behind_the_end(written):
    """The central directory says more bytes than the file has after the entry."""
    data = bytearray(torch_files.torch_file({"a": X}))
    at = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4) + 4)
    struct.pack_into("<II", data, at + 20, 1 << 30, 1 << 30)
    with pytest.raises(FormatError, match="data/0: truncated: it ends at byte"):
        read_torch(written(bytes(data)))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"K\x05.", "expected tensors by name, got 5"),
        (b"}" + text("a") + whole(3) + b"s.", "a: expected a tensor, got 3|'a': expected a tensor"),
        (b"}" + text("a") + b"]s.", "expected a tensor, got a list"),
        (b"}K\x01" + tensor(0, X) + b"s.", "1: expected a tensor, got a tensor"),
    ],
)
def test_a_state_dict_has_tensors_alone(written, code, message):
    with pytest.raises(FormatError, match=message):
        read_state_dict(written(data_of(code)))
