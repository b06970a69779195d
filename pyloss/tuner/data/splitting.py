"""Cuts validation and test data off one set of records, the same ones in every run.

A hash of the record's content decides, so records keep their side when others are added. Records
with the same prompt, and records of one conversation, are on one side.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pyloss.models.text.chat_forms import as_text

log = logging.getLogger("pyloss")

#: the share of validation data in a file without a validation file beside it
DEFAULT_SPLIT = 0.05
#: keys of a record that name its conversation
_CONVERSATION_IDS = ("conversation_id", "session_id", "dialogue_id", "thread_id")


def check_shares(valid: float, test: float) -> None:
    """Raises `ValueError` unless both are at least 0 and something is left to train on."""
    for name, share in (("valid_split", valid), ("test_split", test)):
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise ValueError(
                f"{name} is {share!r:.80}, and must be a share of at least 0 and below 1, "
                "such as 0.05"
            )
    if valid + test >= 1:
        raise ValueError(
            f"valid_split {valid:g} and test_split {test:g} leave nothing to train on: "
            "their sum must be below 1"
        )


def split_keys(record: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Texts that put records on one side: two records that share one are not divided.

    `record` has one of the forms of datasets, `given` is the record of the file.
    """
    keys = [
        f"{name} {given[name]}"
        for name in _CONVERSATION_IDS
        if isinstance(given.get(name), (str, int)) and given[name] != ""
    ]
    messages = record.get("messages")
    if messages:
        asked = next((m for m in messages if m.get("role") == "user"), messages[0])
        prompt = as_text(asked.get("content"))
    else:
        prompt = record["prompt"] if "prompt" in record else record["text"]
    if not isinstance(prompt, str):
        prompt = json.dumps(prompt, sort_keys=True, default=str)
    return [*keys, "prompt " + " ".join(prompt.split())]


def cut(
    keys: Sequence[Sequence[str]], valid: float, test: float
) -> tuple[list[int], list[int], list[int]]:
    """Indices of the training, validation and test records, each in order.

    `keys` has the `split_keys` of each record. At least one group of records is left to train on,
    and then a share above 0 gets at least one. Raises `ValueError` for shares out of range.
    """
    check_shares(valid, test)
    groups = _groups(keys)
    order = sorted(groups)
    count = len(order)
    low = sum(place < valid for place, _ in order)
    high = sum(place >= 1 - test for place, _ in order)
    low = min(max(low, 1 if valid else 0), max(count - 1, 0))
    high = min(max(high, 1 if test else 0), max(count - 1 - low, 0))
    parts = order[low : count - high], order[:low], order[count - high :]
    train, valid_part, test_part = (sorted(i for g in part for i in groups[g]) for part in parts)
    return train, valid_part, test_part


def cut_train(
    found: Sequence[Any], places: Sequence[str | None], config: Any
) -> tuple[Any, Any, Any]:
    """`(train, valid, test)`, with the shares that `config` asks for cut off the training data.

    `places` names the origin of each split that there is. Raises `ValueError` for a share of a
    split that there is.
    """
    train, valid, test = found
    shares = {name: getattr(config, f"{name}_split", None) or 0.0 for name in ("valid", "test")}
    for (name, share), place in zip(shares.items(), places[1:], strict=True):
        if share and place is not None:
            raise ValueError(
                f"{name}_split is {share!r:.80}, but {place} has the {name} data: "
                "leave out one of them"
            )
    if not any(shares.values()) or not len(train):
        return train, valid, test
    cut_off = cut_dataset(train, shares["valid"], shares["test"])
    return cut_off[0], cut_off[1] or valid, cut_off[2] or test


def cut_dataset(dataset: Any, valid: float, test: float) -> tuple[Any, Any, Any]:
    """`(train, valid, test)` of a dataset's records, cut by the hash of their prompts."""
    check_shares(valid, test)
    dataset.check_all()
    keys = [split_keys(dataset.form(i), dataset.given(i)) for i in range(len(dataset))]
    parts = cut(keys, valid, test)
    counts = f"{len(parts[0]):,} records to train on, {len(parts[1]):,} to validate"
    counts += f", {len(parts[2]):,} to test" if test else ""
    shares = f"valid_split {valid:g}" + (f", test_split {test:g}" if test else "")
    log.info("Cut by a hash of the prompts (%s): %s", shares, counts)
    found = [dataset.select(part) if part else [] for part in parts]
    return found[0], found[1], found[2]


def _groups(keys: Sequence[Sequence[str]]) -> dict[tuple[float, str], list[int]]:
    """Records that share keys, directly or through others, under a number in [0, 1) and its hash.

    The number comes from the least hash of the group's keys.
    """
    above = list(range(len(keys)))

    def root(i: int) -> int:
        while above[i] != i:
            above[i] = above[above[i]]
            i = above[i]
        return i

    first: dict[str, int] = {}
    for i, names in enumerate(keys):
        for name in names:
            above[root(i)] = root(first.setdefault(name, i))
    members: dict[int, list[int]] = {}
    for i in range(len(keys)):
        members.setdefault(root(i), []).append(i)
    found = {}
    for group in members.values():
        # The least of several hashes is small; its own hash is not.
        digest = _hash(min(_hash(name) for i in group for name in keys[i]))
        found[int(digest[:13], 16) / 16**13, digest] = group
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
