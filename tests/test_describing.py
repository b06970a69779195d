"""`pyloss info MODEL`."""

import json

import pytest
import tiny
from packed_folders import write_float8, write_packed
from tiny_commands import fails

from pyloss.cli import main
from pyloss.describing import describe_model, template_features
from pyloss.models import load_model, quantize_model
from pyloss.models.config.gemma4 import Gemma4
from pyloss.models.config.mixture import Mixture
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.reading import resolve_model
from pyloss.models.synthetic import random_model

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def described(place):
    return dict(line.split(": ", 1) for line in describe_model(place))


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_model_is_described_without_reading_its_weights(tmp_path, kind, monkeypatch):
    place = tmp_path / ("m.gguf" if kind == "gguf" else "m")
    (tiny.write_gguf if kind == "gguf" else tiny.write_folder)(place)
    found = described(place)
    assert found["family"] == "llama (LlamaForCausalLM; llama in GGUF)"
    assert found["layers"] == "3: 3 with full attention"
    assert found["sizes"] == (
        "hidden 32, MLP 64, 4 heads of 8 with 2 for keys and values, vocabulary 29, head tied to "
        "the embedding"
    )
    assert found["context"] == "512 tokens"
    # embedding; q and o, k and v, MLP of three layers; norms
    assert (
        found["parameters"]
        == f"{29 * 32 + 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 7 * 32:,}, 928 of them in embedding and head"
    )
    assert found["stored"] == "0 MB: 100.0% f32"
    assert found["tokenizer"].startswith("none that can be read")
    assert "self_attn.q_proj, " in found["adapters"] and "mlp.down_proj" in found["adapters"]
    longer = [name for name in found if name.startswith("LoRA of rank 8 (")]
    assert [name.split("), ")[1] for name in longer] == ["1 x 512 tokens"]  # the context
    assert all("with --grad-checkpoint" in found[name] for name in longer)


def test_layers_are_counted_by_type(tmp_path):
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = ModelConfig(
        "gemma2", num_hidden_layers=3, sliding_window=64, layer_types=kinds, **SIZES
    )
    random_model(config, "q8_0").save(tmp_path / "gemma")
    found = described(tmp_path / "gemma")
    assert found["layers"] == "3: 2 with attention over 64 tokens; 1 with full attention"
    bare = ModelConfig("smollm3", num_hidden_layers=2, no_rope_layers=[1, 0], **SIZES)
    random_model(bare, "f32").save(tmp_path / "smollm3")
    assert described(tmp_path / "smollm3")["layers"] == (
        "2: 1 with full attention; 1 with full attention, without positions"
    )
    mixed = ModelConfig(
        "lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"], conv_L_cache=3, **SIZES
    )
    random_model(mixed, "f32").save(tmp_path / "lfm2")
    shared = ModelConfig(
        "gemma4_text", num_hidden_layers=3, sliding_window=64, layer_types=kinds, **SIZES,
        gemma4=Gemma4(32, 0, False, 16, 300),
    )  # fmt: skip
    random_model(shared, "f32").save(tmp_path / "gemma4")
    assert described(tmp_path / "gemma4")["Gemma 4"] == (
        "heads of 32 without a window, the keys and values of 0 layers shared, embeddings of 16 "
        "for each layer"
    )
    assert described(tmp_path / "lfm2")["layers"] == (
        "2: 1 with short convolution over 3 tokens; 1 with full attention"
    )
    experts = ModelConfig("mixtral", num_hidden_layers=2, mixture=Mixture(4, 2, 128, True), **SIZES)
    random_model(experts, "f32").save(tmp_path / "mixtral")
    assert described(tmp_path / "mixtral")["layers"] == (
        "2: 2 with full attention, 4 experts of 128, 2 per token"
    )


def test_a_configuration_alone(tmp_path, capsys):
    config = ModelConfig("llama", num_hidden_layers=2, **SIZES)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    for place in (tmp_path, tmp_path / "config.json"):
        assert main(["info", str(place)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "weights: none here" in lines and not any("LoRA" in line for line in lines)


def test_what_is_refused_is_named(tmp_path, capsys):
    config = ModelConfig("llama", num_hidden_layers=2, **SIZES).to_hf()
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mamba2"}))
    fails(capsys, ["info", str(tmp_path)], "model_type 'mamba2' is not supported")
    (tmp_path / "config.json").write_text(json.dumps(config | {"partial_rotary_factor": 0.3}))
    fails(capsys, ["info", str(tmp_path)], "partial_rotary_factor 0.3")


class Templated:
    """A tokenizer that is only a chat template."""

    def __init__(self, template):
        self.chat_template = template

    def apply_chat_template(self, messages, tokenize=False, **options):
        from pyloss.models.text.chat_template import render_chat

        return render_chat(self.chat_template, messages, **options)


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "features"),
    [
        (PLAIN, ["system role"]),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", []),
        ("{% if tools %}{{ tools | tojson }}{% endif %}" + PLAIN, ["system role", "tools"]),
        (
            PLAIN + "{% if enable_thinking %}<think>{% endif %}",
            ["system role", "thinking, switched by enable_thinking"],
        ),
        (PLAIN + "{{ messages[-1].reasoning_content }}", ["system role", "thinking"]),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            ["system role", "marks around the assistant's text"],
        ),
        ("{{ raise_exception('no') }}", []),
    ],
)
def test_features_of_chat_templates(template, features):
    assert template_features(Templated(template)) == features


def test_the_embedded_model():
    try:
        place = resolve_model("smollm2-135m")
    except FileNotFoundError:
        pytest.skip("the model is not installed")
    found = described(place)
    assert found["parameters"] == "134,515,008, 28,311,552 of them in embedding and head"
    assert found["stored"].startswith("97 MB: ")
    assert found["tokenizer"] == "49152 tokens" and found["chat template"] == "system role"


def test_parts_for_other_inputs_are_said_to_be_left_out(tmp_path):
    tiny.write_folder(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert "not read" not in described(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**content, "vision_config": {}}))
    assert described(tmp_path)["not read"].startswith("the parts for vision; text alone")


def test_mixtures_are_described(tmp_path):
    mixture = Mixture(4, 2, 32, True, (0,), bias=True)
    types = ["conv", "full_attention", "conv"]
    sizes = {"num_hidden_layers": 3, **SIZES}
    config = ModelConfig("lfm2_moe", mixture=mixture, layer_types=types, **sizes)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert described(tmp_path)["layers"] == (
        "3: 1 with short convolution over 3 tokens; "
        "1 with full attention, 4 experts of 32, 2 per token; "
        "1 with short convolution over 3 tokens, 4 experts of 32, 2 per token"
    )
    shared = Mixture(4, 2, 32, False, shared_size=64)
    config = ModelConfig("qwen2_moe", mixture=shared, **sizes)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert described(tmp_path)["layers"] == (
        "3: 3 with full attention, 4 experts of 32, 2 and one of 64 per token"
    )


@pytest.mark.parametrize("case", ["gptq", "gptq, desc_act", "awq", "fp8", "mlx"])
def test_quantized_folders_are_not_repacked(tmp_path, case, monkeypatch):
    if case == "fp8":
        write_float8(tmp_path)
    elif case == "mlx":
        tiny.write_folder(tmp_path / "a")
        model = load_model(tmp_path / "a")
        quantize_model(model, "q4", 32)
        model.save(tmp_path)
    else:
        write_packed(tmp_path, method=case[:4].strip(","), order="desc_act" in case or None)
    loaded = load_model(tmp_path).stored()
    for name in ("packed._rows_of", "packed._gptq_codes", "float8.encode"):
        monkeypatch.setattr(f"pyloss.models.files.{name}", None)
    found = described(tmp_path)
    becomes = {
        "fp8": ", expanded to floats when it is loaded",
        "mlx": "",
    }.get(case, ", repacked as affine groups when it is loaded")
    assert found["quantization"] == case.split(",")[0] + becomes
    formats = {weight.format for weight in loaded.values()}
    assert all(format in found["stored"] for format in formats)
    (tmp_path / "model.safetensors").unlink()
    assert described(tmp_path)["quantization"] == found["quantization"]
