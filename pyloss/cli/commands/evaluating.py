"""`pyloss eval`: losses and scores of answers, of one model or of two side by side."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from pyloss import models
from pyloss.checks.numbers import whole
from pyloss.cli.commands.shared import Flags, base_of, join, move
from pyloss.cli.commands.training import note_other_targets, print_loss
from pyloss.distributed import group_of
from pyloss.errors import counted
from pyloss.evaluation import Difference, Evaluation, compare, measure, write_results
from pyloss.evaluation.comparison import RESAMPLES
from pyloss.evaluation.metrics import ANSWER_METRICS, COUNTED, LOSS_METRICS, read_metrics
from pyloss.io import bars
from pyloss.io.console import out, say
from pyloss.io.files import check_target, user_path
from pyloss.runtime import precision
from pyloss.tuner.adapters.layout import CONFIG_FILE, adapter_place
from pyloss.tuner.data.sources import read_sources
from pyloss.tuner.datasets import load_dataset
from pyloss.tuner.run.settings import DEFAULT_MODEL, merge_settings

_SECONDS = 10  # between lines of progress


def evaluate(flags: Flags) -> int:
    """`pyloss eval`: prints the metrics, and with --compare those of another model beside them."""
    split, output, base = flags.pop("split"), flags.pop("output"), flags.pop("compare")
    names = read_metrics(flags.pop("metric") or LOSS_METRICS)
    max_tokens = whole(flags.pop("max_tokens"), "--max-tokens", 1)
    answering = any(name in ANSWER_METRICS for name in names)
    defaults = {"adapter_path": None} | ({"batch_size": 16} if answering else {})
    settings = merge_settings(flags, flags.get("config"), {**defaults, "model": None})
    settings.model = settings.model or base_of(settings.adapter_path) or DEFAULT_MODEL
    settings.train, settings.test = split == "train", split == "test"
    group = join(settings.distributed)
    if output is not None:
        check_target(output, ending=".jsonl")
    data = " ".join(source.name for source in read_sources(settings.data or "hf_dataset"))
    say(
        f"model {settings.model}, adapter {settings.adapter_path or 'none'}, "
        f"data {data}, split {split}"
    )
    if names == LOSS_METRICS and output is None and base is None:
        model, _, dataset = _load(settings, split)
        print_loss(settings, model, dataset, split)
        return 0
    # Both are loaded before the first is measured, which may take long.
    loaded, beside = _load(settings, split), None
    if base is not None:
        other = _compared(settings, base)
        say(f"compared with model {other.model}, adapter {other.adapter_path or 'none'}")
        loaded_base = _load(other, split)
    found = _measured(settings, loaded, names, max_tokens)
    if base is None:
        _print(found)
    else:
        beside = _measured(other, loaded_base, names, max_tokens)
        _print_differences(found, beside, compare(found, beside))
    if output is not None:
        group.first(lambda: write_results(output, found, beside, settings.overwrite))
        say(f"wrote {output}")
    return 0


def _load(settings: SimpleNamespace, split: str) -> tuple[Any, Any, Any]:
    """The model, its tokenizer, and the split."""
    model, tokenizer = models.load(settings.model, adapter_path=settings.adapter_path)
    found = dict(zip(("train", "valid", "test"), load_dataset(settings, tokenizer), strict=True))
    if not found[split]:
        raise ValueError(f"no {split} data in {settings.data!r}")
    move(model, settings.device)
    return model, tokenizer, found[split]


def _compared(settings: SimpleNamespace, base: str) -> SimpleNamespace:
    """The settings of --compare: an adapter's folder or file, a model, or none."""
    other = SimpleNamespace(**vars(settings))
    other.adapter_path = None
    if base.lower() == "none":
        if settings.adapter_path is None:
            raise ValueError(
                "--compare none is the model without its adapter, and no adapter is given: "
                "give --adapter-path, or a model or adapter to compare with"
            )
        return other
    place = user_path(base)
    if adapter_place(base)[1] is not None or (place / CONFIG_FILE).is_file():
        other.adapter_path = str(place)
    else:
        other.model = base
    return other


def _measured(
    settings: SimpleNamespace,
    loaded: tuple[Any, Any, Any],
    names: tuple[str, ...],
    max_tokens: int,
) -> Evaluation:
    model, tokenizer, dataset = loaded
    if any(name in LOSS_METRICS for name in names):
        note_other_targets(settings)
    limit = settings.test_batches
    if limit == 0:
        raise ValueError("test_batches is 0; it must be at least 1, or -1 for all")
    with precision.matmul_precision(settings.matmul_precision):
        return measure(
            model,
            tokenizer,
            dataset,
            names,
            max_tokens=max_tokens,
            batch_size=settings.batch_size,
            max_seq_length=settings.max_seq_length,
            limit=None if limit == -1 else limit * settings.batch_size * group_of().size(),
            progress=_Progress(),
        )


class _Progress:
    """Says the number of answers at times, where `measure` shows no bar."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._said >= _SECONDS and not bars.possible():
            self._said = time.monotonic()
            say(f"{done}/{total} answers")


def _print(found: Evaluation) -> None:
    losses = [name for name in found.metrics if name in LOSS_METRICS]
    samples = counted(len(found.results), "sample")
    if losses:
        out(", ".join([*(f"{name} {found.scores[name]:.4f}" for name in losses), samples]))
    for name in found.metrics:
        if name not in losses:
            out(f"{name} {found.scores[name]:.4f}, {_how_many(found, name)}")
    _note_cut(found)


def _how_many(found: Evaluation, name: str) -> str:
    """The records that a metric counts: those that it gives 1, where it gives 0 or 1."""
    records = len(found.results)
    if name not in COUNTED:
        return f"mean of {records}"
    return f"{sum(result.scores[name] == 1 for result in found.results)} of {records}"


def _note_cut(found: Evaluation, whose: str = "") -> None:
    if found.cut:
        say(f"note: --max-tokens cut {counted(found.cut, 'answer')}{whose}")


def _print_differences(
    found: Evaluation, base: Evaluation, differences: dict[str, Difference]
) -> None:
    out(f"{'':11} {'model':>10} {'base':>10} {'difference':>11}   95 % interval")
    for name, d in differences.items():
        interval = f"{d.low:+.4f} to {d.high:+.4f}"
        out(f"{name:11} {d.score:10.4f} {d.base:10.4f} {d.difference:+11.4f}   {interval}")
    samples = counted(len(found.results), "sample")
    out(f"{samples}; paired bootstrap of {RESAMPLES} resamples")
    _note_cut(found, " of the model")
    _note_cut(base, " of the base")
    targets = [sum(result.targets for result in each.results) for each in (found, base)]
    if targets[0] != targets[1]:
        say(
            "note: the models' tokenizers or templates differ, and with them the target tokens "
            f"({targets[0]:g} and {targets[1]:g}): their losses are of different tokens"
        )
