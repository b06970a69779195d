"""How transformers reads folders whose files repeat a fact or omit it."""

import json

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

transformers = pytest.importorskip("transformers", reason="compares with transformers")
pytest.importorskip("torch", reason="transformers computes with it")

from parity_models import our_logits, torch_logits, torch_model

from pyloss.models import load_model
from pyloss.models.tokenizer import Tokenizer

IDS = np.random.default_rng(0).integers(0, tiny.SIZES["vocab_size"], 20)


def same_logits(folder):
    np.testing.assert_allclose(
        our_logits(load_model(folder), IDS),
        torch_logits(torch_model(folder), IDS),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("last", [0, 1])
def test_a_head_beside_tied_embeddings(tmp_path, last):
    def change(arrays):
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] + np.float32(last)

    tiny.write_folder(tmp_path, change=change)
    same_logits(tmp_path)


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def test_a_stale_index_beside_a_single_file(tmp_path):
    tiny.write_folder(tmp_path / "old", seed=1)
    tiny.write_folder(tmp_path / "new", seed=2)
    arrays = load_file(tmp_path / "old" / "model.safetensors")
    save_file(arrays, tmp_path / "new" / "old.safetensors", {"format": "pt"})
    write_index(tmp_path / "new", dict.fromkeys(arrays, "old.safetensors"))
    same_logits(tmp_path / "new")


def test_a_tensor_of_a_shard_that_the_index_does_not_name(tmp_path):
    tiny.write_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    names = list(load_file(tmp_path / "one.safetensors"))
    names.remove("model.norm.weight")
    write_index(tmp_path, dict.fromkeys(names, "one.safetensors"))
    same_logits(tmp_path)


@pytest.mark.parametrize(
    ("config", "older"),
    [
        ({"pad_token": "<pad>"}, None),
        (
            {
                "unk_token": "<none>",
                "pad_token": {"content": "<pad>", "lstrip": True, "__type": "AddedToken"},
                "sep_token": "<sep>",
            },
            None,
        ),
        ({"pad_token": "<pad>", "additional_special_tokens": ["<x1>", "<s>"]}, None),
        ({"extra_special_tokens": {"image_token": "<x1>"}}, None),
        ({"pad_token": "</s>"}, {"pad_token": "<pad>"}),
        ({"pad_token": "</s>", "added_tokens_decoder": {}}, {"pad_token": "<pad>"}),
    ],
    ids=str,
)
def test_special_tokens_that_the_vocabulary_lacks(tmp_path, config, older):
    tiny.byte_tokenizer().save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    content = {
        key: value
        for key, value in json.loads(path.read_text()).items()
        if not key.endswith("_token")
    }
    path.write_text(json.dumps({**content, "bos_token": "<s>", "eos_token": "</s>", **config}))
    (tmp_path / "special_tokens_map.json").unlink()
    if older:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    ours, theirs = (
        Tokenizer.from_folder(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    )
    text = "a<none> <pad> <sep><x1>b<s></s>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.vocab_size == len(theirs)
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert ours.special_tokens.get(name) == getattr(theirs, name)
