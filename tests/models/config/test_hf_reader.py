"""config.json is read and written back; options that would change results are refused."""

import json

import pytest
from configurations import EMBEDDING, GGUF, LLAMA3, SMOLLM2, YARN, windows

from pyloss.errors import FormatError
from pyloss.models.config.model_config import ModelConfig

WINDOWED = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 512}


@pytest.fixture
def read(tmp_path):
    def read(**changes):
        content = {key: value for key, value in {**SMOLLM2, **changes}.items() if value is not ...}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(content))
        return ModelConfig.from_hf(path)

    return read


def test_smollm2(read):
    config = read()
    assert (config.head_dim, config.rope_theta, config.rope_scaling) == (64, 100000.0, None)
    assert type(config.rope_theta) is float
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (
        9,
        3,
        30,
    )
    assert (
        config.tie_word_embeddings is True
        and config.attention_bias is False
        and config.mlp_bias is False
    )
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)


def test_gguf_gives_the_same_as_config_json(read):
    assert ModelConfig.from_gguf(GGUF, EMBEDDING) == read()


def test_defaults(read):
    missing = (
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "max_position_embeddings",
    )
    config = read(**dict.fromkeys(missing, ...), eos_token_id=None, pad_token_id=...)
    assert config.num_key_value_heads == 9
    assert (config.rms_norm_eps, config.rope_theta, config.max_position_embeddings) == (
        1e-6,
        10000.0,
        2048,
    )
    assert config.tie_word_embeddings is False
    assert config.eos_token_id is None and config.pad_token_id is None
    assert read(head_dim=None).head_dim == 64
    assert read(head_dim=32).head_dim == 32
    assert read(eos_token_id=[2, 3]).eos_token_id == [2, 3]


def test_rope_of_transformers_5(read):
    config = read(
        rope_theta=...,
        rope_scaling=...,
        rope_parameters={"rope_theta": 5e5, "rope_type": "default"},
    )
    assert (config.rope_theta, config.rope_scaling) == (5e5, None)
    config = read(rope_theta=..., rope_scaling=..., rope_parameters={"rope_theta": 5e5, **LLAMA3})
    assert (config.rope_theta, config.rope_scaling) == (5e5, LLAMA3)


def test_rope_before_transformers_5(read):
    assert read(rope_scaling=LLAMA3).rope_scaling == LLAMA3
    assert read(rope_scaling={"type": "linear", "factor": 2}).rope_scaling == {
        "rope_type": "linear",
        "factor": 2.0,
    }
    assert read(rope_scaling={"rope_type": "default"}).rope_scaling is None
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert read(rope_scaling=yarn).rope_scaling == YARN
    assert (
        read(rope_scaling={**yarn, "attention_factor": 1.0, "mscale": None}).rope_scaling[
            "attention_factor"
        ]
        == 1.0
    )


def test_the_scales_of_yarn(read):
    """As in transformers, both together, and attention_factor counts more."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

    def factor(**more):
        return read(rope_scaling={**yarn, **more}).rope_scaling["attention_factor"]

    assert factor(mscale=1.0) == factor(mscale_all_dim=0.0, mscale=1.0) == factor()
    assert factor(mscale=1.0, mscale_all_dim=1.0) == 1.0
    assert factor(mscale=0.5, mscale_all_dim=1.0) == pytest.approx(1.0693 / 1.1386, rel=1e-4)
    assert factor(mscale=0.5, mscale_all_dim=1.0, attention_factor=1.2) == 1.2


def test_ministral3_without_rope_parameters(read):
    config = read(model_type="ministral3")
    assert config.query_growth == (0.1, 16384) and config.rope_scaling["attention_factor"] == 1.0
    scaling = {"rope_type": "default", "rope_theta": 1e6, "llama_4_scaling_beta": 0.0}
    assert read(model_type="ministral3", rope_parameters=scaling).query_growth is None
    with pytest.raises(FormatError, match="supported only with rope_type yarn"):
        read(model_type="ministral3", rope_parameters={**scaling, "llama_4_scaling_beta": 0.1})


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_the_length_before_scaling_may_be_left_to_the_configuration(read, kind):
    """Integral floats are valid; tests/parity/test_config_parity.py has transformers' values."""
    scaling = {
        key: value
        for key, value in (YARN if kind == "yarn" else LLAMA3).items()
        if not key.startswith("original")
    }

    def length(**changes):
        return read(rope_scaling={**scaling, **changes.pop("inner", {})}, **changes).rope_scaling[
            "original_max_position_embeddings"
        ]

    assert length() == 8192 and length(max_position_embeddings=4096) == 4096
    assert length(inner={"original_max_position_embeddings": 4096.0}) == 4096
    assert type(length(inner={"original_max_position_embeddings": 4096.0})) is int
    assert (
        length(
            inner={"original_max_position_embeddings": 1024}, original_max_position_embeddings=2048
        )
        == 2048
    )


def test_what_rope_scaling_says_goes_before_the_keys_outside(read):
    assert (
        read(rope_scaling={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}).rope_theta
        == 5e5
    )
    assert (
        read(rope_scaling={"rope_type": "default", "rope_theta": 5e5}, rope_theta=...).rope_theta
        == 5e5
    )
    config = read(
        rope_scaling={"type": "linear", "factor": 2.0},
        rope_parameters={"rope_theta": 7e5, **LLAMA3},
    )
    assert (
        config.rope_scaling == {"rope_type": "linear", "factor": 2.0} and config.rope_theta == 1e5
    )


HUGE = 10**400


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1.0, "rope_scaling": YARN},
        {"rope_theta": 5e-324},
        {"rope_scaling": {**YARN, "beta_slow": 5e-324}},
        {"rope_scaling": {**YARN, "factor": 1e-320}},
        {"rope_scaling": {**YARN, "attention_factor": 1e300}},
        {"rope_scaling": {**YARN, "original_max_position_embeddings": HUGE}},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": HUGE}},
        {"rope_scaling": {"rope_type": "linear", "factor": 5e-324}},
        {"original_max_position_embeddings": HUGE, "rope_scaling": YARN},
        {"model_type": "gemma3_text", "query_pre_attn_scalar": HUGE},
        {"model_type": "gemma3_text", "rope_local_base_freq": HUGE},
        {"model_type": "mistral", "sliding_window": 1 << 63},
        {"model_type": "mistral", "sliding_window": 1 << 40},
        {"max_position_embeddings": HUGE},
        {"rms_norm_eps": HUGE},
        {"head_dim": 10**9},
        {"vocab_size": 10**12},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**9, "model_type": "gemma3_text"},
        {"num_hidden_layers": 10**9, "model_type": "qwen3_moe", "decoder_sparse_step": 2},
        {"model_type": "qwen3_moe", "mlp_only_layers": [{}]},
        {"model_type": "lfm2_moe", "num_dense_layers": 1 << 17},
        {"model_type": "granite", "residual_multiplier": 1e-300},
        {"bos_token_id": HUGE},
    ],
)
def test_arithmetic_stays_in_its_range(read, changes):
    with pytest.raises(FormatError, match="config.json"):
        read(**changes)


def test_windows(read):
    assert windows(read(sliding_window=None)) == [0] * 30
    assert windows(read(model_type="mistral", sliding_window=7)) == [7] * 30
    assert windows(read(model_type="mistral")) == [4096] * 30
    assert windows(read(model_type="mistral", sliding_window=None)) == [0] * 30
    assert windows(read(model_type="qwen2", sliding_window=9)) == [0] * 30
    assert windows(read(**WINDOWED)) == [0] * 28 + [512] * 2
    assert windows(read(**WINDOWED, max_window_layers=3)) == [0] * 3 + [512] * 27
    assert (
        windows(read(**WINDOWED, layer_types=["sliding_attention"] + ["full_attention"] * 29))
        == [512] + [0] * 29
    )
    assert windows(read(model_type="gemma3_text")) == ([4096] * 5 + [0]) * 5
    assert (
        windows(read(model_type="gemma3_text", sliding_window=3, sliding_window_pattern=2))
        == [3, 0] * 15
    )
    assert windows(read(model_type="gemma3_text", sliding_window_pattern=1)) == [0] * 30


def test_windows_of_layers_without_positions(read):
    smollm3 = {"model_type": "smollm3", "sliding_window": 9}
    assert windows(read(**smollm3)) == [0] * 30
    config = read(**smollm3, use_sliding_window=True)
    assert windows(config) == ([0] * 3 + [9]) * 7 + [0] * 2
    own = ["sliding_attention"] + ["full_attention"] * 29
    assert windows(read(**smollm3, use_sliding_window=True, layer_types=own)) == [9] + [0] * 29
    assert (
        windows(read(model_type="smollm3", sliding_window=None, use_sliding_window=True))
        == [0] * 30
    )


def test_layers_without_positions(read):
    def unrotated(**changes):
        config = read(**{"model_type": "smollm3", "num_hidden_layers": 9, **changes})
        return [i for i in range(9) if not config.rotated(i)]

    assert unrotated() == [3, 7]
    assert unrotated(no_rope_layer_interval=2) == [1, 3, 5, 7]
    assert unrotated(no_rope_layer_interval=1) == list(range(9))
    assert unrotated(no_rope_layer_interval=10) == []
    assert unrotated(no_rope_layers=[1] * 8 + [0], no_rope_layer_interval=2) == [8]
    assert unrotated(no_rope_layers=[0] + [1] * 20) == [0]  # longer, as in transformers
    assert unrotated(no_rope_layers=[1] * 9) == []


def test_olmo3_by_its_defaults(read):
    config = read(model_type="olmo3", rope_theta=...)
    assert windows(config) == ([4096] * 3 + [0]) * 7 + [4096] * 2
    assert (config.rope_theta, config.rope_local_base_freq, config.rope_scaling) == (5e5, 5e5, None)
    scaled = read(model_type="olmo3", rope_theta=500000, rope_scaling=YARN)
    assert (scaled.rope_local_base_freq, scaled.rope_scaling) == (5e5, YARN)
    parts = {
        "full_attention": {**YARN, "rope_theta": 7e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 7e5},
    }
    config = read(model_type="olmo3", rope_parameters=parts, rope_theta=...)
    assert (config.rope_theta, config.rope_local_base_freq) == (7e5, 7e5)
    assert config.rope_scaling == YARN
    full = read(
        model_type="olmo3",
        rope_theta=...,
        sliding_window=None,
        layer_types=["full_attention"] * 30,
    )
    assert windows(full) == [0] * 30


def test_window_period(read):
    def period(*types):
        names = {"s": "sliding_attention", "f": "full_attention"}
        return read(
            model_type="gemma3_text",
            num_hidden_layers=len(types[0]),
            layer_types=[names[t] for t in types[0]],
        ).window_period

    assert [period(types) for types in ("ssf", "ssfs", "ssfssf", "f", "ff", "s", "ss")] == [
        3,
        3,
        3,
        1,
        1,
        2,
        3,
    ]
    assert [period(types) for types in ("ssff", "fs", "ssfsfs")] == [None] * 3


def test_gemma_by_its_defaults(read):
    published = {
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {"hidden_size": 2560, "num_hidden_layers": 34},
    }
    text = dict.fromkeys(SMOLLM2, ...) | published
    text["text_config"] |= {
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        "eos_token_id": 1,
    }
    config = read(**text)
    assert (config.model_type, config.vocab_size, config.head_dim, config.num_attention_heads) == (
        "gemma3_text",
        262208,
        256,
        8,
    )
    assert (
        config.num_key_value_heads,
        config.query_pre_attn_scalar,
        config.tie_word_embeddings,
    ) == (4, 256, True)
    assert (config.rope_theta, config.rope_local_base_freq) == (1e6, 1e4)
    assert config.rope_scaling == {
        "rope_type": "linear",
        "factor": 8.0,
    } and config.eos_token_id == [1, 106]
    assert windows(config) == ([1024] * 5 + [0]) * 5 + [1024] * 4


def test_rope_per_layer_type(read):
    local, full = (
        {"rope_type": "default", "rope_theta": 5e3},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e5},
    )
    config = read(
        model_type="gemma3_text",
        rope_parameters={"sliding_attention": local, "full_attention": full},
        rope_theta=...,
    )
    assert (config.rope_theta, config.rope_local_base_freq) == (7e5, 5e3)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": YARN},
        {"eos_token_id": [2, 3], "model_type": "mistral"},
        {"model_type": "mistral", "sliding_window": 100},
        {**WINDOWED, "max_window_layers": 3},
        {"model_type": "qwen3"},
        {"model_type": "gemma3_text", "sliding_window": 100},
        {
            "model_type": "gemma3_text",
            "sliding_window": 100,
            "layer_types": ["full_attention"] + ["sliding_attention"] * 29,
        },
        {"model_type": "gemma3_text", "sliding_window_pattern": 1},
        {"model_type": "smollm3"},
        {"model_type": "smollm3", "no_rope_layers": [1] * 30},
        {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 7},
        {"model_type": "olmo2", "rope_scaling": YARN},
        {"model_type": "olmo3", "sliding_window": 9, "rope_theta": 500000, "rope_scaling": YARN},
        {"model_type": "olmo3", "rope_theta": ..., "layer_types": ["full_attention"] * 30},
    ],
)
def test_round_trip(read, tmp_path, changes):
    changes = {"sliding_window": None, **changes}
    config = read(**changes)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type 'gpt2' is not supported: it needs learned positions in place of rotary "
            "ones, which pyloss lacks; supported are llama, mistral",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"sliding_window": 4096}, "sliding_window 4096 is not supported for llama"),
        (
            {"model_type": "gemma3_text", "hidden_activation": "gelu"},
            "hidden_activation 'gelu' .* 'gelu_pytorch_tanh'",
        ),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
            "attn_logit_softcapping 50.0 is not supported for gemma3_text",
        ),
        (
            {"model_type": "gemma3_text", "final_logit_softcapping": 30.0},
            "final_logit_softcapping 30.0 is not supported for gemma3_text",
        ),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            r"attention in both directions \(use_bidirectional_attention True\) is not supported",
        ),
        ({"model_type": "gemma3_text", "rope_parameters": {"other": {}}}, "per layer type"),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
            },
            "'linear' of sliding_attention",
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            "rope_type 'dynamic' .* default, linear, llama3, yarn",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}},
            "mscale of rope_scaling 1.0 is not supported",
        ),
        (
            {"rope_scaling": {**YARN, "llama_4_scaling_beta": 0.1}},
            "'llama_4_scaling_beta' of rope_scaling is not supported",
        ),
        (
            {"model_type": "granitemoehybrid", "layer_types": ["mamba"] * 9 + ["conv"]},
            "layers of type 'conv' are not supported; .* of types 'attention' and 'mamba'",
        ),
        (
            {
                "model_type": "granitemoehybrid",
                "layer_types": ["attention"] * 30,
                "position_embedding_type": "alibi",
            },
            "position_embedding_type 'alibi' is not supported",
        ),
        ({"model_type": "qwen2_moe", "qkv_bias": False}, "qkv_bias false is not supported"),
        ({"qkv_bias": True}, "qkv_bias True is not supported for llama"),
        (
            {"rope_scaling": {**YARN, "truncate": False}},
            "truncate of rope_scaling False is not supported",
        ),
        ({"rope_parameters": {"full": {"rope_theta": 1.0}}}, "per layer type"),
        (
            {"no_rope_layer_interval": 4},
            "no_rope_layer_interval 4 is not supported for llama",
        ),
        ({"no_rope_layers": [1, 0] * 15}, r"no_rope_layers \[.* is not supported for llama"),
        (
            {"model_type": "smollm3", "layer_types": ["sliding_attention"] * 30},
            "layer_types names sliding_attention, and use_sliding_window is false",
        ),
        ({"model_type": "olmo2", "sliding_window": 512}, "sliding_window 512 is not supported for"),
        ({"model_type": "olmo2", "clip_qkv": 8.0}, "clip_qkv 8.0 is not supported"),
        (
            {"model_type": "olmo3", "rope_theta": 1e6},
            "rope_theta 1000000.0 must be given for full_attention and sliding_attention each",
        ),
        (
            {"model_type": "olmo3", "rope_parameters": {"rope_theta": 5e5}, "rope_theta": ...},
            "rope_parameters must be given for full_attention and sliding_attention each",
        ),
        (
            {"model_type": "olmo3", "rope_theta": 5e5, "sliding_window": None},
            "sliding_window is null, and layer_types have sliding_attention",
        ),
        (
            {"model_type": "olmo3", "sliding_window_pattern": 6},
            "sliding_window_pattern 6 is not supported for olmo3",
        ),
    ],
)
def test_what_is_not_supported_is_named(read, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(**changes)
    assert "config.json" in str(caught.value)
    assert not isinstance(caught.value, FormatError)


@pytest.mark.parametrize(
    ("changes", "what", "message"),
    [
        ({"hidden_size": "576"}, "hidden_size", "the value is '576'; it must be a whole number"),
        ({"hidden_size": 576.0}, "hidden_size", "the value is 576.0; it must be a whole number"),
        ({"hidden_size": True}, "hidden_size", "the value is True; it must be a whole number"),
        ({"hidden_size": ...}, "hidden_size", "missing"),
        ({"vocab_size": None}, "vocab_size", "missing"),
        ({"model_type": ["llama"]}, "model_type", "expected str"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings", "expected bool"),
        (
            {"rms_norm_eps": "1e-5"},
            "rms_norm_eps",
            "the value is '1e-5'; it must be a finite number",
        ),
        ({"eos_token_id": ["a"]}, "eos_token_id", "integer or a list"),
        ({"rope_scaling": "llama3"}, "rope_scaling", "expected dict"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor", "missing"),
        (
            {"rope_scaling": {**LLAMA3, "factor": "8"}},
            "factor",
            "the value is '8'; it must be a finite number",
        ),
        ({"rope_scaling": {**LLAMA3, "factor": -1}}, None, "positive finite"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, None, "below"),
        (
            {"rope_scaling": {**YARN, "beta_slow": 32}},
            None,
            "beta_slow must be below its beta_fast",
        ),
        ({"rope_scaling": {**YARN, "factor": 0}}, None, "positive finite"),
        (
            {"num_attention_heads": 7},
            None,
            "hidden_size 576 is not a multiple of num_attention_heads 7",
        ),
        (
            {"num_attention_heads": 0},
            "num_attention_heads",
            "the value is 0; it must be a whole number from 1 to 2147483647",
        ),
        (
            {"num_key_value_heads": 2},
            None,
            "num_attention_heads 9 is not a multiple of num_key_value_heads 2",
        ),
        ({"head_dim": 63}, None, "head_dim must be even"),
        (
            {"num_hidden_layers": -1},
            "num_hidden_layers",
            "the value is -1; it must be a whole number from 1 to 65536",
        ),
        ({"rms_norm_eps": 0}, None, "rms_norm_eps is 0.0; it must be a finite number above 0"),
        (
            {"rope_theta": float("nan")},
            "rope_theta",
            "the value is nan; it must be a finite number",
        ),
        (
            {"model_type": "mistral", "sliding_window": 0},
            None,
            "sliding_window is 0; it must be a whole number from 1 to",
        ),
        (
            {"model_type": "mistral", "sliding_window": "all"},
            "sliding_window",
            "the value is 'all'; it must be a whole number",
        ),
        (
            {**WINDOWED, "layer_types": ["sliding_attention"]},
            None,
            "layer_types names 1 layers, and num_hidden_layers is 30",
        ),
        (
            {**WINDOWED, "layer_types": ["chunked_attention"] * 30},
            None,
            "layer_types must be of .* got 'chunked_attention'",
        ),
        ({**WINDOWED, "layer_types": "full_attention"}, "layer_types", "expected list"),
        (
            {"model_type": "smollm3", "no_rope_layers": [1, 0]},
            None,
            "no_rope_layers names 2 layers, and num_hidden_layers is 30",
        ),
        (
            {"model_type": "smollm3", "no_rope_layers": [1, 2] * 15},
            None,
            "no_rope_layers must be 0 or 1 per layer",
        ),
        (
            {"model_type": "smollm3", "no_rope_layer_interval": 0},
            "no_rope_layer_interval",
            "at least 1",
        ),
        (
            {"model_type": "gemma3_text", "sliding_window_pattern": 0},
            "sliding_window_pattern",
            "at least 1, got 0",
        ),
        (
            {"model_type": "gemma3_text", "query_pre_attn_scalar": -1},
            "query_pre_attn_scalar",
            "the value is -1; it must be a whole number of at least 1",
        ),
        (
            {"model_type": "gemma3_text", "rope_local_base_freq": 0},
            None,
            "rope_local_base_freq is 0.0; it must be a finite number above 0",
        ),
        ({"model_type": "gemma3"}, "text_config", "missing"),
        (
            {"rope_theta": 10**400},
            "rope_theta",
            "the value is an integer of 1329 bits; it must be a finite number",
        ),
    ],
)
def test_damage_is_named(read, changes, what, message):
    with pytest.raises(FormatError, match=message) as caught:
        read(**changes)
    assert caught.value.path.endswith("config.json")
    assert caught.value.what == what
