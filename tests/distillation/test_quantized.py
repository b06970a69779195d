"""Distilled quantization: the scales that it trains, what it reports, and what it leaves alone."""

import json

import numpy as np
import pytest
import tiny

import pyloss
from pyloss.distillation import quantized
from pyloss.distillation.quantized import tune_scales
from pyloss.distillation.scales import ScaledLinear, store_scales, train_scales
from pyloss.models import load_model
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.conversion import quantize_model
from pyloss.models.synthetic import random_model

SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}


def random_tokens(seed, count=8):
    """A dataset of token ids, all of them targets."""
    rng = np.random.default_rng(seed)
    return tiny.Tokens([list(map(int, rng.integers(1, 29, 24))) for _ in range(count)])


@pytest.fixture
def folder(tmp_path):
    tiny.write_folder(tmp_path / "model", tied=False, bias=True, **SIZES)
    return tmp_path / "model"


def pair(folder, bits="q3"):
    original, student = load_model(folder), load_model(folder)
    quantize_model(student, bits, group_size=32)
    return original, student


def tuned(student, original, **more):
    options = {"iters": 60, "learning_rate": 4e-3, "progress": False, **more}
    return tune_scales(student, original, random_tokens(0, 64), random_tokens(1), **options)


@pytest.mark.parametrize("bits", ["q3", "q4"])
def test_the_divergence_from_the_original_falls(folder, bits):
    original, student = pair(folder, bits)
    stored = {name: weight.raw.copy() for name, weight in student.stored().items()}
    found = tuned(student, original)
    assert found.kept and found.layers == 23
    assert found.after.divergence < 0.9 * found.before.divergence
    assert found.original != found.before.perplexity != found.after.perplexity
    assert not student.trainable_parameters()
    for name, weight in student.stored().items():  # the same codes in the same format
        assert weight.format == f"affine{bits[1:]}"
        assert np.array_equal(weight.raw, stored[name])


def test_the_model_computes_with_the_scales_that_are_stored(folder):
    _, student = pair(folder)
    tokens = np.arange(1, 13).reshape(2, 6)
    plain = student(tokens)
    assert len(train_scales(student)) == 23
    assert isinstance(student.layers[0].self_attn.q_proj, ScaledLinear)
    np.testing.assert_allclose(student(tokens), plain, rtol=1e-4, atol=1e-4)
    for number, change in enumerate(student.trainable_parameters().values()):
        change += np.random.default_rng(number).normal(0, 0.05, change.shape)
    assert sorted(name.rsplit(".")[-1] for name in student.trainable_parameters())[0] == "change"
    trained = student(tokens)
    assert np.abs(trained - plain).max() > 0.05
    store_scales(student)
    np.testing.assert_allclose(student(tokens), trained, rtol=1e-4, atol=1e-4)
    assert not student.trainable_parameters()


def test_gradients_with_recomputed_layers_are_the_same(folder):
    original, student = pair(folder)
    train_scales(student)
    loss = pyloss.DistillationLoss(original)
    batch = np.array([list(range(1, 13))], np.int32)
    lengths = np.array([[1, 12]], np.int32)
    grads = []
    for again in (False, True):
        student.set_grad_checkpoint(again)
        _, found = pyloss.nn.value_and_grad(student, loss)(student, batch, lengths)
        grads.append(found)
    assert all(np.abs(grad).max() > 0 for grad in grads[0].values())
    for name, grad in grads[0].items():
        np.testing.assert_allclose(grad, grads[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_a_model_are_those_of_its_loss(tmp_path, tied):
    tiny.write_folder(tmp_path / "model", tied=tied, **SIZES)
    original, student = pair(tmp_path / "model")
    train_scales(student)
    loss = pyloss.DistillationLoss(original)
    batch, lengths = np.array([list(range(1, 20))], np.int32), np.array([[1, 19]], np.int32)
    _, grads = pyloss.nn.value_and_grad(student, loss)(student, batch, lengths)
    rng = np.random.default_rng(5)
    parameters = student.trainable_parameters()
    assert ("lm_head.change" in parameters) is not tied
    for name in ("model.embed_tokens.change", "model.layers.1.mlp.down_proj.change"):
        # the slope along a random direction, since single differences drown in rounding
        along = rng.standard_normal(parameters[name].shape).astype(np.float32)
        ends = []
        for sign in (1, -1):
            parameters[name][...] = sign * 0.01 * along
            ends.append(float(loss(student, batch, lengths)[0]))
        parameters[name][...] = 0
        slope = float((grads[name] * along).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / 0.02, rel=0.03, abs=1e-3)


def test_experts_are_tuned_too(tmp_path):
    config = {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "norm_topk_prob": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(tiny.config(**config, **SIZES)))
    shape = ModelConfig.from_hf(tmp_path / "config.json")
    original, student = random_model(shape), random_model(shape)
    quantize_model(student, "q3", group_size=32)
    found = tuned(student, original, iters=20)
    assert found.after.divergence < found.before.divergence
    assert student.layers[0].mlp.switch_mlp.up_proj.weight.format == "affine3"
    assert not student.grad_checkpoint


def test_tuning_that_does_not_help_leaves_the_model_as_it_was(folder):
    original, student = pair(folder)
    before = student.stored()
    found = tuned(student, original, iters=2, learning_rate=30.0)
    assert not found.kept and found.after.divergence > found.before.divergence
    assert all(student.stored()[name] is weight for name, weight in before.items())


def test_a_model_of_floats_is_refused(folder):
    with pytest.raises(ValueError, match="no layer of the model has scales that can be trained"):
        tuned(load_model(folder), load_model(folder))


@pytest.mark.parametrize("option", [{"iters": 0}, {"learning_rate": 0.0}])
def test_wrong_numbers_are_refused_first(folder, option, monkeypatch):
    monkeypatch.setattr(quantized, "evaluate", lambda *args, **more: pytest.fail("too late"))
    with pytest.raises(ValueError, match=f"{next(iter(option))} "):
        tuned(*reversed(pair(folder)), **option)
