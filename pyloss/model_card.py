"""The model card: a README.md that says what a model was made of, how, and how well.

The front matter is what the Hugging Face hub reads. `pyloss.io.cards` tells a card from a README.md
of the user's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from pyloss.checks.durations import duration_text
from pyloss.io.cards import marked
from pyloss.tuner.adapters.layout import adapter_place
from pyloss.tuner.run.metrics import Row, column, read_metrics
from pyloss.tuner.run.run_folder import portable, read_adapter_config
from pyloss.tuner.run.settings import SCHEMA

# owner/name, owner/name:Q4_K_M, hf:owner/name/file.gguf
_ON_HUB = re.compile(r"(?:hf:)?([\w.-]+/[\w.-]+)(?::[\w-]+|/.+\.gguf)?")
# owner/name:CONFIG:SPLIT; a name without these may be a folder that is elsewhere
_DATASET = re.compile(r"([\w.-]+/[\w.-]+):[\w.-]*(?::[\w.-]*)?")
#: settings of a run that say nothing of its result
_OF_THE_MACHINE = (
    "adapter_path", "config", "overwrite", "report_to", "project_name", "train", "test", "preview",
    "resume", "device",
)  # fmt: skip


def model_card(
    name: str,
    base: str,
    command: Sequence[str],
    adapter: str | None = None,
    *,
    quantization: str | None = None,
    measured: Iterable[Sequence[str]] = (),
) -> str:
    """The text of a card.

    Args:
        name: of the model, its title.
        base: the model that it was made from, as for --model.
        command: the words of the command that wrote it; paths of this machine are left out.
        adapter: the adapter that was merged, a folder or a file; its settings, its data and the
            metrics of its run are told.
        quantization: of the model, such as "q4".
        measured: rows of a table of results, its header first.

    Raises FormatError for damaged metrics of the adapter's run.
    """
    config: Mapping[str, Any] = {}
    rows: list[Row] = []
    if adapter is not None:
        place, _ = adapter_place(adapter)
        config, rows = read_adapter_config(place), read_metrics(place)
    body = [
        *_front_matter(base, config, adapter is not None, quantization),
        f"# {name}",
        "",
        _summary(base, config, adapter is not None, quantization),
        "",
        *_training(config, adapter),
        *_results(rows),
        *_table("Quality", [list(row) for row in measured]),
        "## Command",
        "",
        "```sh",
        command_text(command),
        "```",
        "",
    ]
    return marked("\n".join(body))


def command_text(words: Sequence[str]) -> str:
    """A command as it is typed, with the last names of absolute paths and of those in a home."""
    import shlex

    def shown(word: str) -> str:
        flag, equals, value = word.partition("=")
        if equals and flag.startswith("--"):
            return f"{flag}={shown(value)}"
        return PurePath(word).name if word.startswith(("/", "~")) else word

    return shlex.join(["pyloss", *map(shown, words)])


def _hub_name(base: str) -> str | None:
    """The repository of a model's name, if that is one on the hub and no path."""
    match = _ON_HUB.fullmatch(base)
    return match[1] if match and not Path(base).exists() else None


def _front_matter(
    base: str, config: Mapping[str, Any], adapted: bool, quantization: str | None
) -> list[str]:
    lines = ["---"]
    if (repository := _hub_name(base)) is not None:
        relation = "finetune" if adapted else "quantized" if quantization else None
        lines.append(f"base_model: {json.dumps(repository)}")
        lines += [] if relation is None else [f"base_model_relation: {relation}"]
    mlx = quantization is not None and quantization != "nf4"
    lines += [f"library_name: {'mlx' if mlx else 'transformers'}", "pipeline_tag: text-generation"]
    if data := _datasets(config):
        lines += ["datasets:", *(f"- {json.dumps(name)}" for name in data)]
    kind = config.get("fine_tune_type")
    tags = ["pyloss", *([str(kind)] if adapted and kind in ("lora", "dora", "full") else [])]
    lines += ["tags:", *(f"- {tag}" for tag in [*tags, *(["mlx"] if mlx else [])]), "---", ""]
    return lines


def _datasets(config: Mapping[str, Any]) -> list[str]:
    """The names of the data that are certainly the hub's."""
    given = config.get("data")
    names = given if isinstance(given, list) else [given]
    matches = [_DATASET.fullmatch(name) for name in names if isinstance(name, str)]
    entries = config.get("hf_dataset")
    listed = entries if isinstance(entries, list) else [entries]
    paths = [entry.get("path") for entry in listed if isinstance(entry, dict)]
    found = [match[1] for match in matches if match and not Path(match[1]).exists()]
    return found + [path for path in paths if isinstance(path, str) and _hub_name(path)]


def _summary(base: str, config: Mapping[str, Any], adapted: bool, quantization: str | None) -> str:
    source = portable(base, "model")
    stored = f", quantized ({quantization})" if quantization else ""
    if not adapted:
        return f"Made of `{source}` by pyloss{stored}."
    kind = {"full": "full fine-tuning", "dora": "DoRA"}.get(
        str(config.get("fine_tune_type")), "LoRA"
    )
    prompt = config.get("system_prompt")
    text = f"`{source}`, fine-tuned by {kind} with pyloss{stored}. The adapter is merged."
    if isinstance(prompt, str):
        text += "\n\nIt was trained with this system prompt, which it needs:\n\n" + "\n".join(
            f"> {line}" for line in prompt.splitlines()
        )
    return text


def _training(config: Mapping[str, Any], adapter: str | None) -> list[str]:
    """Data and settings; the latter as a file for `pyloss train -c`, without the defaults."""
    if adapter is None:
        return []
    if "peft_type" in config:
        kept = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout")
        rows = [[key, str(config[key])] for key in kept if config.get(key) is not None]
        return _table("Adapter, written by PEFT", [["setting", "value"], *rows])
    settings = {
        key: value
        for key, value in portable(config).items()
        if key in SCHEMA
        and key not in _OF_THE_MACHINE
        and (key in ("model", "data") or value != SCHEMA[key].default)
        and value is not None
    }
    if not settings:
        return []
    data = settings.get("data")
    told = ", ".join(data) if isinstance(data, list) else data
    return [
        "## Training",
        "",
        *([f"Data: `{told}`", ""] if told else []),
        "`pyloss train -c settings.yaml`, with these settings:",
        "",
        "```yaml",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()),
        "```",
        "",
    ]


def _results(rows: list[Row]) -> list[str]:
    """The metrics of a run."""
    found: list[list[str]] = []
    for name, text in (("train_loss", "training"), ("val_loss", "validation")):
        losses = [(at, loss) for at, loss in column(rows, name) if math.isfinite(loss)]
        if not losses:
            continue
        best = min(losses, key=lambda pair: pair[1])
        for label, (at, loss) in (("first", losses[0]), ("lowest", best), ("last", losses[-1])):
            found.append([f"{text} loss, {label}", f"{loss:.4f} (iteration {at})"])
    if values := column(rows, "trained_tokens"):
        found.append(["tokens trained", f"{values[-1][1]:,.0f}"])
    if rows:
        found.append(["iterations", f"{rows[-1]['iteration']:,}"])
        if seconds := float(rows[-1].get("seconds") or 0):
            found.append(["time", duration_text(seconds)])
    return _table("Results of the run", [["", ""], *found] if found else [])


def _table(title: str, rows: list[list[str]]) -> list[str]:
    """A section with a table of Markdown; nothing without rows."""
    if len(rows) < 2:
        return []
    first, *others = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [first, ["---"] * len(first), *others]
    return [f"## {title}", "", *(f"| {' | '.join(row)} |" for row in lines), ""]
