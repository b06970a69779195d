"""The state of a run between two updates: what is saved, and how a run is restored from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

import pyloss.random
from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.recursive.carry import Carry, InnerCarry
from pyloss.recursive.run_files import STATE_KEY
from pyloss.runtime.precision import get_matmul_precision
from pyloss.tuner.run.checkpoints import read_tree, restore_arrays
from pyloss.tuner.run.fingerprint import values_digest
from pyloss.tuner.run.restoring import notes_of_changes
from pyloss.tuner.run.run_folder import STATE_FILE

#: settings whose change would make a resumed run differ from an uninterrupted one
_KEPT = (
    *("epochs", "eval_interval", "lr", "lr_min_ratio", "lr_warmup_steps", "beta1", "beta2"),
    *("weight_decay", "puzzle_emb_lr", "puzzle_emb_weight_decay", "ema", "ema_rate"),
    *("freeze_weights", "seed"),
)
#: settings of an architecture that change no weight, so that a run may go on with others
_FREE = ("loss", "halt_exploration_prob", "halt_max_steps", "forward_dtype", "causal")


def of(run: Any) -> dict[str, Any]:
    """The state of a `RecursiveRun` as nested values and arrays."""
    carry = run.carry
    return {
        "progress": asdict(run.progress),
        "model": {**run.head.parameters(), **run.head.buffers()},
        "optimizer": run.optimizer.state_dict(copy=False),
        "puzzle_optimizer": run.puzzle_optimizer.state_dict(copy=False),
        "average": None if run.average is None else run.average.state_dict(),
        "carry": None if carry is None else _carried(carry),
        "random": run.marked,
        "arch": run.arch,
        "settings": _settings(run),
        "data": _data(run),
    }


def restore(run: Any, folder: Path) -> list[str]:
    """Gives a `RecursiveRun` the state in `folder`; returns notes for the user.

    Raises:
        ValueError: the run there has another architecture, batch size or data; the message lists
            what differs.
        FormatError: the state is damaged.
        FileNotFoundError: there is none.
    """
    file = folder / STATE_FILE
    saved: Mapping[str, Any] = read_tree(file, STATE_KEY, _checked)
    differ = [
        f"{key} {shown(was)}, now {shown(now)}"
        for key in sorted({*saved["arch"], *run.arch} - {*_FREE, "name"})
        if (was := saved["arch"].get(key)) != (now := run.arch.get(key))
    ]
    if differ:
        raise ValueError(f"the run to resume has another architecture: {'; '.join(differ)}")
    size, before = run.args.global_batch_size, saved["settings"].get("global_batch_size")
    if size != before:
        raise ValueError(
            f"the run to resume has global_batch_size {shown(before)}, not {size}: its carry and "
            "its place in the data are of that size"
        )
    if saved["data"] != _data(run):
        raise ValueError("the run to resume was trained on other data: give the same puzzles")
    try:
        restore_arrays(
            {**run.head.parameters(), **run.head.buffers()}, saved["model"], "the run to resume"
        )
        run.optimizer.load_state_dict(saved["optimizer"])
        run.puzzle_optimizer.load_state_dict(saved["puzzle_optimizer"])
        if run.average is not None and saved["average"] is not None:
            run.average.load_state_dict(saved["average"])
        run.carry = None if saved["carry"] is None else _carry(saved["carry"])
        run.progress = type(run.progress)(**saved["progress"])
        pyloss.random.set_state(saved["random"])
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(file, None, f"not a readable trainer state: {error}") from error
    notes = notes_of_changes(_settings(run), saved["settings"])
    return [f"resuming after update {run.progress.iteration}", *notes]


def _settings(run: Any) -> dict[str, Any]:
    kept = {name: getattr(run.args, name) for name in ("global_batch_size", *_KEPT)}
    return kept | {"matmul_precision": get_matmul_precision()}


def _data(run: Any) -> str:
    """A fingerprint of the training data."""
    names = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")
    return values_digest({name: np.asarray(getattr(run.data, name)) for name in names})


def _carried(carry: Carry) -> dict[str, Any]:
    inner = carry.inner_carry
    arrays = {"z_H": inner.z_H, "z_L": inner.z_L, "steps": carry.steps, "halted": carry.halted}
    return {**arrays, "current_data": carry.current_data}


def _carry(saved: Mapping[str, Any]) -> Carry:
    inner = InnerCarry(saved["z_H"], saved["z_L"])
    return Carry(inner, saved["steps"], saved["halted"].astype(bool), dict(saved["current_data"]))


def _checked(tree: Any) -> dict[str, Any]:
    """The nested values of a state file. Raises TypeError or ValueError for others."""
    from pyloss.recursive.training import RecursiveProgress

    parts = (
        *("progress", "model", "optimizer", "puzzle_optimizer", "average", "carry", "random"),
        *("arch", "settings", "data"),
    )
    if not isinstance(tree, dict) or set(tree) != set(parts):
        raise ValueError(f"its parts are not {', '.join(parts)}")
    for name in ("progress", "model", "optimizer", "puzzle_optimizer", "arch", "settings"):
        if not isinstance(tree[name], dict):
            raise TypeError(f"{name} is {shown(tree[name])}; it must be a mapping")
    known = {each.name for each in fields(RecursiveProgress)}
    if set(tree["progress"]) != known:
        raise ValueError("progress is not a mapping of the counters of a run")
    return tree
