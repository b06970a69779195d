"""mlx_lm.models.switch_layers: the stacked layers of experts."""

from pyloss.mlx_lm.names import absent
from pyloss.nn import SwitchLinear

__all__ = ["SwitchLinear"]

__getattr__ = absent(__name__)
