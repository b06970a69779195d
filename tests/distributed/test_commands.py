"""Commands of several ranks: the work is split by records, and the results are those of one."""

import json

import numpy as np
import pytest
import tiny_project
from launching import needs_mpi, run
from safetensors.numpy import load_file

pytestmark = needs_mpi
MODEL = ["--model", "base"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    tiny_project.make(folder)
    prompts = [{"prompt": f"say {i}", "max_tokens": 3 + i % 4} for i in range(7)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return folder


def both(project, ranks, *words, one=(), several=()):
    """What the command prints in one process, and on several ranks."""
    alone = tiny_project.command(*words, *one, cwd=project)
    assert alone.returncode == 0, alone.stderr
    together = run(ranks, "-m", "pyloss", *words, *several, cwd=project)
    return alone.stdout.decode(), together.stdout


def test_a_trained_adapter_is_that_of_one_process(project):
    words = ["train", *MODEL, "--data", "data", "--iters", "4", "--num-layers", "1"]
    one = ["--batch-size", "4", "--adapter-path", "one"]
    several = ["--batch-size", "2", "--adapter-path", "several"]
    alone, together = both(project, 2, *words, one=one, several=several)
    assert alone.count("val loss") == together.count("val loss") == 2
    assert "plan: 2 ranks on 1 machine, 2 samples of a batch for each" in together
    arrays, others = (load_file(project / n / "adapters.safetensors") for n in ("one", "several"))
    for name, array in arrays.items():
        np.testing.assert_allclose(others[name], array, rtol=1e-4, atol=1e-7)
    configs = [
        json.loads((project / n / "adapter_config.json").read_text()) for n in ("one", "several")
    ]
    assert configs[0]["batch_size"] == configs[1]["batch_size"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_evaluations_have_all_records_in_order(project, ranks):
    """Three records: a fourth rank has none."""
    words = ["eval", *MODEL, "--data", "data", "--metric", "loss,contains,f1", "--max-tokens", "5"]
    outputs = ["--output", f"one{ranks}.jsonl"], ["--output", f"several{ranks}.jsonl"]
    alone, together = both(project, ranks, *words, one=outputs[0], several=outputs[1])
    assert alone == together
    lines, others = (
        [json.loads(line) for line in (project / files[1]).read_text().splitlines()]
        for files in outputs
    )
    assert len(lines) == 3
    for line, other in zip(lines, others):
        assert line.pop("scores") == pytest.approx(other.pop("scores"), rel=1e-6)
    assert lines == others


def test_answers_of_a_file_are_in_the_order_of_its_lines(project):
    words = ["generate", *MODEL, "--prompts", "prompts.jsonl", "--output"]
    both(project, 3, *words, one=["a1.jsonl"], several=["a3.jsonl"])
    assert (project / "a1.jsonl").read_bytes() == (project / "a3.jsonl").read_bytes()


@pytest.mark.slow
def test_the_loss_of_test_data_is_that_of_one_process(project):
    words = ["eval", *MODEL, "--data", "data", "--adapter-path", "adapters"]
    alone, together = both(project, 2, *words)
    assert alone.split(",")[0] == together.split(",")[0] and alone.startswith("loss ")
    assert together.endswith("3 samples\n")


@pytest.mark.slow
def test_a_stored_teacher_has_the_bytes_of_one_process(project):
    """Written by three ranks, killed ranks' shards included: a second call has nothing to do."""
    words = ["distill", "--teacher", "base", *MODEL, "--data", "data", "--write-teacher"]
    both(project, 3, *words, one=["t1"], several=["t3"])
    names = sorted(path.name for path in (project / "t1").iterdir())
    assert names == sorted(path.name for path in (project / "t3").iterdir())
    for name in names:
        assert (project / "t1" / name).read_bytes() == (project / "t3" / name).read_bytes()
    done = run(2, "-m", "pyloss", *words, "t1", cwd=project)
    assert "complete" in done.stderr


@pytest.mark.slow
def test_distillation_is_that_of_one_process(project):
    words = ["distill", "--teacher", "base.gguf", *MODEL, "--data", "data", "--iters", "3"]
    words += ["--num-layers", "1"]
    one = ["--batch-size", "4", "--adapter-path", "d1"]
    several = ["--batch-size", "2", "--adapter-path", "d2"]
    both(project, 2, *words, one=one, several=several)
    arrays, others = (load_file(project / n / "adapters.safetensors") for n in ("d1", "d2"))
    for name, array in arrays.items():
        np.testing.assert_allclose(others[name], array, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_what_several_processes_cannot_share_is_refused_once(project):
    for words, said in (
        (["info"], "started 2 processes, and pyloss info works in one"),
        (["generate", *MODEL, "--prompt", "a"], "2 processes can share the prompts of a file"),
        (["train", *MODEL, "--bogus"], "unrecognized arguments: --bogus"),
    ):
        done = run(2, "-m", "pyloss", *words, check=False, cwd=project)
        assert done.returncode and done.stderr.count(said) == 1, done.stderr
