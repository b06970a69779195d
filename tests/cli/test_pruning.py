"""`prune`, from its flags to its folder."""

import pytest
import tiny_project
from tiny_commands import fails

import pyloss
from pyloss.cli import main


@pytest.fixture
def project(tmp_path, monkeypatch):
    tiny_project.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("model", [["base"], ["--model", "base.gguf"]])
@pytest.mark.parametrize(("flags", "count"), [(["--keep", "2"], 2), (["--layers", "0,2"], 2)])
def test_a_student_that_loads(project, capsys, model, flags, count):
    assert main(["prune", *model, *flags, "--output", "student"]) == 0
    assert "kept layers 0, 2 of 3; saved the model to student" in capsys.readouterr().err
    student, tokenizer = pyloss.load("student")
    assert len(student.layers) == count and tokenizer.encode("hi")
    assert main(["generate", "--model", "student", "--prompt", "hi", "--max-tokens", "2"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --layers"),
        (["--keep", "2", "--layers", "0"], "give either --layers"),
        (["--keep", "4"], "keep is 4; the model has 3 layers"),
        (["--layers", "0-9"], "layers has 3; the model has layers 0 to 2"),
        (["--layers", "x"], "'x' in 'x' is not a layer"),
    ],
)
def test_refused_flags_write_nothing(project, capsys, flags, message):
    fails(capsys, ["prune", "base", *flags, "--output", "student"], message)
    assert not (project / "student").exists()


def test_the_model_itself_is_not_overwritten(project, capsys):
    fails(capsys, ["prune", "base", "--keep", "1", "--output", "base"], "is the model itself")
