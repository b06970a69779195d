"""Names of tensors: Hugging Face's, which the whole package uses, and other file formats'."""

from __future__ import annotations

from pyloss.models.config.families import Family

# Modules by Hugging Face's names and by GGUF's; "{}" is the layer.
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
    "model.layers.{}.per_layer_input_gate": "blk.{}.inp_gate",
    "model.layers.{}.per_layer_projection": "blk.{}.proj",
    "model.layers.{}.post_per_layer_input_norm": "blk.{}.post_norm",
    "model.layers.{}.router.proj": "blk.{}.ffn_gate_inp",
    "model.layers.{}.switch_mlp.gate_proj": "blk.{}.ffn_gate_exps",
    "model.layers.{}.switch_mlp.up_proj": "blk.{}.ffn_up_exps",
    "model.layers.{}.switch_mlp.gate_up_proj": "blk.{}.ffn_gate_up_exps",
    "model.layers.{}.switch_mlp.down_proj": "blk.{}.ffn_down_exps",
    "model.layers.{}.post_feedforward_layernorm_1": "blk.{}.post_ffw_norm_1",
    "model.layers.{}.pre_feedforward_layernorm_2": "blk.{}.pre_ffw_norm_2",
    "model.layers.{}.post_feedforward_layernorm_2": "blk.{}.post_ffw_norm_2",
    "model.embedding_norm": "token_embd_norm",
    "model.layers.{}.operator_norm": "blk.{}.attn_norm",
    "model.layers.{}.ffn_norm": "blk.{}.ffn_norm",
    "model.layers.{}.self_attn.out_proj": "blk.{}.attn_output",
    "model.layers.{}.self_attn.q_layernorm": "blk.{}.attn_q_norm",
    "model.layers.{}.self_attn.k_layernorm": "blk.{}.attn_k_norm",
    "model.layers.{}.conv.in_proj": "blk.{}.shortconv.in_proj",
    "model.layers.{}.conv.conv": "blk.{}.shortconv.conv",
    "model.layers.{}.conv.out_proj": "blk.{}.shortconv.out_proj",
    "model.layers.{}.feed_forward.w1": "blk.{}.ffn_gate",
    "model.layers.{}.feed_forward.w2": "blk.{}.ffn_down",
    "model.layers.{}.feed_forward.w3": "blk.{}.ffn_up",
    "model.layers.{}.expert_bias": "blk.{}.exp_probs_b",
    "model.layers.{}.linear_attn.in_proj_qkv": "blk.{}.attn_qkv",
    "model.layers.{}.linear_attn.in_proj_z": "blk.{}.attn_gate",
    "model.layers.{}.linear_attn.in_proj_qkvz": "blk.{}.ssm_in",
    "model.layers.{}.linear_attn.in_proj_ba": "blk.{}.ssm_ba",
    "model.layers.{}.linear_attn.in_proj_b": "blk.{}.ssm_beta",
    "model.layers.{}.linear_attn.in_proj_a": "blk.{}.ssm_alpha",
    "model.layers.{}.linear_attn.conv1d": "blk.{}.ssm_conv1d",
    "model.layers.{}.linear_attn.norm": "blk.{}.ssm_norm",
    "model.layers.{}.linear_attn.out_proj": "blk.{}.ssm_out",
    "model.layers.{}.mamba.in_proj": "blk.{}.ssm_in",
    "model.layers.{}.mamba.conv1d": "blk.{}.ssm_conv1d",
    "model.layers.{}.mamba.norm": "blk.{}.ssm_norm",
    "model.layers.{}.mamba.out_proj": "blk.{}.ssm_out",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.qkv_proj": "blk.{}.attn_qkv",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.self_attn.q_norm": "blk.{}.attn_q_norm",
    "model.layers.{}.self_attn.k_norm": "blk.{}.attn_k_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.gate_up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
    **{
        f"model.layers.{{}}.{block}.{ours}": f"blk.{{}}.{theirs}"
        for block in ("mlp", "block_sparse_moe", "feed_forward")
        for ours, theirs in {
            "gate": "ffn_gate_inp",
            "router.layer": "ffn_gate_inp",
            "switch_mlp.gate_proj": "ffn_gate_exps",
            "switch_mlp.gate_up_proj": "ffn_gate_up_exps",
            "switch_mlp.up_proj": "ffn_up_exps",
            "switch_mlp.down_proj": "ffn_down_exps",
            "shared_expert_gate": "ffn_gate_inp_shexp",
            "shared_expert.gate_proj": "ffn_gate_shexp",
            "shared_expert.up_proj": "ffn_up_shexp",
            "shared_expert.down_proj": "ffn_down_shexp",
        }.items()
    },
}
_GGUF_NAMES |= {
    f"model.layers.{{}}.shared_mlp.{part}_proj": f"blk.{{}}.ffn_{part}_shexp"
    for part in ("gate", "up", "down")
}
# post_attention_layernorm is the norm before the MLP in families without norms after the blocks.
_POST_NORMS = {
    "model.layers.{}.post_attention_layernorm": "blk.{}.post_attention_norm",
    "model.layers.{}.pre_feedforward_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.post_feedforward_layernorm": "blk.{}.post_ffw_norm",
}
_PRE_NORMS = {"model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm"}
# Qwen3.5's norm before the MLP has the name of one after attention.
_DELTA_NORMS = {"model.layers.{}.post_attention_layernorm": "blk.{}.post_attention_norm"}
# Whole names of arrays that are no module's weight or bias.
_GGUF_ARRAYS = {
    "model.layers.{}.router.scale": "blk.{}.ffn_gate_inp.scale",
    "model.layers.{}.router.per_expert_scale": "blk.{}.ffn_down_exps.scale",
    "model.layers.{}.linear_attn.A_log": "blk.{}.ssm_a",
    "model.layers.{}.linear_attn.dt_bias": "blk.{}.ssm_dt.bias",
    "model.layers.{}.mamba.A_log": "blk.{}.ssm_a",
    "model.layers.{}.mamba.D": "blk.{}.ssm_d",
    "model.layers.{}.mamba.dt_bias": "blk.{}.ssm_dt.bias",
}

# The only tensor whose name has no kind at its end.
_EXPERT_BIAS = ".feed_forward.expert_bias"

# Prefixes of the language model's names in checkpoints that also read images, with its own.
_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head": "lm_head",
    "model.language_model.": "model.",
}


def language_model_name(name: str) -> str:
    """`name` without the prefix that checkpoints with an image model add."""
    for prefix, own in _PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


def gguf_name(name: str, family: Family) -> str:
    """GGUF's name of the tensor `name`.

    "model.layers.0.self_attn.q_proj.weight" is "blk.0.attn_q.weight".
    """
    if name.endswith(_EXPERT_BIAS):
        name = name.removesuffix(_EXPERT_BIAS) + ".expert_bias.bias"
    module, kind = name.rsplit(".", 1)
    if kind == "layer_scalar":
        return f"blk.{module.split('.')[2]}.layer_output_scale.weight"
    parts = module.split(".")
    layer = parts[2] if module.startswith("model.layers.") else ""
    if layer:
        parts[2] = "{}"
    key, norms = ".".join(parts), _POST_NORMS if family.post_norms else _PRE_NORMS
    if family.linear_attention:
        norms = _DELTA_NORMS
    if f"{key}.{kind}" in _GGUF_ARRAYS:
        return _GGUF_ARRAYS[f"{key}.{kind}"].format(layer)
    return (norms.get(key) or _GGUF_NAMES[key]).format(layer) + f".{kind}"


def shared_parts(name: str, experts: bool) -> list[str]:
    """The names of the matrices that GGUF has in place of one of Granite's shared expert.

    Without `experts` it is the MLP. Empty for other names.
    """
    at, found, whole = name.partition(".shared_mlp.")
    if not found:
        return []
    part, kind = whole.rsplit(".", 1)
    parts = {"input_linear": ("gate_proj", "up_proj"), "output_linear": ("down_proj",)}[part]
    return [f"{at}.{'shared_mlp' if experts else 'mlp'}.{each}.{kind}" for each in parts]


#: mlx-lm's names of the matrices of LFM2-MoE's MLPs, by the family's own.
MLX_MLP = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def mlx_names(name: str, family: Family, experts: bool) -> list[str]:
    """The tensors of a quantized mlx folder in place of `name`: of several, each has its rows."""
    if family.experts is not None and family.experts.sigmoid:
        at, found, matrix = name.partition(".feed_forward.w")
        return [f"{at}.feed_forward.{MLX_MLP[f'w{matrix[0]}']}{matrix[1:]}"] if found else [name]
    if family.gemma4:
        return [name.replace(OWN_EXPERTS, MLX_EXPERTS)]
    return [name] if experts else shared_parts(name, False) or [name]


#: Experts' gates above ups, and downs, in a block of transformers 5, and in Granite's files.
STACKS = (
    ("experts.gate_up_proj", "experts.down_proj"),
    ("input_linear.weight", "output_linear.weight"),
)


def stack_names(family: Family) -> tuple[str, str] | None:
    """The one of `STACKS` that a family's files have; None: they have a matrix per expert."""
    if family.gemma4:
        return STACKS[0]
    if family.experts is None or not (family.experts.stacked or family.experts.fused):
        return None
    return STACKS[family.experts.fused]


#: pyloss's name of Gemma 4's experts in a layer, and mlx-lm's.
OWN_EXPERTS, MLX_EXPERTS = ".switch_mlp.", ".experts.switch_glu."


def expert_name(name: str, family: Family, expert: int) -> str:
    """Hugging Face's name of one expert's matrix in the stack `name`.

    Expert 3 of "model.layers.0.mlp.switch_mlp.up_proj.weight" is
    "model.layers.0.mlp.experts.3.up_proj.weight".
    """
    assert family.experts is not None
    block, _, matrix = name.partition(".switch_mlp.")
    part, *kind = matrix.split(".")
    own = family.experts.matrices[("gate_proj", "up_proj", "down_proj").index(part)]
    return ".".join([block, "experts", str(expert), own, *kind])
