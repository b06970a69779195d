"""YAML files by users: each is read, or refused in one sentence that names the file."""

import pytest

from pyloss.cli import main
from pyloss.tuner.run.settings import merge_settings
from pyloss.tuner.run.yaml_file import read_yaml

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 11)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 11)
)


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "lora.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("data: " + "[" * 5000 + "]" * 5000, ["nested too deep"]),
        ("data: " + "{a: " * 5000 + "}" * 5000, ["nested too deep"]),
        ("- " * 5000, ["nested too deep"]),
        ("iters: " + "9" * 5000, ["line 1", "an integer of 5000 digits"]),
        ("seed: 0x" + "9" * 900, ["seed is an integer of", "at most 9223372036854775807"]),
        (
            "batch_size: 9223372036854775808",
            ["batch_size is 9223372036854775808", "at most 9223372036854775807"],
        ),
        ("iters: 1e300", ["iters is", "at most 9223372036854775807"]),
        ("learning_rate: .inf", ["learning_rate is inf", "finite"]),
        ("lora_parameters: {scale: -.inf}", ["lora_parameters is -inf", "finite"]),
        ("learning_rate: " + "9" * 400, ["learning_rate is", "a finite number"]),
        (LAUGHS, ["stands for more than 100000 values"]),
        ("a: &a [1]\nb: [" + "*a, " * 101 + "]", ["more than 100 aliases"]),
        ("a: &a [*a]", ["a holds itself"]),
        ("a: &a {b: {c: *a}}", ["a holds itself"]),
        ("iters: 3\ndata: x\niters: 4", ["line 3", "the key 'iters' is given twice"]),
        ("lora_parameters:\n  rank: 3\n  rank: 4", ["line 3", "the key 'rank' is given twice"]),
        ("1: 2", ["unknown key 1"]),
        ("? [a, b]\n: 2", ["line 1", "not YAML"]),
        ("lora_parameters: {1: 2}", ["lora_parameters is", "a mapping of names to values"]),
        ("model: 2020-01-01", ["model is a date"]),
        ("data: !!binary aGk=", ["data is a bytes"]),
        ("data: !!set {a, b}", ["data is a set"]),
        ("data: 2001-99-99", ["a value that its tag does not fit"]),
        ("data: !!int ''", ["a value that its tag does not fit"]),
        ("data: !!bool perhaps", ["a value that its tag does not fit"]),
        ("data: !!timestamp soon", ["a value that its tag does not fit"]),
        (
            "data: !!python/object/apply:os.system [ls]",
            ["line 1", "could not determine a constructor"],
        ),
        ("clear_cache_threshold: [1]", ["clear_cache_threshold is [1]"]),
        (b"data: \xff", ["not UTF-8 text (byte 6)"]),
        ("data: \0", ["not YAML"]),
        ("adapter_path: ''", ["adapter_path is ''", "the path of a file or folder"]),
        ("#" * (1 << 20) + "\n", ["larger than 1 MB"]),
        ("[" + "a," * 100_000, ["more than 20000 keys and values"]),
        ("learning_rate: " + "1" * 100_000 + "." + "1" * 100_000 + "e", ["learning_rate is '111"]),
        ("learning_rate: " + "1" * 50_000 + "." + "1" * 50_000 + "e5", ["learning_rate is '111"]),
    ],
)
def test_what_is_refused(written, content, parts):
    path = written(content)
    with pytest.raises(ValueError) as raised:
        merge_settings({}, path)
    message = str(raised.value)
    assert message.startswith(str(path)) and len(message) < len(str(path)) + 1200
    for part in parts:
        assert part in message


def test_merges_of_merges_do_not_pile_up(written):
    content = read_yaml(written(MERGES))
    assert content["a10"] == {"x": 1, "y": 2}


def test_what_is_read(written):
    assert read_yaml(written("\ufeffiters: 1e3\nseed: 7\ndata: ~\n".encode())) == {
        "iters": 1000.0,
        "seed": 7,
    }
    shared = read_yaml(
        written("a: &a {rank: 4}\nlora_parameters:\n  <<: *a\n  scale: 2.0\nb: {<<: *a, rank: 5}\n")
    )
    assert shared["lora_parameters"] == {"rank": 4, "scale": 2.0} and shared["b"] == {"rank": 5}
    assert merge_settings({}, written("iters: 1e3\nclear_cache_threshold: 2GB")).iters == 1000
    assert read_yaml(written("")) == {}


def test_flags_are_read_as_files_are(capsys):
    for flag, value, part in [
        ("--iters", "9" * 5000, "argument --iters: an integer of 5000 digits is out of range"),
        ("--iters", "9223372036854775808", "iters is 9223372036854775808"),
        ("--iters", "x" * 5000, "is not a whole number"),
        ("--learning-rate", "inf", "learning_rate is inf"),
        ("--learning-rate", "9" * 5000, "learning_rate is inf"),
        ("--dropout", "nan", "dropout is nan"),
        ("--scale", "fast", "--scale: 'fast' is not a number"),
    ]:
        assert main(["train", "--data", "none", flag, value]) == 2
        message = capsys.readouterr().err
        assert part in message and len(message) < 300


def test_the_home_of_the_user(written, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    settings = merge_settings(
        {"data": "~/data"}, written("adapter_path: ~/a\nmodel: ~/m\nresume_adapter_file: ~/r\n")
    )
    assert (settings.data, settings.adapter_path) == ("/home/somebody/data", "/home/somebody/a")
    assert (settings.model, settings.resume_adapter_file) == (
        "/home/somebody/m",
        "/home/somebody/r",
    )
    assert merge_settings({"model": "owner/name"}).model == "owner/name"
