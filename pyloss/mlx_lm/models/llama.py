"""mlx_lm.models.llama."""

from pyloss.mlx_lm.models.architectures import Model, ModelArgs
from pyloss.mlx_lm.names import absent

__all__ = ["Model", "ModelArgs"]

__getattr__ = absent(__name__)
