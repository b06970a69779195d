"""Memory of training stays flat over many steps of any lengths."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import tiny

from pyloss import _core, nn
from pyloss.optim import AdamW
from pyloss.runtime.precision import matmul_precision
from pyloss.tuner import default_loss, linear_to_lora_layers
from pyloss.tuner.run.plan import estimate_memory, keeps_half


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("checkpoint", [False, True])
def test_many_steps_take_no_more_memory_than_some(tmp_path, checkpoint):
    model = tiny.load_tiny(tmp_path / "model")
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 2.0, "dropout": 0.1})
    model.train().set_grad_checkpoint(checkpoint)
    rng, optimizer = np.random.default_rng(0), AdamW(1e-3)
    step = nn.value_and_grad(model, default_loss)

    def steps(count: int) -> tuple[int, int]:
        for _ in range(count):
            rows, width = rng.integers(1, 5), rng.integers(2, 40)
            batch = rng.integers(0, 29, (rows, width)).astype(np.int32)
            _, grads = step(model, batch, np.tile([0, width], (rows, 1)))
            optimizer.update(model, grads)
        del grads
        return _core.buffer_stats()["in_use"], resident()

    gc.disable()  # no memory may wait for the collector
    try:
        held, before = steps(300)
        again, after = steps(1000)
    finally:
        gc.enable()
    assert again == held
    assert after - before < 1_000_000  # 1,000 bytes per step


@pytest.mark.parametrize(
    ("config", "use_dora", "is_half"),
    [
        ({}, False, True),
        ({"dropout": 0.1}, False, True),
        ({}, True, True),
        ({"init": "pissa"}, False, False),
    ],
)
def test_the_plan_knows_what_is_kept_in_bfloat16(tmp_path, config, use_dora, is_half):
    def adapted():
        model = tiny.load_tiny(tmp_path / "model")
        linear_to_lora_layers(model, -1, {"rank": 2, "scale": 2.0, **config}, use_dora)
        return model.train()

    with matmul_precision("bfloat16"):
        whole = estimate_memory(adapted(), 4, 128)
        assert not keeps_half(adapted())
    with matmul_precision("mixed"):
        found, half = estimate_memory(adapted(), 4, 128), keeps_half(adapted())
    assert half == is_half
    assert found < whole if half else found == whole
