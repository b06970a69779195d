"""The model card: what it says, and which README.md it replaces."""

import json

import pytest
import yaml

from pyloss.io.cards import is_unedited, write_card
from pyloss.model_card import command_text, model_card

RUN = {
    "model": "/home/me/models/base", "data": ["mine.jsonl", "o/d:c:train"], "iters": 40,
    "learning_rate": 1e-4, "fine_tune_type": "dora", "adapter_path": "adapters",
    "system_prompt": "Be brief.\nAnswer in JSON.", "batch_size": 4, "report_to": "wandb",
}  # fmt: skip
ROWS = [
    {"iteration": 10, "train_loss": 2.5, "trained_tokens": 900, "seconds": 60.0},
    {"iteration": 10, "val_loss": 2.25, "seconds": 61.0},
    {"iteration": 20, "train_loss": 1.5, "trained_tokens": 1800, "seconds": 120.0},
    {"iteration": 30, "val_loss": 1.125, "seconds": 200.0},
    {"iteration": 40, "train_loss": 1.0, "trained_tokens": 3600, "seconds": 3700.0},
    {"iteration": 40, "val_loss": 1.375, "seconds": 3720.0},
]


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(RUN))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(folder)


def front(text):
    return yaml.safe_load(text.split("---")[1])


def test_base_data_settings_metrics_and_command(adapter):
    words = [
        "fuse",
        "--model",
        "/home/me/models/base",
        "--save-path=~/out",
        "--adapter-path",
        "a b",
    ]
    text = model_card("tuned", "/home/me/models/base", words, adapter)
    assert "# tuned\n" in text
    assert "`base`, fine-tuned by DoRA with pyloss" in text
    assert "> Be brief.\n> Answer in JSON." in text
    assert "Data: `mine.jsonl, o/d:c:train`" in text
    for line in (
        "| training loss, first | 2.5000 (iteration 10) |",
        "| training loss, last | 1.0000 (iteration 40) |",
        "| validation loss, lowest | 1.1250 (iteration 30) |",
        "| validation loss, last | 1.3750 (iteration 40) |",
        "| tokens trained | 3,600 |",
        "| iterations | 40 |",
        "| time | 1 h 2 min |",
        "pyloss fuse --model base --save-path=out --adapter-path 'a b'",
    ):
        assert line in text.splitlines()
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings == {
        "model": "base", "data": RUN["data"], "iters": 40, "learning_rate": 1e-4,
        "fine_tune_type": "dora",
    }  # fmt: skip
    assert "/home" not in text and "~" not in text
    found = front(text)
    assert "base_model" not in found and found["datasets"] == ["o/d"]
    assert found["library_name"] == "transformers" and found["tags"] == ["pyloss", "dora"]


def test_the_settings_are_a_file_for_train(adapter, tmp_path):
    from pyloss.tuner.run.settings import merge_settings

    text = model_card("tuned", "base", ["fuse"], adapter)
    (tmp_path / "settings.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    settings = merge_settings({}, str(tmp_path / "settings.yaml"))
    assert (settings.learning_rate, settings.iters) == (1e-4, 40)


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("o/base", "o/base"), ("o/base:Q4_K_M", "o/base"), ("hf:o/base/x/m.gguf", "o/base"),
        ("smollm2-135m", None), ("ollama:a:b", None), ("some/place/m", None), ("./o/base", None),
    ],
)  # fmt: skip
def test_a_base_of_the_hub_is_named_to_it(base, name, adapter):
    found = front(model_card("m", base, ["export"], adapter))
    assert found.get("base_model") == name
    assert found.get("base_model_relation") == (name and "finetune")
    plain = front(model_card("m", base, ["quantize"], quantization="q4"))
    assert plain.get("base_model_relation") == (name and "quantized")
    assert plain["library_name"] == "mlx" and plain["tags"] == ["pyloss", "mlx"]


def test_a_folder_of_that_name_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o" / "base").mkdir(parents=True)
    assert "base_model" not in front(model_card("m", "o/base", ["export"]))


def test_measured_qualities_are_a_table():
    rows = [("", "KL", "perplexity"), ("q3|x", "0.5", "12")]
    text = model_card("m", "base", ["quantize"], quantization="q3", measured=rows)
    assert (
        "## Quality\n\n|  | KL | perplexity |\n| --- | --- | --- |\n| q3\\|x | 0.5 | 12 |" in text
    )


def test_adapters_of_peft_have_their_own_settings(tmp_path):
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "base_model_name_or_path": "x/y"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    text = model_card("m", "base", ["fuse"], str(tmp_path))
    assert "| r | 16 |" in text and "yaml" not in text


def test_an_edited_card_and_other_readmes_are_kept(tmp_path, adapter):
    text = model_card("m", "base", ["fuse"], adapter)
    place = tmp_path / "README.md"
    assert is_unedited(text)
    assert write_card(tmp_path, text) and place.read_text() == text
    assert write_card(tmp_path, model_card("n", "base", ["fuse"]))
    assert "# n\n" in place.read_text()
    for users in (text.replace("# m", "# mine"), text + "more", "my notes", ""):
        place.write_text(users)
        assert not is_unedited(users)
        assert not write_card(tmp_path, text) and place.read_text() == users
    place.write_bytes(b"\xff\xfe other encoding")
    assert not write_card(tmp_path, text)
    place.unlink()
    place.mkdir()
    assert not write_card(tmp_path, text)


def test_commands_are_quoted_and_name_no_place_of_this_machine():
    words = [
        "fuse",
        "--model",
        "/a/b/c.gguf",
        "--adapter-path",
        "~/x",
        "--name=/d/e",
        "it's",
        "../f",
    ]
    expected = "pyloss fuse --model c.gguf --adapter-path x --name=e 'it'\"'\"'s' ../f"
    assert command_text(words) == expected
