"""The block that an unknown family needs and the decoder lacks, as its configuration shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pyloss.checks.numbers import shown


class _Block(NamedTuple):
    """A block, the keys of which any shows it (Hugging Face's and GGUF's), and a test of values."""

    name: str
    keys: tuple[str, ...]
    shows: Callable[[Any], bool] = lambda value: value not in (None, False, 0, [], {}, "")


def _contains(*parts: str) -> Callable[[Any], bool]:
    """Whether a text, or one of a list, has one of the parts."""

    def test(value: Any) -> bool:
        texts = value if isinstance(value, list) else [value]
        return any(isinstance(text, str) and part in text for text in texts for part in parts)

    return test


def _above_one(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _is_true(value: Any) -> bool:
    return value is True


#: The first that a configuration shows is told. Mixers come first, and norms, which many families
#: share, last.
_BLOCKS = (
    _Block("an encoder beside the decoder", ("encoder_layers", "num_encoder_layers")),
    _Block("an encoder beside the decoder", ("is_encoder_decoder",), _is_true),
    _Block("attention in both directions", ("type_vocab_size",)),
    _Block("attention in both directions", ("attention.causal",), lambda value: value is False),
    _Block("cross attention to images", ("cross_attention_layers",)),
    _Block("residual streams mixed by hyper-connections", ("hc_mult", "hc_count")),
    _Block("the RG-LRU recurrence", ("lru_width",)),
    _Block("RWKV's time mixing", ("rescale_every", "wkv.head_size")),
    _Block("xLSTM's memory cells", ("qk_dim_factor",)),
    _Block("attention blocks shared between layers", ("hybrid_layer_ids", "n_mamba_heads")),
    _Block("Mamba-1's selective scan", ("mamba_dt_rank",)),
    _Block("Mamba-2 beside attention in one layer", ("mamba_d_ssm",)),
    _Block("Kimi's delta attention", ("kda_safe_gate", "linear_attn_config", "kda.head_dim")),
    _Block("lightning attention", ("linear_attn_alpha_factor",)),
    _Block("sparse attention by an indexer", ("index_topk", "index_topk_blocks")),
    _Block("sparse attention by an indexer", ("attention.indexer.top_k",)),
    _Block("latent attention", ("kv_lora_rank", "attention.kv_lora_rank")),
    _Block("differential attention", ("lambda_std_dev",)),
    _Block("attention in chunks", ("attention_chunk_size", "attention.chunk_size")),
    _Block("layers of a mixer or an MLP alone", ("layers_block_type",), _contains("mlp", "moe")),
    _Block("layers of a mixer or an MLP alone", ("hybrid_override_pattern",)),
    _Block("AltUp and LAuReL", ("altup_num_inputs", "altup.num_inputs")),
    _Block("experts with a clamped gate", ("swiglu_limit",)),
    _Block("experts that do nothing", ("zero_expert_num",)),
    _Block("experts chosen within groups", ("topk_group", "expert_group_used_count"), _above_one),
    _Block("layers that are run repeatedly", ("n_recurrent_loops", "H_cycles"), _above_one),
    _Block("ALiBi in place of rotary positions", ("alibi", "attention.max_alibi_bias")),
    _Block("learned positions in place of rotary ones", ("learned_pos_emb",), _is_true),
    _Block(
        "attention and MLP side by side on one norm",
        ("parallel_attn", "use_parallel_residual"),
        _is_true,
    ),
    _Block("an MLP with squared ReLU", ("hidden_act", "mlp_hidden_act"), _contains("relu2")),
    _Block("an MLP with xIELU", ("hidden_act",), _contains("xielu")),
    _Block("a limit of queries, keys and values", ("clip_qkv", "attention.clamp_kqv")),
    _Block(
        "LayerNorm, which subtracts the mean",
        ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "attention.layer_norm_epsilon"),
    ),
)

_SIDE_BY_SIDE = "attention and MLP side by side on one norm"
_LEARNED = "learned positions in place of rotary ones"
#: Families whose keys do not show the block: model_type, or GGUF's name of the architecture.
_OF_TYPE = {
    "bitnet": "weights of three values",
    "bloom": "ALiBi in place of rotary positions",
    "codegen": _SIDE_BY_SIDE,
    "cohere": _SIDE_BY_SIDE,
    "cohere2": _SIDE_BY_SIDE,
    "command-r": _SIDE_BY_SIDE,
    "falcon_mamba": "Mamba-1's selective scan",
    "gemma-embedding": "attention in both directions",
    "gpt2": _LEARNED,
    "gpt_bigcode": _LEARNED,
    "gpt_neo": _LEARNED,
    "gpt-oss": "experts with a clamped gate",
    "gptj": _SIDE_BY_SIDE,
    "mamba": "Mamba-1's selective scan",
    "mamba2": "layers of a mixer or an MLP alone",
    "mpt": "ALiBi in place of rotary positions",
    "nemotron": "LayerNorm, which subtracts the mean",
    "olmo": "LayerNorm without a weight",
    "opt": _LEARNED,
    "phi": _SIDE_BY_SIDE,
    "starcoder": _LEARNED,
    "xglm": "positions of sines in place of rotary ones",
}


def missing_block(model_type: str, values: Mapping[str, Any]) -> str:
    """A clause that names what the decoder lacks for a family; empty where nothing shows it.

    `values` are those of config.json, or of a GGUF file's metadata without the architecture's name.
    """
    if (name := _OF_TYPE.get(model_type)) is not None:
        return f": it needs {name}, which pyloss lacks"
    text = values.get("text_config")
    given = {**values, **text} if isinstance(text, dict) else values
    for block in _BLOCKS:
        for key in block.keys:
            if key in given and block.shows(given[key]):
                return f": it needs {block.name} ({key} {shown(given[key])}), which pyloss lacks"
    return ""
