"""mlx_lm.models.qwen2."""

from __future__ import annotations

from typing import Any, ClassVar

from pyloss.mlx_lm.models import architectures
from pyloss.mlx_lm.models.architectures import Model
from pyloss.mlx_lm.names import absent

__all__ = ["Model", "ModelArgs"]

__getattr__ = absent(__name__)


class ModelArgs(architectures.ModelArgs):
    """The keys of a config.json of Qwen2."""

    defaults: ClassVar[dict[str, Any]] = {
        **architectures.ModelArgs.defaults,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
    }
