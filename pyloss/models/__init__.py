"""Models and their files: `load`, `load_model`, `resolve_model`, `quantize_model`, and the transformer itself."""

from .config import ModelConfig
from .conversion import dequantize_model, quantize_model
from .loading import load, load_model, resolve_model
from .transformer import Model

__all__ = [
    "Model",
    "ModelConfig",
    "dequantize_model",
    "load",
    "load_model",
    "quantize_model",
    "resolve_model",
]
