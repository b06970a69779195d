"""For tests of commands: a tiny model, a command line that trains it, a check of errors."""

from pathlib import Path
from types import SimpleNamespace

from fake import FakeTokenizer
from tiny_training import Tiny

from pyloss.cli import main


class Tokenizer(FakeTokenizer):
    def __init__(self):
        super().__init__()
        self.eos_token_ids = set(self.eos_token_ids)


class Model(Tiny):
    adapter_config = None
    config = SimpleNamespace(max_position_embeddings=64)

    def __init__(self):
        super().__init__(vocabulary=Tokenizer.vocab_size)
        self.layers = [None] * 20
        self.calls = []

    def named_modules(self):
        return []

    def save(self, path, tokenizer, overwrite=False):
        self.calls.append(("save", path) + ("overwrite",) * overwrite)
        Path(path).mkdir(exist_ok=True)
        (Path(path) / "config.json").write_text("{}")


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
