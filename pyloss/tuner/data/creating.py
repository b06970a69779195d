"""Makes the dataset for records: their keys select the layout and the class."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pyloss.tuner.data.dataset_classes import (
    ChatDataset,
    CompletionsDataset,
    RecordDataset,
    TextDataset,
)
from pyloss.tuner.data.layouts import (
    Converted,
    Layout,
    chat as chat_layout,
    continued,
    mapped,
    place_of,
    read_map,
    recognized,
)
from pyloss.tuner.data.records import Records, keys_of
from pyloss.tuner.data.targets import resolve_train_on


def create_dataset(data: Any, tokenizer: Any, config: Any) -> RecordDataset:
    """The dataset for `data`; the keys of its first record select layout and class.

    `config` may have `mask_prompt`, `train_on`, `map` (see `layouts.read_map`) and, as in mlx-lm,
    `prompt_feature`, `completion_feature`, `chat_feature` and `text_feature`. Raises `ValueError`
    for an empty dataset, for unknown keys, for text records with a masked prompt, and for
    preference pairs, unless `config` has `describing`: then their chosen answers are read.
    """
    if len(data) == 0:
        raise ValueError("the dataset is empty")
    layout, keys = _layout_of(data, config)
    if layout.note and not getattr(config, "describing", False):
        raise ValueError(f"{place_of(data, 0)}: {layout}: {layout.note}")
    given = data if layout.convert is None else Converted(data, layout)
    mask_prompt = bool(getattr(config, "mask_prompt", False))
    train_on = getattr(config, "train_on", None)
    dataset: RecordDataset
    if layout.form == "completion":
        dataset = CompletionsDataset(given, tokenizer, keys[0], keys[1], mask_prompt, train_on)
    elif layout.form == "messages":
        dataset = ChatDataset(given, tokenizer, keys[0], mask_prompt, train_on)
    elif resolve_train_on(train_on, mask_prompt) != "all":
        raise ValueError(
            f"records of {keys[0]!r} have no prompt to mask: leave out mask_prompt and train_on"
        )
    else:
        dataset = TextDataset(given, tokenizer, keys[0])
    dataset.layout = layout
    return dataset


_FORM_KEYS = {"completion": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}


def _layout_of(data: Any, config: Any) -> tuple[Layout, tuple[str, ...]]:
    """The layout of `data`, and the keys of its form.

    Raises `ValueError` that names the first record if its layout is not known.
    """
    features = [
        getattr(config, f"{name}_feature", None)
        for name in ("prompt", "completion", "chat", "text")
    ]
    prompt, completion, chat, text = (
        own or name
        for own, name in zip(features, ("prompt", "completion", "messages", "text"), strict=True)
    )
    first = data[0]
    if mapping := getattr(config, "map", None):
        try:
            layout = mapped(read_map(mapping), first)
        except ValueError as e:
            raise ValueError(f"{place_of(data, 0)}: {e}") from None
        return layout, _FORM_KEYS[layout.form]
    if prompt in first and completion in first:
        if isinstance(first[prompt], list):
            return continued(prompt, completion), _FORM_KEYS["messages"]
        return Layout("prompt and answer", (prompt, completion), "completion"), (prompt, completion)
    if chat in first:
        layout = chat_layout(chat, first, _keys(data))
        return layout, (chat,) if layout.convert is None else _FORM_KEYS["messages"]
    if text in first:
        return Layout("plain text", (text,), "text"), (text,)
    if any(features):
        expected = f"{prompt!r} and {completion!r}, or {chat!r}, or {text!r}"
        raise ValueError(
            f"{place_of(data, 0)}: the record's keys are {keys_of(first)}; expected {expected}"
        )
    try:
        layout = recognized(first, _keys(data))
    except ValueError as e:
        raise ValueError(f"{place_of(data, 0)}: {e}") from None
    return layout, _FORM_KEYS[layout.form]


def _keys(data: Any) -> Collection[str]:
    """The keys of all records; records of the hub share theirs."""
    return set().union(*data) if isinstance(data, Records) else set(data[0])
