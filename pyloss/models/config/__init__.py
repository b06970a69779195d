"""Configurations of models, from Hugging Face's config.json or from GGUF metadata."""

from pyloss.models.config.model_config import ModelConfig

__all__ = ["ModelConfig"]
