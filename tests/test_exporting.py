"""`export`: every format from a tiny model, which stays unchanged."""

import copy
import json

import gguf
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import pyloss
from pyloss.io.gguf import read_gguf
from pyloss.models import conversion, load, load_model
from pyloss.models.importance import column_importance
from pyloss.tuner import linear_to_lora_layers, load_adapters

IDS = np.arange(30)[None] * 11 % tiny.TOKENS


def logits(model):
    return pyloss.autograd.data(model(IDS))


@pytest.fixture
def plain(tmp_path):
    tiny.write_folder(tmp_path / "base", vocab_size=tiny.TOKENS)
    return load_model(tmp_path / "base")


@pytest.fixture
def model(plain):
    linear_to_lora_layers(
        plain, -1, {"rank": 3, "scale": 1.5, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    )
    rng = np.random.default_rng(0)
    for array in plain.trainable_parameters().values():
        array[...] = rng.normal(0, 0.3, array.shape)
    return plain


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_adapters(model, tmp_path, to):
    pyloss.export(model, tmp_path / "a", to, name="base")
    again = load_model(tmp_path / "base")
    load_adapters(again, tmp_path / "a")
    np.testing.assert_array_equal(logits(again), logits(model))


def test_models(model, tmp_path):
    before, names = logits(model), set(model.trainable_parameters())
    tokenizer = tiny.byte_tokenizer()
    pyloss.export(model, tmp_path / "hf", "hf", tokenizer)
    pyloss.export(model, tmp_path / "new" / "m.gguf", "gguf", tokenizer, name="mine")
    pyloss.export(model, tmp_path / "half.gguf", "gguf", tokenizer, type="f16")
    pyloss.export(model, tmp_path / "lora.gguf", "gguf", adapter_only=True)
    assert set(model.trainable_parameters()) == names
    np.testing.assert_array_equal(logits(model), before)
    for place in (tmp_path / "hf", tmp_path / "new" / "m.gguf"):
        again, text = load(place)
        np.testing.assert_allclose(logits(again), before, rtol=0, atol=1e-4)
        assert text.encode("hello w12") == tokenizer.encode("hello w12")
    assert read_gguf(tmp_path / "new" / "m.gguf").metadata["general.name"] == "mine"
    assert {
        t.dtype for t in read_gguf(tmp_path / "half.gguf").tensors.values() if len(t.shape) == 2
    } == {"F16"}
    assert len(read_gguf(tmp_path / "lora.gguf").tensors) == 2 * 3 * 2


@pytest.mark.parametrize("kept", [False, True])
def test_over_a_quantized_base(tmp_path, kept, recwarn):
    """Folders and GGUF files of other types cannot hold the base's format; nothing is lost."""
    tiny.write_gguf(tmp_path / "base.gguf", format="Q4_0", vocab_size=tiny.TOKENS)
    model = load_model(tmp_path / "base.gguf")
    linear_to_lora_layers(model, -1, {"rank": 3, "scale": 1.5, "keys": ["mlp.up_proj"]})
    for array in model.trainable_parameters().values():
        array[...] = np.random.default_rng(0).normal(0, 0.05, array.shape)
    before, tokenizer = logits(model), tiny.byte_tokenizer()
    pyloss.export(model, tmp_path / "hf", "hf", tokenizer)
    pyloss.export(model, tmp_path / "f32.gguf", "gguf", tokenizer, type="f32")
    assert not recwarn.list
    for place in ("hf", "f32.gguf"):
        np.testing.assert_allclose(logits(load_model(tmp_path / place)), before, rtol=0, atol=1e-4)
    if kept:
        pyloss.export(model, tmp_path / "same.gguf", "gguf", tokenizer, dequantize=True)
    else:
        names = set(model.trainable_parameters())
        for type in (None, "q4_0"):
            with pytest.raises(
                ValueError, match=r"would keep [0-4]% .*--dequantize --type q8_0 .*--adapter-only"
            ):
                pyloss.export(model, tmp_path / "same.gguf", "gguf", tokenizer, type=type)
        assert set(model.trainable_parameters()) == names and not (tmp_path / "same.gguf").exists()
        np.testing.assert_array_equal(logits(model), before)
        for array in model.trainable_parameters().values():
            array *= 2
        before = logits(model)
        pyloss.export(model, tmp_path / "same.gguf", "gguf", tokenizer, type="f16", dequantize=True)
        moved = np.abs(logits(load_model(tmp_path / "base.gguf")) - before).max()
        assert np.abs(logits(load_model(tmp_path / "same.gguf")) - before).max() < 0.05 * moved
        return
    kinds = {
        tensor.dtype
        for name, tensor in read_gguf(tmp_path / "same.gguf").tensors.items()
        if "ffn_up" in name
    }
    assert kinds == {"F32"}
    assert np.abs(logits(load_model(tmp_path / "same.gguf")) - before).max() < 1e-4


def test_a_model_whose_adapter_was_lost_in_fusing_is_not_saved(tmp_path):
    tiny.write_gguf(tmp_path / "base.gguf", format="Q4_0", vocab_size=tiny.TOKENS)
    model = load_model(tmp_path / "base.gguf")
    linear_to_lora_layers(model, -1, {"rank": 3, "scale": 1.5, "keys": ["mlp.up_proj"]})
    for array in model.trainable_parameters().values():
        array[...] = np.random.default_rng(0).normal(0, 0.05, array.shape)
    with pytest.warns(UserWarning, match="storing the fused weight as q4_0"):
        model.fuse()
    with pytest.raises(ValueError, match=r"kept 0% of it.*fuse\(dequantize=True\)"):
        model.save(tmp_path / "out")
    with pytest.raises(ValueError, match="kept 0% of it"):
        pyloss.export(model, tmp_path / "out.gguf", "gguf", tiny.byte_tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def test_over_a_base_in_a_format_that_gguf_does_not_have(plain, tmp_path, recwarn):
    conversion.quantize_model(plain, "q4", 32)
    linear_to_lora_layers(plain, -1, {"rank": 3, "scale": 1.5, "keys": ["mlp.up_proj"]})
    for array in plain.trainable_parameters().values():
        array[...] = np.random.default_rng(0).normal(0, 0.05, array.shape)
    pyloss.export(plain, tmp_path / "m.gguf", "gguf", tiny.byte_tokenizer())
    assert not recwarn.list
    assert {
        t.dtype for t in read_gguf(tmp_path / "m.gguf").tensors.values() if len(t.shape) == 2
    } == {"F16"}
    np.testing.assert_allclose(
        logits(load_model(tmp_path / "m.gguf")), logits(plain), rtol=0, atol=0.05
    )


def test_a_model_without_an_adapter_is_converted(plain, tmp_path):
    pyloss.export(plain, tmp_path / "m.gguf", "gguf", tiny.byte_tokenizer())
    np.testing.assert_array_equal(logits(load_model(tmp_path / "m.gguf")), logits(plain))
    for to, options in (("peft", {}), ("mlx", {}), ("gguf", {"adapter_only": True})):
        with pytest.raises(ValueError, match="the model has no adapter"):
            pyloss.export(plain, tmp_path / ("a.gguf" if to == "gguf" else "a"), to, **options)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("onnx", {}, "to must be one of peft, mlx, gguf, hf, ollama, not 'onnx'"),
        ("hf", {"adapter_only": True}, "adapter_only is for 'gguf' alone, not for 'hf'"),
        ("peft", {"type": "f16"}, "type is for 'gguf' and 'ollama', not for 'peft'"),
        ("gguf", {"type": "f16", "adapter_only": True}, "type is for whole models"),
        ("gguf", {"type": "q3"}, "type must be one of f32, f16"),
        ("gguf", {"dequantize": True, "adapter_only": True}, "dequantize is for whole models"),
        ("mlx", {"dequantize": True}, "dequantize is for whole models"),
        ("gguf", {"tokenizer": None}, "a GGUF file holds the tokenizer too"),
    ],
)
def test_arguments_that_do_not_go_together(model, tmp_path, to, options, message):
    names = set(model.trainable_parameters())
    with pytest.raises(ValueError, match=message):
        pyloss.export(
            model,
            tmp_path / ("out.gguf" if to == "gguf" else "out"),
            to,
            **{"tokenizer": tiny.byte_tokenizer(), **options},
        )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert set(model.trainable_parameters()) == names


def parts_in(folder):
    return sorted(path.name for path in folder.glob("m*.gguf"))


@pytest.mark.parametrize("size", [40_000, "40K", "0.04M", "4M", 1])
def test_split_gguf(plain, tmp_path, size):
    tokenizer = tiny.byte_tokenizer()
    out = tmp_path / "out"
    if size == "0.04M":
        with pytest.raises(ValueError, match="split_max_size must be a number of bytes .* '0.04M'"):
            pyloss.export(plain, out / "m.gguf", "gguf", tokenizer, split_max_size=size)
        return
    whole = pyloss.export(plain, tmp_path / "whole.gguf", "gguf", tokenizer)
    first = pyloss.export(plain, out / "m.gguf", "gguf", tokenizer, split_max_size=size)
    names = parts_in(out)
    if size == "4M":
        assert names == ["m.gguf"] and first == out / "m.gguf"
    else:
        count = len(names)
        assert names == [f"m-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
        assert first == out / names[0]
        files = [gguf.GGUFReader(out / name) for name in names]
        held = [[tensor.name for tensor in file.tensors] for file in files]
        if size == 1:
            assert all(len(tensors) == 1 for tensors in held)
        else:
            assert 2 < count < 20 and all((out / name).stat().st_size <= 40_000 for name in names)
        for i, file in enumerate(files):
            said = {key: int(file.fields[f"split.{key}"].contents()) for key in ("no", "count")}
            assert said == {"no": i, "count": count}
            total = file.fields["split.tensors.count"]
            assert total.contents() == sum(map(len, held)) and total.types[0].name == "INT32"
            assert file.fields["split.no"].types[0].name == "UINT16"
            assert ("tokenizer.ggml.tokens" in file.fields) == (i == 0)
    one, other = read_gguf(whole), read_gguf(first)
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert other.tensors[name].data.tobytes() == tensor.data.tobytes()
    again, text = load(first)
    np.testing.assert_array_equal(logits(again), logits(plain))
    assert text.encode("hello w12") == tokenizer.encode("hello w12")


def test_files_of_an_earlier_split_are_kept(plain, tmp_path, monkeypatch):
    tokenizer = tiny.byte_tokenizer()
    for size in (40_000, 80_000):
        pyloss.export(plain, tmp_path / "m.gguf", "gguf", tokenizer, split_max_size=size)
    names = parts_in(tmp_path)
    assert all(name.endswith(f"-of-{len(names):05}.gguf") for name in names)
    assert len(parts_in(tmp_path / "previous-1")) > len(names)
    before = [(tmp_path / name).read_bytes() for name in names]
    monkeypatch.setattr("pyloss.models.files.gguf_writer._MOST_PARTS", 2)
    with pytest.raises(ValueError, match="a model has at most 2 files, and 40000 bytes make more"):
        pyloss.export(plain, tmp_path / "m.gguf", "gguf", tokenizer, split_max_size=40_000)
    assert [(tmp_path / name).read_bytes() for name in names] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "hf", "split_max_size": "2G"}, "split_max_size is for 'gguf' alone, not for 'hf'"),
        (
            {"adapter_only": True, "split_max_size": "2G"},
            "for whole models: an adapter is one file",
        ),
        ({"split_max_size": 0}, "number of bytes above 0"),
        ({"split_max_size": "many"}, "got 'many'"),
        ({"split_max_size": True}, "got True"),
        ({"split_max_size": -5}, "got -5"),
    ],
)
def test_split_requests_that_are_refused(plain, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        pyloss.export(plain, tmp_path / "m", tokenizer=None, **{"to": "gguf", **options})


@pytest.mark.parametrize("adapted", [False, True])
def test_a_mixture_with_importance(tmp_path, adapted):
    """Errors move to columns whose inputs are small."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
    model = tiny.load_tiny(tmp_path / "base", vocab_size=tiny.TOKENS, **sizes)
    if adapted:
        linear_to_lora_layers(model, -1, {"rank": 2, "scale": 1.0, "keys": ["mlp.down_proj"]})
        model.layers[0].mlp.down_proj.lora_b[...] = 0.1
    tokenizer = tiny.byte_tokenizer()
    text = "hello w12 and hello again\n\nhello world, hello w12"
    (tmp_path / "text.txt").write_text(text)
    importance = column_importance(fused(model), [tokenizer.encode(text)])
    errors = []
    for name, data in (("even", None), ("weighed", tmp_path / "text.txt")):
        path = tmp_path / f"{name}.gguf"
        pyloss.export(model, path, "gguf", tokenizer, type="q2_k", importance_data=data)
        stored = load_model(path).stored()
        error = 0.0
        for tensor, before in fused(model).stored().items():
            if tensor in importance:
                difference = stored[tensor].dequantize() - before.dequantize()
                error += float(np.sum(difference**2 * importance[tensor]))
        errors.append(error)
    assert errors[1] < 0.97 * errors[0]


def fused(model):
    again = copy.deepcopy(model)
    again.fuse()
    return again


@pytest.mark.parametrize(
    "options, message",
    [
        ({"to": "hf"}, "importance_data is for 'gguf' and 'ollama', not for 'hf'"),
        ({"type": None}, "type must be one of q2_k, .*iq4_xs, not None"),
        ({"type": "q8_0"}, "type must be one of q2_k, .* not 'q8_0'"),
        ({}, "importance_data: there is no file .*none.txt"),
    ],
)
def test_requests_with_importance_that_are_refused(plain, tmp_path, options, message):
    request = {"to": "gguf", "type": "q4_k_m", "importance_data": tmp_path / "none.txt", **options}
    if request["to"] == "hf":
        request["type"] = None
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pyloss.export(plain, tmp_path / "m.gguf", tokenizer=tiny.byte_tokenizer(), **request)


def test_for_ollama(tmp_path):
    """The folder has the fused model in K-quants, and a Modelfile with template and stops."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
    model = tiny.load_tiny(tmp_path / "base", vocab_size=tiny.TOKENS, **sizes)
    linear_to_lora_layers(model, -1, {"rank": 2, "scale": 4.0, "keys": ["mlp.down_proj"]})
    for array in model.trainable_parameters().values():
        array[...] = np.random.default_rng(0).normal(0, 0.3, array.shape)
    model.adapter_config = {**(model.adapter_config or {}), "system_prompt": "Be 'brief'."}
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}{{ '<assistant>' }}"
    )
    before = logits(model)
    written = pyloss.export(model, tmp_path / "tuned", "ollama", tokenizer)
    assert written == tmp_path / "tuned"
    np.testing.assert_array_equal(logits(model), before)
    file = read_gguf(tmp_path / "tuned" / "model.gguf")
    assert file.metadata["general.file_type"] == 15
    assert file.tensors["blk.0.attn_q.weight"].dtype == "Q4_K"
    stored = load_model(tmp_path / "tuned" / "model.gguf").stored()
    for tensor, weight in fused(model).stored().items():
        error = np.linalg.norm(stored[tensor].dequantize() - weight.dequantize())
        assert error < 0.1 * np.linalg.norm(weight.dequantize()), tensor
    text = (tmp_path / "tuned" / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{- $first := true }}\n')
    for line in (
        '{{- if not $first }}{{ "<user>" }}',
        '{{- else if $.System }}{{ "<system>" }}{{ $.System }}{{ "<user>" }}',
        '{{- else if eq .Role "assistant" }}{{ "<assistant>" }}{{ .Content }}',
        "SYSTEM \"Be 'brief'.\"",
        'PARAMETER stop "</s>"',
        "PARAMETER num_ctx 512",
    ):
        assert line in text.splitlines(), line
    pyloss.export(model, tmp_path / "tuned", "ollama", tokenizer, type="q8_0")
    assert {path.name for path in (tmp_path / "tuned").iterdir()} >= {
        "Modelfile", "model.gguf", "previous-1",
    }  # fmt: skip
    assert read_gguf(tmp_path / "tuned" / "model.gguf").metadata["general.file_type"] == 7


def test_a_template_that_ollama_cannot_have_is_refused_before_anything_is_written(plain, tmp_path):
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="cannot be written in Ollama's language"):
        pyloss.export(plain, tmp_path / "tuned", "ollama", tokenizer)
    tokenizer.chat_template = None
    for options, message in (
        ({"adapter_only": True}, "adapter_only is for 'gguf' alone"),
        ({"split_max_size": "1G"}, "split_max_size is for 'gguf' alone"),
        ({"type": "q9"}, "type must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            pyloss.export(plain, tmp_path / "tuned", "ollama", tokenizer, **options)
    assert not (tmp_path / "tuned").exists()


def test_a_folder_in_bfloat16_and_shards(model, tmp_path):
    """Shards are read by pyloss and by safetensors under the index, with the same values."""
    tokenizer = tiny.byte_tokenizer()
    pyloss.export(model, tmp_path / "one", "hf", tokenizer, dtype="bfloat16")
    pyloss.export(model, tmp_path / "many", "hf", tokenizer, dtype="bfloat16", shard_size="20KB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    found, total = {}, 0
    for file in files:
        tensors = load_file(file)
        sizes = [array.nbytes for array in tensors.values()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
        total += sum(sizes)
        assert all(index["weight_map"][name] == file.name for name in tensors)
        found |= tensors
    assert index["metadata"]["total_size"] == total
    for name, array in load_file(tmp_path / "one" / "model.safetensors").items():
        assert array.dtype == found[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, found[name])
    assert {weight.format for weight in load_model(tmp_path / "many").stored().values()} == {"bf16"}
    np.testing.assert_array_equal(
        logits(load_model(tmp_path / "many")), logits(load_model(tmp_path / "one"))
    )
    # a single file takes the place of the shards
    pyloss.export(model, tmp_path / "many", "hf", tokenizer, overwrite=True)
    assert [path.name for path in (tmp_path / "many").glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize(
    "to, options, message",
    [
        ("gguf", {"dtype": "bfloat16"}, "dtype is for 'hf' alone, not for 'gguf'"),
        ("ollama", {"shard_size": "2GB"}, "shard_size is for 'hf' alone"),
        ("hf", {"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16, not 'int8'"),
        ("hf", {"shard_size": "two"}, "shard_size must be a number of bytes above 0"),
    ],
)
def test_folder_requests_that_are_refused(plain, tmp_path, to, options, message):
    with pytest.raises(ValueError, match=message):
        pyloss.export(plain, tmp_path / "out", to, tiny.byte_tokenizer(), **options)
    assert not (tmp_path / "out").exists()
