"""The README's tour runs as it stands, in an empty folder beside a copy of the example data."""

import re
import shutil
from pathlib import Path

import pytest

import pyloss

ROOT = Path(__file__).resolve().parent.parent


def blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_the_tour_runs(tmp_path, monkeypatch):
    try:
        pyloss.models.resolve_model("smollm2-135m")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("gguf", reason="the tour writes GGUF files (test extra)")
    tour = blocks("python")
    assert len(tour) >= 4
    names = {}
    for i, block in enumerate(tour):
        exec(compile(block, f"README.md, block {i + 1}", "exec"), names)
    assert (tmp_path / "adapters" / "adapters.safetensors").stat().st_size > 1 << 20
    assert "Paris" in names["answer"]


def test_the_commands_exist(capsys):
    from pyloss.cli import main

    commands = {line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("pyloss ")}
    assert commands >= {"train", "eval", "generate", "fuse", "export", "info"}
    for command in commands:
        assert main([command, "--help"]) == 0
        assert "usage: pyloss" in capsys.readouterr().out
