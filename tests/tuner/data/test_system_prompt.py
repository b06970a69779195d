"""The system prompt that a data set shares: found, stored with the adapter, used, switched off."""

import json
import types

import numpy as np
import pytest
from fake import FakeTokenizer
from tiny import TOKENS, byte_tokenizer, load_tiny

import pyloss
from pyloss.errors import FormatError
from pyloss.tuner import datasets as ds
from pyloss.tuner.adapters.folder import save_adapter
from pyloss.tuner.utils import linear_to_lora_layers, load_adapters

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def chats(*prompts, key="messages"):
    records = [
        {key: [*([] if p is None else [{"role": "system", "content": p}]), *TURNS]} for p in prompts
    ]
    return ds.ChatDataset(records, FakeTokenizer(), key)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (chats("be brief", "be brief"), "be brief"),
        (chats("be brief"), "be brief"),
        (chats("be brief", "be long"), None),
        (chats("be brief", None), None),
        (chats(None, "be brief"), None),
        (chats(None, None), None),
        (chats("", ""), ""),
        (chats("s", [{"type": "text", "text": "s"}], key="turns"), "s"),
        (ds.CacheDataset(chats("s")), "s"),
        (ds.CacheDataset([[1, 2]]), None),
        (ds.ConcatenatedDataset([chats("s"), [], chats("s")]), "s"),
        (ds.ConcatenatedDataset([chats("s"), chats("t")]), None),
        (
            ds.ConcatenatedDataset([chats("s"), ds.TextDataset([{"text": "x"}], FakeTokenizer())]),
            None,
        ),
        (ds.TextDataset([{"text": "x"}], FakeTokenizer()), None),
        (ds.CompletionsDataset([{"prompt": "p", "completion": "c"}], FakeTokenizer()), None),
    ],
)
def test_what_a_dataset_shares(dataset, expected):
    assert dataset.system_prompt() == expected


@pytest.fixture
def model(tmp_path):
    model = load_tiny(tmp_path / "model", vocab_size=TOKENS)
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    return model


def trained(model, dataset, folder, config=None):
    args = pyloss.TrainingArgs(
        iters=1,
        batch_size=1,
        adapter_file=folder / "adapters.safetensors",
        adapter_config=config,
        progress=False,
    )
    pyloss.train(model, pyloss.optim.AdamW(1e-3), dataset, None, args)
    return json.loads((folder / "adapter_config.json").read_text())


def test_training_remembers_it(model, tmp_path):
    assert trained(model, chats("s", "s"), tmp_path / "a")["system_prompt"] == "s"
    assert model.adapter_config["system_prompt"] == "s"
    # Another data set has no shared prompt.
    assert (
        "system_prompt"
        not in trained(model, chats("s", "t"), tmp_path / "b") | model.adapter_config
    )
    config = trained(
        model, ds.CacheDataset(chats("s")), tmp_path / "c", {**model.adapter_config, "own": 1}
    )
    assert (config["system_prompt"], config["own"]) == ("s", 1)
    # A list of tokens says nothing about the prompt.
    assert trained(model, [[1, 2, 3]], tmp_path / "d")["system_prompt"] == "s"


@pytest.mark.parametrize("format", ["mlx", "peft"])
def test_it_goes_with_the_adapter(model, tmp_path, format):
    model.adapter_config["system_prompt"] = "Be brief. Überall."
    save_adapter(model, tmp_path / format, format)
    again = load_tiny(tmp_path / "again", vocab_size=TOKENS)
    load_adapters(again, tmp_path / format)
    assert again.adapter_config["system_prompt"] == "Be brief. Überall."
    path = tmp_path / format / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "system_prompt": ["no", "text"]}))
    with pytest.raises(FormatError, match="adapter_config.json: system_prompt: expected text, got"):
        load_adapters(load_tiny(tmp_path / "third", vocab_size=TOKENS), tmp_path / format)


def test_it_goes_with_weights_trained_in_full(tmp_path):
    model = load_tiny(tmp_path / "model", vocab_size=TOKENS)
    pyloss.tuner.unfreeze_layers(model, 1)
    assert trained(model, chats("s"), tmp_path / "a")["system_prompt"] == "s"
    again = load_tiny(tmp_path / "again", vocab_size=TOKENS)
    load_adapters(again, tmp_path / "a")
    assert again.adapter_config["system_prompt"] == "s"


def test_peft_reads_a_configuration_that_has_it(model, tmp_path):
    peft = pytest.importorskip("peft")
    model.adapter_config["system_prompt"] = "Be brief."
    save_adapter(model, tmp_path / "peft", "peft")
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "peft"))
    assert config.r == 2


def test_gguf_files_of_adapters_have_it(model, tmp_path):
    pytest.importorskip("gguf")
    from pyloss.io.gguf import read_gguf

    model.adapter_config["system_prompt"] = "Be brief."
    pyloss.export(model, tmp_path / "lora.gguf", "gguf", adapter_only=True)
    assert read_gguf(tmp_path / "lora.gguf").metadata["pyloss.system_prompt"] == "Be brief."


# The command


@pytest.fixture
def asked(monkeypatch, capsys):
    """Run `pyloss generate` on a tiny model with a system prompt; return prompt and messages."""
    from pyloss import cli, generation, models

    tokenizer, prompts = byte_tokenizer(), []

    class Model:
        config = types.SimpleNamespace(max_position_embeddings=64)
        adapter_config = {"system_prompt": "Be brief."}  # noqa: RUF012

    def stream(model, tokenizer, prompt, **options):
        prompts.append(tokenizer.decode(prompt))
        yield generation.GenerationStep("yes", 1, "stop", 1, 1.0, 1, 1.0)

    monkeypatch.setattr(models, "load", lambda *a, **k: (Model(), tokenizer))
    monkeypatch.setattr(generation, "stream_generate", stream)

    def ask(*flags):
        code = cli.main(["generate", "--prompt", "q", *flags])
        said = capsys.readouterr()
        return code, prompts[-1] if prompts else None, said.err

    return ask


def test_generate_uses_the_adapters(asked):
    code, prompt, said = asked()
    assert code == 0 and prompt == "system: Be brief.user: q"
    assert (
        "with the adapter's system prompt (--no-system-prompt leaves it out): Be brief.\n" in said
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--no-system-prompt"], "user: q"),
        (["--system-prompt", "Be long."], "system: Be long.user: q"),
        (["--ignore-chat-template"], "q"),
    ],
)
def test_generate_without_the_adapters(asked, flags, expected):
    code, prompt, said = asked(*flags)
    assert code == 0 and prompt == expected and "Be brief" not in said


def test_contradicting_flags(asked):
    code, _, said = asked("--no-system-prompt", "--system-prompt", "x")
    assert code == 2 and "contradict" in said


def test_fusing_says_what_the_files_do_not_have(model, tmp_path, capsys):
    from pyloss import cli

    trained(model, chats("s"), tmp_path / "adapter")
    flags = ["--model", str(tmp_path / "model"), "--adapter-path", str(tmp_path / "adapter")]
    byte_tokenizer().save(tmp_path / "model")
    assert cli.main(["fuse", *flags, "--save-path", str(tmp_path / "fused")]) == 0
    assert "which has to be given to the model: s\n" in capsys.readouterr().err
    assert cli.main(["export", *flags, "--to", "hf", "--output", str(tmp_path / "hf")]) == 0
    assert "which has to be given to the model: s\n" in capsys.readouterr().err
    assert np.isfinite(pyloss.load(tmp_path / "fused")[0](np.array([[1, 2]]))).all()
