"""Files of torch.save whose zip, pickle, storages and tensors do not fit together."""

import numpy as np
import torch_files
from running import put_files

X = np.arange(24, dtype=np.float32).reshape(4, 6)
STORED = {"a": X, "b": X[::2].copy(), "c": X.astype(np.int64)}
KINDS = ("Float", "Double", "Half", "BFloat16", "Long", "Byte", "Bool", "Untyped", "")
NAMES = (
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"c__builtin__\nexec\n",
    b"csubprocess\nPopen\n",
    b"ctorch._utils\n_rebuild_tensor\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch\nSize\n",
)
#: Instructions, of which a program may have any.
CODES = [bytes([i]) for i in range(256)] + [b"(", b"t", b"}", b"]", b"R", b"b", b"Q", b"u", b"s"]


def prepare():
    import pyloss.io.torch_file  # noqa: F401


def _tensor(m, key):
    if not m.chance(0.4):
        return torch_files.tensor(key, X)
    return torch_files.tensor(
        m.pick((key, 0, 1, "x", "../a")),
        X,
        offset=m.pick((0, 1, 23, 24, m.whole())),
        shape=m.pick(((4, 6), (6, 4), (), (0,), (1 << 40, 1 << 40), (1,) * 40, (m.whole(), 2))),
        strides=m.pick((None, (6, 1), (1, 6), (0, 0), (m.whole(), m.whole()), ())),
        count=m.pick((24, 25, 0, m.whole())),
        kind=f"{m.pick(KINDS)}Storage",
        call=m.pick((None, None, *NAMES)),
    )


def _value(m, key):
    if m.chance(0.7):
        return _tensor(m, key)
    return m.pick((torch_files.text(m.text()), torch_files.whole(m.whole()), b"N", b"\x88", b"]"))


def make(m):
    if m.pristine:
        return {"file.bin": torch_files.torch_file({"a": X, "b": X[:1]})}
    kind = m.below(4)
    code = {name: torch_files.tensor(i, a) for i, (name, a) in enumerate(STORED.items())}
    if kind in (0, 1):
        name = m.pick(list(code))
        code[name] = _value(m, list(code).index(name))
    program = torch_files.program(code)
    if kind == 1:
        program = m.bytes(program)
    elif kind == 2:
        for _ in range(m.count()):
            at = m.below(len(program))
            program = program[:at] + m.pick(CODES) + program[at + m.below(3) :]
    data = torch_files.archive(program, dict(enumerate(STORED.values())))
    return {"file.bin": m.bytes(data) if kind == 3 else data}


def use(files, folder):
    from pyloss.io.tensor_file import StoredTensor
    from pyloss.io.torch_file import read_torch

    put_files(folder, files)
    found = read_torch(folder / "file.bin")
    for value in found.values() if isinstance(found, dict) else ():
        if isinstance(value, StoredTensor):
            value.values()
