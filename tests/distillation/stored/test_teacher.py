"""Training from a stored teacher: against the live one, bounds, and data that are missing."""

import json

import numpy as np
import pytest
import tiny
import tiny_data

import pyloss
from pyloss import nn
from pyloss.distillation.loss import DistillationLoss
from pyloss.distillation.stored import StoredTeacher, write_teacher
from pyloss.errors import FormatError
from pyloss.tuner import TrainingArgs, evaluate
from pyloss.tuner.data.batching import iterate_batches

KINDS = ["forward-kl", "reverse-kl", "js", "skew-kl", "skew-reverse-kl"]


@pytest.fixture
def pair(tmp_path):
    return tiny_data.models(tmp_path)


def batches(data, seed=0):
    return list(iterate_batches(data, 3, 2048, seed=seed))


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def all_logits(models, batch, lengths):
    """float64 logits [N, V] of a batch's targets, of each model.

    The batch stands four times: products of at most 32 rows have another order of sums.
    """
    from pyloss.tuner.losses import target_weights

    weights = target_weights(batch, lengths)
    rows = [
        np.asarray(model(np.tile(batch, (4, 1))), np.float64)[: len(batch), :-1][weights[:, 1:] > 0]
        for model in models
    ]
    return rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"alpha": 0.3}])
def test_all_classes_equal_the_live_teacher(pair, tmp_path, kind, options):
    """Not bit for bit: log-probabilities take the place of logits, which the live loss reads."""
    student, teacher = pair
    folder = write_teacher(
        teacher, tiny_data.data(), tmp_path / "t", top_k=29, dtype="float32",
        temperature=options.get("temperature", 1.0),
    )  # fmt: skip
    live = nn.value_and_grad(student, DistillationLoss(teacher, kind, **options))
    stored = nn.value_and_grad(student, DistillationLoss(StoredTeacher(folder), kind, **options))
    for batch in batches(tiny_data.data(), seed=7):
        (value, weight), grads = live(student, *batch)
        (other, other_weight), others = stored(student, *batch)
        assert float(other) == pytest.approx(float(value), rel=2e-5) and other_weight == weight
        for name, grad in grads.items():
            scale = np.abs(grad).max()
            np.testing.assert_allclose(others[name], grad, atol=2e-5 * scale + 1e-9)


@pytest.mark.parametrize("k", [1, 4, 16])
def test_the_error_is_below_the_bound_of_the_mass_that_is_left(pair, tmp_path, k):
    """KL(P || Q) less the loss with one class for the rest is left KL(P' || Q'), the divergence
    within the rest: not negative, and at most left max log(P' / Q').
    """
    student, teacher = pair
    folder = write_teacher(teacher, tiny_data.data(), tmp_path / "t", top_k=k, dtype="float32")
    loss = DistillationLoss(StoredTeacher(folder))
    for batch, lengths in batches(tiny_data.data()):
        q, p = map(log_softmax, all_logits(pair, batch, lengths))
        whole, inside, most = [], [], []
        for log_q, log_p in zip(q, p, strict=True):
            rest = np.argsort(-log_p)[k:]
            left, of_q = np.exp(log_p[rest]).sum(), np.exp(log_q[rest]).sum()
            ratio = (log_p[rest] - np.log(left)) - (log_q[rest] - np.log(of_q))
            whole.append((np.exp(log_p) * (log_p - log_q)).sum())
            inside.append((np.exp(log_p[rest]) * ratio).sum())
            most.append(left * ratio.max())
        value, _ = loss(student, batch, lengths)
        error = np.mean(whole) - float(value)
        assert error == pytest.approx(np.mean(inside), abs=1e-5)
        assert -1e-6 < error <= np.mean(most)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_error_of_the_types(pair, tmp_path, dtype):
    student, teacher = pair
    values = []
    for each in (dtype, "float32"):
        folder = write_teacher(teacher, tiny_data.data(), tmp_path / each, top_k=8, dtype=each)
        values.append(
            evaluate(student, tiny_data.data(), 3, loss=DistillationLoss(StoredTeacher(folder)))
        )
    assert values[0] == pytest.approx(values[1], rel=0 if dtype == "float32" else 1e-3)


def test_another_temperature_needs_renormalized_entries(pair, tmp_path):
    """The likeliest classes at one temperature are the likeliest at another; their rest is not
    known there.
    """
    student, teacher = pair
    folders = [
        write_teacher(
            teacher, tiny_data.data(), tmp_path / f"{t}", top_k=5, temperature=t, dtype="float32"
        )
        for t in (1.0, 2.0)
    ]
    with pytest.raises(ValueError, match=r"temperature is 2 and stored_temperature 1"):
        DistillationLoss(StoredTeacher(folders[0]), temperature=2.0)
    found = [
        evaluate(
            student, tiny_data.data(), 3,
            loss=DistillationLoss(StoredTeacher(folder, "renormalize"), temperature=2.0),
        )
        for folder in folders
    ]  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_draws_cost_what_the_whole_distribution_does(pair, tmp_path):
    """The mean over 40 teachers of 50 draws; its standard error is measured."""
    student, teacher = pair
    whole = evaluate(student, tiny_data.data(), 3, loss=DistillationLoss(teacher))
    found = []
    for seed in range(40):
        folder = write_teacher(
            teacher, tiny_data.data(), tmp_path / f"{seed}", samples=50, seed=seed, dtype="float32"
        )
        found.append(
            evaluate(student, tiny_data.data(), 3, loss=DistillationLoss(StoredTeacher(folder)))
        )
    error = np.std(found, ddof=1) / np.sqrt(len(found))
    assert abs(np.mean(found) - whole) < 4 * error and error < 0.05 * whole


def test_draws_are_for_the_forward_kl(pair, tmp_path):
    folder = write_teacher(pair[1], tiny_data.data(), tmp_path / "t", samples=5)
    with pytest.raises(ValueError, match="shares are for the kinds 'forward-kl'"):
        DistillationLoss(StoredTeacher(folder), "js")


def test_parts_of_a_batch_add_up(pair, tmp_path, monkeypatch):
    from pyloss.tuner import losses

    student, teacher = pair
    folder = write_teacher(teacher, tiny_data.data(), tmp_path / "t", top_k=5, shard_bytes=400)
    step = nn.value_and_grad(student, DistillationLoss(StoredTeacher(folder), alpha=0.5))
    batch = batches(tiny_data.data())[0]
    (whole, _), grads = step(student, *batch)
    monkeypatch.setattr(losses, "PART_TOKENS", 8)
    (parts, _), others = step(student, *batch)
    assert float(parts) == pytest.approx(float(whole), rel=1e-6)
    for name, grad in grads.items():
        np.testing.assert_allclose(others[name], grad, atol=1e-6)


def test_a_student_with_fewer_classes(tmp_path):
    """Without the teacher's padding: its probability goes to the rest."""
    student, teacher = tiny_data.models(tmp_path, vocab_size=32)
    folder = write_teacher(teacher, tiny_data.data(), tmp_path / "t", top_k=32, dtype="float32")
    value = evaluate(student, tiny_data.data(), 3, loss=DistillationLoss(StoredTeacher(folder)))
    assert np.isfinite(value) and value > 0


def test_a_run(pair, tmp_path):
    student, teacher = pair
    data = tiny_data.data()
    folder = write_teacher(teacher, data, tmp_path / "t", top_k=8, val_dataset=tiny_data.data(3, 9))
    before = evaluate(student, data, 4, loss=DistillationLoss(teacher))
    args = TrainingArgs(
        batch_size=4, iters=40, val_batches=-1, steps_per_eval=20, progress=False,
        adapter_file=tmp_path / "run" / "adapters.safetensors",
    )  # fmt: skip
    pyloss.distill(
        student, StoredTeacher(folder), pyloss.optim.Adam(1e-2), data, tiny_data.data(3, 9), args
    )
    assert evaluate(student, data, 4, loss=DistillationLoss(teacher)) < before / 2


def test_other_data_are_refused(pair, tmp_path):
    student, teacher = pair
    folder = write_teacher(teacher, tiny_data.data(), tmp_path / "t")
    stored = StoredTeacher(folder)
    args = TrainingArgs(iters=1, adapter_file=tmp_path / "run" / "adapters.safetensors")
    rate = pyloss.optim.Adam(1e-2)
    with pytest.raises(
        ValueError, match=r"lacks 2 of the 10 samples of the training data, the fir"
    ):
        pyloss.distill(student, stored, rate, tiny_data.data(10), None, args)
    with pytest.raises(ValueError, match=r"lacks 3 of the 3 samples of the validation data, the f"):
        pyloss.distill(student, stored, rate, tiny_data.data(), tiny_data.data(3, 9), args)
    short = TrainingArgs(iters=1, max_seq_length=8, adapter_file=args.adapter_file)
    with pytest.raises(ValueError, match=r"it must be written .* max_seq_length 2048"):
        pyloss.distill(student, stored, rate, tiny_data.data(), None, short)
    with pytest.raises(ValueError, match=r"lacks a sample of \d+ tokens and \d+ targets, which be"):
        DistillationLoss(stored)(student, *batches(tiny_data.data(3, 9))[0])
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(pair, tmp_path):
    tokenizer, other = tiny.byte_tokenizer(), tiny.byte_tokenizer()
    other.backend.add_tokens(["<extra>"])
    folder = write_teacher(pair[1], tiny_data.data(), tmp_path / "t", tokenizer=tokenizer)
    stored = StoredTeacher(folder)
    stored.check_tokenizer(tiny.byte_tokenizer())
    with pytest.raises(ValueError, match="was written with another tokenizer"):
        stored.check_tokenizer(other)
    with pytest.raises(ValueError, match="rest is 'drop'; it must be"):
        StoredTeacher(folder, "drop")
    assert json.loads((folder / "teacher.json").read_text())["settings"]["tokenizer"]


def test_rows_that_are_damaged_are_named(pair, tmp_path):
    student, teacher = pair
    folder = write_teacher(teacher, tiny_data.data(), tmp_path / "t", top_k=5)
    stored = StoredTeacher(folder)
    shard = folder / "teacher-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(FormatError, match=r"teacher-00001.safetensors.*do not have their checksum"):
        DistillationLoss(StoredTeacher(folder))(student, *batches(tiny_data.data())[0])
    del stored
