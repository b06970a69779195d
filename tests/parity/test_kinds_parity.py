"""Files of full fine-tuning, PiSSA and rsLoRA, exchanged with mlx-lm and PEFT."""

import json

import numpy as np
import pytest
from parity_models import (
    TINY,
    make_tiny,
    mlx_logits,
    our_logits,
    peft_matrices,
    torch,
    torch_logits,
    torch_model,
)

import pyloss
from pyloss.tuner import linear_to_lora_layers, load_adapters, save_adapter, unfreeze_layers
from pyloss.tuner.adapters.adapter import adapter_modules

IDS = np.random.default_rng(0).integers(0, TINY["vocab_size"], 40)


@pytest.fixture(params=["tied", "untied"])
def folder(tmp_path, request):
    place = tmp_path / "base"
    make_tiny(tie_word_embeddings=request.param == "tied", attention_bias=True).save_pretrained(
        place
    )
    return place


def load_mlx(folder, adapter=None):
    """Do what `mlx_lm.load` does, without the tokenizer, which tiny models lack."""
    pytest.importorskip("mlx_lm", reason="compares with mlx-lm (parity extra)")
    from mlx_lm.tuner.utils import load_adapters as load_theirs
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return model if adapter is None else load_theirs(model, str(adapter))


def change(model, seed=0):
    """Change every trained number a little, as training would."""
    rng = np.random.default_rng(seed)
    for array in model.trainable_parameters().values():
        array += (0.2 * rng.standard_normal(array.shape) / np.sqrt(array.shape[-1])).astype(
            np.float32
        )
    return model


@pytest.mark.parametrize(
    "keys", [None, ["mlp.up_proj", "input_layernorm", "model.embed_tokens", "model.norm"]]
)
def test_mlx_lm_loads_weights_trained_in_full(folder, tmp_path, keys):
    model = pyloss.load_model(folder)
    plain = our_logits(model, IDS)
    unfreeze_layers(model, 1, keys)
    save_adapter(change(model), tmp_path / "adapter")
    logits = our_logits(model, IDS)
    assert np.abs(logits - plain).max() > 0.1
    np.testing.assert_allclose(
        mlx_logits(load_mlx(folder, tmp_path / "adapter"), IDS), logits, rtol=0, atol=1e-4
    )


def test_weights_trained_in_full_by_mlx_lm_load_here(folder, tmp_path):
    """As by mlx_lm.lora: the last layers are unfrozen, and trainable arrays are saved."""
    mlx = load_mlx(folder)
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map

    mlx.freeze()
    mlx.layers[-1].unfreeze()
    mlx.update(tree_map(lambda a: a * 1.25, mlx.trainable_parameters()))
    place = tmp_path / "adapter"
    place.mkdir()
    mx.save_safetensors(
        str(place / "adapters.safetensors"), dict(tree_flatten(mlx.trainable_parameters()))
    )
    settings = {
        "fine_tune_type": "full",
        "num_layers": 1,
        "lora_parameters": None,
        "model": "x",
        "iters": 3,
    }
    (place / "adapter_config.json").write_text(json.dumps(settings))
    ours = load_adapters(pyloss.load_model(folder), place)
    np.testing.assert_allclose(our_logits(ours, IDS), mlx_logits(mlx, IDS), rtol=0, atol=1e-4)
    assert len(ours.trainable_parameters()) == 7 + 4 + 2


@pytest.mark.parametrize("config", [{"scale": 1.5, "init": "pissa"}, {"alpha": 6, "rslora": True}])
def test_mlx_lm_and_peft_load_what_began_otherwise(folder, tmp_path, config):
    peft = pytest.importorskip("peft", reason="compares with PEFT (parity extra)")
    model = pyloss.load_model(folder)
    plain = our_logits(model, IDS)
    linear_to_lora_layers(model, -1, {"rank": 4, **config})
    change(model)
    logits = our_logits(model, IDS)
    assert np.abs(logits - plain).max() > 0.1
    for format in ("mlx", "peft"):
        save_adapter(model, tmp_path / format, format)
    np.testing.assert_allclose(
        mlx_logits(load_mlx(folder, tmp_path / "mlx"), IDS), logits, rtol=0, atol=2e-4
    )
    base = torch_model(folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    np.testing.assert_allclose(torch_logits(theirs, IDS), logits, rtol=0, atol=2e-4)


def test_scales_are_pefts(folder):
    peft = pytest.importorskip("peft", reason="compares with PEFT (parity extra)")
    for rslora in (False, True):
        model = pyloss.load_model(folder)
        linear_to_lora_layers(model, -1, {"rank": 4, "alpha": 6, "rslora": rslora})
        base = torch_model(folder)
        targets = sorted(adapter_modules(model))
        theirs = peft.get_peft_model(
            base, peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=targets)
        )
        scales = {m.scaling["default"] for m in theirs.modules() if hasattr(m, "lora_A")}
        assert {layer.scale for layer in adapter_modules(model).values()} == scales


def test_lora_plus_updates_as_pefts_optimiser(folder):
    """One AdamW update from equal gradients: PEFT's parameter groups against the scaled rate."""
    peft = pytest.importorskip("peft", reason="compares with PEFT (parity extra)")
    from peft.optimizers import create_loraplus_optimizer

    ours = pyloss.load_model(folder)
    linear_to_lora_layers(
        ours, -1, {"rank": 4, "scale": 2.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    )
    base = torch_model(folder)
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    )
    optimizer = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=1e-2,
        loraplus_lr_ratio=16,
        loraplus_weight_decay=0.1,
        weight_decay=0.1,
    )
    own = pyloss.optim.AdamW(1e-2, weight_decay=0.1)
    own.rate_scales = {"lora_b": 16}
    names = peft_matrices(theirs)
    parameters = ours.trainable_parameters()
    assert set(names) == set(parameters)
    rng = np.random.default_rng(0)
    for step in range(3):
        grads = {
            name: rng.standard_normal(array.shape).astype(np.float32)
            for name, array in parameters.items()
        }
        for name, parameter in names.items():
            if not step:
                parameter.data.copy_(torch.from_numpy(parameters[name].T))
            parameter.grad = torch.from_numpy(np.ascontiguousarray(grads[name].T))
        own.update(ours, grads)
        optimizer.step()
    for name, array in parameters.items():
        np.testing.assert_allclose(
            array, names[name].detach().numpy().T, rtol=1e-4, atol=1e-5, err_msg=name
        )
