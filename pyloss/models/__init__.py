"""Models and their files: `load`, `load_model`, `resolve_model`, `quantize_model`, and the transformer itself."""

from pyloss.models.config.model_config import ModelConfig
from pyloss.models.conversion import dequantize_model, quantize_model
from pyloss.models.loading import load, load_model, resolve_model
from pyloss.models.transformer import Model

__all__ = [
    "Model",
    "ModelConfig",
    "dequantize_model",
    "load",
    "load_model",
    "quantize_model",
    "resolve_model",
]
