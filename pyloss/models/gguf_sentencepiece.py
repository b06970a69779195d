"""A SentencePiece BPE vocabulary of a GGUF file, as a `tokenizers.Tokenizer` that gives the same tokens."""

from __future__ import annotations

import math
import os
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from pyloss.errors import FormatError

NORMAL = 1  # of tokenizer.ggml.token_type
_SPACE = "▁"


def sentencepiece_tokenizer(
    tokens: list[str], scores: Any, kinds: list[Any], unknown: str | None, prefix: bool, path: str | os.PathLike[str]
) -> tokenizers.Tokenizer:
    """The tokenizer, without special tokens and what is put around a text.

    SentencePiece joins the two neighbours whose union has the highest score; here every pair that makes a piece is a merge,
    in the order of the scores. Characters that are no piece become the tokens of their bytes.

    Args:
        scores: `tokenizer.ggml.scores`, as read.
        kinds: `tokenizer.ggml.token_type`; ordinary tokens alone take part in merges.
        unknown: the token of what is not in the vocabulary.
        prefix: a text, and what follows a special token, begins with a space of its own.

    Raises:
        FormatError: damaged scores.
        ValueError: two pieces of one score, which merges could not tell apart.
    """
    name = "tokenizer.ggml.scores"
    if not isinstance(scores, list) or len(scores) != len(tokens) or not all(type(score) is float for score in scores):
        raise FormatError(path, name, f"expected a list of {len(tokens)} numbers, one per token")
    if not all(map(math.isfinite, scores)):
        raise FormatError(path, name, "expected finite numbers")
    pieces = {token: score for token, score, kind in zip(tokens, scores, kinds, strict=True) if kind == NORMAL and token}
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=_merges(pieces, path),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    before: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    after: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return backend


def _merges(pieces: dict[str, float], path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    last: tuple[float, str] | None = None
    for piece, score in sorted(pieces.items(), key=lambda item: -item[1]):
        cuts = [(piece[:i], piece[i:]) for i in range(len(piece) - 1, 0, -1)]
        own = [(left, right) for left, right in cuts if left in pieces and right in pieces]
        if not own:
            continue
        if last is not None and last[0] == score:
            raise ValueError(f"{path}: tokenizer.ggml.scores: {last[1]!r} and {piece!r} have the same, {score}, and no order")
        last = (score, piece)
        merges += own
    return merges
