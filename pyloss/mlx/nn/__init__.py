"""mlx.nn over pyloss: modules, layers, losses and gradients."""

from pyloss.mlx.core.refused import refusing
from pyloss.mlx.nn.methods import with_mlx_methods
from pyloss.mlx.nn.module import Module, checkpoint, value_and_grad

__getattr__ = refusing("nn")

__all__ = ["Module", "checkpoint", "value_and_grad", "with_mlx_methods"]
