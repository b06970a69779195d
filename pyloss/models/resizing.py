"""The tables of a model's tokens: more rows for new tokens, and a head of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pyloss.models.transformer import Model
from pyloss.nn import Embedding, Linear
from pyloss.weights.weight import Weight

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def add_tokens(
    model: Model, tokenizer: Any, tokens: Sequence[str], special: bool = False
) -> list[int]:
    """Adds tokens to the tokenizer, and rows to the embedding and the head; returns their ids.

    A token that exists keeps its id. New rows are the mean of the others, in the table's format; a
    head that is the embedding stays it. Rows that a table has already, as padding, are used before
    new ones are made. `special` tokens are left out of decoded texts on request, and never split.

    Adapters that are saved from then on carry the tables, as PEFT's do after
    `resize_token_embeddings`; to train the new rows, name the ids as `trainable_token_indices`, or
    the tables in `modules_to_save`.

    Raises TypeError or ValueError for tokens that are no texts or empty, ValueError for a model
    whose tables have adapters.
    """
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise TypeError(f"tokens must be a list of texts, not {tokens!r:.60}")
    if "" in tokens:
        raise ValueError("a token must not be empty")
    check_tables(model)
    (tokenizer.backend.add_special_tokens if special else tokenizer.backend.add_tokens)(
        list(tokens)
    )
    vars(tokenizer).pop("highest_id", None)
    resize(model, max(tokenizer.highest_id + 1, model.vocab_size))
    return [tokenizer.backend.token_to_id(token) for token in tokens]


def check_tables(model: Model) -> None:
    """Raises ValueError if the embedding or the head has an adapter."""
    for name, layer in tables(model).items():
        if not isinstance(layer, Embedding | Linear):
            raise ValueError(f"{name} has an adapter; fuse() or remove_lora_layers() first")


def tables(model: Model) -> dict[str, Any]:
    """The embedding, and the head if it is another layer, by name."""
    found = {EMBEDDING: model.model.embed_tokens}
    return found if model.lm_head is None else found | {HEAD: model.lm_head}


def resize(model: Model, rows: int) -> None:
    """Gives the tables `rows` rows, not fewer than they have; new ones are the mean of the others.

    Raises ValueError for fewer rows.
    """
    if rows < model.vocab_size:
        raise ValueError(f"rows is {rows}; the tables have {model.vocab_size}, and rows stay")
    for name, layer in tables(model).items():
        if layer.shape[0] == rows:
            continue
        dense = _dense(layer.weight)
        mean = dense.mean(axis=0, dtype=np.float64).astype(np.float32)
        more = np.tile(mean, (rows - len(dense), 1))
        set_table(model, name, _appended(layer.weight, dense, more))


def set_table(model: Model, name: str, weight: np.ndarray | Weight) -> None:
    """Replaces the table EMBEDDING or HEAD, frozen; a head gets zeros for new biases.

    Adapters that are saved then carry the tables, see `Model.own_tables`.
    """
    layer = tables(model)[name]
    if isinstance(layer, Linear):
        bias = layer.bias
        if bias is not None and len(bias) != weight.shape[0]:
            bias = np.concatenate([bias, np.zeros(weight.shape[0] - len(bias), np.float32)])
        made: Any = Linear.from_weight(weight, bias)
    else:
        made = Embedding.from_weight(weight)
    model.set_module(name, made.freeze().train(model.training))
    model.own_tables = True
    if model.config.vocab_size != weight.shape[0]:
        model.config = replace(model.config, vocab_size=int(weight.shape[0]))


def untie_head(model: Model) -> None:
    """Makes the head a layer of its own over the embedding's weight, which is not copied.

    An adapter over one of the two then changes that one alone. A head of its own stays.
    """
    if model.lm_head is None:
        check_tables(model)
        head = Linear.from_weight(model.model.embed_tokens.weight)
        model.lm_head = head.freeze().train(model.training)  # type: ignore[assignment]
        model.config = replace(model.config, tie_word_embeddings=False)


def tie_head(model: Model) -> None:
    """The opposite of `untie_head`: the embedding is the head."""
    model.lm_head = None
    model.config = replace(model.config, tie_word_embeddings=True)


def _dense(weight: np.ndarray | Weight) -> np.ndarray:
    return weight.dequantize() if isinstance(weight, Weight) else np.asarray(weight)


def _appended(
    weight: np.ndarray | Weight, dense: np.ndarray, more: np.ndarray
) -> np.ndarray | Weight:
    if not isinstance(weight, Weight):
        return np.concatenate([dense, more])
    g = weight.groups
    if not weight.can_requantize:
        return Weight.quantize(np.concatenate([dense, more]), "f32")
    if weight.columns is not None or (g is not None and (g.offsets is None or g.first)):
        return weight.quantize_alike(np.concatenate([dense, more]))
    rows = weight.quantize_alike(more)  # the other rows keep their bytes
    if g is not None and rows.groups is not None:
        g = g._replace(
            scales=np.concatenate([g.scales, rows.groups.scales]),
            offsets=np.concatenate([g.offsets, rows.groups.offsets]),
        )
    shape = weight.shape[0] + len(more), weight.shape[1]
    return Weight(np.concatenate([weight.raw, rows.raw]), weight.format, shape, groups=g)
