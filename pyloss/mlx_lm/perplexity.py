"""mlx_lm.perplexity: the perplexity of a model on a dataset, with its standard error."""

from __future__ import annotations

import argparse
import math
import types
from typing import Any

import numpy as np

from pyloss.io.bars import watched
from pyloss.io.console import out
from pyloss.losses import softmax_cross_entropy
from pyloss.mlx_lm.arrays import array, mx
from pyloss.mlx_lm.command import as_command
from pyloss.mlx_lm.names import absent
from pyloss.mlx_lm.tuner.datasets import load_dataset
from pyloss.mlx_lm.utils import load

__all__ = ["eval_ppl", "load_data", "main"]

__getattr__ = absent(__name__)


def load_data(tokenizer: Any, data_path: str, num_samples: int, sequence_length: int) -> Any:
    """Token ids [samples, length] of a hub dataset's records, shuffled; -1 takes all samples."""
    splits = {"path": data_path, "train_split": "train", "valid_split": "train[:1]"}
    args = types.SimpleNamespace(hf_dataset=splits, train=True, test=False)
    dataset = load_dataset(args, tokenizer)[0]
    wanted = sequence_length * num_samples if num_samples > 0 else math.inf
    ids: list[int] = []
    for place in np.random.permutation(len(dataset)).tolist():
        if len(ids) >= wanted:
            break
        ids += dataset.process(dataset[place])[0]
    rows = np.array(ids[: len(ids) // sequence_length * sequence_length], np.int32)
    rows = rows.reshape(-1, sequence_length)
    return array(rows[:num_samples] if num_samples > 0 else rows)


def eval_ppl(model: Any, data: Any, batch_size: int = 8) -> tuple[float, float]:
    """`(perplexity, standard error)` of token ids [samples, length]."""
    rows = np.asarray(data)
    found = []
    for begin in watched(range(0, len(rows), batch_size), "perplexity", "batch"):
        batch = rows[begin : begin + batch_size]
        logits = np.asarray(model(batch[:, :-1]))
        found.append(np.asarray(softmax_cross_entropy(logits, batch[:, 1:])).reshape(-1))
    losses = np.concatenate(found).astype(np.float64)
    perplexity = math.exp(losses.mean())
    return perplexity, perplexity * float(losses.std(ddof=1)) / math.sqrt(len(losses))


def main() -> None:
    """The command `python -m pyloss.mlx_lm.perplexity`."""
    parser = argparse.ArgumentParser(description="Evaluate perplexity of MLX models")
    add = parser.add_argument
    add("--model", type=str, required=True, help="the model: its folder, GGUF file or name")
    add("--batch-size", type=int, default=8, help="samples at a time")
    add("--sequence-length", type=int, default=512, help="tokens of a sample")
    add("--num-samples", type=int, default=256, help="samples; -1: all")
    add("--data-path", type=str, default="allenai/tulu-3-sft-mixture", help="hub dataset")
    add("--seed", type=int, default=123, help="seed of the choice of records")
    add("--trust-remote-code", action="store_true", help="no effect: no model's code is run")
    args = parser.parse_args()
    np.random.seed(args.seed)
    mx.random.seed(args.seed)
    model, tokenizer = load(args.model)
    data = load_data(tokenizer, args.data_path, args.num_samples, args.sequence_length)
    perplexity, error = eval_ppl(model, data, batch_size=args.batch_size)
    out(f"Perplexity: {perplexity:.3f} ± {error:.3f}")


if __name__ == "__main__":
    as_command(main)
