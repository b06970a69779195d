"""SentencePiece's BPE vocabularies of GGUF as a `tokenizers.Tokenizer`, and back."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.io.gguf import BYTE, NORMAL, UNKNOWN, USER_DEFINED

#: stands for a space in pieces
SPACE = "▁"


def sentencepiece_tokenizer(
    tokens: list[str],
    scores: Any,
    kinds: list[Any],
    unknown: str | None,
    prefix: bool,
    path: str | os.PathLike[str],
) -> tokenizers.Tokenizer:
    """The tokenizer, without special tokens and the tokens around a text.

    SentencePiece joins the two neighbors whose union has the highest score. Here every pair that
    makes a piece is a merge, in the order of the scores. Characters without a piece become the
    tokens of their bytes.

    Args:
        scores: `tokenizer.ggml.scores`, as read.
        kinds: `tokenizer.ggml.token_type`; only ordinary tokens take part in merges.
        unknown: the token for text that is not in the vocabulary.
        prefix: whether a space is put before texts, and before text behind a special token.

    Raises:
        FormatError: damaged scores.
        ValueError: two pieces of one score, which merges could not tell apart.
    """
    name = "tokenizer.ggml.scores"
    if (
        not isinstance(scores, list)
        or len(scores) != len(tokens)
        or not all(type(score) is float for score in scores)
    ):
        raise FormatError(path, name, f"expected a list of {len(tokens)} numbers, one per token")
    if not all(map(math.isfinite, scores)):
        raise FormatError(path, name, "expected finite numbers")
    pieces = {
        token: score
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
        if kind == NORMAL and token
    }
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges_of(pieces, path, name),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    before: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    after: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return backend


def merges_of(
    pieces: dict[str, float], path: str | os.PathLike[str], name: str
) -> list[tuple[str, str]]:
    """The merges that join pieces as their scores do; the file `path` calls these `name`.

    ValueError for two pieces of one score, which merges could not tell apart.
    """
    by_score: dict[float, list[tuple[str, str]]] = {}
    for piece, score in sorted(pieces.items(), key=lambda item: -item[1]):
        own = [(left, right) for left, right in _cuts(piece) if left in pieces and right in pieces]
        if own:
            by_score.setdefault(score, []).extend(own)
    for score, group in by_score.items():
        made = list(dict.fromkeys(left + right for left, right in group))
        if len(made) > 1 and len(set("".join(made))) > 1:
            both = f"{shown(made[0])} and {shown(made[1])}"
            raise ValueError(f"{path}: {name}: {both} have the same, {score}, and no order")
        # Among pairs of one score the leftmost is joined: in a run of one character, the pair with
        # the longest left part.
        group.sort(key=_lengths, reverse=True)
    return [pair for group in by_score.values() for pair in group]


def _lengths(pair: tuple[str, str]) -> tuple[int, int]:
    return len(pair[0]), len(pair[1])


def _cuts(piece: str) -> Iterator[tuple[str, str]]:
    return ((piece[:i], piece[i:]) for i in range(len(piece) - 1, 0, -1))


def sentencepiece_metadata(
    content: dict[str, Any], tokens: list[str], kinds: list[int]
) -> dict[str, Any]:
    """The keys, without `tokenizer.ggml.`, of a tokenizer.json of BPE with byte fallback.

    `tokens` and `kinds` are the tokenizer's, by id. Raises ValueError if no scores give its tokens.
    """
    model = content["model"]
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            raise refused(f"{key} = {shown(model[key])} is not supported")
    merges = [
        (left, right)
        for left, right in (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    ]
    scores = _scores(merges)
    own_tokens, own_kinds = _pieces(model.get("unk_token"), tokens, kinds, scores)
    pieces, known = (
        {t for t, kind in zip(own_tokens, own_kinds, strict=True) if kind == NORMAL},
        set(merges),
    )
    for piece in pieces:
        for pair in _cuts(piece):
            if pair[0] in pieces and pair[1] in pieces and pair not in known:
                raise refused(
                    f"{shown(pair[0])} and {shown(pair[1])} are pieces that it does not merge"
                )
    return {
        "model": "llama",
        "pre": "default",
        "tokens": own_tokens,
        "scores": [
            scores.get(token, -float(len(merges) + i)) for i, token in enumerate(own_tokens)
        ],
        "token_type": own_kinds,
        "add_space_prefix": _space_prefix(content),
    }


def _scores(merges: list[tuple[str, str]]) -> dict[str, float]:
    """Scores of merged pieces, in the order of merges; mixed runs of a character share one."""
    scores: dict[str, float] = {}
    scattered: set[str] = set()
    spans: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(merges):
        piece = left + right
        span = spans.setdefault(piece, [rank, rank])
        if rank - span[1] > 1:
            if len(set(piece)) > 1:
                raise refused(
                    f"merges that make {shown(piece)} are not next to each other, "
                    "and pieces have one score"
                )
            scattered.add(piece[0])
        span[1] = rank
        scores.setdefault(piece, -float(rank))
    for character in sorted(scattered):
        runs = {piece: span for piece, span in spans.items() if set(piece) == {character}}
        first, last = min(span[0] for span in runs.values()), max(span[1] for span in runs.values())
        group = merges[first : last + 1]
        if any(left + right not in runs for left, right in group) or group != sorted(
            group, key=_lengths, reverse=True
        ):
            raise refused(f"merges that make runs of {character!r} are in no order of scores")
        scores |= dict.fromkeys(runs, -float(first))
    return scores


def _pieces(
    unknown: str | None, tokens: list[str], kinds: list[int], scores: dict[str, float]
) -> tuple[list[str], list[int]]:
    own_tokens, own_kinds = list(tokens), list(kinds)
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
    for i, token in enumerate(tokens):
        if token == unknown:
            own_kinds[i] = UNKNOWN
        elif token in bytes_:
            own_kinds[i] = BYTE
        elif kinds[i] == USER_DEFINED and SPACE in token:
            # Normalization makes this character from spaces, so text itself cannot contain it.
            if token in scores:
                own_kinds[i] = NORMAL
            own_tokens[i] = token if token in scores else token.replace(SPACE, " ")
    return own_tokens, own_kinds


def _space_prefix(content: dict[str, Any]) -> bool:
    """Whether a space is put before texts."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizers_, cuts = (
        _flat(content["normalizer"], "normalizers"),
        _flat(content["pre_tokenizer"], "pretokenizers"),
    )
    no_cut = [
        {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        }
    ]
    if normalizers_ == [replace] and cuts in ([], no_cut):
        return False
    if normalizers_ == [{"type": "Prepend", "prepend": SPACE}, replace] and cuts in ([], no_cut):
        return True
    if not normalizers_ and len(cuts) == 1 and cuts[0]["type"] == "Metaspace":
        scheme = cuts[0].get("prepend_scheme")
        if cuts[0]["replacement"] == SPACE and cuts[0].get("split") is False:
            if scheme == "first":
                warnings.warn(
                    "after special tokens llama.cpp will put a space that this tokenizer does not",
                    stacklevel=2,
                )
            return scheme != "never"
    raise refused(
        f"its normalizer is {normalizers_} and its pre-tokenizer {cuts}, "
        "which SentencePiece's BPE has not"
    )


def _flat(node: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if node is None:
        return []
    return (
        [step for part in node[inner] for step in _flat(part, inner)]
        if node["type"] == "Sequence"
        else [node]
    )


def refused(reason: str) -> ValueError:
    """The error for a tokenizer that GGUF cannot describe."""
    return ValueError(f"the tokenizer cannot be written as GGUF: {reason}")
