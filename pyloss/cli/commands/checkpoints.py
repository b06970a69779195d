"""`pyloss checkpoints`: the adapters that a run has stored."""

from __future__ import annotations

import time

from pyloss.cli.commands.shared import Flags
from pyloss.io.console import out
from pyloss.tuner.run.stored import stored_checkpoints


def checkpoints(flags: Flags) -> int:
    """`pyloss checkpoints`: prints a line for each adapter."""
    rows: list[tuple[str, ...]] = [("name", "iteration", "train loss", "val loss", "saved", "file")]
    for found in stored_checkpoints(flags["adapter"]):
        losses = ("" if x is None else f"{x:.4f}" for x in (found.train_loss, found.val_loss))
        iteration = "" if found.iteration is None else str(found.iteration)
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.saved))
        rows.append((found.name, iteration, *losses, saved, found.path.name))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        out("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
    return 0
