"""Building models from a source: missing or inconsistent tensors are refused by name."""

import json
import resource

import numpy as np
import pytest
import tiny

from pyloss import FormatError, nn
from pyloss.models import load_model


def without(name):
    return lambda arrays: arrays.pop(name)


def reshaped(name, *shape):
    def change(arrays):
        arrays[name] = np.zeros(shape, arrays[name].dtype)

    return change


NAMES = list(tiny.tensors(tiny.config(tied=False, bias=True)))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(tmp_path, name):
    tiny.write_folder(tmp_path, tied=False, bias=True, change=without(name))
    with pytest.raises(FormatError, match="missing") as caught:
        load_model(tmp_path)
    assert name in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.1.self_attn.k_proj.weight", (32, 32), "(16, 32)"),
        ("model.layers.0.mlp.down_proj.weight", (64, 32), "(32, 64)"),
        ("model.layers.2.input_layernorm.weight", (31,), "(32,)"),
        ("model.layers.2.self_attn.q_proj.bias", (32, 1), "(32,)"),
        ("model.embed_tokens.weight", (30, 32), "(29, 32)"),
        ("lm_head.weight", (29,), "(29, 32)"),
        ("model.norm.weight", (1, 32), "(32,)"),
    ],
)
def test_a_wrong_shape_is_named(tmp_path, name, shape, expected):
    tiny.write_folder(tmp_path, tied=False, bias=True, change=reshaped(name, *shape))
    with pytest.raises(FormatError) as caught:
        load_model(tmp_path)
    for part in (name, str(shape), expected, "configuration"):
        assert part in str(caught.value)


def added(name, *shape):
    def change(arrays):
        arrays[name] = np.zeros(shape, np.float32)

    return change


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.pre_feedforward_layernorm.weight",
        "lm_head.bias",
        "model.norm.bias",
        "score.weight",
        "model.embed_positions.weight",
    ],
)
def test_a_tensor_that_the_configuration_has_no_place_for_is_named(tmp_path, name):
    """Otherwise layers or biases would be dropped silently and results be wrong."""
    tiny.write_folder(tmp_path, change=added(name, 32))
    with pytest.raises(
        FormatError, match="no part of this configuration has such a tensor"
    ) as caught:
        load_model(tmp_path)
    assert name in str(caught.value)


def test_what_may_be_left_over(tmp_path):
    """Rotary tables, and the weights of image encoders."""
    for name in (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "vision_tower.layers.0.weight",
    ):
        tiny.write_folder(tmp_path / name, change=added(name, 4))
        load_model(tmp_path / name)


TOKENS = [3, 1, 4, 1, 5]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_head_beside_tied_embeddings_counts_where_it_differs(tmp_path, dtype):
    def change(arrays, last):
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
        arrays["lm_head.weight"][-1, -1] += last

    for last in (0, 1):
        c, arrays = tiny.write_folder(
            tmp_path, dtype=dtype, change=lambda arrays, last=last: change(arrays, last)
        )
        model = load_model(tmp_path)
        assert (model.lm_head is None) == (not last) and model.config.tie_word_embeddings == (
            not last
        )
        expected = tiny.logits({**c, "tie_word_embeddings": False}, arrays, TOKENS)
        np.testing.assert_allclose(model([TOKENS])[0], expected, atol=1e-4)
        # A saved model has one statement of this.
        model.save(tmp_path / "saved")
        np.testing.assert_array_equal(load_model(tmp_path / "saved")([TOKENS]), model([TOKENS]))


def test_a_head_of_another_shape_is_named_though_embeddings_are_tied(tmp_path):
    tiny.write_folder(tmp_path, change=added("lm_head.weight", 4))
    with pytest.raises(FormatError, match=r"lm_head.weight: has shape \(4,\)"):
        load_model(tmp_path)


@pytest.mark.parametrize("layers", [4, 1 << 16])
def test_more_layers_than_the_file_has_are_named_with_it(tmp_path, layers):
    tiny.write_folder(tmp_path)
    config = tiny.config(num_hidden_layers=layers)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FormatError,
        match=f"num_hidden_layers: it is {layers}, and the file has tensors for 3 layers",
    ):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "head_dim",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
    ],
)
@pytest.mark.parametrize("value", [10**9, 10**30])
def test_sizes_without_bound_are_refused_before_anything_is_made_of_them(tmp_path, key, value):
    tiny.write_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny.config(**{key: value})))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=str(tmp_path)):
        load_model(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_missing_and_misshapen_tensors_of_a_gguf_file(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    whole = tiny.tensors
    for change, message in (
        (without("model.layers.1.mlp.up_proj.weight"), r"blk\.1\.ffn_up\.weight.*missing"),
        (
            reshaped("model.layers.0.self_attn.v_proj.weight", 8, 32),
            r"blk\.0\.attn_v\.weight.*\(8, 32\).*\(16, 32\)",
        ),
    ):

        def broken(c, seed=0, change=change):
            arrays = whole(c, seed)
            change(arrays)
            return arrays

        monkeypatch.setattr(tiny, "tensors", broken)
        tiny.write_gguf(tmp_path / "model.gguf")
        with pytest.raises(FormatError, match=message):
            load_model(tmp_path / "model.gguf")


@pytest.mark.parametrize("experts", [10**9, 2**31 - 1])
def test_a_number_of_experts_is_compared_with_the_tensors_before_names_are_made(tmp_path, experts):
    def gate(arrays):
        arrays["model.layers.0.block_sparse_moe.gate.weight"] = np.zeros((4, 32), np.float32)

    tiny.write_folder(tmp_path, change=gate)
    config = tiny.config(model_type="mixtral", num_local_experts=experts, num_experts_per_tok=2)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FormatError,
        match=f"gate.weight: has shape .4, 32., where the configuration gives .{experts}, 32.",
    ):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "name", ["output.bias", "output_norm.bias", "rope_factors_long.weight", "blk.0.attn_q.bias"]
)
def test_a_tensor_of_a_gguf_file_that_nothing_reads_is_named(tmp_path, name):
    gguf = pytest.importorskip("gguf")
    add = gguf.GGUFWriter.write_header_to_file

    def with_another(writer, *args):
        writer.add_tensor(name, np.zeros(29, np.float32))
        add(writer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_another)
        tiny.write_gguf(tmp_path / "model.gguf")
    with pytest.raises(FormatError, match=name):
        load_model(tmp_path / "model.gguf")


def test_a_type_that_cannot_be_read_is_named(tmp_path):
    def change(arrays):
        arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float64)

    tiny.write_folder(tmp_path, change=change)
    with pytest.raises(FormatError, match=r"model\.norm\.weight.*F64"):
        load_model(tmp_path)


@pytest.mark.parametrize("format", ["Q4_1", "Q8_0"])
def test_quantized_layers_say_so(tmp_path, format):
    pytest.importorskip("gguf")
    tiny.write_gguf(tmp_path / "model.gguf", format=format)
    model = load_model(tmp_path / "model.gguf")
    layer = model.layers[0].self_attn.q_proj
    assert isinstance(layer, nn.QuantizedLinear) and isinstance(
        model.model.embed_tokens, nn.QuantizedEmbedding
    )
    assert format.lower() in repr(layer)


@pytest.mark.parametrize("format", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_a_gguf_file_of_k_quants(tmp_path, format):
    pytest.importorskip("gguf")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    c, arrays = tiny.write_gguf(tmp_path / "model.gguf", format=format, tied=False, **sizes)
    model = load_model(tmp_path / "model.gguf")
    assert {weight.format for weight in model.stored().values()} == {format.lower()}
    tokens = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    expected = tiny.logits(c, arrays, tokens)
    np.testing.assert_allclose(model(tokens[None])[0], expected, atol=2e-5 * np.abs(expected).max())
    few = model(tokens[None, :3])[0]  # computed by the kernel for few rows
    np.testing.assert_allclose(few, expected[:3], atol=2e-5 * np.abs(expected).max())
