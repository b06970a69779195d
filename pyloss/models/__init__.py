"""Models and their files: `load`, `load_model`, `resolve_model`, and the transformer itself."""

from .config import ModelConfig
from .loading import load, load_model, resolve_model
from .transformer import Model

__all__ = ["Model", "ModelConfig", "load", "load_model", "resolve_model"]
