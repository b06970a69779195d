"""mlx_lm.tuner.lora."""

from pyloss.mlx_lm.names import absent
from pyloss.tuner import LoRAEmbedding, LoRALinear, LoRASwitchLinear

__all__ = ["LoRAEmbedding", "LoRALinear", "LoRASwitchLinear"]

__getattr__ = absent(__name__)
