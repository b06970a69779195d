"""`generate --prompts`: the lines that it reads and writes."""

import json
from pathlib import Path

import pytest
import tiny
import tiny_project
from fake import FakeTokenizer
from tiny_commands import fails

import pyloss
from pyloss.cli import main


class Tokenizer(FakeTokenizer):
    def __init__(self):
        super().__init__()
        self.eos_token_ids = set(self.eos_token_ids)


@pytest.fixture
def model(monkeypatch, tmp_path):
    """A tiny model that the command loads."""
    model = tiny.load_tiny(tmp_path / "tiny", vocab_size=258)
    monkeypatch.setattr(pyloss.models, "load", lambda path, adapter_path=None: (model, Tokenizer()))
    monkeypatch.chdir(tmp_path)
    return model


def write(lines):
    with open("in.jsonl", "w", encoding="utf-8") as file:
        file.writelines(
            (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines
        )


def read():
    with open("out.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


ARGV = ["generate", "--prompts", "in.jsonl", "--output", "out.jsonl"]


def test_earlier_answers_are_kept_and_the_prompts_are_never_replaced(model, capsys, tmp_path):
    write([{"prompt": "ab"}])
    before = Path("in.jsonl").read_bytes()
    fails(
        capsys,
        ["generate", "--prompts", "in.jsonl", "--output", str(tmp_path / "in.jsonl")],
        "is the file of --prompts: give another",
    )
    assert Path("in.jsonl").read_bytes() == before
    Path("out.jsonl").write_text("mine")
    assert main([*ARGV, "-m", "2"]) == 0
    assert Path("previous-1/out.jsonl").read_text() == "mine" and len(read()) == 1
    assert main([*ARGV, "-m", "2", "--overwrite"]) == 0
    assert [str(path) for path in Path().glob("previous-*")] == ["previous-1"]


def test_answers_are_those_of_single_prompts_in_the_order_of_the_lines(model, capsys):
    write(
        [
            {"prompt": "turn off the lamp", "id": 7, "max_tokens": 9},
            {"messages": [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}]},
            "",
            {"prompt": "hä", "completion": "ja", "temperature": 1.5, "seed": 3, "stop": ["zz"]},
            {"prompt": "turn off the lamp", "max_tokens": 1},
        ]
    )
    argv = [*ARGV, "-m", "5", "--system-prompt", "Do", "--batch-size", "2"]
    assert main(argv) == 0
    err = capsys.readouterr().err
    assert "4 prompts, up to 2 at a time; keys and values take at most" in err
    assert "wrote out.jsonl" in err and "generation 20 tokens" in err
    found = read()
    assert [line["finish_reason"] for line in found] == ["length"] * 4
    assert [line["completion_tokens"] for line in found] == [9, 5, 5, 1]
    assert found[0]["id"] == 7 and found[0]["prompt"] == "turn off the lamp"
    assert found[2]["reference"] == "ja" and found[2]["stop"] == ["zz"]
    assert found[1]["messages"][0]["content"] == "Be"
    single = ["generate", "--system-prompt", "Do", "--verbose", "F"]
    for line, flags in (
        (found[0], ["-m", "9"]),
        (found[2], ["-m", "5", "--temp", "1.5", "--seed", "3"]),
        (found[3], ["-m", "1"]),
    ):
        assert main([*single, "--prompt", line["prompt"], *flags]) == 0
        assert capsys.readouterr().out == line["completion"] + "\n"
    assert main([*ARGV, "--ignore-chat-template", "--verbose", "F", "-m", "2"]) == 2
    write([{"prompt": "ab"}])
    assert main([*ARGV, "--ignore-chat-template", "--verbose", "F", "-m", "2"]) == 0
    assert read()[0]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"prompt": 5}', ["in.jsonl, line 2", "'prompt' is a number"]),
        ("{", ["in.jsonl", "line 2", "not valid JSON"]),
        ("[1]", ["in.jsonl", "line 2", "is a list"]),
        ({"text": "a"}, ["in.jsonl, line 2", "either 'prompt' or 'messages'", "'text'"]),
        ({"prompt": "a", "messages": []}, ["line 2", "either 'prompt' or 'messages'"]),
        ({"messages": []}, ["line 2", "'messages' is empty"]),
        ({"messages": [{"role": "user"}]}, ["line 2", "no 'content'"]),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            ["line 2", "ends with the assistant's message"],
        ),
        ({"prompt": "a", "max_tokens": 0}, ["line 2", "max_tokens is 0"]),
        ({"prompt": "a", "temperature": "hot"}, ["line 2", "temperature"]),
        ({"prompt": "a", "top_p": 2}, ["line 2", "top_p is 2"]),
        ({"prompt": "a", "stop": [""]}, ["line 2", "stop"]),
        ({"prompt": "a", "seed": -1}, ["line 2", "seed"]),
        ({"prompt": "a", "finish_reason": 1}, ["line 2", "'finish_reason' is a field"]),
        (
            {"prompt": "a", "completion": "b", "reference": "c"},
            ["line 2", "'completion' is a field"],
        ),
    ],
)
def test_a_bad_line_is_named_before_a_model_is_loaded(monkeypatch, tmp_path, capsys, line, parts):
    monkeypatch.setattr(pyloss.models, "load", lambda *args, **options: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    write([{"prompt": "good"}, line])
    (tmp_path / "out.jsonl").write_text("before")
    fails(capsys, ARGV, *parts)
    assert (tmp_path / "out.jsonl").read_text() == "before"


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--prompts", "in.jsonl"], "--prompts needs --output"),
        (["--output", "out.jsonl"], "--output needs --prompts"),
        ([*ARGV[1:], "--prompt", "a"], "--prompt and --prompts contradict"),
        (["--prompts", "none.jsonl", "--output", "out.jsonl"], "none.jsonl"),
        (["--prompts", "empty.jsonl", "--output", "out.jsonl"], "holds no prompts"),
        (["--prompts", "in.jsonl", "--output", "in.jsonl/x"], "not a folder"),
        ([*ARGV[1:], "--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_wrong_flags(monkeypatch, tmp_path, capsys, argv, part):
    monkeypatch.setattr(pyloss.models, "load", lambda *args, **options: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    write([{"prompt": "a"}])
    (tmp_path / "empty.jsonl").write_text("\n")
    fails(capsys, ["generate", *argv], part)


def test_what_cannot_fit_is_refused_in_a_sentence(model, monkeypatch, capsys):
    monkeypatch.setattr("pyloss.generation.batch.free_memory", lambda: 1000)
    write([{"prompt": "a"}] * 3)
    fails(capsys, ARGV, "3 sequences of up to", "use a smaller batch_size or max_tokens")


def test_an_interrupted_run_leaves_nothing(model, monkeypatch, tmp_path, capsys):
    write([{"prompt": "a", "max_tokens": n} for n in (1, 9)])

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "step_each", interrupt)
    assert main(ARGV) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "tiny"]


def test_prompts_longer_than_the_context_are_warned_of(tmp_path, monkeypatch, capsys):
    tiny_project.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = "ab" * 3000
    assert main(["generate", "--model", "base", "--prompt", text, "--max-tokens", "1"]) == 0
    assert "warning: a prompt has" in capsys.readouterr().err
    lines = [{"prompt": text}, {"prompt": "short"}, {"prompt": text}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["generate", "--model", "base", "--prompts", "p.jsonl", "--output", "o.jsonl"]
    assert main([*argv, "--max-tokens", "1"]) == 0
    assert "warning: 2 prompts have up to" in capsys.readouterr().err
