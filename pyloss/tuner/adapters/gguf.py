"""Adapters as GGUF files, which llama.cpp loads over a base model (`--lora`)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from pyloss.io.files import user_path
from pyloss.models.files.gguf_writer import (
    GGUFTensor,
    interleaved_head,
    stored_order,
    write_gguf_file,
)
from pyloss.models.files.names import gguf_name
from pyloss.models.files.parts import gguf_parts
from pyloss.nn import Embedding
from pyloss.runtime.device import to_device
from pyloss.tuner.adapters.adapter import storable_adapters
from pyloss.tuner.adapters.layout import BIAS
from pyloss.tuner.adapters.low_rank import LowRankAdapter
from pyloss.tuner.data.system_prompt import system_prompt_of

if TYPE_CHECKING:
    from pyloss.models.transformer import Model


def write_lora_gguf(model: Model, path: str | os.PathLike[str], name: str | None = None) -> None:
    """Writes the model's LoRA adapters, in float32, as a GGUF file for llama.cpp, as a whole.

    Each layer keeps its rank and scale. `name` is the adapter's name in the file (default: the
    file's name).

    Raises:
        ValueError: the model has no adapter, or one that llama.cpp lacks: DoRA, or LoRA over a
            tied embedding.
        ImportError: the `gguf` package is missing.
        OSError: naming `path`.
    """
    adapters = storable_adapters(model)
    if not adapters:
        raise ValueError("the model has no adapter; call linear_to_lora_layers first")
    for module, adapter in adapters.items():
        if adapter.kind != "lora":
            raise ValueError(
                f"{module}: llama.cpp has no {adapter.kind} adapters; write the fused model instead"
            )
        if BIAS in adapter.parameter_names():
            raise ValueError(f"{module}: llama.cpp has no trained biases; write the fused model")
        if isinstance(adapter.base, Embedding) and model.lm_head is None:
            raise ValueError(
                f"{module}: llama.cpp takes no adapter over a head that is the embedding; "
                "write the fused model"
            )
    if model.own_tables:
        raise ValueError(
            "llama.cpp's adapters have no tables of new tokens; write the fused model instead"
        )
    # One alpha for all layers: llama.cpp multiplies by alpha / rank, and reads 0 as "no alpha".
    alpha = next((a.scale * a.rank for a in adapters.values() if a.scale), 1.0)
    tensors = []
    for module, adapter in adapters.items():
        config, name_of = model.config, f"{module}.weight"
        a, b = _factors(adapter, interleaved_head(model.config, f"{module}.weight"))
        if config.delta is not None and not config.family.delta_fused:
            rows, columns = config.delta.gguf_rows(module), config.delta.gguf_columns(module)
            b = b if rows is None else b[rows]
            a = a if columns is None else a[:, columns]
        b = (
            b
            * np.float32(adapter.scale * adapter.rank / alpha)
            * _factors_of_experts(model, module)
        )
        parts = gguf_parts(name_of, b.shape[-2], config) or {name_of: np.arange(b.shape[-2])}
        for part, rows in parts.items():
            stem = gguf_name(part, config.family)
            for half, array in (("lora_a", a), ("lora_b", b[..., rows, :])):
                data = np.ascontiguousarray(array).view(np.uint8)
                tensors.append(GGUFTensor(f"{stem}.{half}", array.shape, "f32", data.view))
    metadata: dict[str, Any] = {
        "general.type": "adapter",
        "general.name": name or user_path(path).stem,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    if (prompt := system_prompt_of(model.adapter_config)) is not None:
        metadata["pyloss.system_prompt"] = prompt
    write_gguf_file(path, model.config.gguf, metadata, tensors)


def _factors_of_experts(model: Model, module: str) -> Any:
    """Gemma 4's factors [E, 1, 1] of experts' results, which llama.cpp leaves out for adapters."""
    layer, found, _ = module.partition(".switch_mlp.down_proj")
    router = dict(model.named_modules()).get(f"{layer}.router") if found else None
    scales = getattr(router, "per_expert_scale", None)
    return np.float32(1) if scales is None else to_device(scales, "cpu")[:, None, None]


def _factors(adapter: LowRankAdapter, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """`lora_a` [.., r, in] and `lora_b` [.., out, r]; for an embedding [V, r] and [D, r]."""
    a, b = adapter.lora_a, adapter.lora_b
    if isinstance(adapter.base, Embedding):
        return a, b.T
    if a.ndim == 3:
        return a, b
    return a.T, b.T[stored_order(b.shape[1], head_dim)]
