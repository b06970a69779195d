"""Scores of answers: the definitions that people quote, and the names of metrics."""

import collections
import random
import re
import string

import pytest

from pyloss.evaluation import ANSWER_METRICS, METRICS
from pyloss.evaluation.metrics import contains, exact_match, f1, json_match, read_metrics


@pytest.mark.parametrize(
    "answer, reference, score",
    [
        ("Paris", "Paris", 1),
        (" Paris\n", "Paris ", 1),
        ("paris", "Paris", 0),
        ("Paris.", "Paris", 0),
        ("", " ", 1),
    ],
)
def test_exact_match(answer, reference, score):
    assert exact_match(answer, reference) == score


@pytest.mark.parametrize(
    "answer, reference, score",
    [
        ("It is Paris.", " Paris\n", 1),
        ("It is paris.", "Paris", 0),
        ("Par", "Paris", 0),
        ("anything", "", 0),
        ("\n", "", 1),
    ],
)
def test_contains(answer, reference, score):
    assert contains(answer, reference) == score


@pytest.mark.parametrize(
    "answer, reference, score",
    [
        ('{"a": 1, "b": [true, null]}', '{"b":[true,null],"a":1.0}', 1),
        (' {"a": "\\u00e9"}\n', '{"a": "é"}', 1),
        ('{"a": 1}', '{"a": true}', 0),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', 0),
        ('{"a": [1]}', '{"a": [1, 2]}', 0),
        ('{"a": 1, "b": 2}', '{"a": 1}', 0),
        ("null", "null", 1),
        ("null", "0", 0),
        ("false", "0", 0),
        ('{"a": 1', '{"a": 1}', 0),
        ('```json\n{"a": 1}\n```', '{"a": 1}', 0),
        ("NaN", "NaN", 0),
        ("-Infinity", "text", 0),
        ('{"any": "JSON"}', "text", 1),
        ("no JSON", "text", 0),
        ("[" * 100_000, "[]", 0),
        ("1" * 5000, "1", 0),
    ],
)
def test_json(answer, reference, score):
    assert json_match(answer, reference) == score


# From SQuAD 2.0's evaluation script, https://rajpurkar.github.io/SQuAD-explorer.
def normalize_answer(s):
    def remove_articles(text):
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)

    def white_space_fix(text):
        return " ".join(text.split())

    def remove_punc(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    def lower(text):
        return text.lower()

    return white_space_fix(remove_articles(remove_punc(lower(s))))


def compute_f1(a_gold, a_pred):
    gold_toks = normalize_answer(a_gold).split() if a_gold else []
    pred_toks = normalize_answer(a_pred).split() if a_pred else []
    common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
    num_same = sum(common.values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(pred_toks)
    recall = 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


def test_f1_by_hand():
    assert f1("The cat sat on a mat!", "cat sat") == pytest.approx(2 * 2 / (4 + 2))
    assert f1("the the", "a") == 1
    assert f1("cat cat", "cat") == pytest.approx(2 / 3)


def test_f1_is_that_of_squads_script():
    words = ["the", "A", "cat", "Cat's", "mat.", "...", "don't", "x-y", "ÉTÉ", "an\u2019", "12", ""]
    chance = random.Random(0)
    for _ in range(500):
        texts = [" ".join(chance.choices(words, k=chance.randrange(6))) for _ in range(2)]
        assert f1(*texts) == pytest.approx(compute_f1(texts[1], texts[0]), abs=1e-12), texts


def test_names_of_metrics():
    assert read_metrics("Loss, exact_match,loss") == ("loss", "exact-match")
    assert read_metrics(["f1"]) == ("f1",)
    assert set(METRICS) == {"loss", "perplexity", *ANSWER_METRICS}
    with pytest.raises(ValueError, match=r"'exact' is not known.*allowed are loss, perplexity"):
        read_metrics("loss,exact")
    with pytest.raises(ValueError, match="did you mean contains"):
        read_metrics("contain")
    with pytest.raises(ValueError, match="no metric is given"):
        read_metrics([])
