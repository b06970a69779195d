"""Every family, fused and saved: same answers from pyloss, transformers, mlx-lm and GGUF."""

import json
import re

import numpy as np
import pytest
import tiny
from parity_models import (
    GEMMA2,
    GEMMA3,
    GEMMA4,
    GEMMA4_EXPERTS,
    GRANITE,
    GRANITE4,
    GRANITE4_MAMBA,
    LFM2,
    LLAMA3,
    MINISTRAL3,
    OLMO2,
    OLMO3,
    PHI3,
    QWEN3_5_GGUF,
    SMOLLM3_GGUF,
    YARN,
    add_adapter,
    greedy,
    load_in_mlx,
    longrope,
    make_tiny,
    mlx_logits,
    our_logits,
    torch_logits,
    torch_model,
)
from safetensors.numpy import load_file, save_file

import pyloss
from pyloss import FormatError
from pyloss.models.files.gguf_writer import write_gguf

FAMILIES = {
    "llama": {"rope_scaling": LLAMA3, "attention_bias": True},
    "mistral": {"family": "Mistral", "sliding_window": 24, "tie_word_embeddings": False},
    "qwen2": {"family": "Qwen2", "rope_scaling": {**YARN, "beta_fast": 32.0}},
    "qwen2 with windows": {
        "family": "Qwen2",
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
    },
    "qwen3": {"family": "Qwen3", "tie_word_embeddings": False},
    "granite": {**GRANITE, "pad_token_id": 0},
    "granite 4": GRANITE4,
    "granite 4 without positions": {**GRANITE4, "position_embedding_type": "nope"},
    "granite 4 with a mamba layer": GRANITE4_MAMBA,
    "ministral3": {**MINISTRAL3, "rope_scaling": {**MINISTRAL3["rope_scaling"], "beta_fast": 32.0}},
    "smollm3": {**SMOLLM3_GGUF, "rope_scaling": {**YARN, "beta_fast": 32.0}},
    "olmo2": {**OLMO2, "tie_word_embeddings": False},
    "olmo3": {**OLMO3, "tie_word_embeddings": False, "rope_scaling": {**YARN, "beta_fast": 32.0}},
    "gemma2": GEMMA2,
    "lfm2": LFM2,
    "qwen3_5": QWEN3_5_GGUF,
    "phi3 with windows": {**PHI3, "sliding_window": 24, "tie_word_embeddings": False},
    "phi4": {
        **longrope(256, 6, attention_factor=1.0625),
        "partial_rotary_factor": 0.75,
        "pad_token_id": 0,
    },
    "phi3 with longrope": {**longrope(1, attention_factor=1.02), "pad_token_id": 0},
    "gemma4": {**GEMMA4, "vocab_size_per_layer_input": tiny.TOKENS},
    "gemma4 with experts": GEMMA4_EXPERTS,
    "gemma3": {"family": "Gemma3", **GEMMA3},
}
IDS = np.random.default_rng(0).integers(5, tiny.TOKENS, 60)
WITHIN = IDS[:20]  # mlx-lm applies windows only to gemma3 and olmo3, llama.cpp also to gemma2


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """(name, our model with a filled adapter)."""
    make_tiny(**{"vocab_size": tiny.TOKENS, **FAMILIES[request.param]}).save_pretrained(
        tmp_path / "base"
    )
    model = pyloss.load_model(tmp_path / "base")
    plain = our_logits(model, IDS)
    add_adapter(model, size=0.2)
    assert np.abs(our_logits(model, IDS) - plain).max() > 0.1  # the adapter has an effect
    return request.param, model


def checked(model, count=60):
    """Tokens generated with the cache; checks that passes without it agree."""
    tokens = greedy(model, IDS, count)
    whole = our_logits(model, [*IDS, *tokens])[len(IDS) - 1 : -1]
    assert whole.argmax(axis=1).tolist() == tokens
    return tokens


def test_fused_and_saved(family, tmp_path):
    name, model = family
    tokens, logits, within = checked(model), our_logits(model, IDS), our_logits(model, WITHIN)
    model.fuse()
    assert checked(model) == tokens
    model.save(tmp_path / "fused")
    again = pyloss.load_model(tmp_path / "fused")
    assert again.config == model.config
    np.testing.assert_array_equal(our_logits(again, IDS), our_logits(model, IDS))
    theirs = torch_model(tmp_path / "fused")
    np.testing.assert_allclose(torch_logits(theirs, IDS), logits, rtol=0, atol=2e-4)
    if name == "phi4":
        return  # mlx-lm always takes longrope's long factors
    if "longrope" in name:
        # mlx-lm derives the attention factor from the lengths, and this model has another one.
        return
    mlx = load_in_mlx(tmp_path / "fused")
    windowless = "windows" in name or name in ("mistral", "gemma2")
    ids, expected = (WITHIN, within) if windowless else (IDS, logits)
    np.testing.assert_allclose(mlx_logits(mlx, ids), expected, rtol=0, atol=2e-4)


def test_written_as_gguf(family, tmp_path):
    name, model = family
    model.fuse()
    write_gguf(model, tmp_path / "fused.gguf", tiny.byte_tokenizer())
    again = pyloss.load_model(tmp_path / "fused.gguf")
    ids = WITHIN if "windows" in name or name == "mistral" else IDS
    np.testing.assert_allclose(our_logits(again, ids), our_logits(model, ids), rtol=0, atol=1e-5)
    assert again.config.max_position_embeddings == (512 if ids is IDS else 24)
    equal = (
        "granite 4 with a mamba layer",
        "granite 4 without positions",
        "ministral3",
        "smollm3",
        "olmo2",
        "olmo3",
        "granite",
        "lfm2",
        "qwen3_5",
        "gemma2",
        "gemma3",
        "phi4",
        "phi3 with longrope",
    )
    if name in equal:
        assert again.config == model.config


def test_checkpointed_gradients_are_the_same(family):
    _, model = family
    batch, lengths = (
        np.stack([IDS[:40], IDS[20:]]).astype(np.int32),
        np.array([[1, 40], [1, 31]], np.int32),
    )
    step = pyloss.nn.value_and_grad(model, pyloss.tuner.default_loss)
    (loss, _), grads = step(model, batch, lengths)
    model.set_grad_checkpoint(True)
    (again, _), others = step(model, batch, lengths)
    assert again == loss and all(
        np.array_equal(grads[name], others[name]) and grads[name].any() for name in grads
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_that_lies_is_named(name, tmp_path):
    make_tiny(**FAMILIES[name]).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    content, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(file)
    for key, value in (("hidden_size", 128), ("intermediate_size", 64), ("num_attention_heads", 2), ("num_key_value_heads", 1),
                       ("head_dim", 8), ("vocab_size", 299), ("num_hidden_layers", 1), ("num_hidden_layers", 9)):  # fmt: skip
        if key == "intermediate_size" and "granite 4" in name:
            key = "shared_intermediate_size"
        changed = {**content, key: value}
        if key == "num_hidden_layers":
            types = ["attention"] * value if "granite 4" in name else None
            if "mamba" in name:
                types[0] = "mamba"
            changed |= {"layer_types": types, "no_rope_layers": None}
            changed["per_layer_config"] = None
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(
            FormatError,
            match="where the configuration gives|missing|no part of this configuration|the file has tensors for|rotary frequencies|leaves no layer|are not mamba_expand",
        ):
            pyloss.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content))
    for tensor in [tensor for tensor in tensors if ".layers.0." in tensor]:
        save_file({other: array for other, array in tensors.items() if other != tensor}, file)
        with pytest.raises(FormatError, match=f"{re.escape(tensor)}.*missing"):
            pyloss.load_model(tmp_path)
        save_file({**tensors, tensor: tensors[tensor][1:].copy()}, file)
        with pytest.raises(
            FormatError, match=f"{re.escape(tensor)}.*where the configuration gives"
        ):
            pyloss.load_model(tmp_path)
