"""Preview of the training data: decoded samples with their target tokens marked."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from pyloss.io.console import visible
from pyloss.tuner.data.dataset_classes import CacheDataset

MARKS = ("[+", "+]")
_COLORS = ("\x1b[32m", "\x1b[0m")


def preview(
    dataset: Any, tokenizer: Any, n: int = 1, max_seq_length: int | None = None, color: bool = False
) -> str:
    """The first `n` samples of `dataset` as text, with targets between `[+` and `+]`.

    `color` also shows the targets in green. A header line gives each sample's number of tokens
    and of targets. `max_seq_length` cuts the samples as training does. Control characters other
    than tabs and line breaks are escaped, as in `\\x1b`. Raises `ValueError` for an empty dataset.
    """
    cache = dataset if isinstance(dataset, CacheDataset) else CacheDataset(dataset)
    if not len(cache):
        raise ValueError("the dataset is empty: there is nothing to show")
    first, last = (a + b for a, b in zip(MARKS, _COLORS, strict=True)) if color else MARKS
    blocks = []
    for i in range(min(n, len(cache))):
        whole = cache.sample(i)
        sample = whole if max_seq_length is None else whole.cut(max_seq_length)
        trained = [bool(w) for w in sample.weights]
        cut = "" if sample is whole else f", cut from {len(whole.tokens)}"
        lines = [
            f"sample {i}: {len(trained)} tokens{cut}, {sum(trained)} of them targets (between "
            f"{MARKS[0]} and {MARKS[1]})"
        ]
        if not any(trained):
            lines[0] += ": nothing to train on, the sample is skipped"
        text = ""
        for is_target, run in groupby(
            zip(trained, sample.tokens, strict=True), key=lambda pair: pair[0]
        ):
            part = visible(tokenizer.decode([token for _, token in run]))
            text += first + part + last if is_target else part
        blocks.append("\n".join([*lines, text]))
    return "\n\n".join(blocks)
