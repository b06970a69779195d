"""Command lines that several tests use, and a check of their failures."""

from pyloss.cli import main

TRAIN = ["train", "--data", "data", "--iters", "4", "--batch-size", "2", "--learning-rate", "0.01"]


def fails(capsys, argv, *parts, code=2):
    assert main(argv) == code
    _, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[-1].startswith("pyloss: "), err
    assert "Traceback" not in err
    for part in parts:
        assert part in lines[-1]
    return lines
