"""Training on several ranks: the updates are those of one rank, and so are the files.

The ranks of a run share each batch, so sums have another order: losses agree to 1e-6. Runs of the
same number of ranks have the same bits.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_runs
from launching import needs_mpi, run
from safetensors.numpy import load_file

from pyloss.tuner.run import checkpoints

pytestmark = needs_mpi
SCRIPT = Path(__file__).with_name("tiny_runs.py")


@pytest.fixture
def base(tmp_path):
    tiny.write_folder(tmp_path / "base", tied=False)
    return str(tmp_path / "base")


def on_ranks(ranks, tmp_path, specs, **options):
    result = tmp_path / f"result{ranks}.json"
    run(ranks, SCRIPT, json.dumps(specs), result, **options)
    return json.loads(result.read_text())


def same_course(one, other, tolerance=1e-6):
    for name in ("losses", "val_losses", "test"):
        np.testing.assert_allclose(one[name], other[name], rtol=tolerance, err_msg=name)
    # None before the first update
    norms = ([norm or 0.0 for norm in run["norms"]] for run in (one, other))
    np.testing.assert_allclose(*norms, rtol=1e-4)
    for name in ("tokens", "stopped", "iterations"):
        assert one[name] == other[name]
    assert one["best"][0] == other["best"][0]
    for a, b in zip(one["values"], other["values"]):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


KINDS = {
    "lora": {"kind": "lora"},
    "dora": {"kind": "dora"},
    "full": {"kind": "full", "max_grad_norm": 0.5},
    "experts": {"kind": "moe lora"},
    "experts in full": {"kind": "moe full"},
    "accumulation": {"kind": "lora", "grad_accumulation_steps": 3},
    "checkpointing": {"kind": "lora", "grad_checkpoint": True},
    "patience": {"kind": "lora", "rate": 0.0, "patience": 2, "steps_per_eval": 2},
}


@pytest.mark.parametrize(
    ("ranks", "kinds"),
    [
        (2, ["lora", "accumulation", "experts in full"]),
        *(pytest.param(ranks, list(KINDS), marks=pytest.mark.slow) for ranks in (2, 3, 4)),
    ],
)
def test_losses_of_20_updates_are_those_of_one_rank(ranks, kinds, base, tmp_path):
    """21 samples in batches of 12 or 8 leave short ones, in which ranks have few rows or none."""
    batch = 12 if ranks == 3 else 8
    specs = [{"folder": base, "batch": batch, **KINDS[kind]} for kind in kinds]
    together = on_ranks(ranks, tmp_path, specs)
    for name, spec, found in zip(kinds, specs, together):
        alone = tiny_runs.run(**spec)
        same_course(found, alone)
        assert (name == "patience") == alone["stopped"]
    assert all(0 < peak < 64 for peak in together[0]["peak"])


def test_files_and_bits_repeat_and_a_run_is_resumed_by_other_ranks(base, tmp_path):
    """Two runs of two ranks have the same bits, dropout included; their states are one rank's."""
    spec = {"folder": base, "batch": 4, "dropout": 0.1, "keep_best": True}
    places = [str(tmp_path / name) for name in ("one", "two")]
    first, second = on_ranks(2, tmp_path, [{**spec, "out": place} for place in places])
    assert first["bits"] == second["bits"] and first["losses"] == second["losses"]
    names = sorted(path.name for path in Path(places[0]).iterdir())
    assert "trainer_state.safetensors" in names and "best_adapters.safetensors" in names
    for name in names:
        if name != "metrics.jsonl":
            both = [Path(place, name).read_bytes() for place in places]
            assert both[0] == both[1], name

    plain = spec | {"dropout": 0.0, "grad_accumulation_steps": 2}
    whole = tiny_runs.run(**plain, out=str(tmp_path / "whole"))
    part = tiny_runs.run(**plain | {"iters": 7}, out=str(tmp_path / "part"))
    assert part["losses"] == whole["losses"][:7]
    more = plain | {"out": str(tmp_path / "part"), "resume": True}
    (resumed,) = on_ranks(2, tmp_path, [more | {"iters": 13}])
    np.testing.assert_allclose(resumed["losses"], whole["losses"][7:13], rtol=1e-6)
    state = checkpoints.load_checkpoint(tmp_path / "part")
    assert state.settings["ranks"] == 2 and state.settings["batch_size"] == 4
    assert state.progress.pending == 1 and state.accumulated  # in the middle of an update
    last = tiny_runs.run(**more)
    np.testing.assert_allclose(last["losses"], whole["losses"][13:], rtol=1e-6)
    assert last["tokens"] == whole["tokens"]
    ours, theirs = (
        load_file(tmp_path / name / "adapters.safetensors") for name in ("part", "whole")
    )
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_sharded_optimizer_has_the_bits_of_a_whole_one(ranks, base, tmp_path):
    """Also its saved state, from which a run without shards goes on, and the other way round."""
    spec = {"folder": base, "batch": 12, "kind": "full", "max_grad_norm": 0.5, "iters": 8}
    specs = []
    for optimizer in ("adamw", "muon"):
        for shards in (False, True):
            out = str(tmp_path / f"{optimizer}{shards}")
            first = spec | {"optimizer": optimizer, "shard_optimizer": shards, "out": out}
            again = {"iters": 12, "resume": True, "shard_optimizer": not shards}
            specs += [first, first | again]
    runs = on_ranks(ranks, tmp_path, specs)
    for whole, whole_more, sharded, sharded_more in (runs[:4], runs[4:]):
        for one, other in ((whole, sharded), (whole_more, sharded_more)):
            assert one["bits"] == other["bits"] and one["norms"] == other["norms"]
        assert len(whole_more["losses"]) == 4
    states = [checkpoints.load_checkpoint(tmp_path / f"adamw{s}").optimizer for s in (False, True)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][key])
