"""GGUF files written by pyloss are read back bit for bit; no file is left incomplete."""

import dataclasses
import sys

import gguf
import numpy as np
import pytest
import tiny
import tokenizers
from rope_settings import llama3
from stored_weights import GGUF, QUANTISED, stored
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

import pyloss
from pyloss.io.gguf import read_gguf
from pyloss.models import load, load_model
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.files.gguf_writer import TYPES, GGUFTensor, write_gguf, write_gguf_file
from pyloss.models.files.mixtures import ALIASES, MIXTURES
from pyloss.models.synthetic import random_model
from pyloss.models.text.gguf_vocabulary import vocabulary_metadata
from pyloss.models.tokenizer import Tokenizer
from pyloss.tuner import linear_to_lora_layers
from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.adapters.gguf import write_lora_gguf

LLAMA3 = llama3(8.0, 64)
IDS = np.arange(40)[None] * 7 % tiny.TOKENS


def logits(model, ids=IDS):
    return pyloss.autograd.data(model(ids))[0]


def tiny_model(folder, **options):
    return tiny.load_tiny(folder, vocab_size=tiny.TOKENS, **options)


@pytest.mark.parametrize("dtype", list(tiny.TYPES))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "tied": False},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"head_dim": 16},
    ],
)
def test_a_folder_becomes_the_same_model(tmp_path, dtype, options):
    tokenizer = tiny.byte_tokenizer()
    model = tiny_model(tmp_path / "hf", dtype=dtype, **options)
    write_gguf(model, tmp_path / "model.gguf", tokenizer)
    again, text = load(tmp_path / "model.gguf")
    # The tokenizer provides this; the folder did not.
    config = dataclasses.replace(model.config, pad_token_id=0)
    assert again.config == config
    np.testing.assert_array_equal(logits(again), logits(model))
    assert {name: weight.format for name, weight in again.stored().items()} == dict.fromkeys(
        model.stored(), dtype
    )
    assert text.encode("hello w12</s>") == tokenizer.encode("hello w12</s>")
    assert (text.special_tokens, text.eos_token_ids) == (tokenizer.special_tokens, {2})
    assert text.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("format", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"])
def test_a_gguf_file_keeps_its_bytes(tmp_path, format):
    tiny.write_gguf(
        tmp_path / "a.gguf", format=format, vocab_size=tiny.TOKENS, tied=False, bias=True
    )
    write_gguf(
        load_model(tmp_path / "a.gguf"), tmp_path / "b.gguf", tiny.byte_tokenizer(), name="a name"
    )
    a, b = read_gguf(tmp_path / "a.gguf"), read_gguf(tmp_path / "b.gguf")
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert (b.tensors[name].dtype, b.tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert b.tensors[name].data.tobytes() == tensor.data.tobytes(), name
    assert {key: b.metadata[key] for key in a.metadata} == a.metadata
    names = {"F32": "ALL_F32"}
    assert (
        b.metadata["general.file_type"] == gguf.LlamaFileType[names.get(format, f"MOSTLY_{format}")]
    )
    assert b.metadata["general.name"] == "a name"


@pytest.mark.parametrize("type", [type for type in TYPES if type not in {**MIXTURES, **ALIASES}])
def test_types_are_those_of_the_gguf_package(tmp_path, type):
    c, arrays = tiny.write_folder(tmp_path / "hf", vocab_size=tiny.TOKENS, dtype="bf16")
    write_gguf(load_model(tmp_path / "hf"), tmp_path / "model.gguf", tiny.byte_tokenizer(), type)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == len(arrays)
    for name, array in arrays.items():
        tensor = tensors[tiny.gguf_name(name)]
        kind = gguf.GGMLQuantizationType[type.upper() if array.ndim == 2 else "F32"]
        if type.startswith(("q4", "q5")) and "embed" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
        placed = (
            tiny.interleaved(array, c["head_dim"])
            if ".q_proj." in name or ".k_proj." in name
            else array
        )
        assert tensor.tensor_type == kind, name
        expected = gguf.quants.quantize(placed, kind)
        assert np.asarray(tensor.data).tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("format", QUANTISED)
def test_what_gguf_has_is_kept_and_the_rest_is_f16(tmp_path, format):
    model = tiny_model(tmp_path / "hf", intermediate_size=256)
    weight = stored(np.random.default_rng(0), 32, 256, format)
    model.layers[0].mlp.down_proj = pyloss.nn.Linear.from_weight(weight)
    write_gguf(model, tmp_path / "model.gguf", tiny.byte_tokenizer())
    tensor = read_gguf(tmp_path / "model.gguf").tensors["blk.0.ffn_down.weight"]
    if format in GGUF:
        assert tensor.dtype == format.upper() and tensor.data.tobytes() == weight.raw.tobytes()
    else:
        assert tensor.dtype == "F16"
        np.testing.assert_array_equal(tensor.array(), weight.dequantize().astype(np.float16))


def test_rows_that_do_not_fit_blocks_are_f16(tmp_path):
    model = tiny_model(tmp_path / "hf", intermediate_size=40)
    write_gguf(model, tmp_path / "model.gguf", tiny.byte_tokenizer(), "q4_0")
    types = {
        name: tensor.dtype for name, tensor in read_gguf(tmp_path / "model.gguf").tensors.items()
    }
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q4_0"


def test_trained_matrices_and_other_families(tmp_path):
    """A float32 array in place of a stored matrix; q and k of a family that keeps its row order."""
    model = tiny_model(
        tmp_path / "hf",
        model_type="qwen2",
        bias=False,
        change=lambda arrays: arrays.update(_qkv_biases()),
    )
    layer = model.layers[1].self_attn
    layer.q_proj = pyloss.nn.Linear.from_weight(
        layer.q_proj.weight.dequantize() * np.float32(1.5), layer.q_proj.bias
    )
    write_gguf(model, tmp_path / "model.gguf", tiny.byte_tokenizer())
    again = load_model(tmp_path / "model.gguf")
    assert again.config.model_type == "qwen2"
    np.testing.assert_array_equal(logits(again), logits(model))
    stored = read_gguf(tmp_path / "model.gguf").tensors["blk.1.attn_q.weight"].array()
    np.testing.assert_array_equal(stored, layer.q_proj.weight)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "smollm3"},
        {"model_type": "olmo2", "tied": False, "rms_norm_eps": 0.01},
        {
            **tiny.FAMILIES["olmo3"],
            "tied": False,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 1000.0}
                for kind in ("full_attention", "sliding_attention")
            },
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ],
    ids=["smollm3", "olmo2", "olmo3"],
)
def test_families_become_the_same_model(tmp_path, options):
    model = tiny_model(tmp_path / "hf", num_hidden_layers=3, **options)
    write_gguf(model, tmp_path / "model.gguf", tiny.byte_tokenizer())
    again = load_model(tmp_path / "model.gguf")
    assert again.config == dataclasses.replace(model.config, pad_token_id=0)
    np.testing.assert_array_equal(logits(again), logits(model))


def test_a_tied_head_that_llama_cpp_needs_is_written(tmp_path):
    model = tiny_model(tmp_path / "hf", model_type="olmo2")
    write_gguf(model, tmp_path / "model.gguf", tiny.byte_tokenizer())
    again = load_model(tmp_path / "model.gguf")
    assert not again.config.tie_word_embeddings
    np.testing.assert_array_equal(logits(again), logits(model))


OLMO3 = tiny.FAMILIES["olmo3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            tiny.FAMILIES["smollm3"],
            r"no_rope_layers \[1, 0, 1\] cannot be written: llama.cpp takes",
        ),
        (
            {"model_type": "smollm3", "rope_scaling": LLAMA3},
            "rope_scaling of type llama3 cannot be written: llama.cpp does not have it for smollm3",
        ),
        ({"model_type": "olmo2", "head_dim": 16}, "head_dim other than .* cannot be written"),
        ({"model_type": "smollm3", "bias": True}, "attention_bias cannot be written"),
        (OLMO3, "rope_theta 700.0 of layers with a window cannot be written"),
        (
            {**OLMO3, "layer_types": OLMO3["layer_types"][1:] + ["full_attention"]},
            "llama.cpp reads layer_types that repeat with one full_attention at the end",
        ),
    ],
)
def test_options_that_llama_cpp_lacks_are_refused(tmp_path, options, message):
    model = tiny_model(tmp_path / "hf", **options)
    with pytest.raises(ValueError, match=message):
        write_gguf(model, tmp_path / "model.gguf", tiny.byte_tokenizer())
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("option", ["attention_bias", "rope_scaling"])
def test_options_that_only_llama_has(tmp_path, family, option):
    value = {"attention_bias": True, "rope_scaling": LLAMA3}[option]
    sizes = {key: tiny.SIZES[key] for key in tiny.SIZES if not key.startswith(("rms", "rope"))}
    config = ModelConfig(family, **{**sizes, "vocab_size": tiny.TOKENS}, **{option: value})
    with pytest.raises(ValueError, match=f"{option}.* cannot be written: llama.cpp does not have"):
        write_gguf(random_model(config), tmp_path / "model.gguf", tiny.byte_tokenizer())


def _qkv_biases():
    rng, sizes = np.random.default_rng(5), {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    return {
        f"model.layers.{i}.self_attn.{name}.bias": rng.standard_normal(rows, np.float32)
        for i in range(3)
        for name, rows in sizes.items()
    }


# ---- Tokenizers


@pytest.mark.parametrize(
    "pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "dbrx", "gpt-4o"]
)
@pytest.mark.parametrize(
    "around", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}]
)
def test_a_tokenizer_json_is_described_as_its_gguf_was(tmp_path, pre, around):
    tokenizer = tiny.byte_tokenizer(
        pre, eot_token_id=3, **{"add_bos_token": False, "add_eos_token": False, **around}
    )
    tokenizer.save(tmp_path)
    found = vocabulary_metadata(Tokenizer.from_folder(tmp_path), tiny.TOKENS + 3)
    again = Tokenizer.from_gguf(found)
    assert found["tokenizer.ggml.pre"] == pre
    assert found["tokenizer.ggml.tokens"][-3:] == [f"[PAD{tiny.TOKENS + i}]" for i in range(3)]
    assert found["tokenizer.ggml.token_type"][-4:] == [1, 5, 5, 5]
    for text in ("hello w12 1234", "<|eot|> <tool>x</s>", "  two\n", "日本語 e\u0301"):
        assert again.encode(text) == tokenizer.encode(text)
    assert (
        again.special_tokens == tokenizer.special_tokens
        and again.chat_template == tokenizer.chat_template
    )
    assert again.eos_token_ids == {2, 3}


def test_what_a_gguf_said_of_its_tokenizer_is_carried_over(tmp_path):
    model = tiny_model(tmp_path / "hf")
    write_gguf(model, tmp_path / "a.gguf", tiny.byte_tokenizer("deepseek-r1-qwen", eot_token_id=3))
    a, tokenizer = load(tmp_path / "a.gguf")
    tokenizer.chat_template = "another"
    write_gguf(a, tmp_path / "b.gguf", tokenizer)
    before, after = (read_gguf(tmp_path / name).metadata for name in ("a.gguf", "b.gguf"))
    assert {key for key in before if before[key] != after[key]} == {
        "general.name",
        "tokenizer.chat_template",
    }
    assert load(tmp_path / "b.gguf")[1].chat_template == "another"


def test_several_templates_and_ends(tmp_path):
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    tokenizer.eos_token_ids |= {3, 4}
    write_gguf(tiny_model(tmp_path / "hf"), tmp_path / "m.gguf", tokenizer)
    again = load(tmp_path / "m.gguf")[1]
    assert again.chat_template == tokenizer.chat_template and again.eos_token_ids == {2, 3, 4}
    tokenizer.eos_token_ids.add(0)
    with pytest.warns(UserWarning, match="a further token that ends an answer"):
        vocabulary_metadata(tokenizer, tiny.TOKENS)


def bpe(**changes):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {
        key: changes.pop(key)
        for key in ("byte_fallback", "continuing_subword_prefix")
        if key in changes
    }
    words = {word: i for i, word in enumerate([*alphabet, "he"])}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=words, merges=changes.pop("merges", [("h", "e")]), **options)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for key, value in changes.items():
        setattr(backend, key, value)
    return Tokenizer(backend, {})


def with_token(**flags):
    tokenizer = bpe()
    tokenizer.backend.add_tokens([AddedToken("<m>", **flags)])
    return tokenizer


REFUSED = {
    "its model is WordLevel": lambda: Tokenizer(
        tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")), {}
    ),
    "its normalizer is .* which SentencePiece's BPE has not": lambda: bpe(byte_fallback=True),
    "its model has no merges": lambda: bpe(merges=[]),
    "continuing_subword_prefix = '##'": lambda: bpe(continuing_subword_prefix="##", merges=[]),
    "its normalizer is Lowercase": lambda: bpe(normalizer=normalizers.Lowercase()),
    "its pre-tokenizer is none of gpt-2, smollm": lambda: bpe(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "its pre-tokenizer is none of": lambda: bpe(pre_tokenizer=pre_tokenizers.Whitespace()),
    "'<m>' takes the text around it": lambda: with_token(rstrip=True),
    "its post-processor is BertProcessing": lambda: bpe(
        post_processor=processors.BertProcessing(("a", 0), ("b", 1))
    ),
    r"it puts \['a'\] around texts, not its bos token": lambda: bpe(
        post_processor=processors.TemplateProcessing(single="a $A", special_tokens=[("a", 65)])
    ),
}


@pytest.mark.parametrize("message", list(REFUSED))
def test_tokenizers_that_gguf_cannot_describe(tmp_path, message):
    model = tiny.load_tiny(tmp_path / "hf", vocab_size=300)
    with pytest.raises(ValueError, match="the tokenizer cannot be written as GGUF: " + message):
        write_gguf(model, tmp_path / "m.gguf", REFUSED[message]())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_added_tokens_without_a_row_in_the_model_are_left_out(tmp_path):
    """As in Gemma 3's files of 1B, whose tokenizer has one for images."""
    tokenizer = tiny.byte_tokenizer()
    size = len(tokenizer)
    tokenizer.backend.add_special_tokens(["<image>"])
    write_gguf(tiny.load_tiny(tmp_path / "hf", vocab_size=size), tmp_path / "m.gguf", tokenizer)
    model, again = load(tmp_path / "m.gguf")
    assert len(again) == model.vocab_size == size and "<image>" not in again.backend.get_vocab()


def test_more_tokens_than_the_model_has(tmp_path):
    with pytest.raises(ValueError, match="ids up to 266, and the model 29 tokens"):
        write_gguf(tiny.load_tiny(tmp_path / "hf"), tmp_path / "m.gguf", tiny.byte_tokenizer())
    write_gguf(tiny_model(tmp_path / "big"), tmp_path / "a.gguf", tiny.byte_tokenizer())
    with pytest.raises(ValueError, match="the tokenizer has 267 tokens, and the model 29"):
        write_gguf(
            tiny.load_tiny(tmp_path / "hf"), tmp_path / "m.gguf", load(tmp_path / "a.gguf")[1]
        )


# ---- Adapters


def adapted(folder, keys=None, **options):
    model = tiny_model(folder, **options)
    linear_to_lora_layers(model, 2, {"rank": 3, "scale": 2.5, "dropout": 0.125, "keys": keys})
    rng = np.random.default_rng(0)
    for array in model.trainable_parameters().values():
        array[...] = rng.standard_normal(array.shape)
    return model


def test_a_lora_file_has_the_names_and_shapes_of_llama_cpp(tmp_path):
    model = adapted(tmp_path / "hf", tied=False)
    layers = adapter_modules(model)
    layers["model.layers.2.self_attn.q_proj"].scale = 1.25
    write_lora_gguf(model, tmp_path / "lora.gguf", name="mine")
    file = read_gguf(tmp_path / "lora.gguf")
    wanted = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "mine",
        "adapter.type": "lora",
        "adapter.lora.alpha": 7.5,
    }
    assert file.metadata == wanted
    assert len(file.tensors) == 2 * 2 * 7
    for name, layer in layers.items():
        stem = tiny.gguf_name(f"{name}.weight")
        a, b = file.tensors[f"{stem}.lora_a"].array(), file.tensors[f"{stem}.lora_b"].array()
        np.testing.assert_array_equal(a, layer.lora_a.T)
        delta = layer.delta()
        if "q_proj" in name or "k_proj" in name:
            delta = tiny.interleaved(delta, 8)
        # llama.cpp multiplies by alpha / rank of the tensor.
        np.testing.assert_allclose(7.5 / a.shape[0] * b @ a, delta, rtol=1e-4, atol=1e-5)


def test_an_embedding_and_a_head_of_their_own(tmp_path):
    model = adapted(tmp_path / "hf", ["model.embed_tokens", "lm_head"], tied=False)
    write_lora_gguf(model, tmp_path / "lora.gguf")
    tensors = read_gguf(tmp_path / "lora.gguf").tensors
    table, head = model.model.embed_tokens, model.lm_head
    # The table's lora_a is looked up by rows; the head's is a factor of a product.
    for name, expected in (
        ("token_embd", (table.lora_a, table.lora_b.T)),
        ("output", (head.lora_a.T, head.lora_b.T)),
    ):
        for half, array in zip("ab", expected):
            np.testing.assert_array_equal(tensors[f"{name}.weight.lora_{half}"].array(), array)


def test_adapters_that_llama_cpp_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="the model has no adapter"):
        write_lora_gguf(tiny_model(tmp_path / "hf"), tmp_path / "lora.gguf")
    model = adapted(tmp_path / "hf", ["model.embed_tokens"])
    with pytest.raises(
        ValueError,
        match="model.embed_tokens: llama.cpp takes no adapter over a head that is the embedding",
    ):
        write_lora_gguf(model, tmp_path / "lora.gguf")
    model = tiny_model(tmp_path / "hf")
    linear_to_lora_layers(
        model, 1, {"rank": 3, "scale": 2.5, "keys": ["mlp.up_proj"]}, use_dora=True
    )
    with pytest.raises(
        ValueError,
        match="model.layers.2.mlp.up_proj: llama.cpp has no dora adapters; write the fused model",
    ):
        write_lora_gguf(model, tmp_path / "lora.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# ---- Errors


def test_models_that_cannot_be_written(tmp_path):
    model = adapted(tmp_path / "hf")
    with pytest.raises(ValueError, match="unfused adapters"):
        write_gguf(model, tmp_path / "m.gguf", tiny.byte_tokenizer())
    with pytest.raises(ValueError, match="type must be one of f32, f16, .*, q5_k, got 'q2'"):
        write_gguf(model, tmp_path / "m.gguf", tiny.byte_tokenizer(), "q2")
    with pytest.raises(FileNotFoundError, match="missing/m.gguf"):
        write_gguf(model.fuse(), tmp_path / "missing" / "m.gguf", tiny.byte_tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_without_the_gguf_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'pyloss\[gguf\]'"):
        write_gguf(tiny_model(tmp_path / "hf"), tmp_path / "m.gguf", tiny.byte_tokenizer())


def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path):
    def fail():
        raise ZeroDivisionError

    (tmp_path / "m.gguf").write_text("old")
    good = GGUFTensor("a", (2, 32), "f32", lambda: np.zeros(256, np.uint8))
    with pytest.raises(ZeroDivisionError):
        write_gguf_file(
            tmp_path / "m.gguf", "llama", {}, [good, GGUFTensor("b", (2, 32), "q8_0", fail)]
        )
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("m.gguf", "old")]
