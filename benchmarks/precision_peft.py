"""Errors of torch + PEFT's gradients in bfloat16 against its float32: MODEL FOLDER; prints JSON.

FOLDER has what `precision_pyloss.py --save` writes: an adapter and batches. PEFT keeps adapters in
float32, and logits become float32 for the loss, as in transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from common import THREADS
from layer_errors import layers_of, relative
from peft import PeftModel
from transformers import AutoModelForCausalLM


def gradients(path: str, folder: str, dtype: torch.dtype) -> list[list[np.ndarray]]:
    """The gradients of the adapter for each batch, as layers' vectors."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    stored, found = np.load(Path(folder) / "batches.npz"), []
    for number in range(len(stored.files) // 2):
        ids, lengths = stored[f"x{number}"], stored[f"y{number}"]
        steps = np.arange(ids.shape[1])
        targets = (steps >= np.maximum(lengths[:, :1], 1)) & (steps < lengths[:, 1:])
        labels = torch.from_numpy(np.where(targets, ids, -100)[:, 1:]).long()
        mask = torch.from_numpy((steps < lengths[:, 1:])[:, :-1]).long()
        inputs = torch.from_numpy(ids[:, :-1]).long()
        logits = model(input_ids=inputs, attention_mask=mask).logits.float()
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        found.append(layers_of({name: p.grad.numpy().copy() for name, p in trained.items()}))
    return found


def main(path: str, folder: str) -> None:
    torch.set_num_threads(THREADS)
    found = [gradients(path, folder, dtype) for dtype in (torch.float32, torch.bfloat16)]
    print(json.dumps({"errors": relative(*found)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
