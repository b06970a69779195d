"""The steps of distributed_pyloss.py with torch's DistributedDataParallel (gloo) and PEFT."""

from __future__ import annotations

import argparse
import json
import os
import time

import numpy as np
import torch
from common import peak_gb
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from pyloss.distributed import launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    started = launch()
    rank, size = (0, 1) if started is None else (started.rank, started.size)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    adapter = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    whole = DistributedDataParallel(get_peft_model(model, adapter))
    trained = [p for p in whole.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    rng = np.random.default_rng(0)
    vocabulary = model.config.vocab_size
    rows = rng.integers(0, vocabulary, (options.samples, options.tokens + 1))[rank::size]
    ids = torch.from_numpy(rows).long()
    seconds = []
    for _ in range(options.iters):
        begin = time.perf_counter()
        logits = whole(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, vocabulary).float(), ids[:, 1:].reshape(-1)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - begin)
    torch.distributed.barrier()
    if rank == 0:
        best = min(seconds[1:])
        tokens = options.samples * options.tokens / best
        print(json.dumps({"step_s": best, "tokens_per_s": tokens, "peak_gb": peak_gb() * size}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
