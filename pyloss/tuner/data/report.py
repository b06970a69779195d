"""What training would make of data: lengths, what is cut, repeated, empty and trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from pyloss.errors import counted
from pyloss.models.text.chat_forms import as_text
from pyloss.tuner.data.splitting import split_keys

_BAR = 40  # characters of the longest bar
_ROWS = 10  # of the histogram


def describe(
    dataset: Any, max_seq_length: int, progress: Callable[[], None] = lambda: None
) -> Iterator[str]:
    """Lines about a dataset of `create_dataset`; `progress` is called after each record.

    Records that the chat template refuses are counted, and the first is told.
    """
    lengths, kept, trained, without = [], 0, 0, []
    refused: list[str] = []
    for i in range(len(dataset)):
        try:
            sample = dataset.sample(i)
        except ValueError as error:
            refused.append(str(error))
        else:
            cut = sample.cut(max_seq_length)
            lengths.append(len(sample.tokens))
            kept += len(cut.tokens)
            targets = int(np.count_nonzero(cut.weights))
            trained += targets
            if not targets:
                without.append(dataset.where(i))
        progress()
    yield f"records: {len(dataset):,} ({dataset.layout})"
    if note := getattr(dataset.layout, "note", ""):
        yield note
    if refused:
        yield f"unusable: {counted(len(refused), 'record')}; the first: {refused[0]}"
    if lengths:
        yield (
            f"tokens: {sum(lengths):,}; in a record {min(lengths):,} to {max(lengths):,}, "
            f"median {np.median(lengths):,.0f}, mean {np.mean(lengths):,.1f}"
        )
        yield from histogram(lengths)
    over = sum(length > max_seq_length for length in lengths)
    yield (
        f"over the window of {max_seq_length:,} tokens: {_share(over, len(lengths))}"
        + f"; {sum(lengths) - kept:,} tokens are cut" * bool(over)
    )
    yield from _repeated(dataset)
    empty = [dataset.where(i) for i in range(len(dataset)) if _is_empty(dataset.form(i))]
    yield f"empty: {_share(len(empty), len(dataset))}{_first(empty)}"
    yield f"trained: {trained / max(kept, 1):.1%} of the tokens (train_on {dataset.train_on})"
    if without:
        yield f"nothing to train on: {_share(len(without), len(dataset))}{_first(without)}"


def shared_prompts(dataset: Any, train: Any) -> int:
    """How many records of a dataset have a prompt that the training data have, too."""
    known = set(_prompts(train))
    return sum(prompt in known for prompt in _prompts(dataset))


def histogram(lengths: list[int]) -> Iterator[str]:
    """A line for each range of lengths with a bar and the number of records.

    The ranges have one width, a power of two; those from the 95th percentile on are in one line.
    """
    most = max(lengths)
    usual = min(int(np.percentile(lengths, 95)), most)
    width = 1
    while usual // width >= _ROWS:
        width *= 2
    rows = usual // width + 1
    counts = [0] * rows
    beyond = 0
    for length in lengths:
        if length // width < rows:
            counts[length // width] += 1
        else:
            beyond += 1
    bounds = [(i * width, (i + 1) * width - 1) for i in range(rows)]
    if beyond:
        bounds.append((rows * width, most))
        counts.append(beyond)
    first = next(i for i, count in enumerate(counts) if count)
    digits, size = len(f"{bounds[-1][1]:,}"), len(f"{max(counts):,}")
    for (low, high), count in list(zip(bounds, counts, strict=True))[first:]:
        bar = "#" * max(round(count / max(counts) * _BAR), 1 if count else 0)
        yield f"  {low:{digits},} to {high:{digits},}  {count:{size},} {bar}".rstrip()


def _repeated(dataset: Any) -> Iterator[str]:
    """How many records repeat an earlier one, or an earlier prompt with another answer."""
    records: set[str] = set()
    prompts: set[str] = set()
    same: list[str] = []
    asked = 0
    for i, prompt in enumerate(_prompts(dataset)):
        text = json.dumps(dataset.form(i), sort_keys=True, default=str)
        if text in records:
            same.append(dataset.where(i))
        elif prompt in prompts:
            asked += 1
        records.add(text)
        prompts.add(prompt)
    line = f"duplicates: {_share(len(same), len(dataset))}{_first(same)}"
    more = f"; with the first prompt of another: {_share(asked, len(dataset))}" if asked else ""
    yield line + more


def _prompts(dataset: Any) -> Iterator[str]:
    """The first prompt of each record, or its text."""
    for i in range(len(dataset)):
        yield split_keys(dataset.form(i), {})[-1]


def _is_empty(record: Mapping[str, Any]) -> bool:
    """Whether the text, the prompt, the completion or all that the assistant says is blank."""
    if "messages" not in record:
        return any(isinstance(text, str) and not text.strip() for text in record.values())
    said = [message for message in record["messages"] if message.get("role") == "assistant"]
    return not any(
        message.get("tool_calls") or _is_said(message.get("content")) for message in said
    )


def _is_said(content: Any) -> bool:
    text = as_text(content)
    return bool(text.strip() if isinstance(text, str) else text)


def _share(count: int, total: int) -> str:
    return f"{counted(count, 'record')}" + f" ({count / max(total, 1):.1%})" * bool(count)


def _first(places: list[str]) -> str:
    return f"; the first: {places[0]}" if places else ""
