"""The formats that a mixture gives to tensors, beside those in files that llama.cpp wrote."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from pyloss.io.gguf import read_gguf
from pyloss.models import load_model
from pyloss.models.files.gguf_writer import write_gguf
from pyloss.models.files.mixtures import ALIASES, MIXTURES, Mixture

NAMES = [
    "attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight",
    "ffn_norm.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight",
]  # fmt: skip


def described(layers=32, heads=32, kv_heads=8, experts=0, gguf="llama"):
    return SimpleNamespace(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        mixture=SimpleNamespace(count=experts) if experts else None,
        gguf=gguf,
    )


def tensors(layers=32, tied=False):
    found = [f"blk.{layer}.{name}" for layer in range(layers) for name in NAMES]
    return ["token_embd.weight", *found, *([] if tied else ["output.weight"])]


def chosen(name, columns=4096, tied=False, importance=False, **options):
    config = described(**options)
    names = tensors(config.num_hidden_layers, tied)
    mixture = Mixture(name, config, names, importance)
    return {tensor: mixture.format(tensor, columns) for tensor in names}


def layers_with(found, tensor, format):
    return [
        int(name.split(".")[1])
        for name, kind in found.items()
        if name.endswith(tensor) and kind == format
    ]


def test_llama_3_as_q4_k_m():
    """Llama 3 8B: 32 layers, 4 heads share keys and values."""
    found = chosen("q4_k_m")
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    for tensor in ("attn_v.weight", "ffn_down.weight"):
        assert layers_with(found, tensor, "q6_k") == more
        assert layers_with(found, tensor, "q4_k") == sorted(set(range(32)) - set(more))
    for tensor in ("attn_q.weight", "attn_k.weight", "attn_output.weight", "ffn_up.weight"):
        assert layers_with(found, tensor, "q4_k") == list(range(32))
    assert (found["token_embd.weight"], found["output.weight"]) == ("q4_k", "q6_k")
    assert found["blk.0.attn_norm.weight"] is None


@pytest.mark.parametrize(
    "name, values, output, down",
    [
        ("q2_k", {"q4_k": 32}, "q3_k", {"q3_k": 32}),
        ("q2_k_s", {"q4_k": 32}, "q2_k", {"q4_k": 4, "q2_k": 28}),
        ("q3_k_s", {"q3_k": 32}, "q3_k", {"q3_k": 32}),
        ("q3_k_m", {"q5_k": 2, "q4_k": 30}, "q4_k", {"q5_k": 2, "q4_k": 30}),
        ("q3_k_l", {"q5_k": 32}, "q5_k", {"q5_k": 32}),
        ("q4_k_s", {"q5_k": 4, "q4_k": 28}, "q4_k", {"q5_k": 4, "q4_k": 28}),
        ("q5_k_s", {"q5_k": 32}, "q5_k", {"q5_k": 32}),
        ("q5_k_m", {"q6_k": 16, "q5_k": 16}, "q5_k", {"q6_k": 16, "q5_k": 16}),
        ("q6_k", {"q6_k": 32}, "q6_k", {"q6_k": 32}),
        ("iq4_nl", {"q5_k": 32}, "iq4_nl", {"q5_k": 4, "iq4_nl": 28}),
        ("iq4_xs", {"q5_k": 32}, "iq4_xs", {"q5_k": 4, "iq4_xs": 28}),
    ],
)
def test_each_mixture(name, values, output, down):
    found = chosen(name)

    def counted(tensor):
        kinds = [kind for at, kind in found.items() if at.endswith(tensor)]
        return {kind: kinds.count(kind) for kind in kinds}

    assert counted("attn_v.weight") == values
    assert counted("attn_output.weight") == {output: 32}
    assert counted("ffn_down.weight") == down
    assert counted("ffn_gate.weight") == {MIXTURES[name].format: 32}
    assert found["output.weight"] == "q6_k"


def test_what_depends_on_the_model():
    assert chosen("q2_k", kv_heads=16)["blk.0.attn_v.weight"] == "q3_k"
    assert chosen("q2_k_s", kv_heads=16)["blk.0.attn_v.weight"] == "q2_k"
    assert chosen("q2_k_s", experts=8)["blk.0.attn_output.weight"] == "q2_k"
    assert chosen("iq4_nl", kv_heads=16)["blk.0.attn_v.weight"] == "iq4_nl"
    assert chosen("iq4_nl", importance=True)["blk.0.ffn_down.weight"] == "iq4_nl"
    experts = chosen("q4_k_m", experts=8)
    assert [experts[f"blk.9.{name}.weight"] for name in ("attn_v", "attn_k", "attn_output")] == [
        "q8_0", "q8_0", "q5_k",
    ]  # fmt: skip
    assert chosen("q4_k_s", layers=80, kv_heads=8)["blk.50.attn_v.weight"] == "q5_k"
    tied = chosen("q4_k_m", tied=True)
    assert tied["token_embd.weight"] == "q6_k" and "output.weight" not in tied


def test_layers_without_attention_are_not_counted():
    """Hybrid models: the third layer with values is the fourth layer here."""
    names = [name for name in tensors(16) if not name.startswith("blk.1.attn")]
    mixture = Mixture("q3_k_m", described(layers=16), names)
    kinds = [mixture.format(f"blk.{layer}.attn_v.weight", 4096) for layer in (0, 2, 3)]
    assert kinds == ["q5_k", "q5_k", "q4_k"]


@pytest.mark.parametrize(
    "name, columns, common, down, head",
    [
        ("q4_k_m", 576, "q5_0", "q8_0", "q8_0"),
        ("q5_k_m", 576, "q5_1", "q8_0", "q8_0"),
        ("q3_k_m", 576, "q4_0", "q5_1", "q8_0"),
        ("iq4_xs", 576, "iq4_nl", "q5_1", "q8_0"),
        ("iq4_nl", 576, "iq4_nl", "q5_1", "q6_k"),
        ("q4_k_m", 40, "f16", "f16", "f16"),
    ],
)
def test_rows_that_are_no_whole_blocks(name, columns, common, down, head):
    found = chosen(name, columns)
    assert found["blk.0.ffn_up.weight"] == common
    assert found["blk.0.ffn_down.weight"] == down
    assert found["output.weight"] == (head if name != "iq4_nl" else "q8_0")


@pytest.mark.parametrize("name", [*MIXTURES, *ALIASES])
def test_files(tmp_path, name):
    model = tiny.load_tiny(
        tmp_path / "base",
        vocab_size=tiny.TOKENS,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=9,
        dtype="bf16",
    )
    write_gguf(model, tmp_path / "m.gguf", tiny.byte_tokenizer(), name)
    file = read_gguf(tmp_path / "m.gguf")
    mixture = Mixture(name, model.config, file.tensors)
    assert file.metadata["general.file_type"] == MIXTURES[ALIASES.get(name, name)].file_type
    for tensor in file:
        stored = file.tensors[tensor]
        expected = mixture.format(tensor, stored.shape[-1]) if len(stored.shape) > 1 else None
        assert stored.dtype.lower() == (expected or "f32"), tensor
    again = load_model(tmp_path / "m.gguf")
    for layer, before in model.stored().items():
        error = again.stored()[layer].dequantize() - before.dequantize()
        size = np.linalg.norm(before.dequantize())
        assert np.linalg.norm(error) < 0.35 * size, layer


def test_routers_and_small_matrices_stay_floats():
    mixture = Mixture("q4_k_m", described(experts=8), tensors())
    for tensor in ("blk.0.ffn_gate_inp.weight", "blk.0.ssm_conv1d.weight", "blk.0.attn_q.bias"):
        assert mixture.format(tensor, 4096) is None
