"""The first look at an OpenCL device, for opencl_first.sh: COMMAND DEVICE.

    limits opencl:0     what the library knows of the device
    programs opencl:0   compiles every program of csrc/opencl/programs with empty caches and reads
                        them in a second process; times, and the compiler's remarks

`build opencl:0` is what the processes of `programs` run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from common import HERE, KERNEL_CACHES, run_json, table

import pyloss
from pyloss import _core

PROGRAMS = HERE.parent / "csrc" / "opencl" / "programs"
SLOWEST = 8
#: (program, options, from the cache, seconds, the compiler's remarks)
Build = tuple[str, str, bool, float, str | None]


def limits(device: str) -> Iterator[str]:
    """A line for each property."""
    found, reason = _core.opencl_devices()
    number = int(device.partition(":")[2])
    if number >= len(found):
        sys.exit(f"no device {device}: " + (reason or f"there are {len(found)} devices"))
    yield f"{len(found)} OpenCL device(s); {device}:"
    for name, value in found[number].items():
        size = f" ({value / 2**30:.1f} GiB)" if isinstance(value, int) and value >= 2**30 else ""
        yield f"  {name:16s} {value}{size}"


def stems() -> list[str]:
    """The programs that have a kernel, by their names in the library."""
    return sorted(
        str(path.relative_to(PROGRAMS).with_suffix(""))
        for path in PROGRAMS.rglob("*.cl")
        if "\nKERNEL" in path.read_text(encoding="utf-8")
    )


def calls(device: str) -> Iterator[Callable[[], object]]:
    """Calls that together need every program."""
    rng = np.random.default_rng(0)
    x, p = (pyloss.to_device(a, device) for a in rng.standard_normal((2, 4, 300), np.float32))
    labels = rng.integers(0, 300, 4)
    ids = np.tile(np.arange(5), (4, 1))
    logprobs = np.full((4, 5), -2.0, np.float32)

    def gradient(loss: Callable) -> Callable[[], object]:
        return lambda: pyloss.value_and_grad(lambda q: loss(q).sum())(x)

    yield gradient(lambda q: pyloss.softmax_cross_entropy(q, labels))
    yield gradient(lambda q: pyloss.js_div_loss(q, p))
    yield gradient(lambda q: pyloss.cosine_loss(q, p))
    yield gradient(lambda q: pyloss.sparse_distillation_loss(q, ids, logprobs))
    yield gradient(lambda q: pyloss.binary_cross_entropy_with_logits(q, p))
    yield gradient(pyloss.stablemax)
    yield lambda: pyloss.compute_accuracy(x, labels)
    yield lambda: _core.map_tanh(x, x.copy())
    yield lambda: _core.axis_sum(x.reshape(4, 300, 1), 1.0, x.fresh((4, 1), "f32"))
    for shape, format in (
        ("SmolLM2-135M", "q4_1"),
        ("SmolLM2-135M", "f32"),
        ("Qwen3.5-0.8B", "q4_1"),
    ):
        yield lambda: step(shape, format, device)


def step(shape: str, format: str, device: str) -> float:
    """A LoRA step of a model of random weights, with one layer."""
    # `limits` needs no models.
    from bases import load
    from shapes import narrow

    from pyloss import measuring

    model = load(narrow(shape, 1, 512), format)
    train = measuring.training_step(model, {"rank": 8, "scale": 2.0})
    pyloss.to_device(model, device)
    return train(np.zeros((2, 17), np.int32), np.array([[0, 17]] * 2, np.int32))


def build(device: str) -> list[Build]:
    """Makes the calls; the programs that they needed."""
    _core.opencl_profile(True)
    for call in calls(device):
        call()
    return _core.opencl_profile(False)[1]


def programs(device: str) -> Iterator[str]:
    """The builds of a process with empty caches, then of the next one."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {variable: f"{folder}/{variable}" for variable in KERNEL_CACHES}
        yield compiled(run_json("opencl_check.py", "build", device, **caches))
        warm = run_json("opencl_check.py", "build", device, **caches)
    yield (
        f"\nthe next process read {sum(row[2] for row in warm)} of {len(warm)} programs from the "
        f"cache; all took {sum(row[3] for row in warm):.2f} s"
    )


def compiled(cold: list[Build]) -> str:
    """Times of builds by file, the slowest ones, and the compiler's remarks."""
    missing = set(stems()) - {name for name, *_ in cold}
    lines = [
        f"{len(cold)} programs from {len(stems()) - len(missing)} of {len(stems())} files, "
        f"compiled in {sum(row[3] for row in cold):.2f} s",
        f"files without a built program: {', '.join(sorted(missing)) or 'none'}",
    ]
    count, total = Counter(row[0] for row in cold), Counter[str]()
    for name, _, _, spent, _ in cold:
        total[name] += spent
    rows = [(name, count[name], f"{spent:.2f}") for name, spent in total.most_common()]
    lines += ["", table(("file", "programs", "s"), rows), "", f"the {SLOWEST} slowest:"]
    slowest = sorted(cold, key=lambda row: -row[3])[:SLOWEST]
    lines += [f"{spent:7.2f} s  {name} {options}" for name, options, _, spent, _ in slowest]
    remarks = [row for row in cold if row[4]]
    lines.append(f"\nthe compiler's remarks on {len(remarks)} programs:")
    lines += [f"{name} {options}\n{log.strip()}" for name, options, _, _, log in remarks]
    return "\n".join(lines)


def main(command: str, device: str) -> None:
    if command == "build":
        print(json.dumps(build(device)))
    else:
        for text in {"limits": limits, "programs": programs}[command](device):
            print(text, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
