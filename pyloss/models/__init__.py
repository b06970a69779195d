"""Models and their files: `load`, `load_model`, `quantize_model`, and the transformer itself."""

from typing import TYPE_CHECKING, Any

from pyloss.models.config.model_config import ModelConfig
from pyloss.models.conversion import dequantize_model, quantize_model
from pyloss.models.reading import load_model, resolve_model
from pyloss.models.resizing import add_tokens, untie_head
from pyloss.models.transformer import Model

if TYPE_CHECKING:
    from pyloss.loading import load

__all__ = [
    "Model",
    "ModelConfig",
    "add_tokens",
    "dequantize_model",
    "load",
    "load_model",
    "quantize_model",
    "resolve_model",
    "untie_head",
]


def __getattr__(name: str) -> Any:
    if name == "load":  # it also reads adapters, which models do not know
        from pyloss.loading import load

        return load
    raise AttributeError(f"module 'pyloss.models' has no attribute {name!r}")
