"""Cuts validation and test data off one set of records, the same ones in every run.

A hash of the record's content decides, so records keep their side when others are added. Records
with the same prompt, and records of one conversation, are on one side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pyloss.models.text.chat_forms import as_text

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
