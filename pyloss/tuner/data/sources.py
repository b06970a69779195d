"""`--data` as sources: files, folders and datasets of the hub, and several of them with weights."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.checks.numbers import shown
from pyloss.io.files import user_path
from pyloss.tuner.data.dataset_classes import ConcatenatedDataset
from pyloss.tuner.data.files import STANDARD_INPUT, kind

_WEIGHT = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)", re.DOTALL)
#: a dataset of the hub, with its configuration and its split
_HUB = re.compile(r"([\w.-]+(?:/[\w.-]+)?):([\w.-]*)(?::(.+))?")


@dataclass(frozen=True)
class Source:
    """One source of data.

    Attributes:
        name: a path, "-" for standard input, or the name of a dataset on the hub.
        weight: its share of the training data, relative to those of the other sources.
        config, split: of a dataset on the hub; None: the default, and all splits.
    """

    name: str
    weight: float | None = None
    config: str | None = None
    split: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether this is one file of records, or a split of the hub, which are not divided yet."""
        path = user_path(self.name)
        if self.name == STANDARD_INPUT or self.split is not None:
            return True
        return not path.is_dir() and kind(path) is not None

    def __str__(self) -> str:
        return "standard input" if self.name == STANDARD_INPUT else self.name


def check_data(value: Any) -> str | list[str]:
    """`--data` as text, or a list of texts for several sources.

    Raises TypeError or ValueError for anything else, for weights of 0 and for one that is missing.
    """
    values = [value] if isinstance(value, str | os.PathLike) else value
    if not isinstance(values, list | tuple) or not values:
        raise TypeError("it must be a path, the name of a dataset on the hub, or a list of them")
    texts = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in values]
    if not all(isinstance(text, str) and text for text in texts):
        raise TypeError("it must be a path, the name of a dataset on the hub, or a list of them")
    read_sources(texts)
    return texts[0] if len(texts) == 1 else texts


def read_sources(value: str | Path | Sequence[str | Path]) -> list[Source]:
    """The sources that `data.jsonl`, `["a.jsonl:0.7", "b.jsonl:0.3"]` or `owner/name:config` name.

    What exists as a path is one, whatever its name. Raises ValueError for wrong weights.
    """
    values = [value] if isinstance(value, str | Path) else list(value)
    found = [_source(str(text)) for text in values]
    weighted = [source for source in found if source.weight is not None]
    if len(found) == 1 and weighted:
        raise ValueError(
            f"data {shown(values[0])} has a weight, which says a share beside other sources: "
            "give several, or leave it out"
        )
    if weighted and len(weighted) < len(found):
        missing = next(source for source in found if source.weight is None)
        raise ValueError(
            f"data {shown(missing.name)} has no weight, and others have one: "
            "give one to each, as a.jsonl:0.7 b.jsonl:0.3, or to none"
        )
    if any(source.weight == 0 for source in weighted):
        raise ValueError("a weight of the data is 0; it must be above 0")
    if sum(source.name == STANDARD_INPUT for source in found) > 1:
        raise ValueError("data name standard input, '-', more than once")
    return found


def _source(text: str) -> Source:
    if text == STANDARD_INPUT or user_path(text).exists():
        return Source(text)
    weight = None
    if match := _WEIGHT.fullmatch(text):
        text, weight = match[1], float(match[2])
        if text == STANDARD_INPUT or user_path(text).exists():
            return Source(text, weight)
    if (match := _HUB.fullmatch(text)) and kind(Path(match[1])) is None:
        return Source(match[1], weight, match[2] or None, match[3])
    return Source(text, weight)


def mixed(dataset: ConcatenatedDataset, weights: Sequence[float]) -> tuple[Any, list[int]]:
    """As many records as the parts have together, in the shares of their weights.

    A part that is too small for its share is repeated; of one that is too large, the same records
    are taken in every run. Returns the dataset and the number of records of each part.
    """
    sizes = [len(part) for part in dataset.parts]
    shares = np.array(
        [weight if size else 0.0 for weight, size in zip(weights, sizes, strict=True)]
    )
    wanted = shares / shares.sum() * sum(sizes)
    counts = np.floor(wanted).astype(int)
    for i in np.argsort(counts - wanted, kind="stable")[: sum(sizes) - counts.sum()]:
        counts[i] += 1
    parts = []
    for part, size, count in zip(dataset.parts, sizes, counts.tolist(), strict=True):
        whole, rest = divmod(count, size) if size else (0, 0)
        chosen = np.random.default_rng(0).permutation(size)[:rest]
        indices = np.sort(np.concatenate([np.tile(np.arange(size), whole), chosen]))
        parts.append(part.select(indices.tolist()))
    return ConcatenatedDataset(parts), counts.tolist()
