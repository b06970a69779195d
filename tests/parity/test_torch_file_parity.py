"""Files that torch writes, read without torch."""

import numpy as np
import pytest

from pyloss.errors import FormatError
from pyloss.io.torch_file import read_state_dict, read_torch


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="compares with torch (parity extra)")


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_writes(torch, tmp_path, protocol):
    x = torch.arange(24.0).reshape(4, 6)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(layers.parameters())
    layers(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    value = {
        "views": {"t": x.t(), "part": x[1:3, ::2], "half": x.bfloat16(), "none": torch.zeros(0, 3)},
        "optimizer": optimizer.state_dict(),
        "parameter": torch.nn.Parameter(x),
        "epoch": 3,
        "name": "run",
        "best": None,
    }
    path = tmp_path / "a.pt"
    torch.save(value, path, pickle_protocol=protocol)
    found = read_torch(path)
    for name, tensor in value["views"].items():
        np.testing.assert_array_equal(found["views"][name].array(), tensor.float().numpy())
    np.testing.assert_array_equal(found["parameter"].array(), x.numpy())
    assert (found["epoch"], found["name"], found["best"]) == (3, "run", None)
    assert found["optimizer"]["param_groups"] == value["optimizer"]["param_groups"]
    for index, state in value["optimizer"]["state"].items():
        for name, tensor in state.items():
            own = found["optimizer"]["state"][index][name]
            np.testing.assert_array_equal(own.values(), tensor.numpy())
    torch.save(layers.state_dict(), path, pickle_protocol=protocol)
    tensors = read_state_dict(path).tensors
    assert list(tensors) == list(layers.state_dict())
    for name, tensor in layers.state_dict().items():
        np.testing.assert_array_equal(tensors[name].values(), tensor.numpy())


def test_whole_modules_and_old_files_are_refused(torch, tmp_path):
    path = tmp_path / "a.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(FormatError, match="it names 'torch.nn.modules.linear.Linear'"):
        read_torch(path)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match="torch wrote it before version 1.6"):
        read_torch(path)
