"""Runs on mlx-lm's terms: Ctrl-C, losses that are not finite, files."""

import json

import numpy as np
import pytest

import pyloss
from pyloss.mlx import optimizers as optim
from pyloss.mlx_lm import load
from pyloss.mlx_lm.tuner.datasets import CacheDataset
from pyloss.mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train
from pyloss.mlx_lm.tuner.utils import linear_to_lora_layers


class Rows:
    def __init__(self, count=6):
        rng = np.random.default_rng(0)
        self.rows = [rng.integers(5, 200, n).tolist() for n in rng.integers(4, 20, count)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]

    def process(self, row):
        return row, 0


def model_of(made):
    model, _ = load(str(made / "base"))
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    return model


def run(made, folder, model=None, optimizer=None, callback=None, **settings):
    args = TrainingArgs(
        **{"batch_size": 2, "iters": 4, "steps_per_report": 1, "steps_per_save": 2} | settings,
        adapter_file=str(folder / "adapters.safetensors"),
    )
    model = model or model_of(made)
    optimizer = optimizer or optim.Adam(learning_rate=1e-3)
    result = train(model, optimizer, CacheDataset(Rows()), args=args, training_callback=callback)
    return model, result


class Stops(TrainingCallback):
    def on_train_loss_report(self, train_info):
        if train_info["iteration"] == 3:
            raise KeyboardInterrupt


def test_ctrl_c_saves_the_adapter(made, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="after iteration 3: the adapter is saved to"):
        run(made, tmp_path, callback=Stops())
    model = model_of(made)
    before = {name: value.copy() for name, value in model.trainable_parameters().items()}
    model.load_weights(str(tmp_path / "adapters.safetensors"), strict=False)
    after = model.trainable_parameters()
    assert any(not np.array_equal(before[name], after[name]) for name in before)


def test_a_loss_that_is_not_finite_ends_the_run(made, tmp_path):
    model = model_of(made)
    first = next(iter(model.trainable_parameters()))
    model.trainable_parameters()[first][...] = np.nan
    with pytest.raises(FloatingPointError, match="iteration 1: the loss is nan"):
        run(made, tmp_path, model=model)


def test_files(made, tmp_path):
    run(made, tmp_path)
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert names == {
        "0000002_adapters.safetensors",
        "0000004_adapters.safetensors",
        "adapter_config.json",
        "adapters.safetensors",
        "metrics.jsonl",
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["num_layers"] == 1 and config["lora_parameters"]["rank"] == 2
    pyloss.load(made / "base", adapter_path=tmp_path)


def test_optimizers_of_pyloss_train_too(made, tmp_path):
    _, result = run(made, tmp_path, optimizer=pyloss.optim.AdamW(1e-3))
    assert result.iterations == 4 and result.updates == 4
    losses = result.history["train_loss"]
    assert all(np.isfinite(losses))


def test_refused_settings(made, tmp_path):
    with pytest.raises(ValueError, match="grad_accumulation_steps"):
        run(made, tmp_path, grad_accumulation_steps=0)
    model, _ = load(str(made / "base"))
    model.freeze()
    with pytest.raises(ValueError, match="no trainable parameters"):
        run(made, tmp_path, model=model)
