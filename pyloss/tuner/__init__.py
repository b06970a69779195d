"""Fine-tuning: adapters, datasets, the trainer. Names and signatures are those of mlx-lm's tuner."""

from .adapters import save_adapter
from .args import TrainingArgs, TrainingResult
from .callbacks import TrainingCallback
from .datasets import (
    CacheDataset,
    ChatDataset,
    CompletionsDataset,
    ConcatenatedDataset,
    TextDataset,
    create_dataset,
    load_dataset,
)
from .dora import DoRAEmbedding, DoRALinear
from .experts import DoRASwitchLinear, LoRASwitchLinear
from .full import unfreeze_layers
from .lora import LoRAEmbedding, LoRALinear
from .losses import default_loss
from .trainer import evaluate, iterate_batches, train
from .utils import (
    linear_to_lora_layers,
    load_adapters,
    print_trainable_parameters,
    remove_lora_layers,
)

__all__ = [
    "CacheDataset",
    "ChatDataset",
    "CompletionsDataset",
    "ConcatenatedDataset",
    "DoRAEmbedding",
    "DoRALinear",
    "DoRASwitchLinear",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRASwitchLinear",
    "TextDataset",
    "TrainingArgs",
    "TrainingCallback",
    "TrainingResult",
    "create_dataset",
    "default_loss",
    "evaluate",
    "iterate_batches",
    "linear_to_lora_layers",
    "load_adapters",
    "load_dataset",
    "print_trainable_parameters",
    "remove_lora_layers",
    "save_adapter",
    "train",
    "unfreeze_layers",
]
