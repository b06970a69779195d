"""`distill`: a run, its files, and vocabularies that differ."""

import numpy as np
import pytest
import tiny

import pyloss
from pyloss.distillation.loss import DistillationLoss
from pyloss.models import load_model
from pyloss.tuner import TrainingArgs, evaluate, linear_to_lora_layers


@pytest.fixture
def parts(tmp_path):
    models = []
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny.write_folder(tmp_path / name, seed=seed, tied=False)
        models.append(load_model(tmp_path / name))
    linear_to_lora_layers(models[0], 3, {"rank": 4, "scale": 4.0, "dropout": 0.0})
    rng = np.random.default_rng(0)
    return *models, tiny.Tokens([list(map(int, rng.integers(1, 29, 12))) for _ in range(8)])


def arguments(folder, **more):
    return TrainingArgs(
        batch_size=4, iters=30, val_batches=-1, steps_per_report=10, steps_per_eval=15,
        adapter_file=folder / "adapters.safetensors", progress=False, **more,
    )  # fmt: skip


def test_a_run_comes_closer_to_its_teacher(parts, tmp_path):
    student, teacher, data = parts
    loss = DistillationLoss(teacher, "reverse-kl")
    before = evaluate(student, data, 4, loss=loss)
    result = pyloss.distill(
        student, teacher, pyloss.optim.Adam(1e-2), data, data, arguments(tmp_path / "run"),
        kind="reverse-kl",
    )  # fmt: skip
    after = evaluate(student, data, 4, loss=loss)
    assert result.iterations == 30 and after < before / 2
    assert after == pytest.approx(result.best_loss, rel=1e-5)
    assert (tmp_path / "run" / "adapters.safetensors").exists()


def test_heads_of_different_sizes_need_tokenizers(tmp_path):
    models = []
    for name, size in (("student", 29), ("teacher", 32)):
        tiny.write_folder(tmp_path / name, tied=False, vocab_size=size)
        models.append(load_model(tmp_path / name))
    linear_to_lora_layers(models[0], 3, {"rank": 4, "scale": 4.0, "dropout": 0.0})
    with pytest.raises(ValueError, match=r"29 classes and the teacher's 32: give tokenizers="):
        pyloss.distill(*models, pyloss.optim.Adam(1e-2), tiny.Tokens([[1, 2, 3]]))
    assert not (tmp_path / "run").exists()
