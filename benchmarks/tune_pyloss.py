"""`tune_scales` of pyloss on a quantized copy of a float folder, as `tune_mlx.py`.

Prints JSON: `cpu_s`, the CPU time of training with its measurements, `peak_gb`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from common import peak_gb

import pyloss
from pyloss.distillation.quantized import tune_scales
from pyloss.models import quantize_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "data", "out"):
        parser.add_argument(name)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    data = json.loads(Path(options.data).read_text())
    train, valid = ([(tokens, 0) for tokens in data[split]] for split in ("train", "valid"))
    original, tokenizer = pyloss.load(options.model)
    student = pyloss.load_model(options.model)
    quantize_model(student, f"q{options.bits}")
    out = Path(options.out)
    student.save(out / "untuned", tokenizer, overwrite=True)
    begin = time.process_time()
    tune_scales(
        student, original, train, valid,
        iters=len(train) // options.batch, learning_rate=options.rate, batch_size=options.batch,
        val_batches=1, progress=False,
    )  # fmt: skip
    seconds = time.process_time() - begin
    student.save(out / "tuned", tokenizer, overwrite=True)
    print(json.dumps({"cpu_s": seconds, "peak_gb": peak_gb()}))


if __name__ == "__main__":
    main()
