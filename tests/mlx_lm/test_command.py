"""Sizes in flags, and how commands end."""

import shutil
import subprocess
import sys

import pytest

import pyloss
from pyloss.mlx_lm import load, stream_generate
from pyloss.mlx_lm.command import as_command, flag_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("500", 500), ("1.5MB", 1_500_000), ("2G", 2 * 10**9), ("3 gb", 3 * 10**9)],
)
def test_sizes(text, size):
    assert flag_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "5TB", "MB", "1.2.3"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="a size is a number of bytes"):
        flag_size(text)


def command(module, *words, cwd):
    argv = [sys.executable, "-m", f"pyloss.mlx_lm.{module}", *words]
    return subprocess.run(argv, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


def test_an_error_is_one_line(made):
    done = command("lora", "--model", "base", "--data", "data", cwd=made)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr == "error: Must provide at least one of --train or --test\n"


def test_commands_by_their_names(made):
    argv = [sys.executable, "-m", "pyloss.mlx_lm"]
    words = ["generate", "--model", "base", "-p", "hello", "-m", "2", "--verbose", "F"]
    done = subprocess.run([*argv, *words], capture_output=True, text=True, cwd=made, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr
    done = subprocess.run([*argv, "serve"], capture_output=True, text=True, cwd=made, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: there is no command 'serve': ")


def test_a_run(made):
    words = "--model base --data data --train --iters 2 --batch-size 2 --num-layers 1".split()
    done = command("lora", *words, "--adapter-path", "new", "--steps-per-report", "1", cwd=made)
    assert done.returncode == 0, done.stderr
    assert (
        "Trainable parameters" in done.stdout and (made / "new" / "adapters.safetensors").exists()
    )
    done = command("generate", "--model", "base", "--adapter-path", "new", "-m", "3", cwd=made)
    assert done.returncode == 0 and "Generation: 3 tokens" in done.stdout
    done = command("generate", "--model", "none/at/all", cwd=made)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_fuse_into_its_own_folder(made, tmp_path):
    shutil.copytree(made / "base", tmp_path / "own")
    shutil.copytree(made / "adapters", tmp_path / "ad")
    settings = '{"eos_token_id": 0, "temperature": 0.5}\n'
    (tmp_path / "own" / "generation_config.json").write_text(settings)
    words = ["--model", "own", "--adapter-path", "ad", "--save-path", "own"]
    done = command("fuse", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for place in ("own", "own/previous-1"):
        assert (tmp_path / place / "generation_config.json").read_text() == settings
    assert pyloss.load(tmp_path / "own")[0].layers


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--max-tokens", "-3", "a whole number of at least -1"),
        ("--temp", "-1", "a finite number of at least 0"),
        ("--top-p", "1.5", "a finite number of at least 0 and of at most 1"),
    ],
)
def test_refused_flags_of_generate(made, flag, value, allowed):
    done = command("generate", "--model", "base", flag, value, cwd=made)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {flag} is {value}")
    assert done.stderr.endswith(f"it must be {allowed}\n")


def test_tokens_below_no_limit(made):
    model, tokenizer = load(str(made / "base"))
    with pytest.raises(ValueError, match="max_tokens is -3"):
        next(stream_generate(model, tokenizer, "hello", max_tokens=-3))


def test_the_text_of_a_key_error(capsys):
    def main():
        raise KeyError("LoRA config is missing required key 'scale'")

    with pytest.raises(SystemExit, match="2"):
        as_command(main)
    assert capsys.readouterr().err == "error: LoRA config is missing required key 'scale'\n"
