"""Code of the README and the tour runs as written, and every shown command is valid."""

import argparse
import io
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import pyloss
from pyloss.cli import main
from pyloss.cli.flags import build_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "examples/README.md",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")),
]
# Names of the reader's own files in pages and help.
OWN = {
    "base_folder",
    "some_folder",
    "Qwen3-0.6B/config.json",
    "folder",
    "quantised",
    "quantized",
    "my-model",
    "peft_adapter",
    "model.gguf",
    "base.gguf",
    "lora_config.yaml",
    "adapters-fused",
    "big.gguf",
    "big/",
    "mine.csv",
    "a.jsonl",
    "b.jsonl",
    "-",
    "data",
    "data/",
    "small/",
    "config/cfg_pretrain.yaml",
    "data/sudoku-extreme-1k-aug-1000",
    "mine.yaml",
    "trm.yaml",
    "sudoku",
}
READS = (
    "model",
    "source",
    "teacher",
    "adapter_path",
    "config",
    "data",
    "loftq_model",
    "resume_adapter_file",
)
#: flags of a command that are no settings
OF_COMMANDS = (
    "messages_quiet",
    "messages_verbose",
    "split",
    "write_teacher",
    "top_k",
    "samples",
    "metric",
    "max_tokens",
    "compare",
    "output",
)
WRITES = ("write_teacher", "output", "save_path")


#: pages whose commands run as they stand, one after the other, in a copy of the repository
RUN = ["README.md", "docs/command_line.md"]


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(text):
    """The pyloss commands in a text, as lists of arguments."""
    text = re.sub(r" *\\\n *", " ", text)
    lines = [
        m[1]
        for m in re.finditer(
            r"^ *(?:echo .*\| *)?pyloss ((?:train|data|distill|checkpoints|report|eval|generate|chat|fuse|export|convert|quantize|prune|puzzles|bench|info)\b.*)",
            text,
            re.M,
        )
    ]
    lines += [
        m[1]
        for m in re.finditer(
            r"`pyloss ((?:train|data|distill|checkpoints|report|eval|generate|chat|fuse|export|convert|quantize|prune|puzzles|bench|info) [^`]*--model [^`]*)`",
            text,
        )
    ]
    # In help texts, two or more spaces separate a line from its explanation.
    return [shlex.split(re.split(r" {2,}(?!-)|`", line)[0], comments=True) for line in lines]


def helps():
    parser = build_parser()
    found = {"pyloss": parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {f"pyloss {name}": sub for name, sub in action.choices.items()}
    return found


SHOWN = {page: commands((ROOT / page).read_text(encoding="utf-8")) for page in PAGES}
SHOWN |= {f"{name} --help": commands(parser.epilog or "") for name, parser in helps().items()}
SHOWN = {place: lines for place, lines in SHOWN.items() if lines}


@pytest.mark.slow
def test_the_tour_runs(tmp_path, monkeypatch):
    try:
        pyloss.models.resolve_model("smollm2-135m")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("gguf", reason="the tour writes GGUF files (test extra)")
    pyloss.random.seed(0)  # as in a new process
    tour = blocks("docs/tour.md", "python")
    assert len(tour) >= 4
    names = {}
    for i, block in enumerate(tour):
        exec(compile(block, f"tour.md, block {i + 1}", "exec"), names)
    assert (tmp_path / "adapters" / "adapters.safetensors").stat().st_size > 1 << 20
    # The exact answer needs one instruction set: after so few iterations others may differ.
    assert names["order"].startswith('{"tool":"light","room":"hall"')
    assert "Paris" in names["answer"]


def test_the_readmes_code_runs():
    names = {}
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), names)
    # soft_targets of zeros: ln 3, and 1/3 of each row's mean, less its target
    assert names["value"] == pytest.approx(np.log(3))
    np.testing.assert_allclose(names["gradient"], (1 / 3 - np.eye(3)[:2]) / 2, rtol=1e-6)


def test_the_commands_exist(capsys):
    shown = {line[0] for lines in SHOWN.values() for line in lines}
    assert shown == {name.removeprefix("pyloss ") for name in helps()} - {"pyloss"}
    assert {line[0] for line in SHOWN["docs/command_line.md"]} == shown
    for command in shown:
        assert main([command, "--help"]) == 0
        assert "usage: pyloss" in capsys.readouterr().out


@pytest.mark.parametrize("place", SHOWN)
def test_every_command_shown_is_taken_and_names_what_is_there(place, monkeypatch):
    """Commands parse, and the files that they read are in the repository or were written before."""
    from pyloss.tuner.run.settings import merge_settings

    monkeypatch.chdir(ROOT)
    own = set() if place in (*RUN, "pyloss --help") else OWN
    written = {"adapters"} if place not in RUN else set()
    for line in SHOWN[place]:
        flags = vars(build_parser().parse_args(line))
        command = flags.pop("command")
        for name in READS:
            path = flags.get(name)
            if isinstance(path, list) and name == "data":
                own_data = {f"{file}:{share}" for file in OWN for share in ("0.7", "0.3")} | OWN
                path = next((item for item in path if item not in own_data), path[0])
                path = path.rpartition(":")[0] if path in own_data - OWN else path
            if name == "adapter_path" and path:
                path = re.sub(r"@(best|last|\d+)$", "", path)
            if (
                path
                and not (command in ("train", "distill") and name == "adapter_path")
                and path != "smollm2-135m"
            ):
                assert path in own | written or Path(path).exists(), f"{place}: {line}: {path}"
        if command in ("train", "distill", "eval") and not (
            flags["config"] and not Path(flags["config"]).exists()
        ):
            settings = merge_settings(
                {k: v for k, v in flags.items() if k not in OF_COMMANDS}, flags["config"]
            )
            if command in ("train", "distill"):
                written.add(settings.adapter_path)
        written |= {flags[name] for name in WRITES if flags.get(name)}


def training(place):
    """The flags of the lines that train."""
    found = [vars(build_parser().parse_args(line)) for line in SHOWN[place] if line[0] == "train"]
    return [
        flags
        for flags in found
        if flags["preview"] is None and not (flags["test"] and not flags["train"])
    ]


@pytest.mark.parametrize("place", [*RUN, "pyloss --help", "pyloss train --help"])
def test_training_lines_train(place):
    lines = [flags for flags in training(place) if flags["config"] is None]
    # With mlx-lm's default of 1e-5, so few iterations would have no effect.
    assert lines and all(
        (flags["learning_rate"] or 0) >= 2e-4 and (flags["iters"] or 1000) >= 50 for flags in lines
    ), lines


def test_training_lines_of_a_page_keep_each_others_adapters():
    folders = [flags["adapter_path"] or "adapters" for flags in training("docs/command_line.md")]
    assert len(folders) == len(set(folders)) > 1


def test_commands_on_the_readers_own_files_run(tmp_path, monkeypatch):
    """Lines of pages and help that convert, export and fuse, in sequence on a tiny model."""
    pytest.importorskip("gguf", reason="needs the package gguf (test extra)")
    from tiny import TOKENS, byte_tokenizer, load_tiny

    monkeypatch.chdir(tmp_path)
    for name in ("base_folder", "some_folder", "folder"):
        sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
        model = load_tiny(tmp_path / name, vocab_size=TOKENS, **sizes)
        byte_tokenizer().save(tmp_path / name)
    pyloss.linear_to_lora_layers(model, -1, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    pyloss.save_adapter(model, "adapters")
    pyloss.save_adapter(model, "peft_adapter", format="peft")
    pyloss.export(pyloss.load("base_folder")[0], "model.gguf", "gguf", byte_tokenizer())
    places = [
        "docs/formats.md",
        "pyloss fuse --help",
        "pyloss export --help",
        "pyloss convert --help",
        "docs/quantizing.md",
        "pyloss quantize --help",
    ]
    texts = [{"text": f"the {i} hens lay {i + 3} eggs in a week"} for i in range(40)]
    Path("texts.jsonl").write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    for line in (line for place in places for line in SHOWN[place]):
        given = line if "--model" in line else [*line, "--model", "base_folder"]
        flags = vars(build_parser().parse_args(given))
        output = Path(flags.get("output") or flags["save_path"])
        if output.is_dir():
            shutil.rmtree(output)
        assert main(given) == 0, line
        assert output.exists(), line


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("PYLOSS_README") != "1", reason="trains the real model four times: make readme"
)
@pytest.mark.parametrize("page", RUN)
def test_the_commands_run_one_after_the_other(page, tmp_path, monkeypatch, capsys):
    try:
        pyloss.models.resolve_model("smollm2-135m")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is the weather in oslo\n"))
    answers, losses = [], []
    for line in SHOWN[page]:
        capsys.readouterr()
        assert main(line) == 0, line
        said = capsys.readouterr().out
        if line[0] in ("generate", "chat"):
            answers.append(said)
        if line[0] == "eval":
            losses.append(float(re.search(r"loss ([\d.]+)", said)[1]))
    assert answers and all(
        answer.startswith('{"tool":"weather"') and "oslo" in answer for answer in answers
    ), answers
    assert max(losses) < 0.2, losses
