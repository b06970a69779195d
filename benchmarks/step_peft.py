"""One training step of SmolLM2-135M with torch + PEFT, eager: FOLDER BATCH TOKENS CHECKPOINT STEPS lora|dora; prints JSON."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from common import THREADS, peak_gb
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(folder: str, batch: int, tokens: int, checkpoint: int, steps: int, kind: str) -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    adapter = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=PROJECTIONS, use_dora=kind == "dora")
    model = get_peft_model(model, adapter)
    if checkpoint:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    vocabulary = model.config.vocab_size
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, (batch, tokens + 1)))
    best = float("inf")
    for _ in range(steps):
        begin = time.perf_counter()
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.view(-1, vocabulary), ids[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        best = min(best, time.perf_counter() - begin)
    found = {"tokens_per_s": batch * tokens / best, "peak_gb": peak_gb(), "base_gb": base / 1e9, "loss": loss.item()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6])
