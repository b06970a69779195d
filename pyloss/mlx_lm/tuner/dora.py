"""mlx_lm.tuner.dora."""

from pyloss.mlx_lm.names import absent
from pyloss.tuner import DoRAEmbedding, DoRALinear

__all__ = ["DoRAEmbedding", "DoRALinear"]

__getattr__ = absent(__name__)
