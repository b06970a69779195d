"""Cards of `fuse`, `export --to hf` and `quantize`, and --push to a local hub."""

import pytest
from hub_server import TOKEN, hub, run_with

from pyloss.cli import main
from pyloss.io.cards import is_unedited


@pytest.fixture(autouse=True)
def project(made, monkeypatch):
    monkeypatch.chdir(made)


FUSE = ["fuse", "--model", "base", "--adapter-path", "adapters", "--save-path"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (FUSE, ["fine-tuned by LoRA", "pyloss fuse --model base --adapter-path adapters"]),
        (["export", "--model", "base", "--to", "hf", "--output"], ["Made of `base` by pyloss."]),
        (
            ["quantize", "base", "--to", "q4", "--group-size", "32", "--output"],
            ["Made of `base` by pyloss, quantized (q4).", "- mlx"],
        ),
    ],
)
def test_commands_write_a_card(tmp_path, capsys, argv, parts):
    place = tmp_path / "made"
    assert main([*argv, str(place)]) == 0
    text = (place / "README.md").read_text()
    assert is_unedited(text) and "# made\n" in text and str(tmp_path) not in text
    for part in parts:
        assert part in text
    (place / "README.md").write_text("mine")
    assert main([*argv, str(place)]) == 0
    assert (place / "README.md").read_text() == "mine"
    assert f"kept {place / 'README.md'}, which is yours" in capsys.readouterr().err
    assert not list(place.glob("previous-*/README.md"))


def test_a_card_goes_with_its_model(tmp_path):
    place = tmp_path / "made"
    assert main([*FUSE, str(place)]) == 0
    first = (place / "README.md").read_bytes()
    assert main(["convert", "--model", "base", "--output", str(place)]) == 0
    assert (place / "previous-1" / "README.md").read_bytes() == first
    assert not (place / "README.md").exists()  # that of the fused model said what is now wrong
    assert main([*FUSE, str(place)]) == 0
    assert main([*FUSE, str(place), "--overwrite"]) == 0
    assert (place / "README.md").exists()
    assert not [
        path for path in place.glob("previous-*/README.md") if "previous-1" not in str(path)
    ]


def test_an_edited_card_stays_and_is_said_to_be_of_the_model_before(tmp_path, capsys):
    place = tmp_path / "made"
    said = f"kept {place / 'README.md'}, which you edited: it is the card of the model that was"
    assert main([*FUSE, str(place)]) == 0
    card = (place / "README.md").read_text()
    convert = ["convert", "--model", "base", "--output", str(place)]
    for edited in (card.replace("# made", "# mine"), card + "more"):
        (place / "README.md").write_text(edited)
        assert main(convert) == 0
        assert said in capsys.readouterr().err
        assert (place / "README.md").read_text() == edited
    (place / "README.md").write_text("notes of the user's own")
    assert main(convert) == 0
    assert "which you edited" not in capsys.readouterr().err


def test_a_base_on_the_hub_can_be_named(tmp_path):
    assert main([*FUSE, str(tmp_path / "made"), "--hf-path", "o/base"]) == 0
    assert 'base_model: "o/base"' in (tmp_path / "made" / "README.md").read_text()


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([*FUSE, "new", "--push", "mine"], "push must be owner/name"),
        ([*FUSE, "new", "--private"], "--private is for --push, which is not given"),
        ([*FUSE, "new", "--push", "me/mine"], "no token for the hub"),
        (
            ["export", "--to", "gguf", "--output", "new.gguf", "--push", "me/mine"],
            "--push uploads what --to hf writes, and --to is gguf",
        ),
        (
            ["quantize", "base", "--to", "q4_0", "--output", "new.gguf", "--push", "me/mine"],
            "--push uploads folders, and --to q4_0 writes a file",
        ),
    ],
)
def test_what_cannot_be_pushed_is_refused_first(made, capsys, monkeypatch, argv, part):
    pytest.importorskip("huggingface_hub", reason="uploads need it")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    before = set(made.iterdir())
    assert main(argv) == 2
    assert part in capsys.readouterr().err
    assert set(made.iterdir()) == before


CODE = "import sys; from pyloss.cli import main; sys.exit(main({0!r}))"


def test_a_pushed_model_is_the_folder(tmp_path, made):
    pytest.importorskip("huggingface_hub", reason="uploads need it")
    (tmp_path / "repositories").mkdir()
    place = tmp_path / "made"
    argv = [*FUSE, str(place), "--push", "me/tuned", "--private"]
    with hub(tmp_path / "repositories") as server:
        code, out, err = run_with(server, tmp_path / "cache", CODE.format(argv), HF_TOKEN=TOKEN)
        assert code == 0, err
        assert "uploaded the model to" in err and not out
        there = server.root / "me" / "tuned"
        files = {path.name: path.read_bytes() for path in there.iterdir()}
        assert files == {p.name: p.read_bytes() for p in place.iterdir() if p.suffix != ".lock"}
        assert b"# tuned\n" in files["README.md"]
        # another token: the folder is there, the command fails
        wrong = {"HF_TOKEN": "hf_other"}
        code, _, err = run_with(server, tmp_path / "cache", CODE.format(argv), **wrong)
        assert code == 2 and f"the files are in {place}" in err.splitlines()[-1]
    # it is opened by name, as any repository
    assert (place / "model.safetensors").exists()


def test_the_hubs_library_and_transformers_open_what_is_pushed(tmp_path):
    """The card's front matter is valid, and the repository is a model of transformers."""
    pytest.importorskip("transformers", reason="compares with transformers (parity extra)")
    (tmp_path / "repositories").mkdir()
    argv = [*FUSE, str(tmp_path / "made"), "--push", "me/tuned", "--hf-path", "o/base"]
    opened = """
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
import pyloss, numpy as np
card = ModelCard.load("me/tuned")
print(card.data.base_model, card.data.library_name, card.data.tags)
model = AutoModelForCausalLM.from_pretrained("me/tuned", dtype="float32")
ours, tokenizer = pyloss.load("me/tuned")
import torch
ids = torch.arange(5, 25).reshape(2, 10)
print(float(np.abs(model(ids).logits.detach().numpy() - ours(ids.numpy())).max()) < 1e-3)
text = "hello world"
print(AutoTokenizer.from_pretrained("me/tuned").encode(text) == tokenizer.encode(text))
"""
    with hub(tmp_path / "repositories") as server:
        code, _, err = run_with(server, tmp_path / "cache", CODE.format(argv), HF_TOKEN=TOKEN)
        assert code == 0, err
        code, out, err = run_with(server, tmp_path / "other", opened)
    assert code == 0, err
    assert out.splitlines()[-3:] == ["o/base transformers ['pyloss', 'lora']", "True", "True"]
