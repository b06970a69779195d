"""Errors, signals and exit codes of all commands."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tiny_commands import TRAIN, fails

import pyloss
import pyloss.generation
from pyloss import nn
from pyloss.cli import commands, main


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["COMMAND", "pyloss --help"]),
        ([*TRAIN, "--zzz"], ["unrecognized arguments: --zzz (see pyloss train --help)"]),
        (
            ["generate", "--max-token=3", "--promt", "a"],
            ["--promt a; did you mean --prompt? (see pyloss generate --help)"],
        ),
        (["info", "model", "extra"], ["unrecognized arguments: extra (see pyloss info --help)"]),
        (["trian"], ["invalid choice: 'trian'"]),
        (
            [*TRAIN, "--itres", "4"],
            ["unrecognized arguments: --itres 4; did you mean --iters? (see pyloss train --help)"],
        ),
        ([*TRAIN, "--iters", "four"], ["--iters: 'four' is not a whole number"]),
        ([*TRAIN, "--batch-size", "0"], ["command line: batch_size is 0"]),
        (
            [*TRAIN, "--fine-tune-type", "ia3"],
            ["fine_tune_type is 'ia3'; allowed: lora, dora, full"],
        ),
        ([*TRAIN, "--full-keys", "mlp"], ["full_keys says what fine_tune_type full trains"]),
        (
            [*TRAIN, "--loraplus-lr-ratio", "0"],
            ["loraplus_lr_ratio is 0.0; allowed: a finite number above 0"],
        ),
        (
            [*TRAIN, "--matmul-precision", "bf16"],
            ["matmul_precision is 'bf16'; allowed: float32, bfloat16, mixed, int8"],
        ),
        ([*TRAIN, "--optimizer", "rmsprop"], ["rmsprop", "allowed: adam, adamw, adam_atan2"]),
        ([*TRAIN, "--model", "missing"], ["no such model: missing"]),
        ([*TRAIN, "--data", "./nowhere"], ["nowhere", "no such folder"]),
        (["train"], ["no data given"]),
        ([*TRAIN, "-c", "none.yaml"], ["none.yaml: No such file"]),
        ([*TRAIN, "--resume"], ["nothing to resume", "adapters/trainer_state.safetensors"]),
        ([*TRAIN, "--resume", "--resume-adapter-file", "x"], ["give one of them"]),
        ([*TRAIN, "--report-to", "comet"], ["report_to is 'comet'; allowed: tensorboard, trackio"]),
        (
            [*TRAIN, "--adapter-path", "data/train.jsonl/x"],
            ["data/train.jsonl/x", "data/train.jsonl is not a folder"],
        ),
        (
            ["generate", "--max-tokens", "0"],
            ["--max-tokens is 0; it must be a whole number of at least 1"],
        ),
        (
            ["generate", "--top-p", "2"],
            ["--top-p is 2.0; it must be a finite number of at least 0 and of at most 1"],
        ),
        (["generate", "--temp", "nan"], ["--temp is nan"]),
        (["generate", "--seed", "9" * 30], ["--seed is 999"]),
        (["generate", "--top-k", "-1"], ["--top-k is -1"]),
        (["generate", "--chat-template-config", "{"], ["--chat-template-config", "not JSON"]),
        (["generate", "--extra-eos-token", "two"], ["'two' is 3 tokens"]),
        (["eval", "--data", "data", "--split", "nope"], ["invalid choice: 'nope'"]),
    ],
)
def test_bad_input_is_one_line_and_code_2(world, capsys, argv, parts):
    lines = fails(capsys, argv, *parts)
    assert len(lines) == 1


#: sitecustomize of a process to which Ctrl-C comes when it imports a module
INTERRUPT = """
import os, signal, sys

class Interrupt:
    def find_spec(name, path, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt)
"""


@pytest.mark.parametrize(
    "module", ["numpy", "pyloss._core", "pyloss.cli.entry", "pyloss.cli.commands"]
)
@pytest.mark.parametrize("program", ["python -m pyloss", "pyloss"])
def test_ctrl_c_while_modules_are_imported(tmp_path, program, module):
    script = tmp_path / "pyloss"  # as pip writes it
    script.write_text("import sys\nfrom pyloss.cli import main\nsys.exit(main())\n")
    start = ["-m", "pyloss"] if program.startswith("python") else [str(script)]
    done = started(tmp_path, module, [*start, "checkpoints", "."])
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "pyloss: interrupted\n")


@pytest.mark.parametrize("module", ["numpy", "pyloss._core", "pyloss.mlx_lm.tuner.trainer"])
@pytest.mark.parametrize("words", [["pyloss.mlx_lm.lora"], ["pyloss.mlx_lm", "lora"]])
def test_ctrl_c_while_a_command_of_mlx_lm_is_imported(tmp_path, words, module):
    done = started(tmp_path, module, ["-m", *words, "--train", "--data", "nothing"])
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.removeprefix("pyloss: ") == "interrupted\n"


@pytest.mark.parametrize("at", ["pyloss.autograd", "pyloss.models"])
def test_ctrl_c_in_a_program_that_imports_the_library(tmp_path, at):
    script = tmp_path / "pyloss"
    script.write_text(
        "import sys\ntry:\n    import pyloss\n    if 'pyloss.models' in sys.argv[1]:\n"
        "        pyloss.load\n    sys.exit('not interrupted')\n"
        "except KeyboardInterrupt:\n    print('mine')\n"
    )
    other = tmp_path / "other.py"
    other.write_text(script.read_text())
    done = started(tmp_path, at, [str(other), at])
    assert (done.returncode, done.stdout) == (0, "mine\n"), done.stderr
    if at == "pyloss.models":  # after the imports, in a program with the command's name
        done = started(tmp_path, at, [str(script), at])
        assert (done.returncode, done.stdout) == (0, "mine\n"), done.stderr


def started(folder, module, words):
    """A process of Python that is interrupted when it imports the module."""
    (folder / "sitecustomize.py").write_text(INTERRUPT)
    path = os.pathsep.join([str(folder), str(Path(pyloss.__file__).parents[1])])
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": path, "INTERRUPTED_AT": module},
        capture_output=True, text=True, timeout=120, cwd=folder,
    )  # fmt: skip


def test_bad_data_names_the_line(world, capsys):
    Path("data/train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    fails(capsys, TRAIN, "train.jsonl", "line 2")


def test_a_loss_that_is_not_finite_ends_with_code_1(world, capsys, monkeypatch):
    monkeypatch.setattr(
        nn, "value_and_grad", lambda model, loss: lambda *a: ((float("nan"), 3), {})
    )
    fails(capsys, TRAIN, "error: iteration 1: the loss is nan", code=1)


def test_ctrl_c_ends_with_code_130_and_says_where_it_saved(world, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(nn, "value_and_grad", lambda model, loss: interrupted)
    fails(capsys, TRAIN, "interrupted after iteration 0: saved to adapters", "--resume", code=130)
    assert (
        Path("adapters/trainer_state.safetensors").exists()
        and not Path("adapters/adapters.safetensors").exists()
    )


def test_sigterm_saves_as_ctrl_c_does(world, capsys, monkeypatch):
    def terminated(*arguments):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(nn, "value_and_grad", lambda model, loss: terminated)
    before = signal.getsignal(signal.SIGTERM)
    fails(capsys, TRAIN, "interrupted after iteration 0: saved to adapters", "--resume", code=143)
    assert Path("adapters/trainer_state.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_debugging_shows_the_traceback(world, capsys, monkeypatch):
    monkeypatch.setenv("PYLOSS_DEBUG", "1")
    assert main([*TRAIN, "--model", "missing"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_ours_is_not_disguised_as_bad_input(world, monkeypatch):
    monkeypatch.setattr(pyloss.models, "load", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(TRAIN)


def test_warnings_are_lines_without_places_in_the_code(monkeypatch, capsys):
    def command(flags):
        warnings.warn("something\n  was lost", stacklevel=2)
        return 0

    monkeypatch.setitem(commands.COMMANDS, "info", command)
    shown = warnings.showwarning
    assert main(["info"]) == 0
    assert capsys.readouterr().err == "pyloss: warning: something was lost\n"
    assert warnings.showwarning is shown


def test_python_m_pyloss_runs_the_command_line():
    paths = {"PYTHONPATH": str(Path(pyloss.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "pyloss", "nope"], capture_output=True, text=True, env=paths
    )
    assert done.returncode == 2
    assert (
        done.stderr.startswith("pyloss: error: ") and "(see python -m pyloss --help)" in done.stderr
    )
    done = subprocess.run(
        [sys.executable, "-m", "pyloss", "eval", "--help"],
        capture_output=True,
        text=True,
        env=paths,
    )
    assert done.stdout.startswith("usage: python -m pyloss eval [options]\n")


def test_errors_of_any_length_are_cut(capsys, monkeypatch):
    def command(flags):
        raise ValueError("--prompt " + "9" * 100_000 + " is no prompt")

    monkeypatch.setitem(commands.COMMANDS, "info", command)
    lines = fails(capsys, ["info"], "--prompt 999", "999 is no prompt")
    assert len(lines[-1]) < 3200


def test_too_little_memory_says_what_needs_less_of_it(world, capsys, monkeypatch):
    def load(*arguments, **options):
        raise MemoryError("Unable to allocate 7 GiB")

    monkeypatch.setattr(pyloss.models, "load", load)
    fails(
        capsys,
        TRAIN,
        "error: out of memory; a smaller --batch-size",
        "--grad-checkpoint, needs less (Unable to allocate 7 GiB)",
    )
    lines = fails(capsys, ["generate"], "error: out of memory (Unable to allocate 7 GiB)")
    assert "batch-size" not in lines[-1]


def test_the_version_is_a_result(capsys):
    import pyloss

    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"pyloss {pyloss.__version__}\n", "")
