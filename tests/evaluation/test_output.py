"""The file of an evaluation."""

import json
import math

import pytest

from pyloss.evaluation import Evaluation, Result, write_results


def evaluation(answer, **scores):
    result = Result("p é", "r", answer, None if answer is None else "stop", 2.0, 1.0, scores)
    return Evaluation(tuple(scores), [result])


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_for_each_record(tmp_path):
    path = tmp_path / "out.jsonl"
    write_results(path, evaluation("a\nb", f1=0.5))
    whole = {
        "record": 0,
        "prompt": "p é",
        "reference": "r",
        "answer": "a\nb",
        "finish_reason": "stop",
        "scores": {"f1": 0.5},
    }
    assert lines(path) == [whole]
    base = {"answer": "c", "finish_reason": "stop", "scores": {"f1": 0.0}}
    write_results(path, evaluation("a\nb", f1=0.5), evaluation("c", f1=0.0))
    assert lines(path) == [whole | {"base": base}]
    aside = tmp_path / "previous-1"
    assert sorted(tmp_path.iterdir()) == [path, aside] and lines(aside / "out.jsonl") == [whole]
    write_results(path, evaluation("d", f1=0.5), overwrite=True)
    assert sorted(tmp_path.iterdir()) == [path, aside]


def test_without_answers_there_are_scores_only(tmp_path):
    write_results(tmp_path / "out.jsonl", evaluation(None, loss=2.0, perplexity=math.inf))
    assert lines(tmp_path / "out.jsonl") == [
        {"record": 0, "scores": {"loss": 2.0, "perplexity": None}}
    ]


def test_a_failure_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("before")
    broken = evaluation("a", f1=0.5)
    broken.results[0].prompt = object()
    with pytest.raises(TypeError):
        write_results(path, broken)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match=r"out\.jsonl"):
        write_results(path / "out.jsonl", evaluation("a", f1=0.5))


def test_missing_folders_are_made(tmp_path):
    write_results(tmp_path / "a" / "b" / "out.jsonl", evaluation("a", f1=0.5))
    assert len(lines(tmp_path / "a" / "b" / "out.jsonl")) == 1
