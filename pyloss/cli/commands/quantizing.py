"""`pyloss quantize`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyloss.cli.commands.shared import Flags, flag_text, refuse_source
from pyloss.cli.publishing import check_publishing, publish
from pyloss.io.console import out, say
from pyloss.io.files import user_path

if TYPE_CHECKING:
    from pyloss.distillation.quantized import Tuned

_TUNING = (
    "iters", "learning_rate", "batch_size", "max_seq_length", "val_batches", "seed",
    "grad_checkpoint",
)  # fmt: skip
_DATA = ("valid_split", "map")


def quantize(flags: Flags) -> int:
    """`pyloss quantize`: writes a quantized copy of a model, tuned with --tune.

    Returns 1 if tuning did not help, so that the copy is untuned.
    """
    from pyloss import quantizing

    flags["model"] = flags.pop("source") or flags["model"]
    data = flags["tune_data"]
    given = [name for name in ("tune_data", *_TUNING, *_DATA) if flags[name] is not None]
    if flags["tune"] and data is None:
        raise ValueError("--tune needs text: give --tune-data, a file, folder or dataset")
    if given and not flags["tune"]:
        raise ValueError(f"{', '.join(map(flag_text, given))} belongs to --tune")
    refuse_source("output", flags)
    if flags["push"] is not None and flags["to"] in quantizing.FILES:
        raise ValueError(f"--push uploads folders, and --to {flags['to']} writes a file")
    check_publishing(flags)
    names = ("group_size", "dtype", "importance_data")
    try:
        found = quantizing.quantize(
            flags["model"],
            flags["output"],
            flags["to"],
            **{name: flags[name] for name in names},
            tune_data=data,
            tuning={name: flags[name] for name in _TUNING if flags[name] is not None},
            data_options={name: flags[name] for name in _DATA if flags[name] is not None},
            overwrite=flags["overwrite"],
            step=say,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: nothing is written") from None
    rows = [] if found is None else _qualities(found, flags["to"])
    if found is not None:
        _report(found, rows)
    say(f"saved the model to {flags['output']}")
    untuned = found is not None and not found.kept
    if untuned and flags["push"] is not None:
        say("the untuned model is not uploaded", True)
        flags["push"] = None
    if flags["to"] in quantizing.FOLDERS:
        # The last row is that of scales which the files do not have.
        publish(flags, user_path(flags["output"]), measured=rows[:-1] if untuned else rows)
    return int(untuned)


def _qualities(found: Tuned, to: str) -> list[tuple[str, str, str]]:
    """The table of qualities, its header first."""
    rows = [("", "KL from original", "perplexity"), ("original", "", f"{found.original:.3f}")]
    for name, quality in ((to, found.before), (f"{to}, tuned", found.after)):
        rows.append((name, f"{quality.divergence:.4f}", f"{quality.perplexity:.3f}"))
    return rows


def _report(found: Tuned, rows: list[tuple[str, str, str]]) -> None:
    """Prints the table, and says so if the model is untuned."""
    width = max(len(row[0]) for row in rows)
    for name, divergence, perplexity in rows:
        out(f"{name:{width}}  {divergence:>16}  {perplexity:>10}")
    if not found.kept:
        say("tuning brought the model no nearer to its original: it is written untuned", True)
