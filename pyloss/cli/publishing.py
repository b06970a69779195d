"""A model's folder for others: its card, and its upload to the hub."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pyloss.cli import invocation
from pyloss.cli.commands.shared import Flags
from pyloss.io.cards import CARD_FILE, is_unedited, write_card
from pyloss.io.console import say
from pyloss.io.files import read_json


def check_publishing(flags: Flags) -> None:
    """Checks --push and --private before any work. Raises as `uploading.check_push`."""
    if flags["push"] is not None:
        from pyloss.models.uploading import check_push

        check_push(flags["push"])
    elif flags["private"]:
        raise ValueError("--private is for --push, which is not given")


def publish(
    flags: Flags,
    folder: Path,
    *,
    base: str | None = None,
    adapter: str | None = None,
    measured: Iterable[Sequence[str]] = (),
) -> None:
    """Writes the card of the model in `folder`, and uploads the folder with --push.

    `base` is the name of what it was made of; default: --model.
    """
    from pyloss.model_card import model_card

    name = flags["push"].rpartition("/")[2] if flags["push"] else folder.resolve().name
    text = model_card(
        name,
        base or flags["model"],
        invocation.words(),
        adapter,
        quantization=_quantization(folder),
        measured=measured,
    )
    if not write_card(folder, text):
        say(f"kept {folder / CARD_FILE}, which is yours: no model card was written")
    if flags["push"] is None:
        return
    from pyloss.models.saving import model_patterns
    from pyloss.models.uploading import push

    patterns: Any = model_patterns()
    names = sorted({path.name for pattern in patterns for path in folder.glob(pattern)})
    say(f"uploading {folder} to {flags['push']}")
    url = push(
        flags["push"],
        folder,
        [*names, CARD_FILE],
        replaced=patterns,
        private=flags["private"],
        own_card=is_unedited,
    )
    say(f"uploaded the model to {url}")


def _quantization(folder: Path) -> str | None:
    """The quantization that a model's configuration tells, such as "q4" or "nf4"; None: floats."""
    config = read_json(folder / "config.json")
    if isinstance(own := config.get("quantization"), dict):
        return f"q{own.get('bits')}"
    return "nf4" if "quantization_config" in config else None
