"""GGUF's names against the `gguf` package's own table."""

import pytest

from pyloss.models.families import FAMILIES
from pyloss.models.names import gguf_name

LAYER = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
POST_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


@pytest.mark.parametrize("name", FAMILIES)
def test_names_of_families(name):
    gguf = pytest.importorskip("gguf")
    family = FAMILIES[name]
    (arch,) = [arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == family.gguf]
    table = gguf.get_tensor_name_map(arch, 12)
    layer = LAYER + QK_NORMS * bool(family.qk_norm) + POST_NORMS * family.post_norms
    names = ["model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.{i}.{part}" for i in (0, 11) for part in layer)]
    for name in names:
        for kind in ("weight", "bias"):
            assert gguf_name(f"{name}.{kind}", family) == table.get_name(f"{name}.{kind}", try_suffixes=(".weight", ".bias"))
