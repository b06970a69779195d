"""Log-probabilities of targets, against a model in float64."""

import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose

from pyloss.evaluation import likelihood
from pyloss.evaluation.likelihood import score_targets
from pyloss.tuner.data.targets import Sample


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    from pyloss.models import load_model

    config, arrays = tiny.write_folder(folder)
    return load_model(folder), lambda tokens: tiny.logits(config, arrays, tokens)


def expected(logits, sample):
    """The losses and greediness of the sample's targets."""
    places = np.flatnonzero(sample.weights)
    rows = logits(np.array(sample.tokens))[places - 1]
    labels = np.array(sample.tokens)[places]
    top = rows.max(1)
    norms = top + np.log(np.exp(rows - top[:, None]).sum(1))
    return norms - rows[np.arange(len(labels)), labels], rows.argmax(1) == labels


def samples(rng, spans):
    made = []
    for length, span in spans:
        tokens = rng.integers(0, tiny.SIZES["vocab_size"], length).tolist()
        made.append(Sample.from_spans(tokens, [span]))
    return made


SPANS = [(9, (4, 9)), (2, (1, 2)), (30, (0, 30)), (7, (2, 4)), (1, (0, 1)), (5, (5, 5))]


@pytest.mark.parametrize("rows", [3, 1000])
def test_scores_are_those_in_float64(model, monkeypatch, rows):
    own, logits = model
    monkeypatch.setattr(likelihood, "rows_at_once", lambda row_bytes: rows)
    made = samples(np.random.default_rng(0), SPANS)
    # A target in the middle has the largest logit.
    made[0].tokens[6] = int(logits(np.array(made[0].tokens))[5].argmax())
    found = score_targets(own, made)
    assert len(found) == len(made)
    for sample, scores in zip(made, found):
        losses, greedy = expected(logits, sample)
        assert_allclose(scores.losses, losses, rtol=2e-5, atol=2e-5)
        assert np.array_equal(scores.greedy, greedy)
    assert found[0].greedy[2]
    assert [len(scores.losses) for scores in found] == [5, 1, 29, 2, 0, 0]


def test_a_score_does_not_depend_on_the_other_samples(model):
    own, _ = model
    made = samples(np.random.default_rng(1), SPANS * 5)
    for sample, scores in zip(made[:6], score_targets(own, made)):
        assert_allclose(scores.losses, score_targets(own, [sample])[0].losses, rtol=1e-5, atol=1e-6)


def test_several_targets_with_tokens_between_them(model):
    own, logits = model
    tokens = np.random.default_rng(2).integers(0, 29, 12).tolist()
    sample = Sample.from_spans(tokens, [(2, 4), (7, 9)])
    losses, _ = expected(logits, sample)
    assert_allclose(score_targets(own, [sample])[0].losses, losses, rtol=2e-5, atol=2e-5)


def test_equal_inputs_are_computed_once(model, monkeypatch):
    own, logits = model
    question = [3, 7, 1, 12, 5]
    made = [Sample.from_spans([*question, choice], [(5, 6)]) for choice in range(6)]
    made.append(Sample.from_spans([*question, 2], [(3, 6)]))
    made.append(Sample.from_spans([*question, 2, 9], [(6, 7)]))
    counts = []
    hidden = own.hidden
    monkeypatch.setattr(
        own, "hidden", lambda tokens, *more: counts.append(len(tokens)) or hidden(tokens, *more)
    )
    found = score_targets(own, made)
    assert counts == [5 + 6]
    for sample, scores in zip(made, found):
        losses, greedy = expected(logits, sample)
        assert_allclose(scores.losses, losses, rtol=2e-5, atol=2e-5)
        assert np.array_equal(scores.greedy, greedy)


def test_nothing_to_score(model):
    assert score_targets(model[0], []) == []
