"""`pyloss report`: the page about a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pyloss import models
from pyloss.checks.numbers import whole
from pyloss.cli.commands.shared import Flags, move
from pyloss.io.console import say
from pyloss.io.files import check_target, user_path, write_text
from pyloss.io.outputs import output
from pyloss.tuner.adapters.layout import adapter_place
from pyloss.tuner.datasets import load_dataset
from pyloss.tuner.run.run_folder import REPORT_FILE
from pyloss.tuner.run.settings import merge_settings, resumed_settings


def report(flags: Flags) -> int:
    """`pyloss report`: writes the page and says where it is."""
    from pyloss.reports import findings
    from pyloss.reports.page import page

    adapter, target = flags.pop("adapter"), flags.pop("output")
    answers, prompts = flags.pop("answers"), whole(flags.pop("prompts"), "--prompts", 1)
    max_tokens = whole(flags.pop("max_tokens"), "--max-tokens", 1)
    place = user_path(target) if target else adapter_place(adapter)[0] / REPORT_FILE
    if place.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {target}: give the name of an .html file")
    found = findings.of_folder(adapter)
    check_target(place)
    saved = resumed_settings(found.config) if "peft_type" not in found.config else {}
    settings = merge_settings(flags, None, saved)
    settings.answers, settings.prompts, settings.max_tokens = answers, prompts, max_tokens
    if "peft_type" in found.config and not flags.get("model"):
        settings.model = found.config.get("base_model_name_or_path") or settings.model
    loaded = _loaded(settings, adapter, bool(flags.get("model")), found.notes)
    if loaded is not None:
        model, tokenizer = loaded
        sets = _data(settings, tokenizer, bool(flags.get("data")), found.notes)
        say("reading the data")
        findings.add_data(found, sets, settings.max_seq_length)
        move(model, settings.device)
        findings.add_model(found, model, tokenizer, lambda: _base(settings), sets, settings, say)
    for note in found.notes:
        say(f"note: {note}")
    with output(place, overwrite=settings.overwrite):
        write_text(place, page(found))
    say(f"wrote {place}")
    return 0


def _loaded(
    settings: SimpleNamespace, adapter: str, given: bool, notes: list[str]
) -> tuple[Any, Any] | None:
    """The model with the adapter, and its tokenizer; None where the run's model is not found."""
    try:
        models.resolve_model(settings.model)
    except FileNotFoundError as error:
        if given:
            raise
        notes.append(f"Metrics, answers, layers and data are missing; give --model: {error}.")
        return None
    return models.load(settings.model, adapter_path=adapter)


def _base(settings: SimpleNamespace) -> Any:
    model, _ = models.load(settings.model)
    move(model, settings.device)
    return model


def _data(
    settings: SimpleNamespace, tokenizer: Any, given: bool, notes: list[str]
) -> dict[str, Any]:
    """The splits of the data; none where those of the run are not found."""
    settings.train, settings.test = True, False
    name = settings.data
    # An adapter keeps the last part of an absolute path: no name of a dataset on the hub.
    local = isinstance(name, str) and "/" not in name.removeprefix("./")
    if not given and local and not user_path(name).exists():
        notes.append(
            f"Metrics, answers and data are missing: there is no {name!r} here; give --data."
        )
        return {}
    try:
        splits = load_dataset(settings, tokenizer)
    except (ValueError, OSError, ImportError) as error:
        if given:
            raise
        notes.append(f"Metrics, answers and data are missing; give --data: {error}.")
        return {}
    found = dict(zip(("train", "valid", "test"), splits, strict=True))
    return {name: dataset for name, dataset in found.items() if len(dataset)}
