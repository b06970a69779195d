"""Scores of an answer against a reference, from 0 to 1, and the names of all metrics."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from pyloss.errors import nearest

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = frozenset(string.punctuation)


def exact_match(answer: str, reference: str) -> float:
    """1 if both are the same text, without white space at their ends."""
    return float(answer.strip() == reference.strip())


def contains(answer: str, reference: str) -> float:
    """1 if the reference, without white space at its ends, is a part of the answer.

    An empty reference is a part of an empty answer only.
    """
    wanted = reference.strip()
    return float(wanted in answer if wanted else not answer.strip())


def json_match(answer: str, reference: str) -> float:
    """1 if the answer is JSON and, if the reference is JSON too, the same data.

    The order of keys, white space and the notation of a number do not matter. NaN and Infinity are
    no JSON.
    """
    found = _parsed(answer)
    if found is None:
        return 0.0
    wanted = _parsed(reference)
    return float(wanted is None or _same(found[0], wanted[0]))


def _parsed(text: str) -> tuple[Any] | None:
    """The value of a JSON text, which may be null; None if the text is no JSON."""
    try:
        return (json.loads(text, parse_constant=_refuse),)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    # For Python true is 1; for JSON they differ.
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def f1(answer: str, reference: str) -> float:
    """The F1 of the words of both, as SQuAD 2.0's script computes it.

    Words are compared in lower case, without punctuation and without "a", "an" and "the". If one
    side has no words, the score is 1 if the other has none either.
    """
    found, wanted = _words(answer), _words(reference)
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return _ARTICLES.sub(" ", plain).split()


#: Metrics of the data's target tokens.
LOSS_METRICS = ("loss", "perplexity")
#: Metrics of a generated answer: functions of answer and reference, which give 0 to 1.
ANSWER_METRICS: dict[str, Callable[[str, str], float]] = {
    "exact-match": exact_match,
    "contains": contains,
    "json": json_match,
    "f1": f1,
}
#: Metrics that are 0 or 1, so that they can be counted.
COUNTED = ("exact-match", "contains", "json")
#: All metrics that `measure` takes.
METRICS = (*LOSS_METRICS, *ANSWER_METRICS)


def read_metrics(names: str | Iterable[str]) -> tuple[str, ...]:
    """The names of metrics, each once, from a list or a text with commas.

    Raises ValueError for a name that is no metric, and for none at all.
    """
    listed = names.split(",") if isinstance(names, str) else list(names)
    found = tuple(dict.fromkeys(str(name).strip().lower().replace("_", "-") for name in listed))
    for name in found:
        if name not in METRICS:
            near = nearest(name, METRICS)
            raise ValueError(
                f"metric {name!r:.60} is not known"
                + (f": did you mean {near}?" if near else ";")
                + f" allowed are {', '.join(METRICS)}"
            )
    if not found:
        raise ValueError(f"no metric is given; allowed are {', '.join(METRICS)}")
    return found
