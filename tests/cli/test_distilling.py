"""`distill`: a run against a teacher, its settings, and what is refused."""

import json

import numpy as np
import pytest
import tiny
import tiny_project
from tiny_commands import fails

import pyloss
from pyloss.cli import main
from pyloss.models import load_model

DISTILL = ["distill", *tiny_project.TRAIN[1:], "--teacher", "teacher"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A student `base`, and a `teacher` with other weights and a padded head."""
    tiny_project.make(tmp_path)
    size = tiny.TOKENS + 3
    tiny.write_folder(tmp_path / "other", seed=5, vocab_size=size, tied=False)
    load_model(tmp_path / "other").save(tmp_path / "teacher", tiny.byte_tokenizer())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_a_run_keeps_its_settings_and_resumes(project, capsys):
    flags = ["--kind", "js", "--beta", "0.25", "--alpha", "0.1", "--lora-alpha", "4"]
    assert main([*DISTILL, "--adapter-path", "run", *flags]) == 0
    out, err = capsys.readouterr()
    assert "teacher teacher: " in err and "iteration 2/2: train loss" in out
    assert "of memory at the peak, " in out and " of it the teacher's files\n" in out
    saved = settings(project / "run")
    assert saved["distillation"] == {
        "teacher": "teacher", "kind": "js", "beta": 0.25, "alpha": 0.1,
    }  # fmt: skip
    assert saved["lora_parameters"]["scale"] == 4 / saved["lora_parameters"]["rank"]
    assert main(["distill", "--resume", "--adapter-path", "run", "--iters", "3"]) == 0
    assert "resuming after iteration 2" in capsys.readouterr().out
    assert settings(project / "run")["distillation"] == saved["distillation"]
    fails(
        capsys,
        ["train", "--resume", "--adapter-path", "run", "--iters", "4"],
        "the settings have a distillation section: pyloss distill runs and resumes them",
    )
    assert main(["generate", "--model", "base", "--adapter-path", "run", "--prompt", "hi"]) == 0


def test_the_loss_is_that_of_the_teacher(project, capsys):
    """A student that is its own teacher has nothing to learn."""
    own = [*DISTILL[:-1], "base.gguf"]
    assert main([*own, "--model", "base.gguf", "--adapter-path", "run"]) == 0
    out, _ = capsys.readouterr()
    shown = [line for line in out.splitlines() if "val loss" in line]
    assert shown and all("val loss 0.000" in line for line in shown)


def test_answers_of_the_student(project, capsys):
    flags = ["--mask-prompt", "--on-policy", "1", "--max-new-tokens", "3", "--adapter-path", "run"]
    assert main([*DISTILL, *flags]) == 0
    saved = settings(project / "run")["distillation"]
    assert saved == {"teacher": "teacher", "on_policy": 1.0, "max_new_tokens": 3}
    first = (project / "run" / "adapters.safetensors").read_bytes()
    assert main([*DISTILL, *flags, "--overwrite"]) == 0
    assert (project / "run" / "adapters.safetensors").read_bytes() == first


def test_hidden_states(project, capsys):
    tiny.write_folder(
        project / "wide", seed=6, vocab_size=tiny.TOKENS, tied=False, hidden_size=40, head_dim=10
    )
    load_model(project / "wide").save(project / "larger", tiny.byte_tokenizer())
    flags = ["--hidden-loss", "mse", "--hidden-layers", "1:0,2:2", "--hidden-weight", "0.1"]
    run = [*DISTILL[:-1], "larger", "--adapter-path", "run", *flags]
    assert main(run) == 0
    shown = "hidden states: mse of the layers 1:0, 2:2 (student:teacher), with projections of 2,560"
    assert shown in capsys.readouterr().err
    saved = settings(project / "run")["distillation"]
    assert saved == {
        "teacher": "larger", "hidden_loss": "mse", "hidden_layers": "1:0,2:2", "hidden_weight": 0.1,
    }  # fmt: skip
    assert main(["distill", "--resume", "--adapter-path", "run", "--iters", "3"]) == 0
    assert shown in capsys.readouterr().err
    again = ["distill", "--resume", "--adapter-path", "run", "--iters", "4"]
    message = "in one only, first 'hidden_projections.1:0'"
    fails(capsys, [*again, "--hidden-layers", "2:2"], message)
    assert main(["generate", "--model", "base", "--adapter-path", "run", "--prompt", "hi"]) == 0
    (project / "run.yaml").write_text(
        "model: base\ndata: data\niters: 2\nbatch_size: 2\nnum_layers: 1\n"
        "distillation: {teacher: teacher, hidden_loss: cosine, hidden_layers: [[2, 1], [0, 0]]}\n"
    )
    assert main(["distill", "-c", "run.yaml", "--on-policy", "0.5", "--mask-prompt"]) == 0
    assert "hidden states: cosine of the layers 2:1, 0:0 (stu" in capsys.readouterr().err


def test_settings_from_a_file(project, capsys):
    (project / "run.yaml").write_text(
        "model: base\ndata: data\niters: 2\nbatch_size: 2\nnum_layers: 1\n"
        "distillation: {teacher: teacher, kind: reverse-kl, temperature: 2}\n"
    )
    assert main(["distill", "-c", "run.yaml", "--temperature", "3"]) == 0
    saved = settings(project / "adapters")["distillation"]
    assert saved == {"teacher": "teacher", "kind": "reverse-kl", "temperature": 3.0}


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_other_kinds_of_training(project, kind):
    assert main([*DISTILL, "--fine-tune-type", kind, "--adapter-path", "run"]) == 0
    assert (project / "run" / "adapters.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kind", "kl"], "distillation.kind is 'kl'; allowed: forward-kl, reverse-kl"),
        (["--temperature", "0"], "distillation.temperature is 0.0; allowed: a finite number above"),
        (["--alpha", "1.5"], "distillation.alpha is 1.5; allowed: a finite number of at least 0"),
        (["--skew", "1"], "distillation.skew is 1.0"),
        (["--on-policy", "2"], "distillation.on_policy is 2.0; allowed: a finite number of at"),
        (["--max-new-tokens", "0"], "distillation.max_new_tokens is 0; allowed: a whole number"),
        (["--teacher", "nowhere"], "nowhere"),
        (["--hidden-loss", "mae"], "distillation.hidden_loss is 'mae'; allowed: cosine, mse"),
        (["--hidden-loss", "mse", "--hidden-weight", "0"], "distillation.hidden_weight is 0.0"),
        (["--hidden-loss", "mse", "--hidden-layers", "1"], "'1' in '1' is not a layer of the stu"),
        (["--hidden-loss", "mse", "--hidden-layers", "9:1"], "the student has no layer 9: it has"),
        (["--hidden-layers", "1:1"], "go with --hidden-loss, which says how hidden states are"),
        (["--hidden-weight", "1"], "go with --hidden-loss, which says how hidden states are"),
    ],
)
def test_refused_flags(project, capsys, flags, message):
    fails(capsys, [*DISTILL, "--adapter-path", "run", *flags], message)
    assert not (project / "run").exists()


WRITE = ["distill", "--teacher", "teacher", "--data", "data", "--write-teacher", "stored"]


@pytest.mark.parametrize(
    ("written", "flags"),
    [
        (["--top-k", "20"], ["--kind", "js"]),
        (["--samples", "8"], []),
        (["--temperature", "2"], ["--temperature", "2", "--alpha", "0.5", "--beta", "0.3"]),
        ([], ["--temperature", "3", "--rest", "renormalize", "--kind", "skew-kl"]),
    ],
)
def test_a_stored_teacher(project, capsys, written, flags):
    assert main([*WRITE, *written]) == 0
    _, err = capsys.readouterr()
    assert err.splitlines()[0].startswith("stored teacher stored: ")
    assert main([*WRITE, *written]) == 0
    assert "1 shard written before: complete" in capsys.readouterr().err
    run = [*DISTILL[:-1], "stored", "--adapter-path", "run", *flags]
    assert main(run) == 0
    assert "teacher stored: " in capsys.readouterr().err
    assert settings(project / "run")["distillation"]["teacher"] == "stored"
    assert main(["distill", "--resume", "--adapter-path", "run", "--iters", "3"]) == 0
    assert "resuming after iteration 2" in capsys.readouterr().out


def test_a_stored_teacher_that_does_not_fit(project, capsys):
    fails(capsys, [*WRITE, "--top-k", "1000"], "top_k is 1000; it must be a whole number from 1 to")
    fails(capsys, [*WRITE, "--top-k", "2", "--samples", "2"], "give --top-k or --samples, not both")
    for flag in ("--preview", "--test"):
        fails(capsys, [*WRITE, flag], "--write-teacher neither previews nor tests")
    assert not (project / "stored").exists()
    run = [*DISTILL, "--adapter-path", "run"]
    fails(capsys, [*run, "--top-k", "2"], "--top-k and --samples go with --write-teacher")
    fails(capsys, [*run, "--rest", "bucket"], "--rest is for a stored teacher, and teacher is a")
    assert main(WRITE) == 0
    capsys.readouterr()
    fails(capsys, [*WRITE, "--top-k", "2"], "has a stored teacher with count 64, not 2")
    run = [*DISTILL[:-1], "stored", "--adapter-path", "run"]
    fails(capsys, [*run, "--temperature", "2"], "temperature is 2 and stored_temperature 1")
    message = "--hidden-loss needs a model as its teacher; stored has probabilities only"
    fails(capsys, [*run, "--hidden-loss", "mse"], message)
    fails(capsys, [*run, "--rest", "drop"], "distillation.rest is 'drop'; allowed: bucket,")
    fails(capsys, [*run, "--mask-prompt"], "lacks 6 of the 6 samples of the training data")
    fails(capsys, [*run, "--max-seq-length", "9"], "max_seq_length 2048")
    assert not (project / "run").exists()


def test_a_teacher_is_needed(project, capsys):
    fails(capsys, [*DISTILL[:-2], "--adapter-path", "run"], "no teacher: give --teacher")
    assert not (project / "run").exists()


def test_another_tokenizer_is_refused(project, capsys):
    tokenizer = tiny.byte_tokenizer()
    tokenizer.backend.add_tokens(["<extra>"])
    load_model(project / "other").save(project / "foreign", tokenizer)
    found = fails(
        capsys,
        [*DISTILL[:-1], "foreign", "--adapter-path", "run"],
        "and the teacher's", "no token in the student's and '<extra>' in the teacher's",
    )  # fmt: skip
    assert len(found[-1]) < 300
    assert not (project / "run").exists()


def test_the_teacher_stays_as_it_is(project):
    before = {p.name: p.read_bytes() for p in (project / "teacher").iterdir()}
    assert main([*DISTILL, "--adapter-path", "run"]) == 0
    assert {p.name: p.read_bytes() for p in (project / "teacher").iterdir()} == before
    model, _ = pyloss.load("base", adapter_path="run")
    assert all(np.isfinite(array).all() for array in model.parameters().values())
