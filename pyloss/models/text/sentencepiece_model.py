"""tokenizer.model, SentencePiece's own file, as a `tokenizers.Tokenizer`.

The `sentencepiece` package reads the file; its encoder is not used. A folder's tokens that are
special, and its flags, are in tokenizer_config.json, which `tokenizer_folder` reads.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.io.gguf import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from pyloss.models.text.gguf_sentencepiece import SPACE, merges_of
from pyloss.models.text.tokenizer_library import check_backend, check_charsmap, library

# SentencePiece's numbers of kinds of models; those of its kinds of pieces are GGUF's.
_UNIGRAM, _BPE = 1, 2
_NAMES = {3: "words", 4: "characters"}
# Below the sum of scores of other pieces. A text that spells the name of a byte's piece still
# becomes that piece where it has characters that are not in the vocabulary.
_NEVER = -1e6


class SentencePieceModel(NamedTuple):
    """A tokenizer, and the texts of the tokens that the file names: bos_token, eos_token, ..."""

    backend: tokenizers.Tokenizer
    special: dict[str, str]


def read_sentencepiece(file: Path, first_only: bool = False) -> SentencePieceModel:
    """The tokenizer of a tokenizer.model, without the tokens around a text.

    Where the model puts a space before a text, it is also put before each part of a text behind a
    special token; with `first_only` it is not.

    Raises:
        ImportError: the `sentencepiece` package is missing; names what installs it.
        FormatError: not such a file, or one that is damaged.
        ValueError: a kind of model that pyloss does not read.
    """
    proto = _parsed(file)
    tokens = [piece.piece for piece in proto.pieces]
    kinds = [piece.type for piece in proto.pieces]
    if not tokens:
        raise FormatError(file, None, "not a model of SentencePiece: it has no pieces")
    if len(set(tokens)) != len(tokens) or not all(type(token) is str for token in tokens):
        raise FormatError(file, "pieces", "expected different texts in UTF-8")
    training, normalizer = proto.trainer_spec, proto.normalizer_spec
    if training.treat_whitespace_as_suffix:
        raise ValueError(f"{file}: treat_whitespace_as_suffix is not supported")
    names = {"bos": training.bos_id, "eos": training.eos_id, "pad": training.pad_id}
    names["unk"] = next((i for i, kind in enumerate(kinds) if kind == UNKNOWN), -1)
    special = {
        f"{name}_token": tokens[i]
        for name, i in names.items()
        if 0 <= i < len(tokens) and kinds[i] in (CONTROL, UNKNOWN)
    }
    prefix = normalizer.add_dummy_prefix
    changes = prefix or normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
    # BPE finds a user's own pieces in the text as it is normalized, and never merges them. Where
    # only spaces change, they are added tokens, as GGUF has them.
    own = {token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED}
    bpe = training.model_type == _BPE
    cut = sorted(own, key=lambda piece: (-len(piece), piece)) if bpe and changes else []
    added = own if bpe and not changes else set()
    if added:
        tokens = [token.replace(SPACE, " ") if token in added else token for token in tokens]
    with library(file, "not a tokenizer"):
        backend = tokenizers.Tokenizer(_model(file, proto, tokens, kinds, special, bool(cut)))
        backend.normalizer = normalizers.Sequence(_normalizers(file, normalizer, first_only))
        steps: list[Any] = []
        if prefix and first_only:
            steps.append(
                pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
            )
        if cut:
            pattern = "|".join(map(re.escape, cut))
            steps.append(pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"))
        if steps:
            backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        after = [decoders.Strip(" ", 1, 0)] if prefix else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
        )
        backend.add_tokens(
            [
                tokenizers.AddedToken(token, special=kind != USER_DEFINED, normalized=False)
                for token, kind in zip(tokens, kinds, strict=True)
                if kind in (CONTROL, UNKNOWN) or (kind == USER_DEFINED and added)
            ]
        )
    check_backend(file, backend)
    return SentencePieceModel(backend, special)


def _parsed(file: Path) -> Any:
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ImportError(
            f"{file}: there is no tokenizer.json beside it, and reading this file needs the "
            "sentencepiece package: pip install 'pyloss[sentencepiece]'"
        ) from None
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError:
        raise FormatError(file, None, "not a model of SentencePiece") from None
    return proto


def _model(
    file: Path,
    proto: Any,
    tokens: list[str],
    kinds: list[int],
    special: dict[str, str],
    whole: bool,
) -> Any:
    """The model; with `whole`, a part of a text that is a piece is that piece."""
    training = proto.trainer_spec
    scores = [float(piece.score) for piece in proto.pieces]
    if not all(map(math.isfinite, scores)):
        raise FormatError(file, "scores", "expected finite numbers")
    if training.model_type == _BPE:
        pieces = {
            token: score
            for token, score, kind in zip(tokens, scores, kinds, strict=True)
            if kind == NORMAL and token
        }
        return models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges_of(pieces, file, "scores"),
            unk_token=special.get("unk_token"),
            fuse_unk=True,
            byte_fallback=training.byte_fallback,
            ignore_merges=whole,
        )
    if training.model_type != _UNIGRAM:
        name = _NAMES.get(training.model_type, shown(training.model_type))
        raise ValueError(f"{file}: models of {name} are not supported; supported are BPE, unigram")
    if "unk_token" not in special:
        raise FormatError(file, "pieces", "no piece for unknown text")
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == USER_DEFINED:
            scores[i] = 0.1 * len(token.encode()) - 0.1  # as SentencePiece 0.2.3 prefers them
        elif kind in (BYTE, UNUSED):
            scores[i] = _NEVER
    return models.Unigram(
        list(zip(tokens, scores, strict=True)),
        unk_id=tokens.index(special["unk_token"]),
        byte_fallback=training.byte_fallback,
    )


def _normalizers(file: Path, spec: Any, first_only: bool) -> list[Any]:
    """SentencePiece's steps before it cuts a text, in its order."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        check_charsmap(file, spec.precompiled_charsmap)
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        ends, runs = tokenizers.Regex(r"\A +| +\z"), tokenizers.Regex(" {2,}")
        steps += [normalizers.Replace(ends, ""), normalizers.Replace(runs, " ")]
    space = SPACE if spec.escape_whitespaces else " "
    if spec.add_dummy_prefix and not first_only:
        steps.append(normalizers.Prepend(space))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return steps
