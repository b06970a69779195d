"""mlx_lm.models: what scripts use of it beside the models, which pyloss has in one decoder."""

from pyloss.mlx_lm.names import absent

__all__: list[str] = []

__getattr__ = absent(__name__)
