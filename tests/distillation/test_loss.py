"""The loss of a batch against a live teacher, against float64 on tiny models, and runs with it."""

import numpy as np
import pytest
import tiny

import pyloss
from pyloss import nn
from pyloss.distillation.loss import DistillationLoss, LiveTeacher
from pyloss.models import load_model
from pyloss.tuner import linear_to_lora_layers
from pyloss.tuner.losses import target_weights

BATCH = np.array(
    [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 28, 0, 0, 0], [1, 6, 0, 0, 0, 0, 0, 0]], np.int32
)
LENGTHS = np.array([[3, 8], [1, 5], [0, 2]], np.int32)


@pytest.fixture
def pair(tmp_path):
    """(student with an adapter of zeros, teacher, what NumPy needs of each)"""
    models = []
    for name, seed, sizes in (("student", 0, {}), ("teacher", 1, {"num_hidden_layers": 4})):
        c, arrays = tiny.write_folder(tmp_path / name, seed=seed, tied=False, **sizes)
        models.append((load_model(tmp_path / name), c, arrays))
    (student, *own), (teacher, *known) = models
    pyloss.random.seed(0)
    linear_to_lora_layers(student, 2, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    return student, teacher, own, known


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def reference(own, known, weights, temperature, alpha):
    """The weighted mean of alpha CE + (1 - alpha) T^2 KL(P || Q) in float64, row by row."""
    total = 0.0
    for row, w in zip(BATCH, weights):
        q, p = (tiny.logits(c, arrays, row) for c, arrays in (own, known))
        log_q, log_p = log_softmax(q / temperature), log_softmax(p / temperature)
        kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
        for i in range(1, len(row)):
            own_loss = -log_softmax(q)[i - 1, row[i]]
            total += w[i] * (alpha * own_loss + (1 - alpha) * temperature**2 * kl[i - 1])
    return total / weights[:, 1:].sum()


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.0), (2.0, 0.25), (1.0, 1.0)])
def test_against_float64(pair, temperature, alpha):
    student, teacher, own, known = pair
    loss = DistillationLoss(teacher, temperature=temperature, alpha=alpha)
    value, weight = loss(student, BATCH, LENGTHS)
    weights = target_weights(BATCH, LENGTHS)
    assert weight == weights.sum()
    assert value == pytest.approx(reference(own, known, weights, temperature, alpha), rel=1e-5)


def test_the_gradient_leads_to_the_teacher_and_spares_it(pair):
    student, teacher, _, _ = pair
    before = {name: np.array(a) for name, a in teacher.parameters().items()}
    loss = DistillationLoss(teacher, "js")
    step = nn.value_and_grad(student, loss)
    optimizer = pyloss.optim.AdamW(2e-2)
    values = []
    for _ in range(100):
        (value, _), grads = step(student, BATCH, LENGTHS)
        optimizer.update(student, grads)
        values.append(float(value))
    assert values[-1] < values[0] / 2
    for name, array in teacher.parameters().items():
        np.testing.assert_array_equal(array, before[name])


def test_a_student_like_its_teacher_has_no_loss(pair):
    _, teacher, _, _ = pair
    for kind in ("forward-kl", "reverse-kl", "js"):
        value, _ = DistillationLoss(teacher, kind)(teacher, BATCH, LENGTHS)
        assert 0 <= value < 1e-6


def test_parts_add_up(pair, monkeypatch):
    from pyloss.tuner import losses

    student, teacher, _, _ = pair
    step = nn.value_and_grad(student, DistillationLoss(teacher, alpha=0.5))
    (whole, _), grads = step(student, BATCH, LENGTHS)
    monkeypatch.setattr(losses, "PART_TOKENS", 5)
    (parts, _), others = step(student, BATCH, LENGTHS)
    assert float(parts) == pytest.approx(float(whole), rel=1e-6)
    for name, grad in grads.items():
        np.testing.assert_allclose(others[name], grad, atol=1e-6)


def test_a_teacher_of_another_kind_is_called(pair):
    class Known:
        def loss(self, model, part, options):
            return np.float32(part.weights.sum() * options["temperature"])

    value, weight = DistillationLoss(Known(), temperature=3.0)(pair[0], BATCH, LENGTHS)
    assert value == pytest.approx(3.0) and weight == 10


def test_what_is_no_teacher_is_refused(pair):
    with pytest.raises(TypeError, match="a teacher must be a model of pyloss.load, not a dict"):
        LiveTeacher({})
    with pytest.raises(ValueError, match="alpha"):
        DistillationLoss(pair[1], alpha=-0.1)
    with pytest.raises(ValueError, match="kind is 'KL'"):
        DistillationLoss(pair[1], "KL")
