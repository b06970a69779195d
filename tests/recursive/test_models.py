"""Recursive models: settings, halting, exploration, puzzle embeddings, bad input, repeated bits."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest

import pyloss
from pyloss import nn, optim
from pyloss.recursive import HRM, TRM, RecursiveConfig, load_checkpoint, state_dict

SIZES = {
    "seq_len": 5, "vocab_size": 7, "batch_size": 4, "hidden_size": 16, "num_heads": 2,
    "H_cycles": 2, "L_cycles": 2, "L_layers": 1, "halt_max_steps": 4,
}  # fmt: skip


def model(kind=TRM, **changes):
    pyloss.random.seed(0)
    return kind(RecursiveConfig(**SIZES | changes))


def batch(count=4, seed=0, **more):
    rng = np.random.default_rng(seed)
    inputs, labels = rng.integers(0, 7, (2, count, 5))
    return {"inputs": inputs, "labels": labels, **more}


def with_q(made, halt, go_on):
    """Makes the q logits constants."""
    made.inner.q_head.bias[:] = halt, go_on
    return made


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "recursive.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(block.replace("range(30)", "range(2)"), "recursive.md", "exec"), names)
    assert len(names["grids"]) == 288 and names["metrics"]["count"] == 48
    assert names["outputs"]["preds"].shape == (48, 16) and 0 <= names["solved"] <= 1


@pytest.mark.parametrize(
    ("kind", "changes", "halt", "go_on", "ends"),
    [
        (TRM, {}, 1.0, 5.0, True),
        (TRM, {}, -1.0, -5.0, False),
        (TRM, {"no_ACT_continue": False}, 1.0, 5.0, False),
        (TRM, {"no_ACT_continue": False}, -1.0, -5.0, True),
        (HRM, {"H_layers": 1}, 1.0, 5.0, False),
        (HRM, {"H_layers": 1}, -1.0, -5.0, True),
    ],
)
def test_when_a_sequence_halts(kind, changes, halt, go_on, ends):
    made = with_q(model(kind, halt_exploration_prob=0.0, **changes), halt, go_on).train()
    carry, given = made.initial_carry(batch()), batch()
    for step in range(1, 6):
        carry, outputs = made(carry=carry, batch=given)
        at = 1 if ends else (step - 1) % 4 + 1
        assert (carry.steps == at).all() and (carry.halted == (ends or at == 4)).all()
        learned = kind is HRM or not made.config.no_ACT_continue
        assert ("target_q_continue" in outputs) == learned
    made.eval()
    carry = made.initial_carry(given)
    for step in range(1, 5):
        carry, outputs = made(carry=carry, batch=given)
        assert (carry.halted == (step == 4)).all() and "target_q_continue" not in outputs


def test_the_last_step_has_the_target_of_halting():
    made = with_q(model(HRM, H_layers=1, halt_exploration_prob=0.0), 0.5, 2.0).train()
    carry, given = made.initial_carry(batch()), batch()
    for step in range(1, 5):
        carry, outputs = made(carry=carry, batch=given)
        best = 0.5 if step == 4 else 2.0
        np.testing.assert_allclose(outputs["target_q_continue"], 1 / (1 + np.exp(-best)), rtol=1e-6)


def test_exploration_goes_on_for_drawn_numbers_of_steps():
    made = with_q(model(batch_size=1000, halt_exploration_prob=0.4), 5.0, 0.0).train()
    given = batch(1000)
    carry, _ = made(carry=made.initial_carry(given), batch=given)
    # Two of three explorers of a step draw more than it: 2, 3 or 4 steps at the first one.
    assert carry.halted.mean() == pytest.approx(0.6, abs=0.05)
    pyloss.random.seed(7)
    one = made(carry=made.initial_carry(given), batch=given)[0].halted
    pyloss.random.seed(7)
    np.testing.assert_array_equal(one, made(carry=made.initial_carry(given), batch=given)[0].halted)


def test_halted_sequences_are_replaced_and_begin_anew():
    made = with_q(model(halt_exploration_prob=0.0), -5.0, 0.0).train()
    first, second = batch(seed=1), batch(seed=2)
    carry, _ = made(carry=made.initial_carry(first), batch=first)
    carry.halted[:] = False, True, False, True
    after, _ = made(carry=carry, batch=second)
    for name in first:
        mixed = np.where(carry.halted[:, None], second[name], first[name])
        np.testing.assert_array_equal(after.current_data[name], mixed)
    assert after.steps.tolist() == [2, 1, 2, 1]
    fresh, _ = made(carry=made.initial_carry(second), batch=second)
    np.testing.assert_allclose(
        after.inner_carry.z_H[1::2], fresh.inner_carry.z_H[1::2], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("kind", "extra"), [(TRM, {}), (HRM, {"H_layers": 1})])
def test_steps_without_recorded_calls_have_the_same_bits(kind, extra, monkeypatch):
    def run():
        head = pyloss.ACTLossHead(model(kind, **extra), "stablemax_cross_entropy").train()
        optimizer, carry, found = optim.AdamATan2(1e-2), head.initial_carry(batch()), []

        def step(carry, given):
            carry, loss, _, _, _ = head(carry=carry, batch=given)
            return loss, carry

        for seed in range(3):
            (loss, carry), grads = nn.value_and_grad(head, step, has_aux=True)(
                carry, batch(seed=seed)
            )
            optimizer.update(head, grads)
            found.append((float(loss), {name: g.tobytes() for name, g in grads.items()}))
        return found

    recorded = run()
    monkeypatch.setattr("pyloss.nn.module.recorded_module", lambda level: None)
    assert recorded == run()


def test_puzzle_embeddings_update_the_rows_of_a_batch():
    made = model(puzzle_emb_ndim=16, num_puzzle_identifiers=9)
    head = pyloss.ACTLossHead(made, "stablemax_cross_entropy").train()
    given = batch(puzzle_identifiers=np.array([3, 8, 3, 0]))
    assert "model.inner.puzzle_emb.weights" not in head.trainable_parameters()

    def step():
        _, loss, _, _, _ = head(carry=head.initial_carry(given), batch=given)
        return loss

    _, grads = nn.value_and_grad(head, step)()
    made.inner.puzzle_emb.weights[...] = 1
    local = grads["model.inner.puzzle_emb.local_weights"]
    made.puzzle_emb.update(optim.SparseSignSGD(0.1, weight_decay=0.5), local)
    expected = np.ones((9, 16))
    for row, grad in ((3, local[0] + local[2]), (8, local[1]), (0, local[3])):
        expected[row] += -0.1 * 0.5 - 0.1 * np.sign(grad)
    np.testing.assert_allclose(made.puzzle_emb.weights, expected, rtol=1e-6)
    head.eval()
    head(carry=head.initial_carry(given | {"puzzle_identifiers": np.arange(4)}), batch=given)
    with pytest.raises(ValueError, match="below 9, got shape \\(4,\\) from 0 to 9"):
        made.puzzle_emb(np.array([0, 9, 1, 1]))
    made.train()
    with pytest.raises(ValueError, match="has 2 sequences; the model's batch_size is 4"):
        made.puzzle_emb(np.array([0, 1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "hidden_size 16 must be a multiple of num_heads 3"),
        ({"num_heads": 16}, "heads of 1 have no rotary positions"),
        ({"pos_encodings": "alibi"}, "one of rope, learned, none"),
        ({"halt_max_steps": 0}, "halt_max_steps"),
        ({"halt_exploration_prob": 1.5}, "halt_exploration_prob"),
        ({"puzzle_emb_len": 2}, "puzzle_emb_ndim 0"),
        ({"puzzle_emb_ndim": 40, "puzzle_emb_len": 2}, "does not fit into puzzle_emb_len 2"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        RecursiveConfig(**SIZES | settings)


def test_settings_of_the_authors_files():
    given = {
        "name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
        "loss": {"loss_type": "stablemax_cross_entropy"}, "hidden_size": 32, "num_heads": 2,
        "puzzle_emb_ndim": "${.hidden_size}", "puzzle_emb_len": 16, "forward_dtype": "bfloat16",
    }  # fmt: skip
    config = RecursiveConfig.of(given, seq_len=81, vocab_size=11)
    assert (config.puzzle_emb_ndim, config.tokens, config.halt_max_steps) == (32, 97, 16)
    with pytest.raises(ValueError, match="unknown settings: H_cylces; known: seq_len"):
        RecursiveConfig.of(given, H_cylces=2, seq_len=81, vocab_size=11)
    with pytest.raises(ValueError, match="lack vocab_size"):
        RecursiveConfig.of(given, seq_len=81)
    with pytest.raises(TypeError, match="settings must be a mapping .* got 'text'"):
        RecursiveConfig.of("text")


def test_hrm_refuses_settings_of_trm():
    with pytest.raises(ValueError, match="H_layers"):
        model(HRM)
    with pytest.raises(ValueError, match="settings of TRM"):
        model(HRM, H_layers=1, mlp_t=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": np.zeros((4, 6), int)}, r"inputs must be \[B, 5\], got shape \(4, 6\)"),
        ({"inputs": np.full((4, 5), 7)}, "tokens from 7 to 7; the vocabulary has 7"),
        ({"labels": np.zeros((3, 5), int)}, "labels has 3 rows, inputs 4"),
        ({"inputs": np.zeros((4, 5))}, "inputs"),
        ({"inputs": np.zeros((0, 5), int)}, "inputs has no rows"),
        ({"labels": np.array(3)}, "labels has no axis of rows, inputs 4"),
    ],
)
def test_batches_that_do_not_fit(changes, message):
    made = model()
    carry = made.initial_carry(batch())
    with pytest.raises((ValueError, TypeError), match=message):
        made(carry=carry, batch=batch() | changes)
    with pytest.raises(ValueError, match="the carry is of 4 sequences with inputs, labels"):
        made(carry=carry, batch={"inputs": batch()["inputs"]})
    with pytest.raises(ValueError, match="a batch needs 'inputs', given: labels"):
        made.initial_carry({"labels": np.zeros((4, 5), int)})
    with pytest.raises(ValueError, match="needs 'puzzle_identifiers'"):
        model(puzzle_emb_ndim=16).initial_carry(batch())
    for wrong, said in ((None, "NoneType"), ([1], "list"), (np.zeros((4, 5)), "ndarray")):
        with pytest.raises(TypeError, match=f"a batch must be a mapping .* got {said}"):
            made.initial_carry(wrong)
    with pytest.raises(TypeError, match="carry must be a Carry, as .* gives, got None"):
        made(carry=None, batch=batch())


def test_checkpoints_that_do_not_fit_change_nothing():
    made = model()
    before, given = state_dict(made), state_dict(made, "model.")
    given = {name: array + 1 for name, array in given.items()}
    del given["model.inner.H_init"]
    given["model.inner.lm_head.weight"] = np.zeros((3, 16), np.float32)
    given["model.inner.H_level.layers.0.mlp.down_proj.weight"] = np.zeros((3, 16), np.float32)
    with pytest.raises(ValueError) as error:
        load_checkpoint(made, given)
    for said in (
        "inner.H_level.layers.0.mlp.down_proj.weight: not in this architecture",
        "inner.H_init: missing",
        "inner.lm_head.weight: shape (3, 16), expected (7, 16)",
    ):
        assert said in str(error.value)
    assert all(np.array_equal(before[name], array) for name, array in state_dict(made).items())


def test_a_table_of_other_puzzles_becomes_its_mean():
    made, other = (model(puzzle_emb_ndim=16, num_puzzle_identifiers=n) for n in (9, 4))
    made.puzzle_emb.weights[...] = np.arange(9)[:, None]
    with pytest.warns(UserWarning, match="has 9 puzzle embeddings and the model 4: all of the mod"):
        load_checkpoint(other, state_dict(made))
    assert (other.puzzle_emb.weights == 4).all()
    given = state_dict(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(other, given)
        del given["inner.H_init"], given["inner.puzzle_emb.weights"]
        with pytest.raises(ValueError, match="H_init: missing"):
            load_checkpoint(made, given | {"inner.puzzle_emb.weights": np.ones((4, 16), "f4")})
