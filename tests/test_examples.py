"""The example data: the generator reproduces it, and the test split has phrasings of its own. The
comparison of students runs.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyloss
from pyloss.recursive.data.sudoku_symmetry import sudoku_class

EXAMPLES = Path(__file__).parents[1] / "examples"
ROOT = str(Path(pyloss.__file__).parents[1])
SPLITS = ("train", "valid", "test")


def example(name):
    """The module of a script."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_data, distill, sudoku = example("make_data"), example("distill"), example("sudoku")


@pytest.fixture(scope="module")
def splits():
    return {
        s: [json.loads(x) for x in (EXAMPLES / "data" / f"{s}.jsonl").open(encoding="utf-8")]
        for s in SPLITS
    }


def asked(record):
    return record["messages"][1]["content"]


def matcher(phrasings):
    """A pattern for all texts of the phrasings, with every value of every split."""
    said = {
        n: "|".join(map(re.escape, {**v, **make_data.NEW.get(n, {})}))
        for n, v in make_data.VALUES.items()
    }
    alternatives = [re.sub(r"\{(\w+)\}", lambda m: f"(?:{said[m[1]]})", p) for p in phrasings]
    return re.compile("|".join(f"(?:{a})" for a in alternatives))


def phrasings(split):
    return [p for tool in make_data.PHRASINGS.values() for p in tool[split]]


def test_the_files_are_what_the_generator_makes(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_data.py", str(tmp_path)])
    make_data.main()
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (
            EXAMPLES / "data" / f"{split}.jsonl"
        ).read_bytes()


def test_phrasings_of_one_split_are_in_no_other(splits):
    assert len({p for s in SPLITS for p in phrasings(s)}) == sum(len(phrasings(s)) for s in SPLITS)
    for own in SPLITS:
        other = matcher([p for s in SPLITS if s != own for p in phrasings(s)])
        for record in splits[own]:
            assert not other.fullmatch(asked(record)), (own, asked(record))


def test_a_request_has_one_answer(splits):
    """No request fits two calls: it matches only the phrasings of its own tool."""
    for tool, own in make_data.PHRASINGS.items():
        others = matcher(
            [p for t, o in make_data.PHRASINGS.items() if t != tool for s in SPLITS for p in o[s]]
        )
        assert {*own} == {*SPLITS}
        for split in SPLITS:
            for record in splits[split]:
                if json.loads(record["messages"][2]["content"])["tool"] == tool:
                    assert not others.fullmatch(asked(record)), asked(record)


def test_records(splits):
    assert {s: len(r) for s, r in splits.items()} == make_data.SIZES
    requests = [asked(r) for s in SPLITS for r in splits[s]]
    assert len(set(requests)) == len(requests)
    for split in SPLITS:
        tools = set()
        for record in splits[split]:
            assert [m["role"] for m in record["messages"]] == ["system", "user", "assistant"]
            answer = record["messages"][2]["content"]
            call = json.loads(answer)
            assert answer == json.dumps(call, separators=(",", ":")) and "\n" not in answer
            assert tuple(call) == ("tool", *make_data.ARGUMENTS[call["tool"]])
            tools.add(call["tool"])
        assert tools == set(make_data.ARGUMENTS)


def test_every_training_phrasing_is_used_and_some_names_are_new(splits):
    text = "\n".join(asked(r) for r in splits["train"])
    assert all(matcher([p]).search(text) for p in phrasings("train"))
    new = {v for values in make_data.NEW.values() for v in values}
    assert not any(re.search(rf"\b{v}\b", text) for v in new)
    held_out = [r for r in splits["test"] if any(v in asked(r) for v in new)]
    assert 20 <= len(held_out) <= 60


def test_results_are_kept_one_by_one(tmp_path, capsys):
    """What was measured before a run stopped is not measured again, with the same options only."""
    path = tmp_path / "results.json"
    results = distill.Results(path, {"iters": 2})
    assert results.value("text", "labels", 0, lambda: 1.5) == 1.5
    with pytest.raises(KeyboardInterrupt):
        results.value("text", "labels", 1, stopped)
    again = distill.Results(path, {"iters": 2})
    assert again.value("text", "labels", 0, stopped) == 1.5
    assert "text: labels, seed 0: 1.500, known from" in capsys.readouterr().out
    others = [("text", "labels", 1), ("text", "forward KL", 0), ("requests", "labels", 0)]
    for i, key in enumerate([*others, ("text", "labels", None)]):
        assert again.value(*key, lambda value=i: float(value)) == i
    assert distill.Results(path, {"iters": 3}).value("text", "labels", 0, lambda: 7.0) == 7
    kept = distill.Results(path, {"iters": 2})
    assert kept.value("text", "labels", 0, stopped) == 1.5
    assert [entry["value"] for entry in kept.entries] == [1.5, 0, 1, 2, 3, 7]


def stopped():
    raise KeyboardInterrupt


@pytest.mark.slow
def test_the_comparison_of_students_runs(tmp_path):
    """Every way of training in `distill.py`, on random weights; a rerun only what is missing."""
    try:
        pyloss.models.resolve_model("smollm2-135m")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    script = [sys.executable, str(EXAMPLES / "distill.py"), "--small", "--out", str(tmp_path)]
    script += ["--precision", "bfloat16"]

    def run(*options):
        done = subprocess.run(
            [*script, *options],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ROOT}, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    first = run()
    ways = ["labels", "forward KL", "Jensen-Shannon", "stored top 64", "on-policy"]
    table = re.compile(r"^\| (.+?) \| [\d.]+ \| .*$", re.M)
    assert table.findall(first) == ["teacher", "untrained student", *ways] * 2
    path = tmp_path / "results.json"
    entries = json.loads(path.read_text())
    assert len(entries) == 14 and not re.search("skipped", first)
    # As if the run had been stopped during the last of its students.
    path.write_text(json.dumps(entries[:-1]))
    second = run("--seeds", "2")
    assert len(re.findall("skipped$", second, re.M)) == 13
    rows = [m.group() for m in table.finditer(first)]
    assert [m.group() for m in table.finditer(second)][:14] == rows
    assert len(table.findall(second)) == 28 and "perplexity (2 seeds)" in second


@pytest.mark.parametrize(("size", "count"), [(4, 120), (6, 40)])
def test_held_out_sudokus_have_other_grids(size, count):
    train, test = sudoku.data(size, seed=1, count=count)
    grids = [{row.tobytes() for row in part.labels} for part in (train, test)]
    assert not grids[0] & grids[1] and 0.05 * count < len(test) < 0.35 * count
    assert len(train) == train.total_groups * (1 + sudoku.DEMOS[size][2])
    if size == 6:
        kinds = [
            {
                sudoku_class(row.reshape(6, 6) - 1)
                for row in part.labels[:: 8 if part is train else 1]
            }
            for part in (train, test)
        ]
        assert not kinds[0] & kinds[1]


@pytest.mark.slow
def test_a_tiny_recursive_model_learns_sudoku(tmp_path):
    """The demo of 4 x 4, which fails below 95 % of the held-out puzzles."""
    script = [sys.executable, str(EXAMPLES / "sudoku.py"), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        script, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ROOT}, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["exact_accuracy"] >= 0.95 and found["count"] >= 80
    assert (tmp_path / "run" / "steps.svg").is_file() and "wrong, " in done.stdout
