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

EXAMPLES = Path(__file__).parents[1] / "examples"
ROOT = str(Path(pyloss.__file__).parents[1])
SPLITS = ("train", "valid", "test")

_spec = importlib.util.spec_from_file_location("make_data", EXAMPLES / "make_data.py")
make_data = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_data)


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


@pytest.mark.slow
def test_the_comparison_of_students_runs(tmp_path):
    """Every way of training in `distill.py`, on random weights."""
    try:
        pyloss.models.resolve_model("smollm2-135m")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    script = [sys.executable, str(EXAMPLES / "distill.py"), "--small", "--out", str(tmp_path)]
    done = subprocess.run(
        script, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ROOT}, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = re.findall(r"^\| (.+?) \| [\d.]+ \|", done.stdout, re.M)
    ways = ["labels", "forward KL", "Jensen-Shannon", "stored top 64", "on-policy"]
    assert rows == ["teacher", "untrained student", *ways] * 2
