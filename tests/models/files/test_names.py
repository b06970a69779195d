"""GGUF's names against the table of the `gguf` package."""

import pytest

from pyloss.models.config.families import FAMILIES
from pyloss.models.files.names import (
    expert_name,
    gguf_name,
    language_model_name,
    shared_parts,
)

LAYER = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
FUSED = (
    "input_layernorm",
    "self_attn.qkv_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_up_proj",
    "mlp.down_proj",
)
LFM2 = (
    "operator_norm", "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "self_attn.q_proj",
    "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "self_attn.q_layernorm", "self_attn.k_layernorm",
    "conv.in_proj", "conv.conv", "conv.out_proj",
)  # fmt: skip
DELTA = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm",
    *(f"linear_attn.{part}" for part in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d", "norm", "out_proj")),
    "input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
# Qwen3-Next's in place of four of these.
FUSED_DELTA = ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba")
APART = tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a"))
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
EXPERTS = ("gate", "switch_mlp.gate_proj", "switch_mlp.up_proj", "switch_mlp.down_proj")
SHARED = ("gate_proj", "up_proj", "down_proj")
POST_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("language_model.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("model.language_model.embed_tokens", "model.embed_tokens"),
        ("language_model.lm_head", "lm_head"),
        ("model.layers.0", "model.layers.0"),
        ("vision_tower.model.layers.0", "vision_tower.model.layers.0"),
    ],
)
def test_names_beside_a_model_for_images(name, expected):
    assert language_model_name(name) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_names_of_families(name):
    gguf = pytest.importorskip("gguf")
    family = FAMILIES[name]
    (arch,) = [arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == family.gguf]
    table = gguf.get_tensor_name_map(arch, 12)
    layer = (
        [
            part
            for part in DELTA + FUSED_DELTA * family.delta_fused
            if not (family.experts and part.startswith("mlp."))
            and not (family.delta_fused and part in APART)
        ]
        if family.linear_attention
        else LFM2
        if family.short_conv
        else FUSED
        if family.fused
        else (
            LAYER[not family.pre_norms : len(LAYER) - 3 * bool(family.experts)]
            + QK_NORMS * bool(family.qk_norm)
            + POST_NORMS[not family.pre_norms :] * family.post_norms
        )
    )
    names = [
        "model.embed_tokens",
        "model.embedding_norm" if family.short_conv else "model.norm",
        *["lm_head"] * ("an output head of its own" not in family.gguf_lacks),
        *(f"model.layers.{i}.{part}" for i in (0, 11) for part in layer),
    ]
    for name in names:
        for kind in ("weight", "bias"):
            assert gguf_name(f"{name}.{kind}", family) == table.get_name(
                f"{name}.{kind}", try_suffixes=(".weight", ".bias")
            )
    if family.linear_attention:
        at = "model.layers.11.linear_attn"
        assert gguf_name(f"{at}.A_log", family) == table.get_name(f"{at}.A_log")
        # llama.cpp's converter calls it so.
        found = table.get_name(f"{at}.dt_proj.bias", try_suffixes=(".bias",))
        assert gguf_name(f"{at}.dt_bias", family) == found


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.experts])
def test_names_of_experts(name):
    """pyloss has mlx-lm's names; the table has transformers'."""
    gguf = pytest.importorskip("gguf")
    family = FAMILIES[name]
    (arch,) = [arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == family.gguf]
    table, at = gguf.get_tensor_name_map(arch, 12), f"model.layers.3.{family.experts.block}"
    if family.experts.fused:  # one tensor of gates and ups, which GGUF has as two
        router, down = f"{at}.router.layer", "model.layers.3.shared_mlp.output_linear"
        assert gguf_name(f"{router}.weight", family) == f"{table.get_name(router)}.weight"
        (part,) = shared_parts(f"{down}.weight", True)
        assert gguf_name(part, family) == f"{table.get_name(down)}.weight"
        ups = shared_parts("model.layers.3.shared_mlp.input_linear.weight", True)
        assert [gguf_name(name, family) for name in ups] == [
            "blk.3.ffn_gate_shexp.weight",
            "blk.3.ffn_up_shexp.weight",
        ]
        ups = shared_parts("model.layers.3.shared_mlp.input_linear.weight", False)
        assert [gguf_name(name, family) for name in ups] == [
            "blk.3.ffn_gate.weight",
            "blk.3.ffn_up.weight",
        ]
        return
    for part in EXPERTS:
        matrix = part.removeprefix("switch_mlp.")
        own = dict(
            zip(("gate_proj", "up_proj", "down_proj"), family.experts.matrices, strict=True)
        ).get(matrix)
        theirs = (
            f"{at}.{part}"
            if own is None
            else f"layers.3.feed_forward.experts.{own}"
            if own[0] == "w"
            else f"{at}.experts.{own}"
        )
        assert gguf_name(f"{at}.{part}.weight", family) == f"{table.get_name(theirs)}.weight"
        if own:
            assert expert_name(f"{at}.{part}.weight", family, 5) == f"{at}.experts.5.{own}.weight"
    for part in SHARED if family.experts.shared and not family.experts.fused else ():
        name = f"{at}.shared_expert.{part}"
        assert gguf_name(f"{name}.weight", family) == f"{table.get_name(name)}.weight"
    if family.experts.shared and not family.experts.fused:
        name = f"{at}.shared_expert_gate"
        assert gguf_name(f"{name}.weight", family) == f"{table.get_name(name)}.weight"


def test_names_of_mamba_layers():
    gguf, family = pytest.importorskip("gguf"), FAMILIES["granitemoehybrid"]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GRANITE_HYBRID, 12)
    at = "model.layers.11.mamba"
    for name in ("in_proj", "conv1d", "norm", "out_proj"):
        found = table.get_name(f"{at}.{name}.weight", try_suffixes=(".weight", ".bias"))
        assert gguf_name(f"{at}.{name}.weight", family) == found
    for name in ("A_log", "D"):
        assert gguf_name(f"{at}.{name}", family) == table.get_name(f"{at}.{name}")
    # llama.cpp's converter calls it so.
    found = table.get_name(f"{at}.dt_proj.bias", try_suffixes=(".bias",))
    assert gguf_name(f"{at}.dt_bias", family) == found
