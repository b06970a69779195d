"""How modules and their parameters are shown."""

import copy
import dataclasses
import pickle
import time

import numpy as np
import pytest

from pyloss import nn
from pyloss.models.synthetic import SMALL, random_model
from pyloss.tuner import linear_to_lora_layers


class Block(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.norm = nn.RMSNorm(dims)
        self.up, self.down = nn.Linear(dims, 2 * dims), nn.Linear(2 * dims, dims)


class Net(nn.Module):
    def __init__(self, last=4):
        super().__init__()
        self.gain = np.ones(4, np.float32)
        self.blocks = [Block(4), Block(4), Block(4), Block(last)]
        self.heads = {"<i>": nn.Linear(4, 2, bias=False)}
        self.register_buffer("mask", np.ones(3, bool))


def test_a_tree_with_equal_neighbors_in_one_line():
    net = Net(last=5)
    net.blocks[0].norm.freeze()
    assert (
        repr(net)
        == """\
Net(  # 372 parameters: 368 trained, 4 frozen
  gain: [4] float32, trained
  mask: [3] bool, buffer
  (blocks.0): Block(  # 80: 76 trained, 4 frozen
    (norm): RMSNorm(weight: [4] float32, frozen)  # 4 frozen
    (up): Linear(in=4, out=8, bias=True, float32)  # 40 trained
    (down): Linear(in=8, out=4, bias=True, float32)  # 36 trained
  )
  (blocks.1-2): 2 x Block(  # each 80 trained
    (norm): RMSNorm(weight: [4] float32, trained)  # 4 trained
    (up): Linear(in=4, out=8, bias=True, float32)  # 40 trained
    (down): Linear(in=8, out=4, bias=True, float32)  # 36 trained
  )
  (blocks.3): Block(  # 120 trained
    (norm): RMSNorm(weight: [5] float32, trained)  # 5 trained
    (up): Linear(in=5, out=10, bias=True, float32)  # 60 trained
    (down): Linear(in=10, out=5, bias=True, float32)  # 55 trained
  )
  (heads.<i>): Linear(in=4, out=2, bias=False, float32)  # 8 trained
)"""
    )


def test_counts_are_those_of_count_parameters():
    net = Net()
    net.blocks[1].freeze()
    trained, total = nn.count_parameters(net)
    assert repr(net).startswith(
        f"Net(  # {total} parameters: {trained} trained, {total - trained} frozen\n"
    )


def test_a_shared_array_counts_once():
    net = Net()
    net.blocks[1].up.weight = net.blocks[0].up.weight
    net.again = net.blocks[2]
    total = sum(a.size for a in net.trainable_parameters().values())
    assert repr(net).startswith(f"Net(  # {total} parameters: {total} trained, 0 frozen")
    assert f"{total}  " in str(net.summary()).splitlines()[-1]


def test_a_repr_of_the_class_is_its_line():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def __repr__(self):
            return "Odd!"

    class More(Odd):
        def __repr__(self):
            return "More " + super(Odd, self).__repr__()

    both = nn.Sequential(Odd(), More())
    assert "(layers.0): Odd!  # 6 trained" in repr(both)
    assert "(layers.1): More More(" in repr(both)


def test_modules_that_are_not_complete_or_hold_themselves():
    assert repr(nn.Module.__new__(Net)) == "Net(before super().__init__())  # " + (
        "0 parameters: 0 trained, 0 frozen"
    )
    net = Net()
    net.blocks[0].owner = net
    assert "(owner): Net(which this is in)" in repr(net)


def test_html_is_escaped_and_opens():
    page = Net()._repr_html_()
    assert page.count("<details") == page.count("</details>") > 1
    assert "(heads.&lt;i&gt;)" in page and "<i>" not in page
    assert page.count("<div") == page.count("</div>")


def test_a_summary_has_a_table_of_counts_by_class():
    net = Net()
    net.blocks[0].freeze()
    summary = net.summary()
    assert repr(summary) == str(summary) and str(summary).startswith(repr(net) + "\n\n")
    lines = [line.split() for line in summary.splitlines()]
    assert ["Linear", "9", "312", "236", "76", "1.2", "kB"] in lines
    assert ["RMSNorm", "4", "16", "12", "4", "0.1", "kB"] in lines
    assert ["total", "18", "332", "252", "80", "1.3", "kB"] in lines
    assert summary._repr_html_().startswith(net._repr_html_()) and "<table>" in summary.html


def test_while_a_function_is_differentiated():
    net, texts = Net(), []

    def value(x):
        texts.extend([repr(net), net._repr_html_(), str(net.summary())])
        texts.append(repr(net.trainable_parameters()))
        return (net.gain * x).sum()

    nn.value_and_grad(net, value)(np.ones(4, np.float32))
    assert texts[:3] == [repr(net), net._repr_html_(), str(net.summary())]
    assert texts[3] == repr(net.trainable_parameters())


def test_a_model_of_30_layers_with_adapters():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 64}
    model = random_model(dataclasses.replace(SMALL, **sizes))
    linear_to_lora_layers(model, 16, {"rank": 2, "scale": 2.0})
    start = time.perf_counter()
    text = repr(model)
    assert time.perf_counter() - start < 2
    assert "14 x DecoderLayer(" in text and "16 x DecoderLayer(" in text
    assert len(text.splitlines()) < 60


def test_trainable_parameters_are_a_dict_shown_as_a_table():
    net = Net()
    table = net.trainable_parameters()
    assert isinstance(table, dict) and table["gain"] is net.gain
    assert table == dict(table) and type(table | {}) is dict
    lines = [line.split() for line in repr(table).splitlines()]
    assert lines[0] == ["name", "shape", "type", "count"]
    assert ["blocks.0.up.weight", "[8,", "4]", "float32", "32"] in lines
    assert lines[-1] == ["total:", "22", "arrays", "332"]
    assert "heads.&lt;i&gt;.weight" in table._repr_html_()
    assert {*pickle.loads(pickle.dumps(table))} == {*copy.copy(table)} == {*table}


def test_a_long_table_is_shortened():
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)))
    text = repr(net.trainable_parameters())
    assert len(text.splitlines()) == 64 and "... 40 more" in text
    assert text.endswith("300")


@pytest.mark.parametrize("module", [nn.Module(), nn.Sequential()])
def test_nothing_to_show(module):
    name = type(module).__name__
    assert repr(module) == f"{name}()  # 0 parameters: 0 trained, 0 frozen"
    assert "total: 0 arrays" in repr(module.trainable_parameters())
    assert "total" in str(module.summary()) and name in module._repr_html_()
