"""A LoRA step on an OpenCL device by kernel, for opencl_first.sh: DEVICE SHAPE FORMAT BATCH TOKENS.

SHAPE is a name of shapes.SHAPES, or "small" for two layers of SmolLM2. Prints the time of each
kernel by the device's clock (events), the time between them, and the copies to and from the host.
The steps before have compiled the kernels.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import step_work
from bases import load
from shapes import narrow, shape_file

import pyloss
from pyloss import _core, measuring
from pyloss.runtime import profiling

WARM = 2  # steps before the one that counts


def main(device: str, shape: str, format: str, batch: int, tokens: int) -> None:
    _core.opencl_profile(True)  # before the device is opened
    config = narrow("SmolLM2-135M", 2, 4096) if shape == "small" else shape_file(shape)
    model = load(config, format)
    train = measuring.training_step(model, {"rank": step_work.RANK, "scale": step_work.SCALE})
    pyloss.to_device(model, device)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (batch, tokens + 1))
    lengths = np.full((batch, 2), (0, tokens + 1), np.int32)
    for _ in range(WARM):
        train(ids.astype(np.int32), lengths)
    _core.opencl_profile(True)
    begin = time.perf_counter()
    train(ids.astype(np.int32), lengths)
    report = profiling.device_report()  # waits for the device
    seconds = time.perf_counter() - begin
    print(f"LoRA step of {shape}, {format}, {batch} x {tokens}: {seconds * 1e3:.1f} ms by the host")
    print(report)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:6]))
