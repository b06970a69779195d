"""GGUF metadata: its facts are read, and options that would change results are refused."""

import numpy as np
import pytest
from configurations import EMBEDDING, GGUF, LLAMA3, YARN, windows

from pyloss.errors import FormatError
from pyloss.io.tensor_file import StoredTensor
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.config.rope_scaling import llama3_factors


def stored(name, array):
    array = np.asarray(array, np.float32)
    return StoredTensor("m.gguf", name, "F32", array.shape, array.view(np.uint8).reshape(-1))


def test_gguf_switches_come_from_the_tensors():
    config = ModelConfig.from_gguf(GGUF, EMBEDDING)
    assert config.tie_word_embeddings and not config.attention_bias and not config.mlp_bias
    more = {
        **EMBEDDING,
        **dict.fromkeys(("output.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate.bias")),
    }
    config = ModelConfig.from_gguf(GGUF, more)
    assert not config.tie_word_embeddings and config.attention_bias and config.mlp_bias


def test_gguf_of_families():
    for name in ("qwen2", "qwen3"):
        metadata = {key.replace("llama.", f"{name}."): value for key, value in GGUF.items()} | {
            "general.architecture": name
        }
        config = ModelConfig.from_gguf(metadata, {**EMBEDDING, "blk.0.attn_q.bias": None})
        assert config.model_type == name and config.head_dim == 64
        # A qwen2 model always has biases of q, k and v, so its configuration does not say so.
        assert config.attention_bias == (name == "qwen3")


def test_gguf_of_gemma():
    metadata = {key.replace("llama.", "gemma3."): value for key, value in GGUF.items()} | {
        "general.architecture": "gemma3"
    }
    config = ModelConfig.from_gguf({**metadata, "gemma3.attention.sliding_window": 512}, EMBEDDING)
    assert windows(config) == ([512] * 5 + [0]) * 5
    assert (config.rope_theta, config.rope_local_base_freq, config.query_pre_attn_scalar) == (
        1e5,
        1e4,
        64,
    )
    more = {
        "gemma3.attention.sliding_window": 8,
        "gemma3.attention.sliding_window_pattern": 2,
        "gemma3.rope.freq_base_swa": 5e3,
    }
    config = ModelConfig.from_gguf({**metadata, **more}, EMBEDDING)
    assert windows(config) == [8, 0] * 15 and config.rope_local_base_freq == 5e3
    assert windows(ModelConfig.from_gguf(metadata, EMBEDDING)) == [0] * 30
    largest = {**metadata, "gemma3.block_count": 62, "gemma3.embedding_length": 900}
    assert ModelConfig.from_gguf(largest, EMBEDDING).query_pre_attn_scalar == 100
    with pytest.raises(ValueError, match="gemma3.final_logit_softcapping 30.0"):
        ModelConfig.from_gguf({**metadata, "gemma3.final_logit_softcapping": 30.0}, EMBEDDING)


def of(arch, **changes):
    """The metadata of another architecture."""
    own = {key.replace("llama.", f"{arch}."): value for key, value in GGUF.items()}
    changes = {f"{arch}.{key.replace('__', '.')}": value for key, value in changes.items()}
    return {**own, "general.architecture": arch, **changes}


def test_gguf_of_smollm3():
    """llama.cpp knows the interval of layers without rotary positions."""
    config = ModelConfig.from_gguf(of("smollm3"), EMBEDDING)
    assert [i for i in range(30) if not config.rotated(i)] == [3, 7, 11, 15, 19, 23, 27]
    assert ModelConfig.from_gguf(of("smollm3", block_count=3), EMBEDDING).no_rope_layers is None


def test_gguf_of_olmo():
    """Both have one architecture; the windows tell them apart."""
    assert ModelConfig.from_gguf(of("olmo2"), EMBEDDING).model_type == "olmo2"
    without = of("olmo2", attention__sliding_window=0)
    assert ModelConfig.from_gguf(without, EMBEDDING).model_type == "olmo2"
    windowed = of("olmo2", attention__sliding_window=8, rope__scaling__factor=2.0)
    config = ModelConfig.from_gguf(windowed, EMBEDDING)
    assert config.model_type == "olmo3" and windows(config) == ([8] * 3 + [0]) * 7 + [8] * 2
    assert (config.rope_theta, config.rope_local_base_freq) == (1e5, 1e5)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    key = "olmo2.attention.sliding_window_pattern"
    for pattern, expected in ((2, [8, 0] * 15), ([False, True, True] * 10, [0, 8, 8] * 10)):
        assert windows(ModelConfig.from_gguf({**windowed, key: pattern}, EMBEDDING)) == expected
    with pytest.raises(FormatError, match="layer_types names 3 layers"):
        ModelConfig.from_gguf({**windowed, key: [True, True, False]}, EMBEDDING)
    with pytest.raises(FormatError, match=key):
        ModelConfig.from_gguf({**windowed, key: [1, 0] * 15}, EMBEDDING)
    with pytest.raises(ValueError, match="rope.freq_base_swa 5000.0 is not supported"):
        ModelConfig.from_gguf({**windowed, "olmo2.rope.freq_base_swa": 5e3}, EMBEDDING)


def test_gguf_of_gemma_2():
    """Early files lack the caps and the window, and llama.cpp takes the published ones."""
    metadata = {key.replace("llama.", "gemma2."): value for key, value in GGUF.items()}
    metadata |= {"general.architecture": "gemma2", "gemma2.context_length": 8192}
    config = ModelConfig.from_gguf(metadata, EMBEDDING)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50, 30)
    windows = [config.window(i) for i in range(config.num_hidden_layers)]
    assert windows == [0 if i % 2 else 4096 for i in range(len(windows))]
    given = {"gemma2.attn_logit_softcapping": 20.0, "gemma2.final_logit_softcapping": 10.0}
    config = ModelConfig.from_gguf({**metadata, **given}, EMBEDDING)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (20, 10)
    largest = {**metadata, "gemma2.block_count": 46, "gemma2.embedding_length": 900}
    layers = {f"blk.{i}.attn_q.weight": EMBEDDING["token_embd.weight"] for i in range(46)}
    config = ModelConfig.from_gguf(largest, {**EMBEDDING, **layers})
    assert config.query_pre_attn_scalar == 900 // config.num_attention_heads
    with pytest.raises(FormatError, match="final_logit_softcapping is 0.0; it must be"):
        ModelConfig.from_gguf({**metadata, "gemma2.final_logit_softcapping": 0.0}, EMBEDDING)


def test_gguf_of_granite():
    granite = {key.replace("llama.", "granite."): value for key, value in GGUF.items()}
    granite |= {"general.architecture": "granite", "granite.logit_scale": 8.0}
    config = ModelConfig.from_gguf(granite, EMBEDDING)
    assert (config.embedding_factor, config.residual_multiplier, config.logits_scaling) == (1, 1, 8)
    assert config.attention_scale == 64**-0.5  # llama.cpp's default
    scales = {"attention.scale": 0.0, "embedding_scale": 12.0, "residual_scale": 0.22}
    more = {f"granite.{key}": value for key, value in scales.items()}
    config = ModelConfig.from_gguf({**granite, **more}, EMBEDDING)
    assert (config.embedding_factor, config.residual_multiplier) == (12, 0.22)
    assert config.attention_scale == 64**-0.5
    config = ModelConfig.from_gguf({**granite, "granite.attention.scale": 0.015625}, EMBEDDING)
    assert config.attention_scale == 0.015625
    config = ModelConfig.from_gguf({**granite, "granite.rope.scaling.finetuned": False}, EMBEDDING)
    assert config.model_type == "granitemoehybrid" and config.mixture is None
    assert not any(config.rotated(i) for i in range(config.num_hidden_layers))
    mixture = {key.replace("granite.", "granitemoe."): value for key, value in granite.items()}
    mixture |= {"general.architecture": "granitemoe", "granitemoe.expert_count": 4}
    mixture["granitemoe.expert_used_count"] = 2
    assert ModelConfig.from_gguf(mixture, EMBEDDING).model_type == "granitemoe"
    with pytest.raises(ValueError, match="granitemoe.rope.scaling.finetuned false is not support"):
        ModelConfig.from_gguf({**mixture, "granitemoe.rope.scaling.finetuned": False}, EMBEDDING)
    mixture["granitemoe.expert_shared_feed_forward_length"] = 48
    config = ModelConfig.from_gguf(mixture, EMBEDDING)
    assert (config.model_type, config.mixture.shared_size) == ("granitemoeshared", 48)
    with pytest.raises(FormatError, match="granite.logit_scale: this key is missing"):
        ModelConfig.from_gguf(
            {key: value for key, value in granite.items() if key != "granite.logit_scale"},
            EMBEDDING,
        )


def test_gguf_of_phi3():
    phi3 = {key.replace("llama.", "phi3."): value for key, value in GGUF.items()}
    phi3 |= {"general.architecture": "phi3", "phi3.rope.dimension_count": 48}
    config = ModelConfig.from_gguf(phi3, EMBEDDING)
    assert (config.head_dim, config.rotary_dim, config.partial_rotary_factor) == (64, 48, 0.75)
    assert config.rope_scaling is None and config.sliding_window is None
    assert (
        ModelConfig.from_gguf({**phi3, "phi3.rope.dimension_count": 22}, EMBEDDING).rotary_dim == 22
    )
    windowed = ModelConfig.from_gguf({**phi3, "phi3.attention.sliding_window": 2047}, EMBEDDING)
    assert windows(windowed) == [2047] * 30
    scaled = {
        "phi3.rope.scaling.original_context_length": 4096,
        "phi3.rope.scaling.attn_factor": 1.25,
    }
    factors = {
        name: stored(name, np.linspace(1, last, 24))
        for name, last in (("rope_factors_short.weight", 2), ("rope_factors_long.weight", 50))
    }
    scaling = ModelConfig.from_gguf({**phi3, **scaled}, {**EMBEDDING, **factors}).rope_scaling
    assert scaling["original_max_position_embeddings"] == 4096
    assert scaling["attention_factor"] == 1.25 and scaling["rope_type"] == "longrope"
    assert (scaling["short_factor"][-1], scaling["long_factor"][-1]) == (2.0, 50.0)


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({}, {"rope_factors_long.weight": 24}, "short.weight: this tensor is missing beside rope_"),
        ({}, {"rope_factors_short.weight": 24}, "long.weight: this tensor is missing beside rope_"),
        ({"rope.scaling.type": "longrope"}, {}, "rope_factors_long.weight: this tensor is missing"),
        (
            {},
            {"rope_factors_short.weight": 24, "rope_factors_long.weight": 32},
            r"rope_factors_long.weight: has shape \(32,\), where rotary pairs are 24",
        ),
        ({"rope.scaling.type": "yarn"}, {}, "phi3.rope.scaling.type 'yarn' is not supported"),
        ({"rope.scaling.factor": 4.0}, {}, "phi3.rope.scaling.type 'linear' is not supported"),
        ({"rope.scaling.attn_factor": 1.2}, {}, "phi3.rope.scaling.attn_factor 1.2 is not"),
        ({"rope.dimension_count": 23}, {}, "rotates 23 of 64 elements of a head"),
        ({"rope.dimension_count": 66}, {}, "rotates 66 of 64 elements of a head"),
    ],
)
def test_gguf_of_phi3_that_does_not_fit(changes, tensors, message):
    phi3 = {key.replace("llama.", "phi3."): value for key, value in GGUF.items()}
    phi3 |= {"general.architecture": "phi3", "phi3.rope.dimension_count": 48}
    phi3 |= {f"phi3.{key}": value for key, value in changes.items()}
    factors = {name: stored(name, np.ones(count)) for name, count in tensors.items()}
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_gguf(phi3, {**EMBEDDING, **factors}, "m.gguf")


@pytest.mark.parametrize("original", [32, 4096, 8192])
def test_gguf_llama3_factors_are_turned_back_into_their_numbers(original):
    scaling = {**LLAMA3, "original_max_position_embeddings": original}
    factors = stored("rope_freqs.weight", llama3_factors(scaling, 5e5, 64))
    metadata = {**GGUF, "llama.rope.freq_base": 5e5}
    assert (
        ModelConfig.from_gguf(metadata, {**EMBEDDING, "rope_freqs.weight": factors}).rope_scaling
        == scaling
    )
    other = stored("rope_freqs.weight", np.linspace(1, 8, 32))
    with pytest.raises(
        FormatError, match=r"m.gguf: rope_freqs.weight: these are not the rotary factors of Llama 3"
    ):
        ModelConfig.from_gguf(metadata, {**EMBEDDING, "rope_freqs.weight": other}, "m.gguf")


def test_gguf_yarn():
    metadata = {**GGUF, "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    metadata["llama.rope.scaling.original_context_length"] = 32768
    scaling = ModelConfig.from_gguf(metadata, EMBEDDING).rope_scaling
    assert scaling == {**YARN, "attention_factor": pytest.approx(1.13863, abs=1e-5)}
    without = {
        key: value for key, value in metadata.items() if not key.endswith("original_context_length")
    }
    assert (
        ModelConfig.from_gguf(without, EMBEDDING).rope_scaling["original_max_position_embeddings"]
        == 8192
    )
    scaling = ModelConfig.from_gguf(
        {**metadata, "llama.rope.scaling.yarn_beta_fast": 16.0}, EMBEDDING
    ).rope_scaling
    assert scaling["beta_fast"] == 16.0
    said = {**metadata, "llama.rope.scaling.yarn_attn_factor": 1.1386294364929199}  # float32
    assert ModelConfig.from_gguf(said, EMBEDDING) == ModelConfig.from_gguf(metadata, EMBEDDING)
    for key in ("attn_factor", "yarn_ext_factor", "yarn_attn_factor"):
        with pytest.raises(
            ValueError, match=f"m.gguf: llama.rope.scaling.{key} 0.5 is not supported"
        ):
            ModelConfig.from_gguf(
                {**metadata, f"llama.rope.scaling.{key}": 0.5}, EMBEDDING, "m.gguf"
            )


@pytest.mark.parametrize(
    ("said", "factor"),
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, 4.0),
        ({"scaling.factor": 4.0}, 4.0),
        ({"scale_linear": 4.0}, 4.0),
        ({"scaling.factor": 2.0, "scale_linear": 4.0}, 2.0),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.type": "linear"}, None),
        ({"scale_linear": 1.0}, None),
        ({"scaling.factor": 0.0}, None),
    ],
)
def test_gguf_linear_scaling(said, factor):
    """As in llama.cpp: a factor alone is linear, scale_linear is its old name, 0 and 1: none."""
    metadata = {**GGUF, **{f"llama.rope.{key}": value for key, value in said.items()}}
    expected = factor and {"rope_type": "linear", "factor": factor}
    assert ModelConfig.from_gguf(metadata, EMBEDDING).rope_scaling == expected


def test_gguf_scaling_by_a_factor_beside_stored_factors_is_refused():
    factors = stored("rope_freqs.weight", llama3_factors(LLAMA3, 5e5, 64))
    with pytest.raises(ValueError, match="'linear' beside rope_freqs.weight is not supported"):
        ModelConfig.from_gguf(
            {**GGUF, "llama.rope.scale_linear": 2.0}, {**EMBEDDING, "rope_freqs.weight": factors}
        )


@pytest.mark.parametrize("wrong", [np.inf, np.nan, 0.0, -1.0])
def test_gguf_stored_factors_are_positive_and_finite(wrong):
    factors = llama3_factors(LLAMA3, 5e5, 64)
    factors[20] = wrong
    with pytest.raises(
        FormatError,
        match="rope_freqs.weight: these are rotary factors, and some are not positive or not finite",
    ):
        ModelConfig.from_gguf(
            GGUF, {**EMBEDDING, "rope_freqs.weight": stored("rope_freqs.weight", factors)}
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.freq_base", 5e-324),
        ("attention.layer_norm_rms_epsilon", 1e300),
        ("block_count", 10**9),
    ],
)
def test_gguf_arithmetic_stays_in_its_range(key, value):
    with pytest.raises(FormatError):
        ModelConfig.from_gguf({**GGUF, f"llama.{key}": value}, EMBEDDING)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.shared_kv_layers", 1 << 17),
        ("attention.head_count_kv", []),
        ("feed_forward_length", []),
    ],
)
def test_gguf_counts_of_gemma4_stay_in_their_range(key, value):
    metadata = {key.replace("llama.", "gemma4."): value for key, value in GGUF.items()} | {
        "general.architecture": "gemma4",
        f"gemma4.{key}": value,
    }
    with pytest.raises(FormatError, match=f"gemma4.{key}: the value is"):
        ModelConfig.from_gguf(metadata, EMBEDDING)


def test_dense_layers_in_gguf_are_not_counted_beyond_any_model():
    metadata = {key.replace("llama.", "lfm2moe."): value for key, value in GGUF.items()} | {
        "general.architecture": "lfm2moe",
        "lfm2moe.expert_count": 4,
        "lfm2moe.expert_used_count": 2,
        "lfm2moe.expert_feed_forward_length": 8,
        "lfm2moe.expert_gating_func": 2,
        "lfm2moe.shortconv.l_cache": 3,
    }
    key = "lfm2moe.leading_dense_block_count"
    assert ModelConfig.from_gguf({**metadata, key: 2}, EMBEDDING).mixture.dense_layers == (0, 1)
    with pytest.raises(FormatError, match=f"{key}: the value is 131072"):
        ModelConfig.from_gguf({**metadata, key: 1 << 17}, EMBEDDING)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"general.architecture": "mamba"},
            "architecture 'mamba' is not supported: it needs Mamba-1's selective scan, which "
            "pyloss lacks; supported are .*gemma3, .*llama",
        ),
        (
            {"general.architecture": "deepseek2", "deepseek2.attention.kv_lora_rank": 512},
            r"needs latent attention \(attention.kv_lora_rank 512\), which pyloss lacks; supported",
        ),
        ({"llama.expert_count": 8}, "llama.expert_used_count: this key is missing"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 9}, "cannot visit 9 of 8 experts"),
        (
            {"llama.expert_count": 8, "llama.expert_used_count": 2, "llama.expert_shared_count": 1},
            "expert_shared_count 1 is not supported",
        ),
        (
            {"general.architecture": "gemma-embedding"},
            "not supported: it needs attention in both directions, which pyloss lacks; supported",
        ),
        (
            {"general.architecture": "qwen2", "qwen2.expert_count": 8},
            "architecture with experts 'qwen2' is not supported; supported are gemma4, granitehybrid, granitemoe, lfm2moe, llama, ",
        ),
        ({"llama.rope.scaling.type": "longrope"}, "scaling.type 'longrope'"),
        ({"llama.attention.key_length": 128}, "partial"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window 4096"),
        ({"llama.block_count": None}, "llama.block_count: this key is missing"),
        (
            {"llama.attention.head_count": [9, 9]},
            "head_count: the value is \\[9, 9\\]; it must be a whole number",
        ),
        ({"llama.attention.head_count_kv": 2}, "not a multiple"),
    ],
)
def test_gguf_problems_are_named(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig.from_gguf({**GGUF, **changes}, EMBEDDING, "m.gguf")
    assert str(caught.value).startswith("m.gguf")


def test_gguf_without_an_embedding():
    with pytest.raises(FormatError, match=r"token_embd.weight: this tensor is missing"):
        ModelConfig.from_gguf(GGUF, {})
