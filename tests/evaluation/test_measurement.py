"""`measure`: losses as `evaluate` gives them, and scores of the answers that `generate` gives."""

import math

import pytest
import tiny

import pyloss
from pyloss.evaluation import ANSWER_METRICS, measure
from pyloss.tuner import datasets as ds
from pyloss.tuner.data.batching import NoTargets

RECORDS = [{"prompt": f"say {'hello ' * i}", "completion": f"hello {i}"} for i in range(1, 8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.load_tiny(tmp_path_factory.mktemp("tiny") / "model", vocab_size=tiny.TOKENS)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.byte_tokenizer()


@pytest.fixture
def data(tokenizer):
    return ds.CompletionsDataset(RECORDS, tokenizer, mask_prompt=True)


@pytest.mark.parametrize("length", [2048, 60])
def test_the_loss_is_that_of_evaluate(model, tokenizer, data, length):
    expected = pyloss.evaluate(model, data, batch_size=2, max_seq_length=length)
    found = measure(model, tokenizer, data, max_seq_length=length)
    assert found.metrics == ("loss", "perplexity")
    assert found.scores["loss"] == pytest.approx(expected, rel=1e-5)
    assert found.scores["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    alone = ds.CompletionsDataset(RECORDS[2:3], tokenizer, mask_prompt=True)
    one = pyloss.evaluate(model, alone, batch_size=1, max_seq_length=length)
    assert found.results[2].scores["loss"] == pytest.approx(one, rel=1e-5)
    assert found.results[2].answer is None and found.cut == 0


def test_perplexity_alone(model, tokenizer, data):
    both = measure(model, tokenizer, data)
    alone = measure(model, tokenizer, data, "perplexity")
    assert alone.scores == {"perplexity": both.scores["perplexity"]}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_generate(model, tokenizer, data, batch_size):
    calls = []
    found = measure(
        model,
        tokenizer,
        data,
        list(ANSWER_METRICS),
        max_tokens=6,
        batch_size=batch_size,
        progress=lambda *call: calls.append(call),
    )
    assert calls == [(i, 7) for i in range(1, 8)]
    for record, result in zip(RECORDS, found.results):
        prompt = f"user: {record['prompt']}"
        assert (result.prompt, result.reference) == (prompt, record["completion"])
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        assert result.answer == pyloss.generate(model, tokenizer, ids, max_tokens=6)
        assert result.scores == {
            name: score(result.answer, result.reference) for name, score in ANSWER_METRICS.items()
        }
    assert found.cut == sum(result.finish_reason == "length" for result in found.results) > 0


def test_scores_are_means_over_the_records(model, tokenizer):
    first = measure(
        model, tokenizer, ds.CompletionsDataset(RECORDS, tokenizer), "contains", max_tokens=4
    )
    answers = [result.answer for result in first.results]
    known = [
        {"prompt": r["prompt"], "completion": a if i < 3 else "something else"}
        for i, (r, a) in enumerate(zip(RECORDS, answers))
    ]
    data = ds.CompletionsDataset(known, tokenizer)
    found = measure(model, tokenizer, data, "exact-match,f1", max_tokens=4)
    assert found.scores["exact-match"] == 3 / 7
    assert found.scores["f1"] == sum(r.scores["f1"] for r in found.results) / 7


def test_limit(model, tokenizer, data):
    found = measure(model, tokenizer, data, "loss,contains", max_tokens=2, limit=3)
    assert [result.reference for result in found.results] == ["hello 1", "hello 2", "hello 3"]
    whole = measure(model, tokenizer, data, "loss")
    assert found.results[1].scores["loss"] == pytest.approx(
        whole.results[1].scores["loss"], rel=1e-5
    )
    assert len(measure(model, tokenizer, data, "loss", limit=100).results) == 7
    with pytest.raises(ValueError, match="limit is 0"):
        measure(model, tokenizer, data, limit=0)


def test_a_record_without_targets_has_no_loss(model, tokenizer, data):
    found = measure(model, tokenizer, data, max_seq_length=20)
    assert found.results[0].scores["loss"] > 0
    assert found.results[6].scores == {"loss": None, "perplexity": None}
    expected = pyloss.evaluate(model, data, batch_size=2, max_seq_length=20)
    assert found.scores["loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(NoTargets, match="no target token"):
        measure(model, tokenizer, data, max_seq_length=3)


def test_plain_text_has_losses_only(model, tokenizer):
    text = ds.TextDataset([{"text": "hello world"}], tokenizer)
    expected = pyloss.evaluate(model, text, batch_size=1)
    assert measure(model, tokenizer, text).scores["loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="record 0: a record of 'text' has no prompt"):
        measure(model, tokenizer, text, "loss,f1")


def test_no_records(model, tokenizer):
    with pytest.raises(ValueError, match="the dataset is empty"):
        measure(model, tokenizer, [])


def test_the_model_is_in_evaluation_mode_meanwhile(model, tokenizer, data):
    model.train()
    modes = []
    measure(
        model,
        tokenizer,
        data,
        "contains",
        max_tokens=1,
        progress=lambda *_: modes.append(model.training),
    )
    assert modes == [False] * 7 and model.training
    model.eval()
