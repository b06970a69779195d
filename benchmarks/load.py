"""Loading a model in a fresh process: pyloss|torch MODEL; prints seconds and memory as JSON.

`private_mb` is the process's own memory, without pages of mapped files, after loading and reading
one token. It would include a second copy of the weights.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def private_mb() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1e3


def main(library: str, path: str) -> None:
    if library == "pyloss":
        import numpy as np

        import pyloss

        pyloss.load_model  # noqa: B018  imports the modules before the clock starts
        before, begin = private_mb(), time.perf_counter()
        model = pyloss.load_model(path)
        seconds = time.perf_counter() - begin
        model.step(np.array([1]), model.make_cache())
        size = sum(weight.nbytes for weight in model.stored().values())
    else:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.models.llama import modeling_llama  # noqa: F401  as above

        before, begin = private_mb(), time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        seconds = time.perf_counter() - begin
        with torch.no_grad():
            model(input_ids=torch.tensor([[1]]))
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(
        json.dumps(
            {"seconds": seconds, "weights_mb": size / 1e6, "private_mb": private_mb() - before}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
