"""Adapters of experts between pyloss, PEFT and mlx-lm, for each family of mixtures."""

import json

import numpy as np
import pytest
from parity_models import (
    GEMMA4_EXPERTS,
    MIXTURES,
    add_adapter,
    fill_adapter,
    load_in_mlx,
    make_tiny,
    mlx_logits,
    our_logits,
    torch_logits,
    torch_model,
)

import pyloss
from pyloss.io.files import write_json, write_safetensors
from pyloss.tuner.adapters.adapter import adapter_modules

peft = pytest.importorskip("peft", reason="compares with PEFT (parity extra)")

IDS = np.random.default_rng(0).integers(0, 300, 40)


MODELS = {**MIXTURES, "gemma4": GEMMA4_EXPERTS}
IN_BLOCKS = {"lfm2_moe": "feed_forward.", "gemma4": ""} | {
    name: "block_sparse_moe." for name in MIXTURES if name.startswith("granite")
}


@pytest.fixture(params=list(MODELS))
def folder(request, tmp_path):
    place = tmp_path / request.param
    make_tiny(**MODELS[request.param]).save_pretrained(place)
    return place


@pytest.mark.parametrize(
    "options",
    [
        {
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "target_modules": ["q_proj"],
        },
        {
            "target_parameters": ["experts.gate_up_proj"],
            "target_modules": [],
            "rank_pattern": {r"0.mlp.experts.gate_up_proj": 2},
        },
        {
            "target_parameters": ["1.mlp.experts.down_proj", "mlp.gate.weight"],
            "target_modules": [],
            "alpha_pattern": {"mlp.gate.weight": 1},
        },
    ],
    ids=["all", "gates and ups", "downs and routers"],
)
def test_adapters_of_peft_load_here_and_go_on(folder, tmp_path, options):
    options = json.loads(json.dumps(options).replace("mlp.", IN_BLOCKS.get(folder.name, "mlp.")))
    if folder.name == "gemma4":
        options = json.loads(json.dumps(options).replace("gate.weight", "router.proj.weight"))
    if folder.name.startswith("granite"):
        options = json.loads(json.dumps(options).replace(".gate.weight", ".router.weight"))
    theirs = peft.get_peft_model(
        torch_model(folder), peft.LoraConfig(**{"r": 3, "lora_alpha": 4, **options})
    ).eval()
    fill_adapter(theirs, "lora_")
    expected = torch_logits(theirs, IDS)
    assert np.abs(expected - torch_logits(torch_model(folder), IDS)).max() > 0.1
    theirs.save_pretrained(tmp_path / "peft")
    model = pyloss.tuner.load_adapters(pyloss.load_model(folder), tmp_path / "peft")
    np.testing.assert_allclose(our_logits(model, IDS), expected, rtol=0, atol=2e-4)
    pyloss.export(model, tmp_path / "again", "peft")
    again = peft.PeftModel.from_pretrained(torch_model(folder), tmp_path / "again")
    np.testing.assert_allclose(torch_logits(again, IDS), expected, rtol=0, atol=2e-4)


def adapted(folder, mixed):
    """A model with an adapter over every layer that takes one, routers too.

    `mixed`: one layer has another rank and scale.
    """
    model = add_adapter(pyloss.load_model(folder), rank=3, size=0.2)
    if mixed:
        name, layer = next(
            (name, layer)
            for name, layer in adapter_modules(model).items()
            if name.endswith("switch_mlp.up_proj")
        )
        other = type(layer).from_base(layer.base, r=2, scale=0.7)
        other.lora_b[...] = np.random.default_rng(1).normal(0, 0.2, other.lora_b.shape)
        model.set_module(name, other)
    return model


@pytest.mark.parametrize("mixed", [False, True], ids=["one rank", "several ranks"])
def test_our_adapters_in_peft(folder, tmp_path, mixed):
    model = adapted(folder, mixed)
    logits = our_logits(model, IDS)
    pyloss.export(model, tmp_path / "peft", "peft")
    theirs = peft.PeftModel.from_pretrained(torch_model(folder), tmp_path / "peft")
    np.testing.assert_allclose(torch_logits(theirs, IDS), logits, rtol=0, atol=2e-4)
    again = pyloss.tuner.load_adapters(pyloss.load_model(folder), tmp_path / "peft")
    np.testing.assert_allclose(our_logits(again, IDS), logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("mixed", [False, True], ids=["one rank", "several ranks"])
def test_our_adapters_in_mlx_lm(folder, tmp_path, mixed):
    pytest.importorskip("mlx_lm", reason="compares with mlx-lm (parity extra)")
    from mlx_lm.tuner.utils import load_adapters

    if folder.name == "granitemoeshared":
        pytest.skip("mlx-lm does not have it")
    # Adds the keys of config.json that mlx-lm needs.
    pyloss.load_model(folder).save(tmp_path / "ours")
    model = adapted(folder, mixed)
    pyloss.export(model, tmp_path / "mlx", "mlx")
    again = pyloss.tuner.load_adapters(pyloss.load_model(folder), tmp_path / "mlx")
    np.testing.assert_allclose(our_logits(again, IDS), our_logits(model, IDS), rtol=0, atol=2e-4)
    theirs = load_in_mlx(tmp_path / "ours")
    load_adapters(theirs, str(tmp_path / "mlx"))
    theirs.eval()
    np.testing.assert_allclose(mlx_logits(theirs, IDS), our_logits(model, IDS), rtol=0, atol=5e-4)


def test_an_adapter_from_before_experts_were_stacked(tmp_path):
    """PEFT converts such adapters of Mixtral when it loads them."""
    make_tiny(**MIXTURES["mixtral"]).save_pretrained(tmp_path / "base")
    model = pyloss.load_model(tmp_path / "base")
    rng, arrays = np.random.default_rng(0), {}
    for i in range(len(model.layers)):
        for name, ours in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            experts, rows, cols = getattr(model.layers[i].block_sparse_moe.switch_mlp, ours).shape
            for expert in range(experts):
                at = f"base_model.model.model.layers.{i}.block_sparse_moe.experts.{expert}.{name}.lora_"
                arrays[f"{at}A.weight"] = rng.normal(0, 0.3, (3, cols)).astype(np.float32)
                arrays[f"{at}B.weight"] = rng.normal(0, 0.3, (rows, 3)).astype(np.float32)
    write_safetensors(tmp_path / "adapter_model.safetensors", arrays)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["w1", "w2", "w3"],
        "base_model_name_or_path": str(tmp_path / "base"),
    }
    write_json(tmp_path / "adapter_config.json", config)
    theirs = peft.PeftModel.from_pretrained(torch_model(tmp_path / "base"), tmp_path)
    expected = torch_logits(theirs, IDS)
    assert np.abs(expected - torch_logits(torch_model(tmp_path / "base"), IDS)).max() > 0.1
    np.testing.assert_allclose(
        our_logits(pyloss.tuner.load_adapters(model, tmp_path), IDS), expected, rtol=0, atol=2e-4
    )
