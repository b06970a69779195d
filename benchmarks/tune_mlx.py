"""mlx-lm's DWQ of a float folder: trains the scales and offsets of its quantized copy.

Prints JSON: `cpu_s`, the CPU time of training, `peak_gb`. The quantized folder is written untuned
to OUT/untuned and tuned to OUT/tuned. DATA is a JSON file: lists of token ids, "train" and "valid".
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import mlx.core as mx
import mlx.optimizers
from common import peak_gb
from mlx_lm.quant import dwq
from mlx_lm.utils import load, quantize_model, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "data", "out"):
        parser.add_argument(name)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True, help="mlx-lm's default is 1e-6")
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    data = json.loads(Path(options.data).read_text())
    train, valid = ([(tokens, 0) for tokens in data[split]] for split in ("train", "valid"))
    out = Path(options.out)
    rounded, tokenizer, config = load(options.model, return_config=True)
    rounded, config = quantize_model(rounded, config, group_size=64, bits=options.bits)
    save(out / "untuned", options.model, rounded, tokenizer, config)  # empties the model
    original, student = load(options.model)[0], load(str(out / "untuned"))[0]
    optimizer = mlx.optimizers.Adam(learning_rate=options.rate, bias_correction=True)
    begin = time.process_time()
    dwq.dwq_quantize(
        student, lambda batch, index, split: original(batch), optimizer, train, valid,
        batch_size=options.batch, max_seq_length=1025, seed=0, dtype=mx.float32,
    )  # fmt: skip
    mx.eval(student.parameters())
    seconds = time.process_time() - begin
    save(out / "tuned", options.model, student, tokenizer, config)
    print(json.dumps({"cpu_s": seconds, "peak_gb": peak_gb()}))


if __name__ == "__main__":
    main()
