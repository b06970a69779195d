"""What `pyloss info MODEL` says of a model: `describe_model`. Weights are mapped, not read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyloss.errors import FormatError, counted, size_text
from pyloss.io.files import read_json
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.files.quantized import Quantization
from pyloss.models.reading import config_file_of, read_model
from pyloss.models.synthetic import lacks_weights
from pyloss.nn import plain_parameters
from pyloss.tuner.run.settings import LORA_DEFAULTS

#: tokens of the rows for which memory is estimated
LENGTHS = (512, 2048)


def describe_model(place: Path) -> list[str]:
    """Lines about the model at `place`, as `pyloss.models.resolve_model` gives it.

    A folder without weights, or a config.json, is described by its configuration alone.

    Raises:
        ValueError: a model that pyloss refuses; the message names the block or format.
        FormatError: a malformed file.
        OSError: a file cannot be read.
    """
    if lacks_weights(place):
        folder = place if place.is_dir() else place.parent
        where = config_file_of(place) if place.is_dir() else place
        config = ModelConfig.from_hf(where)
        tokenizer = _of_tokenizer(folder, config.vocab_size)
        about = [*_of_config(config), *_other_inputs(where), *_of_quantization(where)]
        return [*about, "weights: none here", *tokenizer]
    model, file = read_model(place, values=False)
    metadata = None if place.is_dir() else file.metadata
    return [
        *_of_config(model.config),
        *(_other_inputs(config_file_of(place)) if place.is_dir() else ()),
        *(_of_quantization(config_file_of(place)) if place.is_dir() else ()),
        *_of_weights(model),
        *_of_tokenizer(place, model.vocab_size, metadata),
        *_of_training(model),
    ]


def _of_quantization(config: Path) -> Iterator[str]:
    """How a folder is quantized. Raises ValueError for a method that pyloss does not read."""
    quantization = Quantization.read(config)
    if quantization.method:
        becomes = ""
        if quantization.packed is not None:
            becomes = ", repacked as affine groups when it is loaded"
        elif quantization.float8 is not None:
            becomes = ", expanded to floats when it is loaded"
        yield f"quantization: {quantization.method}{becomes}"


def _of_config(c: ModelConfig) -> Iterator[str]:
    yield f"family: {c.model_type} ({c.family.architecture}; {c.gguf} in GGUF)"
    yield f"layers: {c.num_hidden_layers}: {_layers(c)}"
    heads = f"{counted(c.num_attention_heads, 'head')} of {c.head_dim}"
    yield (
        f"sizes: hidden {c.hidden_size}, MLP {c.intermediate_size}, {heads} with "
        f"{c.num_key_value_heads} for keys and values, vocabulary {c.vocab_size}"
        + (", head tied to the embedding" if c.tie_word_embeddings else "")
    )
    if c.gemma4 is not None:
        yield (
            f"Gemma 4: heads of {c.gemma4.global_head_dim} without a window, the keys and values "
            f"of {counted(c.gemma4.num_kv_shared_layers, 'layer')} shared, embeddings of "
            f"{c.gemma4.hidden_size_per_layer_input} for each layer"
        )
        if c.gemma4.num_experts:
            yield (
                f"experts beside the MLP: {c.gemma4.num_experts} of "
                f"{c.gemma4.moe_intermediate_size}, {c.gemma4.top_k_experts} per token"
            )
    scaling = c.rope_scaling
    kind = f", rotary positions scaled ({scaling['rope_type']})" if scaling else ""
    yield f"context: {c.max_position_embeddings} tokens{kind}"


def _layers(c: ModelConfig) -> str:
    """How many layers there are of each type."""
    kinds: Counter[str] = Counter()
    for i in range(c.num_hidden_layers):
        window = c.window(i)
        parts = [f"attention over {window} tokens" if window else "full attention"]
        if c.convolved(i):
            parts = [f"short convolution over {counted(window, 'token')}"]
        elif c.linear(i):
            parts = [f"gated delta rule, convolution over {counted(window, 'token')}"]
        elif c.scanned(i):
            parts = [f"scan of Mamba-2, convolution over {counted(window, 'token')}"]
        elif not c.rotated(i):
            parts.append("without positions")
        mixture = c.mixture
        if mixture is not None and i not in mixture.dense_layers:
            shared = f" and one of {mixture.shared_size}" if mixture.shared_size else ""
            parts.append(
                f"{mixture.count} experts of {mixture.size}, {mixture.active}{shared} per token"
            )
        kinds[", ".join(parts)] += 1
    return "; ".join(f"{count} with {kind}" for kind, count in kinds.items())


def _other_inputs(config_file: Path) -> Iterator[str]:
    kinds = [kind for kind in ("vision", "audio") if f"{kind}_config" in read_json(config_file)]
    if kinds:
        yield f"not read: the parts for {' and '.join(kinds)}; text alone is trained and answered"


def _of_weights(model: Any) -> Iterator[str]:
    sizes: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for weight in model.stored().values():
        sizes[weight.format] += weight.nbytes
        numbers[weight.format] += math.prod(weight.shape)
    for array in plain_parameters(model).values():
        sizes["f32"] += array.nbytes
        numbers["f32"] += array.size
    total = numbers.total()
    table = model.config.vocab_size * model.config.hidden_size
    tables = table * (1 if model.lm_head is None else 2)
    yield f"parameters: {total:,}, {tables:,} of them in embedding and head"
    parts = [f"{size / sizes.total():.1%} {format}" for format, size in sizes.most_common()]
    yield f"stored: {size_text(sizes.total())}: {', '.join(parts)}"


def _of_tokenizer(place: Path, vocabulary: int, metadata: Any = None) -> Iterator[str]:
    """The tokenizer and what its chat template takes; what is missing is said, not raised."""
    from pyloss.models.tokenizer import Tokenizer

    try:
        tokenizer = (
            Tokenizer.from_folder(place)
            if metadata is None
            else Tokenizer.from_gguf(metadata, place)
        )
    except (ImportError, OSError, ValueError, FormatError) as error:
        yield f"tokenizer: none that can be read ({error})"
        return
    more = len(tokenizer) - vocabulary
    note = f", {more} more than the model: a text with one of them is refused" if more > 0 else ""
    yield f"tokenizer: {len(tokenizer)} tokens{note}"
    template = tokenizer.chat_template
    if template is None:
        yield "chat template: none"
        return
    if isinstance(template, dict):
        yield f"chat templates: {', '.join(template)}"
    found = template_features(tokenizer)
    yield f"chat template: {', '.join(found) if found else 'user and assistant'}"


def template_features(tokenizer: Any) -> list[str]:
    """What a tokenizer's chat template takes; small conversations are rendered to find out."""
    user, mark = {"role": "user", "content": "Question"}, "XYZZY"
    tool = {
        "type": "function",
        "function": {"name": mark, "description": mark, "parameters": {"type": "object"}},
    }

    def text(messages: list[dict[str, Any]], **options: Any) -> str | None:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except (ValueError, TypeError):
            return None

    def shows(messages: list[dict[str, Any]], **options: Any) -> bool:
        return mark in (text(messages, **options) or "")

    def differs(name: str) -> bool:
        on, off = (
            text([user], add_generation_prompt=True, **{name: value}) for value in (True, False)
        )
        return on != off

    thought = {"role": "assistant", "content": "Answer", "reasoning_content": mark}
    source = tokenizer.chat_template
    sources = source.values() if isinstance(source, dict) else [source]
    features = {
        "system role": shows([{"role": "system", "content": mark}, user]),
        "tools": shows([user], tools=[tool]),
        "thinking, switched by enable_thinking": differs("enable_thinking"),
        "thinking": shows([user, thought]),
        "marks around the assistant's text": any(
            "{% generation" in s or "{%- generation" in s for s in sources
        ),
    }
    if features["thinking, switched by enable_thinking"]:
        del features["thinking"]
    return [name for name, has in features.items() if has]


def _of_training(model: Any) -> Iterator[str]:
    """The layers that adapters may lie over, and estimates for LoRA over all of them."""
    from pyloss.tuner.run.plan import estimate_memory
    from pyloss.tuner.utils import linear_to_lora_layers

    rank = LORA_DEFAULTS["rank"]
    linear_to_lora_layers(model, -1, dict(LORA_DEFAULTS))
    names = dict.fromkeys(
        name.rpartition(".")[0].split(".layers.")[-1].partition(".")[2]
        for name in model.trainable_parameters()
    )
    trained = sum(array.size for array in model.trainable_parameters().values())
    yield f"adapters: {', '.join(names)}"
    longest = model.config.max_position_embeddings
    for tokens in sorted({min(length, longest) for length in LENGTHS}):
        plain, recomputed = (
            size_text(estimate_memory(model, 1, tokens, grad_checkpoint=on)) for on in (False, True)
        )
        yield (
            f"LoRA of rank {rank} ({trained:,} parameters), 1 x {tokens} tokens: about {plain} of "
            f"memory, {recomputed} with --grad-checkpoint"
        )
