"""The cache of many sequences: what steps of many sequences give, against each sequence alone."""

import numpy as np
import pytest
import tiny

from pyloss.models.config.delta_net import DeltaNet
from pyloss.models.config.gemma4 import Gemma4
from pyloss.models.config.mamba import Mamba2
from pyloss.models.config.mixture import Mixture
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.synthetic import random_model
from pyloss.models.transformer import MOST_ROWS

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXPERTS = {"mixture": Mixture(6, 2, 32, True)}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 20},
    "qwen2": {"attention_bias": True},
    "qwen3": {"sliding_window": 90, "layer_types": TYPES},
    "gemma2": {
        "sliding_window": 9, "layer_types": TYPES, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        "sliding_window": 9, "layer_types": TYPES, "rope_local_base_freq": 1000.0, "query_pre_attn_scalar": 8,
    },
    "gemma4_text": {
        "sliding_window": 9, "layer_types": TYPES, "gemma4": Gemma4(24, 1, True, 32, 300), "final_logit_softcapping": 2.0,
    },
    "gemma4_text with experts": {
        "sliding_window": 9, "layer_types": TYPES, "final_logit_softcapping": 2.0,
        "gemma4": Gemma4(24, attention_k_eq_v=True, num_global_key_value_heads=1, num_experts=6, top_k_experts=2, moe_intermediate_size=32),
    },
    "granite": {
        "embedding_multiplier": 12.0, "attention_multiplier": 0.35, "residual_multiplier": 0.22, "logits_scaling": 0.5,
    },
    "smollm3": {"sliding_window": 9, "layer_types": TYPES, "no_rope_layers": [0, 1, 0]},
    "ministral3": {
        "llama_4_scaling_beta": 0.4,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0,
            "attention_factor": 1.0,
        },
    },
    "olmo2": {},
    "olmo3": {"sliding_window": 9, "layer_types": TYPES},
    "phi3": {"sliding_window": 20, "partial_rotary_factor": 0.75},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "delta": DeltaNet(2, 4, 8, 16, 3),
    },
    "qwen3_5_moe_text": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "delta": DeltaNet(2, 4, 8, 16, 3),
        "mixture": Mixture(6, 2, 32, True, shared_size=64),
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "delta": DeltaNet(2, 4, 8, 16, 3),
        "mixture": Mixture(6, 2, 32, True, (1,), shared_size=64),
    },
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"], "mixture": Mixture(6, 2, 32, True, (0,), bias=True, scaling=1.5),
    },
    "granitemoe": EXPERTS,
    "granitemoeshared": {"mixture": Mixture(6, 2, 32, True, shared_size=64)},
    "granitemoehybrid": {
        "no_rope_layers": [0, 0, 0], "layer_types": ["mamba", "full_attention", "mamba"], "mamba": Mamba2(4, 32, 2, 12, 3),
    },
    "qwen2_moe": {"mixture": Mixture(6, 2, 32, False, shared_size=64)},
}  # fmt: skip


def alone(model, tokens, prompt):
    """The logits after `prompt` tokens and after each later one."""
    cache = model.make_cache()
    found = [model.step(tokens[:prompt], cache)]
    return found + [model.step(tokens[i : i + 1], cache) for i in range(prompt, len(tokens))]


def together(model, sequences, slots, most=lambda s: len(s)):
    """The logits of each sequence, which enter as slots become free and leave as they end.

    `sequences`: (tokens, length of the prompt).
    """
    cache, waiting = model.make_batch_cache(slots), list(range(len(sequences)))
    found, running = [[] for _ in sequences], {}
    while waiting or running:
        free = [slot for slot in range(slots) if slot not in running][: len(waiting)]
        entering = {slot: waiting.pop(0) for slot in free}
        cache.enter(
            {slot: (sequences[i][1], most(sequences[i][0])) for slot, i in entering.items()}
        )
        prompts = [sequences[i][0][: sequences[i][1]] for i in entering.values()]
        read = model.read_each(prompts, cache, list(entering))
        for i, logits in zip(entering.values(), read, strict=True):
            found[i].append(logits)
        running |= entering
        for slot in [
            slot for slot, i in running.items() if cache.lengths[slot] == len(sequences[i][0])
        ]:
            cache.release(slot)
            del running[slot]
        if running:
            here = sorted(running)
            tokens = [sequences[running[slot]][0][cache.lengths[slot]] for slot in here]
            for slot, logits in zip(here, model.step_each(tokens, cache, here).copy(), strict=True):
                found[running[slot]].append(logits)
    return found


def draw(rng, count, longest, vocabulary):
    for _ in range(count):
        prompt = int(rng.integers(1, longest))
        yield rng.integers(0, vocabulary, prompt + int(rng.integers(0, longest))), prompt


@pytest.mark.parametrize("format", ["f32", "q4_1"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_has_the_bits_of_one_sequence(family, format):
    config = ModelConfig(family.partition(" ")[0], **SHAPE, **FAMILIES[family])
    model = random_model(config, format)
    sequences = list(draw(np.random.default_rng(1), 9, 60, 97))
    for got, (tokens, prompt) in zip(together(model, sequences, 4), sequences, strict=True):
        np.testing.assert_array_equal(got, alone(model, tokens, prompt))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_sequences_are_taken_and_given(family):
    """A cache taken into a slot goes on as it does alone, and so does a copy of the slot."""
    model = random_model(ModelConfig(family.partition(" ")[0], **SHAPE, **FAMILIES[family]), "f32")
    rng = np.random.default_rng(2)
    cache = model.make_batch_cache(3)
    first = {0: rng.integers(0, 97, 45), 2: rng.integers(0, 97, 7)}
    more = {slot: rng.integers(0, 97, 9) for slot in first}
    cache.enter({slot: (len(tokens), 80) for slot, tokens in first.items()})
    begun = {slot: model.make_cache() for slot in first}
    for slot, tokens in first.items():
        model.step(tokens, begun[slot])
        cache.take(slot, begun[slot])
    found = model.read_each([more[slot][:5] for slot in (2, 0)], cache, [2, 0])
    kept = {slot: cache.sequence(slot) for slot in first}
    last = model.step_each([more[slot][5] for slot in (0, 2)], cache, [0, 2]).copy()
    for i, slot in enumerate(first):
        own = [
            model.step(more[slot][:5], begun[slot]),
            model.step(more[slot][5:6], begun[slot]),
            model.step(more[slot][6:], begun[slot]),
        ]
        again = model.step(more[slot][5:6], kept[slot]), model.step(more[slot][6:], kept[slot])
        # a layer with a window sums the rows of another part of its array
        close = {"rtol": 0, "atol": 1e-5}
        np.testing.assert_allclose(found[1 - i], own[0], **close)
        np.testing.assert_allclose(last[i], own[1], **close)
        np.testing.assert_allclose(again, own[1:], **close)
        assert kept[slot].length == begun[slot].length == len(first[slot]) + 9


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [float(i) for i in range(1, 9)],
    "original_max_position_embeddings": 40,
    "attention_factor": 1.1,
}


@pytest.mark.parametrize("window", [None, 20])
def test_sequences_that_outgrow_the_original_length(window):
    """Their keys are computed again, beside sequences that are shorter or were longer before."""
    config = ModelConfig("phi3", **SHAPE, rope_scaling=LONGROPE, sliding_window=window)
    model = random_model(config)
    sequences = list(draw(np.random.default_rng(2), 12, 70, 97))
    lengths = [(prompt, len(tokens)) for tokens, prompt in sequences]
    assert sum(prompt <= 40 < length for prompt, length in lengths) > 1
    assert any(length <= 40 for _, length in lengths) and any(p > 40 for p, _ in lengths)
    for got, (tokens, prompt) in zip(together(model, sequences, 4), sequences, strict=True):
        np.testing.assert_array_equal(got, alone(model, tokens, prompt))
        for step in (0, len(got) - 1):
            want = model(tokens[None, : prompt + step])[0, -1]
            np.testing.assert_allclose(got[step], want, rtol=0, atol=5e-5)


@pytest.mark.parametrize("slots", [1, 2, 5, 17, 33, 70])
def test_any_number_of_sequences(tmp_path, slots):
    """Also more than one step of the core has rows."""
    assert 33 > MOST_ROWS
    model = tiny.load_tiny(tmp_path / "model")
    sequences = list(draw(np.random.default_rng(2), 75, 12, 29))
    for got, (tokens, prompt) in zip(together(model, sequences, slots), sequences, strict=True):
        np.testing.assert_array_equal(got, alone(model, tokens, prompt))


def test_against_a_forward_pass_over_the_whole_sequence(tmp_path):
    model = tiny.load_tiny(tmp_path / "model", model_type="mistral", sliding_window=50)
    sequences = list(draw(np.random.default_rng(3), 5, 200, 29))
    for got, (tokens, prompt) in zip(together(model, sequences, 3), sequences, strict=True):
        np.testing.assert_allclose(got, model(tokens[None])[0][prompt - 1 :], atol=5e-5)


def test_a_prompt_in_parts_and_rows_that_move(tmp_path):
    """A long sequence makes the others move again and again."""
    model = tiny.load_tiny(tmp_path / "model")
    rng = np.random.default_rng(4)
    sequences = [(rng.integers(0, 29, n), p) for n, p in ((400, 3), (20, 10), (90, 80), (300, 1))]
    for got, (tokens, prompt) in zip(together(model, sequences, 3), sequences, strict=True):
        np.testing.assert_array_equal(got, alone(model, tokens, prompt))


def test_rows_stay_within_what_is_promised():
    model = random_model(ModelConfig("gemma3_text", **SHAPE, **FAMILIES["gemma3_text"]))
    cache = model.make_batch_cache(2)
    cache.enter({0: (5, 500), 1: (400, 410)})
    rng = np.random.default_rng(5)
    model.step(rng.integers(0, 97, 5), cache.prompt(0))
    model.step(rng.integers(0, 97, 400), cache.prompt(1))
    for _ in range(495):
        model.step_each([1], cache, [0])
    held = sum(store.nbytes for group in cache._groups.values() for store in group._stores)
    assert held <= model.cache_bytes([500, 410])
    assert cache.lengths.tolist() == [500, 400]


def test_wrong_tokens(tmp_path):
    model = tiny.load_tiny(tmp_path / "model")
    cache = model.make_batch_cache(2)
    cache.enter({0: (1, 5), 1: (1, 5)})
    for slot in (0, 1):
        model.step([1], cache.prompt(slot))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model.step_each([1, 29], cache, [0, 1])
