"""Files as `torch.save` writes them, made without torch: a zip of a pickle and of storages."""

import io
import struct
import zipfile

import numpy as np

STORAGES = {
    "f8": "Double", "f4": "Float", "f2": "Half", "i8": "Long", "i4": "Int", "i2": "Short",
    "i1": "Char", "u1": "Byte", "b1": "Bool",
}  # fmt: skip


def text(value):
    """BINUNICODE."""
    raw = value.encode(errors="surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def whole(value):
    return (
        b"\x8a"
        + bytes([(value.bit_length() + 8) // 8])
        + value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    )


def sizes(values):
    return b"(" + b"".join(map(whole, values)) + b"t"


def tensor(key, array, offset=0, shape=None, strides=None, count=None, kind=None, call=None):
    """The instructions that make a tensor over storage `key`; each part may be another one."""
    shape = array.shape if shape is None else shape
    if strides is None:
        strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
    kind = kind or f"{STORAGES[array.dtype.str[1:]]}Storage"
    count = array.size if count is None else count
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(str(key))
    storage += text("cpu") + whole(count) + b"tQ"
    return (
        (call or b"ctorch._utils\n_rebuild_tensor_v2\n") + b"(" + storage + whole(offset)
        + sizes(shape) + sizes(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def program(items):
    """The pickle of a dict from texts to instructions."""
    return b"\x80\x02}q\x00(" + b"".join(text(k) + v for k, v in items.items()) + b"u."


def archive(pickle, storages, root="archive", stored=zipfile.ZIP_STORED, order=b"little"):
    """The bytes of the zip file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", stored) as file:
        entries = {"data.pkl": pickle, "byteorder": order}
        entries |= {f"data/{key}": array.tobytes() for key, array in storages.items()}
        for name, data in entries.items():
            file.writestr(zipfile.ZipInfo(f"{root}/{name}", (1980, 1, 1, 0, 0, 0)), data, stored)
    return out.getvalue()


def torch_file(arrays):
    """A file of tensors by name."""
    storages = dict(enumerate(arrays.values()))
    return archive(
        program({name: tensor(i, a) for i, (name, a) in enumerate(arrays.items())}), storages
    )
