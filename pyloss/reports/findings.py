"""What the page of a run shows, gathered from its folder, its model and its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pyloss.evaluation import Difference, Evaluation, compare, measure
from pyloss.evaluation.metrics import LOSS_METRICS
from pyloss.models.text.chat_forms import as_text
from pyloss.reports.changes import Change, changes
from pyloss.reports.machine import machine
from pyloss.tuner.adapters.full import is_full
from pyloss.tuner.adapters.layout import adapter_place
from pyloss.tuner.adapters.switching import AdapterSwitch
from pyloss.tuner.data.report import describe, shared_prompts
from pyloss.tuner.run.metrics import read_metrics
from pyloss.tuner.run.run_folder import read_adapter_config

#: records whose losses are compared
LOSSES = 100
#: metrics of the answers
ANSWERS = ("exact-match", "contains", "f1")

Say = Callable[[str], None]


@dataclass
class Findings:
    """What is known of a run. Parts that could not be had are empty, and `notes` say why.

    Attributes:
        name: of the adapter's folder.
        config: the settings, as adapter_config.json has them.
        rows: the lines of metrics.jsonl.
        machine: names and values of the machine that made the report.
        data: lines about each split of the data.
        layers: the change of each weight.
        split: the split that was measured.
        losses, scores: differences to the base, by metric.
        counted: records of `losses`, records of `scores`.
        answers: the user's question, the whole prompt, the data's answer, that of the base, and
            that of the tuned model.
        notes: what is missing, and why.
    """

    name: str
    config: Mapping[str, Any]
    rows: list[dict[str, Any]]
    machine: dict[str, str] = field(default_factory=dict)
    data: dict[str, list[str]] = field(default_factory=dict)
    layers: list[Change] = field(default_factory=list)
    split: str = ""
    losses: dict[str, Difference] = field(default_factory=dict)
    scores: dict[str, Difference] = field(default_factory=dict)
    counted: tuple[int, int] = (0, 0)
    answers: list[tuple[str, str, str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def of_folder(adapter: str) -> Findings:
    """The settings and the curves. Raises FileNotFoundError where there is no adapter."""
    place, _ = adapter_place(adapter)
    if not place.is_dir():
        raise FileNotFoundError(f"no adapter in {place}: the folder does not exist")
    config = read_adapter_config(place)
    if not config:
        raise FileNotFoundError(f"no adapter in {place}: it has no adapter_config.json to read")
    found = Findings(Path(place).resolve().name, config, read_metrics(place), machine())
    if not found.rows:
        found.notes.append("There are no curves: the folder has no metrics.jsonl.")
    return found


def add_data(found: Findings, sets: Mapping[str, Any], max_seq_length: int) -> None:
    """Describes the splits."""
    for name, dataset in sets.items():
        lines = list(describe(dataset, max_seq_length))
        if name != "train" and "train" in sets:
            shared = shared_prompts(dataset, sets["train"])
            lines.append(f"prompts that train has, too: {shared:,} of {len(dataset):,}")
        found.data[name] = lines


def add_model(
    found: Findings,
    model: Any,
    tokenizer: Any,
    load_base: Callable[[], Any],
    sets: Mapping[str, Any],
    settings: SimpleNamespace,
    say: Say = lambda text: None,
) -> None:
    """Measures the changes of the layers, the losses and, with `settings.answers`, the answers.

    `load_base` loads the model without the adapter; it is called for full fine-tuning alone.
    """
    base = load_base() if is_full(model.adapter_config) else None
    say("comparing the weights")
    found.layers = changes(model, base)
    if not sets:
        return
    found.split = next(name for name in ("test", "valid", "train", "data") if name in sets)
    dataset = sets[found.split]
    evaluated: dict[str, list[Evaluation]] = {}
    for which in ("the adapter", "the base"):
        with _only(model, base, which) as chosen:
            for kind, metrics, limit in _asked(settings, dataset):
                say(f"{which}: {kind}")
                try:
                    result = measure(
                        chosen,
                        tokenizer,
                        dataset,
                        metrics,
                        max_tokens=settings.max_tokens,
                        max_seq_length=settings.max_seq_length,
                        limit=limit,
                    )
                except ValueError as error:  # records without answers or targets
                    note = f"There are no {kind}: {error}."
                    found.notes += [] if note in found.notes else [note]
                    continue
                evaluated.setdefault(kind, []).append(result)
    if len(both := evaluated.get("losses", [])) == 2:
        found.losses = compare(both[0], both[1])
        found.counted = (len(both[0].results), 0)
    if len(both := evaluated.get("answers", [])) == 2:
        found.scores = compare(both[0], both[1])
        found.counted = (found.counted[0], len(both[0].results))
        found.answers = [
            (
                _question(dataset, i),
                a.prompt or "",
                a.reference or "",
                b.answer or "",
                a.answer or "",
            )
            for i, (a, b) in enumerate(zip(both[0].results, both[1].results, strict=True))
        ]
        if cut := max(each.cut for each in both):
            found.notes.append(f"Up to {cut} answers were cut at {settings.max_tokens} tokens.")


def _question(dataset: Any, index: int) -> str:
    """The last text of a record before the answer."""
    messages = [m for m in dataset.conversation(index)[0] if m["role"] != "assistant"]
    text = as_text(messages[-1].get("content"))
    return text if isinstance(text, str) else str(text or "")


def _asked(settings: SimpleNamespace, dataset: Any) -> Iterator[tuple[str, tuple[str, ...], int]]:
    yield "losses", LOSS_METRICS, min(LOSSES, len(dataset))
    if settings.answers:
        yield "answers", ANSWERS, min(settings.prompts, len(dataset))


@contextmanager
def _only(model: Any, base: Any, which: str) -> Iterator[Any]:
    """The model with its adapter, or without."""
    if which == "the adapter":
        yield model
    elif base is not None:
        yield base
    else:
        switch = AdapterSwitch(model)
        switch.turn()
        try:
            yield model
        finally:
            switch.turn()
