"""Targets that the student draws: which rows, what becomes of them, and runs that repeat."""

from itertools import islice

import numpy as np
import pytest
import tiny

import pyloss
from pyloss import nn
from pyloss.distillation.loss import DistillationLoss
from pyloss.distillation.on_policy import OnPolicyLoss
from pyloss.generation.sampling import SamplingParams
from pyloss.generation.single import generate_tokens
from pyloss.models import load_model
from pyloss.tuner import linear_to_lora_layers

BATCH = np.array(
    [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 28, 0, 0, 0], [1, 6, 9, 0, 0, 0, 0, 0]], np.int32
)
LENGTHS = np.array([[3, 8], [1, 5], [2, 3]], np.int32)


@pytest.fixture
def parts(tmp_path):
    """(student, teacher, tokenizer)"""
    models = []
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny.write_folder(tmp_path / name, seed=seed, vocab_size=tiny.TOKENS, tied=False)
        models.append(load_model(tmp_path / name))
    linear_to_lora_layers(models[0], 3, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    models[0].train()
    return *models, tiny.byte_tokenizer()


class Seen(DistillationLoss):
    """Keeps what it is asked for."""

    def of(self, model, batch, lengths, alpha=None):
        self.seen = batch, lengths, alpha
        return super().of(model, batch, lengths, alpha)


def test_every_row_is_answered_by_the_student(parts):
    student, teacher, tokenizer = parts
    loss = Seen(teacher, "js", alpha=0.3)
    value, weight = OnPolicyLoss(loss, tokenizer, 1.0, max_new_tokens=5)(student, BATCH, LENGTHS)
    batch, weights, alpha = loss.seen
    assert np.isfinite(float(value)) and weight == weights.sum()
    np.testing.assert_array_equal(alpha, 0)
    for row, given, (first, _) in zip(range(3), BATCH, LENGTHS):
        first = max(first, 1)
        np.testing.assert_array_equal(batch[row, :first], given[:first])
        places = np.flatnonzero(weights[row])
        assert places[0] == first and 1 <= len(places) <= 5
        answer = batch[row, places]
        if len(places) < 5:
            assert answer[-1] in tokenizer.eos_token_ids
        assert not any(token in tokenizer.eos_token_ids for token in answer[:-1])
    assert student.training


def test_answers_are_what_generation_draws_with_the_rows_seeds(parts, monkeypatch):
    student, teacher, tokenizer = parts
    loss, seeds = Seen(teacher), iter((11, 12, 13))
    monkeypatch.setattr(pyloss.random, "next_seed", lambda: next(seeds))
    monkeypatch.setattr(pyloss.random, "generator", lambda: np.random.default_rng(0))
    OnPolicyLoss(loss, tokenizer, 1.0, max_new_tokens=6)(student, BATCH, LENGTHS)
    batch, weights, _ = loss.seen
    student.eval()
    for row, seed in enumerate((11, 12, 13)):
        places = np.flatnonzero(weights[row])
        sampler = SamplingParams(temperature=1.0, seed=seed).make_sampler()
        prompt = batch[row, : places[0]]
        own = islice(generate_tokens(student, prompt, sampler), len(places))
        assert list(own) == batch[row, places].tolist()


def test_rows_that_are_not_drawn_keep_their_targets_and_their_share_of_labels(parts):
    student, teacher, tokenizer = parts
    loss = Seen(teacher, alpha=0.5)
    run = OnPolicyLoss(loss, tokenizer, 0.5, max_new_tokens=3)
    kept = drawn = 0
    for seed in range(8):
        pyloss.random.seed(seed)
        run(student, BATCH, LENGTHS)
        batch, weights, alpha = loss.seen
        if alpha is None:
            kept += 3
            continue
        for row, (given, (first, end)) in enumerate(zip(BATCH, LENGTHS)):
            if alpha[row] == 0.5:
                np.testing.assert_array_equal(batch[row, :end], given[:end])
                np.testing.assert_array_equal(
                    np.flatnonzero(weights[row]), range(max(first, 1), end)
                )
                kept += 1
            else:
                assert alpha[row] == 0
                drawn += 1
    assert kept > 4 and drawn > 4


def test_evaluation_and_a_share_of_0_use_the_given_targets(parts):
    student, teacher, tokenizer = parts
    plain = DistillationLoss(teacher, "js")
    want = float(plain(student, BATCH, LENGTHS)[0])
    run = OnPolicyLoss(plain, tokenizer, 1.0)
    assert float(run(student.eval(), BATCH, LENGTHS)[0]) == want
    student.train()
    assert float(OnPolicyLoss(plain, tokenizer, 0.0)(student, BATCH, LENGTHS)[0]) == want


def test_a_seed_repeats_a_step_with_its_gradients(parts):
    student, teacher, tokenizer = parts
    step = nn.value_and_grad(student, OnPolicyLoss(DistillationLoss(teacher), tokenizer, 0.5))
    found = []
    for _ in range(2):
        pyloss.random.seed(3)
        found.append(step(student, BATCH, LENGTHS))
    assert float(found[0][0][0]) == float(found[1][0][0])
    for name, grad in found[0][1].items():
        np.testing.assert_array_equal(grad, found[1][1][name])
    assert any(np.abs(grad).max() > 0 for grad in found[0][1].values())


def test_what_is_refused(parts):
    _, teacher, tokenizer = parts

    class Stored:
        def loss(self, model, part, options):
            raise AssertionError

    with pytest.raises(ValueError, match="needs a model as its teacher"):
        OnPolicyLoss(DistillationLoss(Stored()), tokenizer, 0.5)
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match="on_policy"):
            OnPolicyLoss(DistillationLoss(teacher), tokenizer, share)
    with pytest.raises(ValueError, match="max_new_tokens"):
        OnPolicyLoss(DistillationLoss(teacher), tokenizer, 0.5, max_new_tokens=0)
