"""Hidden states of the teacher as targets: the term, its projections, and runs with them."""

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from tiny_data import Tokens

import pyloss
from pyloss import nn
from pyloss.distillation.hidden import HiddenStates, even_pairs, parse_pairs
from pyloss.distillation.loss import DistillationLoss
from pyloss.distillation.on_policy import OnPolicyLoss
from pyloss.models import load_model
from pyloss.models.pruning import prune_model
from pyloss.tuner import TrainingArgs, linear_to_lora_layers
from pyloss.tuner.losses import ModelAndLoss, target_weights

BATCH = np.array(
    [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 28, 0, 0, 0], [1, 6, 0, 0, 0, 0, 0, 0]], np.int32
)
LENGTHS = np.array([[3, 8], [1, 5], [0, 2]], np.int32)
NARROW = {"hidden_size": 16, "head_dim": 4}
PAIRS = [(0, 1), (2, 3)]


def build(folder, **teacher):
    """(student with an adapter, teacher, what NumPy needs of each)"""
    models = []
    for name, seed, sizes in (("student", 0, {}), ("teacher", 1, {"num_hidden_layers": 4})):
        more = teacher if name == "teacher" else {}
        c, arrays = tiny.write_folder(folder / name, seed=seed, tied=False, **sizes, **more)
        models.append((load_model(folder / name), c, arrays))
    (student, *own), (teacher, *known) = models
    pyloss.random.seed(0)
    linear_to_lora_layers(student, 3, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    return student, teacher, own, known


def formula(hidden, own, known):
    """The mean over the targets and pairs, in float64, row by row."""
    weights, total = target_weights(BATCH, LENGTHS), 0.0
    for row, w in zip(BATCH, weights):
        states = [], []
        for (c, arrays), kept in zip((own, known), states):
            tiny.logits(c, arrays, row, kept)
        for pair in hidden.pairs:
            q, p = states[0][pair[0]], states[1][pair[1]]
            for matrix in hidden.projections.values():
                if matrix is hidden.projections[f"hidden_projections.{pair[0]}:{pair[1]}"]:
                    q = q @ matrix.T.astype(np.float64)
            if hidden.kind == "mse":
                each = ((q - p) ** 2).mean(-1)
            else:
                each = 1 - (q * p).sum(-1) / np.sqrt((q * q).sum(-1) * (p * p).sum(-1))
            total += (each[:-1] * w[1:]).sum() / len(hidden.pairs)
    return hidden.weight * total / weights[:, 1:].sum()


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("teacher", [{}, NARROW], ids=["equal", "narrow"])
def test_the_term_is_added_to_the_loss(tmp_path, kind, teacher):
    student, teacher, own, known = build(tmp_path, **teacher)
    hidden = HiddenStates(student, teacher, kind, PAIRS, weight=0.7)
    assert bool(hidden.projections) == (teacher.config.hidden_size == 16)
    plain, weight = DistillationLoss(teacher, "js", alpha=0.3)(student, BATCH, LENGTHS)
    value, same = DistillationLoss(teacher, "js", alpha=0.3, hidden=hidden)(student, BATCH, LENGTHS)
    assert weight == same
    assert float(value) - float(plain) == pytest.approx(formula(hidden, own, known), rel=1e-5)


def test_states_are_the_outputs_of_layers(tmp_path):
    student, *_ = build(tmp_path)
    tokens, offsets = BATCH[0], np.array([0, 5, 8], np.int32)
    last, states = student.hidden_states(tokens, offsets, [2, 0])
    np.testing.assert_array_equal(last, student.hidden(tokens, offsets))
    np.testing.assert_array_equal(last, student.model.norm(states[0]))
    shallow = load_model(tmp_path / "student")
    prune_model(shallow, [0])
    np.testing.assert_array_equal(shallow.model.norm(states[1]), shallow.hidden(tokens, offsets))
    with pytest.raises(ValueError, match="layers is 3; it must be a whole number from 0 to 2"):
        student.hidden_states(tokens, offsets, [3])


@pytest.mark.parametrize("parts", [512, 4])
def test_gradients_are_the_same_recorded_plain_and_checkpointed(tmp_path, monkeypatch, parts):
    """A layer's second run is a recorded program; states are taken between layers in any case."""
    monkeypatch.setattr(pyloss.tuner.losses, "PART_TOKENS", parts)
    student, teacher, *_ = build(tmp_path, **NARROW)
    hidden = HiddenStates(student, teacher, "mse", PAIRS, weight=0.1)
    loss = DistillationLoss(teacher, hidden=hidden)
    step = nn.value_and_grad(ModelAndLoss(student, loss), loss)
    first, recorded = step(student, BATCH, LENGTHS), step(student, BATCH, LENGTHS)
    student.set_grad_checkpoint()
    halves = step(student, BATCH, LENGTHS)
    monkeypatch.setattr("pyloss.models.transformer.HALF_CHECKPOINT_TOKENS", 0)
    wholes = step(student, BATCH, LENGTHS)
    assert len(first[1]) == len(student.trainable_parameters()) + 2
    for (value, _), grads in (recorded, halves, wholes):
        assert value == first[0][0]
        for name, grad in grads.items():
            np.testing.assert_array_equal(grad, first[1][name])


def test_gradients_against_differences(tmp_path):
    """Of the term alone, by a projection and by factors of the first layer."""
    student, teacher, *_ = build(tmp_path, **NARROW)
    hidden = HiddenStates(student, teacher, "cosine", PAIRS, weight=5.0)
    loss = DistillationLoss(teacher, hidden=hidden)
    both, rng = ModelAndLoss(student, loss), np.random.default_rng(0)
    for array in student.trainable_parameters().values():
        array += rng.normal(0, 0.05, array.shape).astype(np.float32)
    _, grads = nn.value_and_grad(both, loss)(student, BATCH, LENGTHS)
    names = ("hidden_projections.0:1", "model.layers.0.self_attn.q_proj.lora_a")
    for name in names:
        array = both.trainable_parameters()[name]
        step = grads[name] / np.linalg.norm(grads[name]) * 1e-2
        values = []
        for sign in (1, -2):
            array += sign * step
            values.append(float(loss(student, BATCH, LENGTHS)[0]))
        array += step
        slope = float((grads[name] * step).sum())
        assert values[0] - values[1] == pytest.approx(2 * slope, rel=0.02)


def test_only_targets_count(tmp_path):
    """Tokens behind a row's last target, and rows without one, change nothing."""
    student, teacher, *_ = build(tmp_path)
    loss = DistillationLoss(teacher, hidden=HiddenStates(student, teacher, "mse", PAIRS))
    want = float(loss(student, BATCH, LENGTHS)[0])
    other, lengths = np.array(BATCH), np.array(LENGTHS)
    other[1, 5:], other[2, 2:] = 11, 12
    assert float(loss(student, other, lengths)[0]) == want
    lengths[0] = 5, 8
    assert float(loss(student, other, lengths)[0]) != want


def arguments(folder, **more):
    return TrainingArgs(
        **{
            "batch_size": 3, "iters": 12, "val_batches": -1, "steps_per_eval": 4, "seed": 7,
            "adapter_file": folder / "adapters.safetensors", "progress": False, "keep_best": True,
        } | more
    )  # fmt: skip


def a_run(folder, models, teacher=None, **more):
    student, known, *_ = build(models, **(NARROW if teacher is None else teacher))
    rng = np.random.default_rng(0)
    data = Tokens([(list(map(int, rng.integers(1, 29, 12))), 0) for _ in range(8)])
    pyloss.distill(
        student, known, pyloss.optim.Adam(1e-2), data, data, arguments(folder, **more),
        hidden_loss="cosine", hidden_layers=PAIRS, hidden_weight=2.0,
    )  # fmt: skip
    return student


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_goes_on_with_its_projections(tmp_path, accumulation):
    more = {"grad_accumulation_steps": accumulation}
    a_run(tmp_path / "whole", tmp_path / "a", **more)
    a_run(tmp_path / "parts", tmp_path / "b", iters=5, **more)
    a_run(tmp_path / "parts", tmp_path / "c", resume=True, **more)
    whole, parts = (
        load_file(tmp_path / name / "adapters.safetensors") for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() and not any("projection" in name for name in whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name])
    states = [load_file(tmp_path / n / "trainer_state.safetensors") for n in ("whole", "parts")]
    kept = [name for name in states[0] if "hidden_projections.0:1" in name]
    assert any(states[0][name].shape == (16, 32) for name in kept)
    for name in kept:
        np.testing.assert_array_equal(states[0][name], states[1][name])
    for file in (tmp_path / "whole").glob("*adapters.safetensors"):
        assert not any("projection" in name for name in load_file(file)), file


def test_a_projection_of_another_shape_is_refused(tmp_path):
    a_run(tmp_path / "run", tmp_path / "a", iters=2)
    before = (tmp_path / "run" / "trainer_state.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"hidden_projections.0:1' has shape \(16, 32\), but \(8"):
        a_run(tmp_path / "run", tmp_path / "b", {"hidden_size": 8, "head_dim": 2}, resume=True)
    with pytest.raises(ValueError, match=r"in one only, first 'hidden_projections.0:1'"):
        a_run(tmp_path / "run", tmp_path / "c", {}, resume=True)
    assert (tmp_path / "run" / "trainer_state.safetensors").read_bytes() == before


def test_a_run_without_the_term_has_its_bits(tmp_path):
    """A state of a run without hidden states has nothing of them."""
    files = []
    for name in ("one", "two"):
        student, teacher, *_ = build(tmp_path / name)
        data = Tokens([([3, 1, 4, 1, 5, 9], 0), ([2, 7, 1, 8, 2, 8], 0)])
        pyloss.distill(
            student, teacher, pyloss.optim.Adam(1e-2), data, None,
            arguments(tmp_path / name, iters=3),
        )  # fmt: skip
        files.append((tmp_path / name / "adapters.safetensors").read_bytes())
    assert files[0] == files[1]
    assert not any("hidden" in n for n in load_file(tmp_path / "one" / "trainer_state.safetensors"))


def test_answers_of_the_student_have_hidden_states_too(tmp_path):
    models = []
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny.write_folder(tmp_path / name, seed=seed, vocab_size=tiny.TOKENS, tied=False)
        models.append(load_model(tmp_path / name))
    linear_to_lora_layers(models[0], 3, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    models[0].train()
    hidden = HiddenStates(*models, "cosine")
    loss = OnPolicyLoss(DistillationLoss(models[1], hidden=hidden), tiny.byte_tokenizer(), 1.0, 4)
    assert loss.loss_parameters() == {}
    (value, _), grads = nn.value_and_grad(models[0], loss)(models[0], BATCH, LENGTHS)
    assert np.isfinite(value) and any(np.abs(grad).max() > 0 for grad in grads.values())


def test_a_device_has_the_processors_loss(tmp_path):
    if len(pyloss.devices()) < 2:
        pytest.skip("no OpenCL device")
    found = []
    for name in ("host", "device"):
        student, teacher, *_ = build(tmp_path / name, **NARROW)
        if name == "device":
            for model in (student, teacher):
                pyloss.to_device(model, "opencl:0")
        for kind in ("cosine", "mse"):
            hidden = HiddenStates(student, teacher, kind, PAIRS)
            loss = DistillationLoss(teacher, hidden=hidden)
            both = ModelAndLoss(student, loss)
            (value, _), grads = nn.value_and_grad(both, loss)(student, BATCH, LENGTHS)
            pyloss.optim.SGD(1e-3).update(both, grads)
            found.append((name, float(value), {n: np.asarray(g) for n, g in grads.items()}))
    for (_, value, grads), (_, there, others) in zip(found[:2], found[2:]):
        assert there == pytest.approx(value, rel=1e-5)
        for name, grad in grads.items():
            np.testing.assert_allclose(others[name], grad, atol=1e-5 * np.abs(grad).max())


def test_pairs_of_layers():
    assert even_pairs(12, 30) == [(2, 7), (5, 14), (8, 22), (11, 29)]
    assert even_pairs(30, 30)[-1] == (29, 29) and even_pairs(2, 9) == [(0, 4), (1, 8)]
    assert even_pairs(1, 1) == [(0, 0)]
    assert parse_pairs("3:7, 11:29") == [(3, 7), (11, 29)]
    for text in ("", "3", "3-7", "3:7,", "a:b", "-1:2"):
        with pytest.raises(
            ValueError, match="is not a layer of the student and one of the teacher"
        ):
            parse_pairs(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mae"}, "hidden_loss is 'mae'; it must be cosine, mse"),
        ({"layers": "3:0"}, "hidden_layers has 3:0, and the student has no layer 3: it has 3"),
        ({"layers": [(0, 4)]}, "has 0:4, and the teacher has no layer 4: it has 4 layers, counted"),
        ({"layers": "0:1,0:1"}, "hidden_layers has 0:1 twice"),
        ({"layers": []}, "hidden_layers is empty"),
        ({"layers": [(1, 2, 3)]}, r"a pair is \(layer of the student, layer of the teacher\)"),
        ({"weight": 0}, "hidden_weight"),
        ({"weight": float("nan")}, "hidden_weight"),
    ],
)
def test_refused_options(tmp_path, options, message):
    student, teacher, *_ = build(tmp_path)
    with pytest.raises(ValueError, match=message):
        HiddenStates(student, teacher, **options)


def test_a_teacher_that_is_no_model_is_refused(tmp_path):
    class Stored:
        def loss(self, model, part, options):
            raise AssertionError

    student, teacher, *_ = build(tmp_path)
    with pytest.raises(ValueError, match="hidden states needs a model as its teacher"):
        HiddenStates(student, Stored())
    with pytest.raises(ValueError, match="hidden states needs a model as its teacher"):
        DistillationLoss(Stored(), hidden=HiddenStates(student, teacher))
