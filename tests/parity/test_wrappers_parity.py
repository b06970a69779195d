"""Language models beside image models, and embedding models, against transformers."""

import json

import numpy as np
import pytest
from parity_models import (
    GEMMA3,
    MINISTRAL3,
    MIXTURES,
    QWEN3_5,
    make_tiny,
    our_logits,
    ragged,
    torch,
    torch_logits,
    transformers,
)
from safetensors.numpy import load_file, save_file

import pyloss

#: the part for images, which is left out
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["Ministral3", "Mistral"])
def test_the_language_model_of_mistral3(tmp_path, family, tied):
    """The wrapper of Ministral 3 and of Mistral Small 3.1, whose parts for images are left out."""
    scaling = MINISTRAL3.get("rope_scaling") if family == "Ministral3" else None
    text = make_tiny(family=family, rope_scaling=scaling, tie_word_embeddings=tied)
    vision = VISION | {"model_type": "pixtral", "head_dim": 8}
    config = transformers.Mistral3Config(
        text_config=text.config.to_dict(), vision_config=vision, tie_word_embeddings=tied
    )
    whole = transformers.Mistral3ForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    whole.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert any("vision_tower" in name for name in load_file(file))
    ours = pyloss.load_model(tmp_path)
    assert ours.config.model_type == family.lower() and (ours.lm_head is None) == tied
    (ids,) = ragged(300, 40)
    np.testing.assert_allclose(our_logits(ours, ids), torch_logits(text, ids), rtol=0, atol=1e-4)
    ours.save(tmp_path / "text")
    assert pyloss.load_model(tmp_path / "text").config == ours.config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [QWEN3_5, MIXTURES["qwen3_5_moe"]], ids=["dense", "moe"])
def test_the_language_model_of_qwen3_5(tmp_path, tied, options):
    """Its parts for images and its layers that guess further tokens are left out."""
    family = options["family"]
    text = make_tiny(**{**options, "tie_word_embeddings": tied})
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "depth": 1,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
    }
    config = getattr(transformers, f"{family}Config")(
        text_config=text.config.to_dict(), vision_config=vision, tie_word_embeddings=tied
    )
    whole = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    whole.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    assert any("visual" in name for name in tensors)
    save_file({**tensors, "mtp.fc.weight": np.ones((4, 4), np.float32)}, file)
    ours = pyloss.load_model(tmp_path)
    assert ours.config.model_type == f"{family.lower()}_text".replace("5moe", "5_moe")
    assert (ours.lm_head is None) == tied
    (ids,) = ragged(300, 40)
    np.testing.assert_allclose(our_logits(ours, ids), torch_logits(text, ids), rtol=0, atol=1e-4)
    ours.save(tmp_path / "text")
    assert pyloss.load_model(tmp_path / "text").config == ours.config


@pytest.mark.parametrize("options", [{"family": "Qwen3"}, {"family": "Gemma3", **GEMMA3}])
def test_embedding_models(tmp_path, options):
    """Saved as Qwen3-Embedding is: without a head, and without the prefix of one that has it."""
    theirs = make_tiny(**options)
    theirs.model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert "embed_tokens.weight" in load_file(file)
    ours = pyloss.load_model(tmp_path)
    (ids,) = ragged(300, 40)
    np.testing.assert_allclose(our_logits(ours, ids), torch_logits(theirs, ids), rtol=0, atol=1e-4)
    found = ours.hidden(ids, np.array([0, 40], np.int32))
    with torch.no_grad():
        states = theirs.model(torch.tensor(ids[None].astype(np.int64))).last_hidden_state[0]
    np.testing.assert_allclose(found, states.numpy(), rtol=0, atol=1e-4)
    ours.save(tmp_path / "saved")
    assert pyloss.load_model(tmp_path / "saved").config == ours.config
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "tie_word_embeddings": False}))
    with pytest.raises(ValueError, match="there is no output head .* an embedding model without"):
        pyloss.load_model(tmp_path)


@pytest.mark.parametrize("beginning", ["language_model.model.", "model.language_model."])
def test_the_language_model_beside_one_for_images(tmp_path, beginning):
    """Under both names that versions of transformers have used."""
    text = make_tiny(family="Gemma3", **GEMMA3)
    config = transformers.Gemma3Config(
        text_config=text.config.to_dict(), vision_config=VISION, mm_tokens_per_image=4
    )
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.tie_weights()
    whole.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = {
        name.replace("language_model.model.", beginning, 1): array
        for name, array in load_file(file).items()
    }
    save_file(tensors, file)
    assert f"{beginning}layers.0.self_attn.q_proj.weight" in tensors
    ours = pyloss.load_model(tmp_path)
    assert ours.config.model_type == "gemma3_text"
    (ids,) = ragged(300, 40)
    np.testing.assert_allclose(our_logits(ours, ids), torch_logits(text, ids), rtol=0, atol=1e-4)
    ours.save(tmp_path / "text")
    assert pyloss.load_model(tmp_path / "text").config == ours.config
