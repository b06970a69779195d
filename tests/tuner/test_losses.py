"""The training loss against float64: masks in both shapes, custom losses, bits of a step."""

import numpy as np
import pytest
import tiny

import pyloss
from pyloss import _core, linear_cross_entropy, nn, softmax_cross_entropy
from pyloss.optim import AdamW
from pyloss.tuner import linear_to_lora_layers, losses
from pyloss.tuner.losses import default_loss, parts_of_rows, target_weights

BATCH = np.array(
    [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 28, 0, 0, 0], [1, 6, 0, 0, 0, 0, 0, 0]], np.int32
)
LENGTHS = np.array([[3, 8], [1, 5], [0, 2]], np.int32)


@pytest.fixture
def tiny_model(tmp_path):
    """(model with an active adapter, config, arrays of the base with the adapter merged)."""
    c, arrays = tiny.write_folder(tmp_path / "model", tied=False)
    from pyloss.models import load_model

    model = load_model(tmp_path / "model")
    linear_to_lora_layers(model, 2, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    rng = np.random.default_rng(0)
    merged = dict(arrays)
    for array in model.trainable_parameters().values():
        array[...] = rng.standard_normal(array.shape) / 4
    for name, module in model.named_modules():
        if hasattr(module, "lora_a"):
            merged[f"{name}.weight"] = (
                arrays[f"{name}.weight"] + 2.0 * (module.lora_a.astype(float) @ module.lora_b).T
            )
    return model, c, merged


@pytest.fixture
def model(tiny_model):
    return tiny_model[0]


def reference(c, arrays, batch, weights):
    """The weighted mean of -log p of all targets in float64, row by row with padding."""
    total = 0.0
    for row, w in zip(batch, weights, strict=True):
        z = tiny.logits(c, arrays, row)
        log_p = z - z.max(-1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
        total += sum(-w[i] * log_p[i - 1, row[i]] for i in range(1, len(row)))
    return total / weights[:, 1:].sum()


def step(model, batch, lengths, loss=default_loss):
    return nn.value_and_grad(model, lambda: loss(model, batch, lengths))()


def assert_same(got, want, tolerance=1e-5):
    assert got[0][0] == pytest.approx(want[0][0], rel=tolerance) and got[0][1] == want[0][1]
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        np.testing.assert_allclose(
            got[1][name], gradient, atol=tolerance * (1 + np.abs(gradient).max()), err_msg=name
        )


# Masks


def test_spans_become_weights():
    want = [[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(target_weights(BATCH, LENGTHS), want)
    assert target_weights(BATCH, LENGTHS.tolist()).dtype == np.float32


def test_the_mask_ends_at_the_last_token():
    """mlx-lm counts one padding token as a target."""
    weights = target_weights(BATCH, np.array([[0, 8], [0, 5], [0, 2]]))
    assert weights.sum() == 7 + 4 + 1
    assert weights[1, 4] == 1 and weights[1, 5] == 0


def test_given_weights_are_kept_but_for_the_first_column():
    given = np.full(BATCH.shape, 0.5)
    weights = target_weights(BATCH, given)
    assert (
        (weights[:, 0] == 0).all() and (weights[:, 1:] == 0.5).all() and (given[:, 0] == 0.5).all()
    )


@pytest.mark.parametrize(
    ("batch", "lengths", "message"),
    [
        (BATCH[0], LENGTHS, r"batch must be \[B, T\] token ids, got shape \(8,\)"),
        (BATCH, LENGTHS[:2], r"\(3, 2\).*\(3, 8\); got int32 of shape \(2, 2\)"),
        (BATCH, LENGTHS.astype(float), "got float64 of shape"),
        (BATCH, np.ones((3, 8), int), "got int64 of shape"),
        (BATCH, np.ones((3, 7)), "got float64 of shape"),
        (BATCH, -np.ones((3, 8)), "finite and not negative"),
        (BATCH, np.full((3, 8), np.nan), "finite and not negative"),
        (BATCH, np.full((3, 8), np.inf), "finite and not negative"),
    ],
)
def test_wrong_masks(batch, lengths, message):
    with pytest.raises(ValueError, match=message):
        target_weights(batch, lengths)


# Values


WEIGHTS = {
    "spans": LENGTHS,
    "whole rows": np.array([[0, 8], [0, 5], [0, 2]]),
    "one row alone": np.array([[7, 8], [5, 5], [9, 9]]),
    "weights": np.random.default_rng(1).uniform(0, 2, BATCH.shape) * (BATCH > 0),
    "weights with holes": np.array(
        [[0, 0, 1, 0, 0, 2, 0, 0], [5, 0.5, 0, 0, 1, 0, 0, 0], [0] * 8], float
    ),
}


@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_values_against_float64(tiny_model, kind):
    model, c, arrays = tiny_model
    weights = target_weights(BATCH, WEIGHTS[kind])
    value, total = default_loss(model, BATCH, WEIGHTS[kind])
    assert float(value) == pytest.approx(
        reference(c, arrays, BATCH, weights.astype(float)), rel=2e-5
    )
    assert total == pytest.approx(weights.sum(), rel=1e-6)


def users_loss(model, batch, lengths):
    """A loss as users of mlx-lm write it: all logits of the padded batch."""
    weights = target_weights(batch, lengths)[:, 1:]
    return softmax_cross_entropy(
        model(batch[:, :-1]), batch[:, 1:], weights=weights, reduction="mean"
    ), float(weights.sum(dtype=np.float64))


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_a_users_loss_gives_the_same_value_and_gradients(model, kind, checkpoint):
    model.set_grad_checkpoint(checkpoint)
    assert_same(step(model, BATCH, WEIGHTS[kind], users_loss), step(model, BATCH, WEIGHTS[kind]))


def test_a_gradient_against_differences_of_the_reference(tiny_model):
    model, c, arrays = tiny_model
    weights = target_weights(BATCH, LENGTHS).astype(float)
    _, grads = step(model, BATCH, LENGTHS)
    name = "model.layers.1.self_attn.q_proj"
    layer = dict(model.named_modules())[name]
    for half, array in (
        ("lora_a", layer.lora_a.astype(float)),
        ("lora_b", layer.lora_b.astype(float)),
    ):
        direction, ends = np.random.default_rng(3).standard_normal(array.shape), []
        for sign in (1, -1):
            a, b = (
                (array + sign * 1e-6 * direction, layer.lora_b)
                if half == "lora_a"
                else (layer.lora_a, array + sign * 1e-6 * direction)
            )
            old = 2.0 * (layer.lora_a.astype(float) @ layer.lora_b).T
            moved = {
                **arrays,
                f"{name}.weight": arrays[f"{name}.weight"].astype(float)
                - old
                + 2.0 * (np.asarray(a, float) @ np.asarray(b, float)).T,
            }
            ends.append(reference(c, moved, BATCH, weights))
        assert (grads[f"{name}.{half}"] * direction).sum() == pytest.approx(
            (ends[0] - ends[1]) / 2e-6, rel=1e-3
        )


# Parts


@pytest.mark.parametrize(
    "lengths",
    [
        [256] * 4,
        [20, 1000, 300, 37, 512, 5],
        [1] * 3,
        [0, 7, 0],
        [600],
        [511, 513],
        [2000, 30, 40],
        list(range(100)),
    ],
)
@pytest.mark.parametrize("together", [1, 2])
def test_parts_hold_every_row_once_and_are_of_like_size(lengths, together):
    parts = parts_of_rows(lengths, together)
    wanted = max(together * losses.PART_TOKENS, *lengths)
    assert sorted(np.concatenate(parts)) == [i for i, n in enumerate(lengths) if n]
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert len(parts) == max(int(sum(lengths) / wanted + 0.5), 1)
    assert max(loads) <= 1.5 * wanted and 2 * min(loads) >= max(loads)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", ["spans", "whole rows", "weights", "weights with holes"])
def test_a_batch_in_parts_has_the_value_and_gradients_of_the_whole(
    model, monkeypatch, kind, checkpoint
):
    model.set_grad_checkpoint(checkpoint)
    want = step(model, BATCH, WEIGHTS[kind])
    monkeypatch.setattr(losses, "PART_TOKENS", 2)
    assert_same(step(model, BATCH, WEIGHTS[kind]), want)
    assert default_loss(model, BATCH, WEIGHTS[kind])[0] == pytest.approx(want[0][0], rel=1e-6)
    monkeypatch.setattr(losses, "PARTS_TOGETHER", 1)  # the same parts, so the same bits
    value, total = default_loss(model, BATCH, WEIGHTS[kind])
    assert value == step(model, BATCH, WEIGHTS[kind])[0][0] and total == want[0][1]


def test_a_larger_batch_takes_no_more_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "PART_TOKENS", 64)
    model = tiny.load_tiny(tmp_path / "model")
    linear_to_lora_layers(model, 2, {"rank": 2, "scale": 2.0})
    peaks = []
    for rows in (2, 16):
        batch = np.random.default_rng(0).integers(0, 29, (rows, 65)).astype(np.int32)
        _core.trim()
        before = _core.buffer_stats()["in_use"]
        step(model, batch, np.tile([0, 65], (rows, 1)))
        peaks.append(_core.buffer_stats()["peak"] - before)
    assert peaks[1] < 1.2 * peaks[0]


# Padding and edges


def test_padding_changes_no_bit(model):
    want = step(model, BATCH, LENGTHS)
    for width, filler in ((8, 17), (20, 0), (20, 28), (20, -1), (20, 10**6)):
        padded = np.full((3, width), filler, np.int32)
        for row, line, (_, n) in zip(padded, BATCH, LENGTHS, strict=True):
            row[:n] = line[:n]
        got = step(model, padded, LENGTHS)
        assert got[0] == want[0]
        for name, gradient in want[1].items():
            assert got[1][name].tobytes() == gradient.tobytes()


def test_tokens_after_the_last_target_cost_nothing(model, monkeypatch):
    seen = []
    hidden = model.hidden
    monkeypatch.setattr(
        model,
        "hidden",
        lambda tokens, offsets: (
            seen.append((tokens.tolist(), offsets.tolist())),
            hidden(tokens, offsets),
        )[1],
    )
    default_loss(model, BATCH, np.array([[1, 4], [5, 5], [1, 2]]))
    assert seen == [([3, 1, 4, 1], [0, 3, 4])]


@pytest.mark.parametrize(
    "lengths",
    [
        np.zeros(BATCH.shape, np.float32),
        np.array([[8, 8], [5, 5], [2, 2]]),
        np.array([[0, 1]] * 3),
        np.eye(3, 8)[[0, 0, 0]],
    ],
)
def test_a_prompt_that_fills_the_window_and_a_batch_without_targets(model, lengths):
    """mlx-lm divides by zero here."""
    (value, total), grads = step(model, BATCH, lengths)
    assert (
        value == 0
        and total == 0
        and not any(g.any() for g in grads.values())
        and len(grads) == len(model.trainable_parameters())
    )


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 1)])
def test_batches_without_anything_to_predict(model, shape):
    value, total = default_loss(
        model, np.zeros(shape, np.int32), np.tile([0, shape[1]], (shape[0], 1)).astype(np.int32)
    )
    assert value == 0 and total == 0


@pytest.mark.parametrize(("place", "token"), [((0, 4), 29), ((0, 7), 29), ((1, 2), -1)])
def test_tokens_outside_the_vocabulary(model, place, token):
    batch = BATCH.copy()
    batch[place] = token
    with pytest.raises(ValueError, match=rf"token id {token}.*outside the vocabulary \[0, 29\)"):
        default_loss(model, batch, LENGTHS)


def test_accumulating_by_tokens_is_the_whole_batch(model):
    """Parts weighted by their number of targets give the gradient of the whole."""
    (value, total), whole = step(model, BATCH, LENGTHS)
    parts = [step(model, BATCH[i : i + 1], LENGTHS[i : i + 1]) for i in range(3)]
    assert sum(v * n for (v, n), _ in parts) / total == pytest.approx(float(value), rel=1e-5)
    for name, gradient in whole.items():
        gathered = sum(n * g[name] for (_, n), g in parts) / total
        np.testing.assert_allclose(gathered, gradient, atol=1e-5 * (1 + np.abs(gradient).max()))


# One whole step


@pytest.mark.parametrize("format", ["Q4_1", "F32"])
@pytest.mark.parametrize("part_tokens", [100, 512])
def test_training_steps_have_the_same_bits_with_any_number_of_threads(
    tmp_path, monkeypatch, format, part_tokens
):
    pytest.importorskip("gguf")
    monkeypatch.setattr(losses, "PART_TOKENS", part_tokens)
    # Wide enough that each kernel divides its work.
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "head_dim": 32,
        "num_key_value_heads": 4,
        "vocab_size": 600,
    }
    tiny.write_gguf(tmp_path / "model.gguf", format=format, num_hidden_layers=2, **sizes)
    rng = np.random.default_rng(0)
    batch, lengths = (
        rng.integers(0, 600, (4, 90)).astype(np.int32),
        np.array([[10, 90], [1, 61], [30, 77], [5, 90]], np.int32),
    )

    def run(threads, checkpoint):
        pyloss.set_num_threads(threads)
        pyloss.random.seed(11)
        model = pyloss.load_model(tmp_path / "model.gguf")
        linear_to_lora_layers(model, -1, {"rank": 8, "scale": 4.0, "dropout": 0.1})
        model.train()
        model.set_grad_checkpoint(checkpoint)
        optimizer = AdamW(learning_rate=1e-2)
        values = []
        for _ in range(3):
            (value, _), grads = step(model, batch, lengths)
            optimizer.update(model, grads)
            values.append(float(value))
        return values, {
            name: array.tobytes() for name, array in model.trainable_parameters().items()
        }

    before = pyloss.get_num_threads()
    try:
        first = run(1, False)
        assert len(set(first[0])) == 3
        for threads, checkpoint in ((2, False), (1, False), (2, True), (3, False)):
            assert run(threads, checkpoint) == first
    finally:
        pyloss.set_num_threads(before)


def test_other_losses_train_a_head_of_their_own(model):
    """hidden and head_weight allow a loss on the packed states, without all logits."""
    tokens = BATCH[0]

    def loss():
        hidden = model.hidden(tokens[:-1], [0, 7])
        return linear_cross_entropy(hidden, model.head_weight, tokens[1:]).mean()

    value, _ = nn.value_and_grad(model, loss)()
    assert value == pytest.approx(
        float(default_loss(model, BATCH[:1], np.array([[0, 8]]))[0]), rel=1e-5
    )


@pytest.mark.parametrize("dtype", ["u1", "u2", "u8", "i1", "i8", ">i4"])
def test_token_ids_of_every_integer_type(model, dtype):
    """Positions without a target are marked -1, which unsigned ids cannot hold."""
    want = step(model, BATCH, LENGTHS)
    got = step(model, BATCH.astype(dtype), LENGTHS.astype(dtype))
    assert got[0] == want[0]
    for name, gradient in want[1].items():
        np.testing.assert_array_equal(got[1][name], gradient)
    with pytest.raises(TypeError, match="batch must be integers, not bool"):
        default_loss(model, BATCH.astype(bool), LENGTHS)
    wrong = BATCH.astype(np.uint64)
    wrong[0, 5] = 2**63 + 9
    with pytest.raises(ValueError, match=rf"target token id {2**63 + 9} at position \(0, 5\)"):
        default_loss(model, wrong, LENGTHS)
