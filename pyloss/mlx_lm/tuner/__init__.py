"""mlx_lm.tuner."""

from pyloss.mlx_lm.names import absent
from pyloss.mlx_lm.tuner.trainer import TrainingArgs, evaluate, train
from pyloss.mlx_lm.tuner.utils import linear_to_lora_layers

__all__ = ["TrainingArgs", "evaluate", "linear_to_lora_layers", "train"]

__getattr__ = absent(__name__)
