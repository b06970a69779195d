"""The parser: help, the flags of mlx-lm's trainer, long arguments."""

from pathlib import Path

from tiny_commands import TRAIN, fails

from pyloss.cli import commands, main


def test_help_is_there_for_every_command(world, capsys):
    for command in commands.COMMANDS:
        assert main([command, "--help"]) == 0
        assert f"pyloss {command}" in capsys.readouterr().out
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "a first run:" in out
    assert "--resume" not in out


def test_every_flag_of_mlx_lms_trainer_is_accepted(world, capsys):
    flags = [
        "--train",
        "--num-layers",
        "4",
        "--val-batches",
        "1",
        "--steps-per-report",
        "1",
        "--steps-per-eval",
        "2",
    ]
    flags += [
        "--grad-accumulation-steps",
        "2",
        "--save-every",
        "2",
        "--max-seq-length",
        "64",
        "--grad-checkpoint",
    ]
    flags += [
        "--seed",
        "1",
        "--trust-remote-code",
        "--clear-cache-threshold",
        "2GB",
        "--optimizer",
        "adamw",
    ]
    assert (
        main(
            [
                *TRAIN,
                *flags,
                "--project-name",
                "p",
                "--adapter-path",
                "a",
                "--fine-tune-type",
                "lora",
            ]
        )
        == 0
    )
    assert Path("a/0000002_adapters.safetensors").exists()


def test_arguments_of_any_length_are_cut_in_errors(capsys):
    for argv in (["eval", "-c", "9" * 5000], ["eval", "9" * 5000], ["info", "--" + "x" * 5000]):
        lines = fails(capsys, argv, " … ")
        assert len(lines[-1]) < 1200
