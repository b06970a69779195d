"""`pyloss data`: what training would make of data, and their conversion."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from pyloss import loading
from pyloss.cli.commands.shared import Flags
from pyloss.errors import counted
from pyloss.io.console import colored, out, say
from pyloss.io.files import check_target, replacing, user_path
from pyloss.io.outputs import output
from pyloss.tuner.data.preview import preview
from pyloss.tuner.data.report import describe, shared_prompts
from pyloss.tuner.data.sources import read_sources
from pyloss.tuner.datasets import load_whole
from pyloss.tuner.progress import ProgressReporter
from pyloss.tuner.run.settings import merge_settings


def data(flags: Flags) -> int:
    """`pyloss data`: prints a report on data and a sample, and with --write converts them."""
    target, form = flags.pop("write"), flags.pop("form")
    settings = merge_settings(flags, flags.get("config"))
    if target is not None:
        _check_target(target, settings.data)
    elif form is not None:
        raise ValueError("--as says the form of --write, which is not given")
    settings.describing = True
    tokenizer = loading.load_tokenizer(settings.model)
    found = load_whole(settings, tokenizer)
    if target is not None and len(found) > 1:
        raise ValueError(
            f"{settings.data} has the splits {', '.join(found)}, and --write takes one: "
            "give one of its files"
        )
    for name, dataset in found.items():
        if len(found) > 1:
            out(f"{name}:")
        progress = ProgressReporter(len(dataset))
        try:
            lines = list(describe(dataset, settings.max_seq_length, partial(progress.step, "")))
        finally:
            progress.close()
        for line in lines:
            out(line)
        if name != "train" and "train" in found:
            count = shared_prompts(dataset, found["train"])
            out(f"prompts that train has, too: {counted(count, 'record')}")
    first = next(iter(found.values()))
    try:
        out(preview(first, tokenizer, 1, max_seq_length=settings.max_seq_length, color=colored()))
    except ValueError as error:
        out(f"no sample: {error}")
    if target is not None:
        _write(target, first, form, settings.overwrite)
    return 0


def _check_target(target: str, source: str | list[str]) -> None:
    place = user_path(target)
    if place.suffix.lower() != ".jsonl":
        raise ValueError(f"--write {target}: give the name of a .jsonl file")
    check_target(place)
    read = [user_path(each.name) for each in read_sources(source)]
    if place.exists() and any(path.exists() and place.samefile(path) for path in read):
        raise ValueError(f"--write {target} is the file that is read: give another")


def _write(target: str, dataset: Any, form: str | None, overwrite: bool) -> None:
    """Writes the records, in the form "messages" or "pairs", or in that which they have."""
    records = [_in_form(dataset, i, form) for i in range(len(dataset))]
    place = user_path(target)
    with output(place, overwrite=overwrite), replacing(place) as part:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        part.write_text(text, encoding="utf-8", newline="\n")
    say(f"wrote {counted(len(records), 'record')} to {target}")


def _in_form(dataset: Any, index: int, form: str | None) -> dict[str, Any]:
    record: dict[str, Any] = dataset.form(index)
    tools = {"tools": record["tools"]} if "tools" in record else {}
    if form == "messages" and "messages" not in record:
        return {"messages": dataset.conversation(index)[0], **tools}
    if form == "pairs" and "prompt" not in record:
        messages = dataset.conversation(index)[0]
        texts = [message.get("content") for message in messages]
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"] or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{dataset.where(index)}: a record of the roles {', '.join(roles):.80} is no "
                "prompt with a completion, one text of the user and one of the assistant: "
                "leave out --as"
            )
        return {"prompt": texts[0], "completion": texts[1], **tools}
    return record
