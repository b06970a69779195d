"""Training steps of a model with pyloss.

The flags are step_work's, --precision, --device and --type. A config.json alone gives a model of
random weights.
"""

from __future__ import annotations

import step_work
from bases import load

import pyloss
from pyloss import measuring
from pyloss.tuner.losses import default_loss


def main() -> None:
    parser = step_work.parser(__doc__)
    parser.add_argument(
        "--precision",
        default="float32",
        help="precision of the layers' products: float32, bfloat16 or mixed",
    )
    parser.add_argument("--device", default="cpu", help="cpu or opencl:<number>")
    parser.add_argument("--type", help="of a config.json's random weights")
    options = parser.parse_args()
    pyloss.set_matmul_precision(options.precision)
    model = load(options.model, options.type)
    base = sum(weight.nbytes for weight in model.stored().values())
    config = {"rank": step_work.RANK, "scale": step_work.SCALE}
    loss = default_loss
    if options.teacher:
        loss = pyloss.DistillationLoss(load(options.teacher, options.type))
    train = measuring.training_step(
        model, config, options.kind == "dora", options.checkpoint, step_work.RATE, loss
    )
    pyloss.to_device(model, options.device)
    if options.evaluate:
        model.eval()
    there = next(
        (a for a in model.parameters().values() if isinstance(a, pyloss.DeviceArray)), None
    )

    def step(batch: step_work.Batch) -> float:
        value = float(loss(model, *batch)[0]) if options.evaluate else train(*batch)
        if there is not None:
            there.wait()  # the gradients and the update are still queued
        return value

    step_work.measure(options, model.vocab_size, base, step)


if __name__ == "__main__":
    main()
