"""Fine-tuning: adapters, datasets, the trainer, with names and signatures of mlx-lm's tuner."""

from pyloss.tuner.adapters.folder import save_adapter
from pyloss.tuner.adapters.full import unfreeze_layers
from pyloss.tuner.adapters.switch import DoRASwitchLinear, LoRASwitchLinear
from pyloss.tuner.callbacks import TrainingCallback
from pyloss.tuner.data.preview import preview
from pyloss.tuner.datasets import (
    CacheDataset,
    ChatDataset,
    CompletionsDataset,
    ConcatenatedDataset,
    TextDataset,
    create_dataset,
    load_dataset,
)
from pyloss.tuner.dora import DoRAEmbedding, DoRALinear
from pyloss.tuner.lora import LoRAEmbedding, LoRALinear
from pyloss.tuner.losses import default_loss
from pyloss.tuner.run.args import TrainingArgs, TrainingResult
from pyloss.tuner.trainer import evaluate, iterate_batches, train
from pyloss.tuner.utils import (
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
    "preview",
    "print_trainable_parameters",
    "remove_lora_layers",
    "save_adapter",
    "train",
    "unfreeze_layers",
]
