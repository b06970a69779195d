"""GGUF's names against the `gguf` package's own table."""

import pytest

from pyloss.models.names import gguf_name

LAYER = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def test_names_of_llama_and_its_kin():
    gguf = pytest.importorskip("gguf")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 12)
    names = ["model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.{i}.{name}" for i in (0, 11) for name in LAYER)]
    for name in names:
        for kind in ("weight", "bias"):
            assert gguf_name(f"{name}.{kind}") == table.get_name(f"{name}.{kind}", try_suffixes=(".weight", ".bias"))
