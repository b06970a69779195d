"""Data that fuzz cases start from: files of tiny models of every family, and their tokenizer.

Also what a loaded model or tokenizer must be able to do.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from packed_folders import write_float8, write_packed
from safetensors.numpy import load_file

from pyloss.models.config.delta_net import DeltaNet
from pyloss.models.config.families import FAMILIES
from pyloss.models.config.mixture import Mixture
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.synthetic import random_model

#: formats of folders that pyloss does not write, and what writes them
PACKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (write_packed, {}),
    "gptq, desc_act": (write_packed, {"order": True, "bits": 3}),
    "awq": (write_packed, {"method": "awq"}),
    "fp8": (write_float8, {}),
}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
PROMPTS = [
    "",
    "hello world 123",
    "a<|im_end|>b</s>",
    "é 😀 日本\n\t x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab",
]


@lru_cache(maxsize=1)
def tokens() -> list[str]:
    """The vocabulary: special tokens, the byte alphabet, a few merges."""
    from tokenizers import pre_tokenizers

    return [
        *SPECIAL,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "he",
        "ll",
        "hell",
        "hello",
        "Ġw",
        "12",
    ]


def gguf_vocabulary() -> dict[str, Any]:
    """The `tokenizer.*` metadata of that vocabulary."""
    kinds = [3] * len(SPECIAL) + [1] * (len(tokens()) - len(SPECIAL))
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens(),
        "token_type": kinds,
        "merges": MERGES,
    }
    values |= {
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
        "add_bos_token": False,
    }
    return {
        "tokenizer.chat_template": CHATML,
        **{f"tokenizer.ggml.{key}": value for key, value in values.items()},
    }


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The tokenizer of all tiny models."""
    from pyloss.models.tokenizer import Tokenizer

    return Tokenizer.from_gguf(gguf_vocabulary())


def config(family: str, vocabulary: int, **changes: Any) -> ModelConfig:
    """A tiny configuration of a family."""
    experts = FAMILIES[family].experts
    if FAMILIES[family].softcaps:
        caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        changes = {**caps, "tie_word_embeddings": True, **changes}
    if FAMILIES[family].short_conv:
        changes = {"layer_types": ["conv", "full_attention"], **changes}
    if "an output head of its own" in FAMILIES[family].gguf_lacks:
        changes = {"tie_word_embeddings": True, **changes}
    if FAMILIES[family].linear_attention:
        types = ["linear_attention", "full_attention"]
        changes = {"layer_types": types, "delta": DeltaNet(2, 2, 4, 4, 3), **changes}
    mixture = None
    if experts:
        shared = 32 if experts.shared else 0
        dense = (0,) if experts.sigmoid else ()
        mixture = Mixture(4, 2, 32, experts.gguf_normalize, dense, shared, bias=experts.sigmoid)
    return ModelConfig(family, vocab_size=vocabulary, mixture=mixture, **SIZES | changes)


def model(family: str, format: str = "f32", **changes: Any) -> Any:
    """A model with random weights; formats with groups need a hidden size of 32 or more."""
    return random_model(config(family, len(tokens()), **changes), format)


@lru_cache(maxsize=16)
def folder(family: str, format: str = "f32") -> dict[str, bytes]:
    """The files of a Hugging Face folder (an mlx folder for "affine4"), or of a key of PACKED."""
    changes: dict[str, Any] = (
        {} if format == "f32" else {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    )
    with tempfile.TemporaryDirectory() as place:
        write, options = PACKED.get(format, (None, {}))
        model(family, "f32" if write else format, **changes).save(place, tokenizer())
        if write:
            config = json.loads((Path(place) / "config.json").read_text())
            arrays = load_file(Path(place) / "model.safetensors")
            write(Path(place), given=(config, arrays), **options)
        return {file.name: file.read_bytes() for file in sorted(Path(place).iterdir())}


def exercise(model: Any, prompt: list[int] | None = None) -> None:
    """Run a forward pass and generate two tokens, the second from the cache; nothing may fail."""
    from pyloss.generation import generate_tokens

    top = model.vocab_size - 1
    ids = prompt or [min(3, top), min(5, top), min(1, top), 0]
    with np.errstate(all="ignore"):
        logits = model(np.array([ids], np.int32))
        assert logits.shape == (1, len(ids), model.vocab_size), f"logits of shape {logits.shape}"
        made = generate_tokens(model, ids)
        for _ in range(2):
            assert 0 <= next(made) <= top


def exercise_tokenizer(tokenizer: Any) -> None:
    """Encode and decode texts and render conversations.

    Errors that say what a template or text did are valid answers.
    """
    for text in PROMPTS:
        ids = tokenizer.encode(text)
        tokenizer.decode(ids)
        tokenizer.decode(ids, skip_special_tokens=True)
    tokenizer.decode([0, 10**6])
    assert isinstance(tokenizer.eos_token_ids, set) and (
        tokenizer.bos_token_id is None or type(tokenizer.bos_token_id) is int
    )
    if tokenizer.chat_template is not None:
        talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "12"}]
        tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True)
        tokenizer.apply_chat_template(talk, tools=[{"name": "f"}], tokenize=False)


@contextlib.contextmanager
def quiet() -> Any:
    """Ignore warnings: they are not errors."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
