"""Runs one piece of script under mlx-lm and under pyloss.mlx_lm, and compares what it returns.

Of what mlx-lm's own tests are about, these are not compared, since pyloss does not have them: Metal
kernels and wired memory (a GPU of Apple's), sharded models and pipelines (distributed), the
BatchGenerator of the server, quantized and batched caches and those of state-space layers, input
embeddings, custom model code, and float16 outputs of single layers (pyloss computes in float32).
"""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="compares with mlx-lm (parity extra)")


MODULES = {"mx": "core", "nn": "nn", "optim": "optimizers", "tree": "utils"}


class Side:
    """The modules of one library: `side.mx`, `side.nn`, `side.optim`, `side.tree`, `side("utils")`.

    Attributes:
        own: whether this is pyloss.
    """

    def __init__(self, own):
        self.own = own
        if not own:
            self.mx.disable_compile()  # it calls a C++ compiler, which takes seconds

    def __getattr__(self, name):
        at, path = "pyloss." if self.own else "", MODULES.get(name)
        if path is None:
            raise AttributeError(name)
        return importlib.import_module(f"{at}mlx.{path}")

    def __call__(self, module=""):
        tail = f".{module}" if module else ""
        return importlib.import_module(f"{'pyloss.' if self.own else ''}mlx_lm{tail}")


def sides():
    """mlx-lm, and pyloss."""
    return Side(False), Side(True)


def plain(value):
    """Arrays as NumPy's, dataclasses as dicts: what can be compared."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(value)
    if value is None or isinstance(value, str | bytes | bool | int | float | Path | type):
        return value
    return np.array(value, np.float64)


def assert_same(ours, theirs, atol, at="result"):
    """Compare trees: numbers within `atol`, all else exactly."""
    if isinstance(theirs, dict):
        assert isinstance(ours, dict) and ours.keys() == theirs.keys(), at
        for key, item in theirs.items():
            assert_same(ours[key], item, atol, f"{at}[{key!r}]")
    elif isinstance(theirs, list):
        assert isinstance(ours, list) and len(ours) == len(theirs), f"{at}: {ours} {theirs}"
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, atol, f"{at}[{i}]")
    elif isinstance(theirs, float | np.ndarray):
        assert np.shape(ours) == np.shape(theirs), f"{at}: {np.shape(ours)} {np.shape(theirs)}"
        np.testing.assert_allclose(ours, theirs, rtol=atol, atol=atol, err_msg=at)
    else:
        assert type(ours) is type(theirs) and ours == theirs, f"{at}: {ours!r} {theirs!r}"


def compare(case, *args, atol=1e-5):
    """`case(side, *args)` gives the same under both libraries; returns mlx-lm's result."""
    theirs, ours = (plain(case(side, *args)) for side in sides())
    assert_same(ours, theirs, atol)
    return theirs


def refused(call, *kinds):
    """The kind of the error that a call raises, and whether it is one of `kinds`."""
    try:
        call()
    except kinds as error:
        return type(error).__name__
    return "nothing raised"


def filled(side, model, seed=3, size=0.05):
    """Give the trained arrays of a model drawn values, the same under both libraries."""
    rng = np.random.default_rng(seed)
    names = side.tree.tree_flatten(model.trainable_parameters())
    new = []
    for name, value in sorted(names, key=lambda pair: pair[0]):
        drawn = rng.normal(0, size, value.shape).astype(np.float32)
        old = np.array(value, np.float32)
        keep = old if name.endswith((".m", "norm.weight")) else np.zeros_like(old)
        new.append((name, side.mx.array(keep + drawn)))
    model.update(side.tree.tree_unflatten(new))
    return model


def adapted(side, folder, num_layers=-1, dora=False, **config):
    """The model of a folder with an adapter of the same values under both libraries."""
    model, tokenizer = side().load(str(folder / "base"))
    model.freeze()
    settings = {"rank": 2, "scale": 2.0, "dropout": 0.0, **config}
    side("tuner.utils").linear_to_lora_layers(model, num_layers, settings, use_dora=dora)
    return filled(side, model), tokenizer


def rows(count=14, longest=60, vocabulary=200, seed=1):
    """Samples `(tokens, offset)`."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(5, vocabulary, n).tolist(), int(rng.integers(0, n // 2)))
        for n in rng.integers(4, longest, count)
    ]


class Samples:
    """A dataset of samples, for `CacheDataset` and for itself."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]

    def process(self, sample):
        return sample


class Reports:
    """A callback that keeps what it gets."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_loss_report(self, info):
        keys = ("iteration", "train_loss", "learning_rate", "trained_tokens")
        self.train.append({key: info[key] for key in keys})

    def on_val_loss_report(self, info):
        self.val.append({key: info[key] for key in ("iteration", "val_loss")})
