"""The training loop on a tiny model: accumulation, schedules, validation, errors, callables."""

import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_training import VOCABULARY, Recorder, Tiny, run, samples, tiny_loss, tiny_value_and_grad

import pyloss
from pyloss import nn, optim
from pyloss.runtime.precision import matmul_precision
from pyloss.tuner.data.batching import BatchIterator
from pyloss.tuner.datasets import CacheDataset
from pyloss.tuner.run import run_reports, training_run
from pyloss.tuner.run.args import TrainingArgs
from pyloss.tuner.run.evaluation import evaluate
from pyloss.tuner.run.plan import describe_plan, estimate_memory
from pyloss.tuner.trainer import train


@pytest.fixture(autouse=True)
def numpy_gradients(monkeypatch):
    monkeypatch.setattr(nn, "value_and_grad", tiny_value_and_grad)


def in_order(rows):
    """An `iterate_batches` that yields `rows` samples at a time, in the order of the data."""

    def iterate(dataset, batch_size, max_seq_length, loop=False, seed=None, comm_group=None):
        while True:
            for i in range(0, len(dataset), rows):
                part = dataset[i : i + rows]
                batch = np.zeros((len(part), max(len(tokens) for tokens, _ in part)), np.int32)
                for row, (tokens, _) in zip(batch, part, strict=True):
                    row[: len(tokens)] = tokens
                yield batch, np.array([(offset, len(tokens)) for tokens, offset in part], np.int32)
            if not loop:
                return

    return iterate


def close(one, two, tolerance=2e-5):
    for name, array in one.arrays.items():
        np.testing.assert_allclose(array, two.arrays[name], rtol=tolerance, atol=tolerance)


def test_training_lowers_the_loss(tmp_path):
    model, seen, result = run(tmp_path, Tiny(noise=0), iters=60)
    assert seen.train[-1]["train_loss"] < 0.8 * seen.train[0]["train_loss"]
    assert result.iterations == result.updates == 60
    saved = load_file(tmp_path / "adapters.safetensors")
    for name, array in model.arrays.items():
        np.testing.assert_array_equal(saved[name], array)


def test_four_batches_of_one_equal_one_of_four(tmp_path):
    """Rows differ in length: weights per micro-batch, not per token, would change the result."""
    data = samples(8)
    assert len({len(tokens) - max(offset, 1) for tokens, offset in data}) > 2
    small, seen_small, result = run(
        None,
        Tiny(noise=0),
        data=data,
        val=None,
        iterate=in_order(1),
        iters=8,
        grad_accumulation_steps=4,
        steps_per_report=4,
    )
    big, seen_big, _ = run(None, Tiny(noise=0), data=data, val=None, iterate=in_order(4), iters=2)
    assert result.updates == 2
    close(small, big)
    assert [i["train_loss"] for i in seen_small.train] == pytest.approx(
        [i["train_loss"] for i in seen_big.train], rel=1e-5
    )
    assert seen_small.train[-1]["trained_tokens"] == seen_big.train[-1]["trained_tokens"]


def test_gradients_left_over_at_the_end_are_applied():
    data = samples(6)
    rest, _, result = run(
        None,
        Tiny(noise=0),
        data=data,
        val=None,
        iterate=in_order(1),
        iters=6,
        grad_accumulation_steps=4,
    )
    assert result.updates == 2
    whole = Tiny(noise=0)
    optimizer = optim.AdamW(0.05)
    run(None, whole, optimizer, data=data[:4], val=None, iterate=in_order(4), iters=1)
    run(None, whole, optimizer, data=data[4:], val=None, iterate=in_order(2), iters=1)
    close(rest, whole)


def test_schedules_count_updates_not_batches():
    rates = []

    def schedule(step):
        rates.append(step)
        return 0.01 * min(step + 1, 3)

    _, seen, result = run(
        None, optimizer=optim.AdamW(schedule), val=None, iters=8, grad_accumulation_steps=2
    )
    assert result.updates == 4
    assert max(rates) == 3
    assert [i["learning_rate"] for i in seen.train[1::2]] == pytest.approx([0.01, 0.02, 0.03, 0.03])


def test_the_plan_counts_warm_up_in_updates():
    optimizer = optim.AdamW(optim.WarmUp(0.1, 5))
    args = TrainingArgs(iters=90, batch_size=2, grad_accumulation_steps=4)
    batches = BatchIterator(samples(), 2, 64, loop=True)
    text = "\n".join(describe_plan(Tiny(), optimizer, args, batches, longest=9))
    assert "90 batches of 2, 23 updates (one every 4 batches)" in text
    assert "first 5 updates (20 batches)" in text
    assert f"{batches.report.tokens} tokens an epoch" in text
    assert "of memory at the peak" in text
    short = describe_plan(Tiny(), optimizer, TrainingArgs(iters=4), batches, longest=9)
    assert any("never reached" in line for line in short)


def test_the_plan_counts_one_as_one():
    batches = BatchIterator(samples(1), 2, 64, loop=True)
    optimizer = optim.AdamW(optim.WarmUp(0.1, 1))
    text = "\n".join(describe_plan(Tiny(), optimizer, TrainingArgs(iters=1), batches, longest=9))
    assert (
        "plan: 1 batch of 4, 1 update\n" in text
        and "over the first update (1 batch)" in text
        and "plan: 1 sample of up" in text
    )


def test_the_plan_names_what_differs_from_mlx_lms_defaults():
    def plan(optimizer, validates, **settings):
        batches = BatchIterator(samples(), 2, 64, loop=True)
        return "\n".join(
            describe_plan(Tiny(), optimizer, TrainingArgs(**settings), batches, 9, 0, validates)
        )

    corrected, best = (
        "with bias correction; mlx-lm's has none",
        "ends with the adapter of the lowest validation loss",
    )
    text = plan(optim.Adam(0.1), True)
    assert (
        f"plan: Adam {corrected} (optimizer_config: {{adam: {{bias_correction: false}}}})" in text
        and best in text
    )
    assert corrected not in plan(optim.AdamW(0.1, bias_correction=False), True)
    assert corrected not in plan(optim.SGD(0.1), True)
    assert best not in plan(optim.Adam(0.1), False) and best not in plan(
        optim.Adam(0.1), True, keep_best=False
    )


def test_memory_estimate_grows_with_tokens_and_shrinks_with_checkpointing():
    class Config:
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, vocab_size = (
            576,
            1536,
            9,
            3,
            49152,
        )

    model = Tiny()
    model.config, model.layers = Config(), [None] * 30
    small, big = estimate_memory(model, 1, 256), estimate_memory(model, 4, 256)
    assert small < big
    assert estimate_memory(model, 4, 256, grad_checkpoint=True) < 0.6 * big
    assert (
        estimate_memory(model, 1, 8192, grad_checkpoint=True) < estimate_memory(model, 1, 8192) / 4
    )
    assert 0.4e9 < big < 1e9
    assert estimate_memory(model, 64, 256) == big, (
        "a batch goes forward and back in parts of 512 tokens"
    )


def test_lora_plus_gives_lora_b_a_rate_of_its_own(capsys):
    """Plain gradient descent: the change of one update is the rate times the gradient."""
    changes = []
    for ratio in (1.0, 8.0):
        before, model = Tiny(noise=0.0), Tiny(noise=0.0)
        run(
            None,
            model,
            optim.SGD(0.01),
            val=None,
            iters=1,
            loraplus_lr_ratio=ratio,
            progress=ratio != 1,
        )
        changes.append({name: model.arrays[name] - array for name, array in before.arrays.items()})
    np.testing.assert_array_equal(changes[1]["layers.0.lora_a"], changes[0]["layers.0.lora_a"])
    np.testing.assert_allclose(
        changes[1]["layers.0.lora_b"], 8 * changes[0]["layers.0.lora_b"], rtol=1e-3, atol=1e-7
    )
    assert (
        "plan: the learning rate of lora_b is 8 times that of the others" in capsys.readouterr().out
    )
    own = SimpleNamespace(update=lambda model, grads: None, learning_rate=0.1)
    with pytest.raises(ValueError, match="loraplus_lr_ratio needs an optimizer of pyloss.optim"):
        run(None, model, own, loraplus_lr_ratio=2.0)
    model.arrays = {name.replace("lora_b", "weight"): array for name, array in model.arrays.items()}
    with pytest.raises(ValueError, match="loraplus_lr_ratio .* trains no such parameter"):
        run(None, model, loraplus_lr_ratio=2.0)


def test_clipping_limits_the_update():
    seen = Recorder()
    model, start = Tiny(noise=0), Tiny(noise=0)
    run(None, model, optim.SGD(1.0), val=None, iters=1, max_grad_norm=0.01, callback=seen)
    moved = math.sqrt(sum(((a - start.arrays[n]) ** 2).sum() for n, a in model.arrays.items()))
    assert moved == pytest.approx(0.01, rel=1e-3)
    assert seen.train[0]["grad_norm"] > 0.01


def test_validation_at_the_start_each_interval_and_the_end():
    _, seen, _ = run(None, iters=10, steps_per_eval=4)
    assert list(seen.val_losses) == [0, 4, 8, 10]
    assert seen.val_losses[0] == pytest.approx(
        evaluate(Tiny(), samples(5, 9), 2, loss=tiny_loss), rel=1e-9
    )


def test_reports_have_mlx_lms_keys(tmp_path):
    _, seen, _ = run(tmp_path, iters=5, steps_per_report=2)
    assert list(seen.losses) == [2, 4, 5]
    wanted = {
        "iteration",
        "train_loss",
        "learning_rate",
        "iterations_per_second",
        "tokens_per_second",
    }
    assert wanted | {"trained_tokens", "peak_memory"} <= set(seen.train[0])
    assert set(seen.val[0]) == {"iteration", "val_loss", "val_time"}
    assert seen.train[0]["peak_memory"] > 0.01


def rising(model, batch, lengths):
    """A loss whose validation is best at iteration 4 of a run that validates every 2."""
    value, count = tiny_loss(model, batch, lengths)
    if not model.training:
        rising.calls += 1
        return abs((rising.calls - 1) // 3 - 2) + 1.0, count
    return value, count


def test_the_best_adapter_is_kept_in_the_model_and_on_disk(tmp_path):
    rising.calls = 0
    kept = {}

    class Watch(Recorder):
        def on_val_loss_report(self, val_info):
            super().on_val_loss_report(val_info)
            kept[val_info["iteration"]] = {n: a.copy() for n, a in model.arrays.items()}

    model = Tiny()
    _, _, result = run(tmp_path, model, loss=rising, steps_per_eval=2, iters=10, callback=Watch())
    assert (result.best_iteration, result.best_loss) == (4, 1.0)
    assert not result.stopped_early
    for name, array in model.arrays.items():
        np.testing.assert_array_equal(array, kept[4][name])
        assert not np.array_equal(array, kept[10][name])
    for file, iteration in (("adapters", 4), ("best_adapters", 4), ("0000010_adapters", 10)):
        saved = load_file(tmp_path / f"{file}.safetensors")
        for name in model.arrays:
            np.testing.assert_array_equal(saved[name], kept[iteration][name])


def test_without_keep_best_the_last_adapter_stays(tmp_path):
    rising.calls = 0
    model, _, _ = run(tmp_path, loss=rising, steps_per_eval=2, iters=10, keep_best=False)
    other, _, _ = run(None, val=None, iters=10)
    for name, array in model.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])
    assert not (tmp_path / "best_adapters.safetensors").exists()


def test_patience_stops_the_run(tmp_path):
    rising.calls = 0
    _, _, result = run(tmp_path, loss=rising, steps_per_eval=2, iters=100, patience=3)
    assert result.stopped_early
    assert result.iterations == 10
    assert result.best_iteration == 4


def timed(monkeypatch, step=10.0):
    """Makes a clock that a batch of training advances by `step` seconds; returns its loss."""
    clock = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now, monotonic=lambda: clock.now)
    for module in (training_run, run_reports):
        monkeypatch.setattr(module, "time", fake)

    def loss(model, batch, lengths):
        if model.training:
            clock.now += step
        return tiny_loss(model, batch, lengths)

    return loss


def test_max_time_stops_at_a_step_and_resume_goes_on(tmp_path, monkeypatch):
    loss = timed(monkeypatch)
    _, seen, result = run(tmp_path, loss=loss, iters=12, max_time="1m", keep_best=False)
    assert 2 <= result.iterations < 12 and result.stopped_early
    assert max(seen.val_losses) == result.iterations  # validated at the end
    assert (tmp_path / "adapters.safetensors").exists()
    model, _, again = run(tmp_path, loss=loss, iters=12, resume=True, keep_best=False)
    assert again.iterations == 12 and not again.stopped_early
    whole, _, _ = run(tmp_path / "whole", loss=loss, iters=12, keep_best=False)
    for name, array in model.arrays.items():
        np.testing.assert_array_equal(array, whole.arrays[name])


def test_reports_estimate_the_time_that_is_left(monkeypatch):
    loss = timed(monkeypatch)
    _, seen, _ = run(None, loss=loss, val=None, iters=6, steps_per_report=2)
    left = [info["seconds_left"] for info in seen.train]
    step = left[0] / 4
    assert step >= 10 and left == [4 * step, 2 * step, 0]
    _, seen, _ = run(None, loss=loss, val=None, iters=6, steps_per_report=1, max_time=4 * step)
    assert [info["seconds_left"] for info in seen.train] == [3 * step, 2 * step, step, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path, bad):
    model, snapshots = Tiny(), []

    def poisoned(model, batch, lengths):
        value, count = tiny_loss(model, batch, lengths)
        snapshots.append({n: a.copy() for n, a in model.arrays.items()})
        return (bad if len(snapshots) == 7 else value), count

    with pytest.raises(FloatingPointError, match=r"iteration 7: the loss is (nan|inf)"):
        run(tmp_path, model, loss=poisoned, val=None, iters=12)
    for name, array in model.arrays.items():
        np.testing.assert_array_equal(array, snapshots[6][name])
    good = load_file(tmp_path / "adapters.safetensors")
    for name in model.arrays:
        np.testing.assert_array_equal(good[name], snapshots[5][name])


def test_gradients_that_are_not_finite_stop_before_the_weights_are_touched(monkeypatch):
    def broken(model, loss):
        inner = tiny_value_and_grad(model, loss)

        def call(*arguments):
            value, grads = inner(*arguments)
            grads["layers.0.lora_b"][0, 0] = np.nan
            return value, grads

        return call

    monkeypatch.setattr(nn, "value_and_grad", broken)
    model, start = Tiny(), Tiny()
    with pytest.raises(FloatingPointError, match="iteration 1: the norm of the gradients is nan"):
        run(None, model, val=None)
    for name, array in model.arrays.items():
        np.testing.assert_array_equal(array, start.arrays[name])


def test_a_users_iterate_batches_gets_the_data_untouched_and_mlx_lms_keywords():
    data, calls = samples(), []

    def iterate(dataset, batch_size, max_seq_length, loop=False, seed=None, comm_group=None):
        assert dataset is data
        calls.append((batch_size, max_seq_length, loop))
        return in_order(batch_size)(dataset, batch_size, max_seq_length, loop)

    run(None, data=data, val=data, iterate=iterate, iters=2, val_batches=1)
    assert calls[0] == (2, 2048, True)
    assert calls[1:] == [(2, 2048, False)] * 2


def test_an_older_iterate_batches_and_one_with_any_keyword_are_called_as_they_can_be():
    def older(dataset, tokenizer=None, batch_size=1, max_seq_length=9, train=False):
        assert train
        return in_order(batch_size)(dataset, batch_size, max_seq_length, train)

    def any_keyword(**options):
        assert set(options) == {"dataset", "batch_size", "max_seq_length", "loop", "comm_group"}
        return in_order(2)(**options)

    for iterate in (older, any_keyword):
        assert run(None, val=None, iterate=iterate, iters=2)[2].iterations == 2


def test_batches_that_end_end_the_run():
    def once(dataset, batch_size, max_seq_length, loop):
        return in_order(batch_size)(dataset, batch_size, max_seq_length)

    assert run(None, data=samples(6), val=None, iterate=once, iters=50)[2].iterations == 3


def test_a_loss_may_give_a_scalar_alone():
    _, seen, result = run(None, loss=lambda *a: tiny_loss(*a)[0], iters=3)
    assert result.iterations == 3
    assert seen.train[-1]["trained_tokens"] == 3


def test_batches_without_a_target_count_nothing():
    model, start = Tiny(), Tiny()
    run(None, model, loss=lambda *a: (float("nan"), 0), val=None, iters=3)
    for name, array in model.arrays.items():
        np.testing.assert_array_equal(array, start.arrays[name])


def test_token_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=rf"token id {VOCABULARY} is outside the vocabulary"):
        run(None, data=[([1, 2, VOCABULARY], 0)], val=None)


def test_bad_arguments_are_refused():
    with pytest.raises(
        ValueError, match="batch_size is 0; it must be a whole number of at least 1"
    ):
        TrainingArgs(batch_size=0)
    for settings in (
        {"iters": 1.5},
        {"iters": True},
        {"batch_size": "4"},
        {"max_grad_norm": "1"},
        {"seed": 0.5},
    ):
        with pytest.raises(TypeError, match=f"{next(iter(settings))} is .*; it must be a"):
            TrainingArgs(**settings)
    for settings in (
        {"batch_size": 1 << 63},
        {"patience": -(1 << 70)},
        {"loraplus_lr_ratio": 10**400},
        {"seed": 10**5000},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*; it must be a"):
            TrainingArgs(**settings)
    with pytest.raises(ValueError, match="patience is 0"):
        TrainingArgs(patience=0)
    with pytest.raises(
        ValueError, match="matmul precision is 'bf16'; it must be one of float32, bfloat16"
    ):
        TrainingArgs(matmul_precision="bf16")
    with pytest.raises(ValueError, match="training dataset is empty"):
        train(Tiny(), optim.SGD(0.1), [])
    frozen = Tiny()
    frozen.trainable_parameters = dict
    with pytest.raises(ValueError, match="no trainable parameters"):
        train(frozen, optim.SGD(0.1), samples())
    with pytest.raises(ValueError, match="num_batches is 0"):
        evaluate(Tiny(), samples(), 2, 0)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(Tiny(), samples(), 2, loss=lambda *a: (0.0, 0))


def test_the_mode_of_the_model_comes_back_and_checkpointing_is_switched_on():
    model, _, _ = run(None, grad_checkpoint=True, iters=1)
    assert not model.training
    assert model.checkpointing


def test_the_precision_is_that_of_the_run_and_comes_back(capsys):
    seen = []

    def loss(model, batch, lengths):
        seen.append(pyloss.get_matmul_precision())
        return tiny_loss(model, batch, lengths)

    run(None, loss=loss, iters=1, matmul_precision="bfloat16", progress=True)
    assert set(seen) == {"bfloat16"} and pyloss.get_matmul_precision() == "float32"
    assert "plan: layers multiply in bfloat16" in capsys.readouterr().out
    with pytest.raises(ValueError, match="inside"), matmul_precision("bfloat16"):
        run(None, loss=loss, iters=1)  # without the option the precision stays
        assert seen[-1] == "bfloat16"
        run(None, loss=loss, iters=1, matmul_precision="float32")
        assert seen[-1] == "float32" and pyloss.get_matmul_precision() == "bfloat16"
        raise ValueError("inside")


def test_evaluate_weighs_by_tokens():
    data = samples(7)
    whole = evaluate(Tiny(), data, 7, loss=tiny_loss)
    assert evaluate(Tiny(), CacheDataset(data), 2, loss=tiny_loss) == pytest.approx(
        whole, rel=1e-12
    )
    seen = []
    evaluate(Tiny(), data, 2, 3, loss=tiny_loss, progress_callback=lambda: seen.append(1))
    assert len(seen) == 3


def test_training_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path, iters=2)[2]))
    thread.start()
    thread.join()
    assert results[0].iterations == 2


def test_progress_prints_the_plan_and_the_reports(tmp_path, capsys):
    run(tmp_path, iters=4, steps_per_report=2, progress=True)
    said = capsys.readouterr().out
    for text in (
        "plan: 4 batches of 2, 4 updates",
        "iteration 2/4: train loss",
        "iteration 4/4: val loss",
        "peak memory",
    ):
        assert text in said
    assert f"saved the adapter to {tmp_path / 'adapters.safetensors'}" in said


def test_epochs_and_parts_of_them_become_iterations(tmp_path):
    """13 samples in batches of 2 are 7 batches an epoch."""
    _, seen, result = run(tmp_path, epochs=2, val_every="0.5ep")
    assert result.iterations == 14
    assert sorted(seen.val_losses) == [0, 4, 8, 12, 14]
    assert run(None, epochs=0.5)[2].iterations == 4
    _, seen, result = run(None, iters=6, val_every=3)
    assert result.iterations == 6 and sorted(seen.val_losses) == [0, 3, 6]


def test_a_run_of_epochs_resumes_with_more(tmp_path):
    run(tmp_path / "parts", epochs=1)
    resumed, _, result = run(tmp_path / "parts", Tiny(seed=9), epochs=2, resume=True)
    whole = run(tmp_path / "whole", epochs=2)[0]
    assert result.iterations == 14
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(array, resumed.arrays[name])


def test_epochs_need_an_iterator_that_knows_them():
    with pytest.raises(ValueError, match="epochs is given in epochs, and the iterator"):
        run(None, epochs=1, iterate=in_order(2))
    with pytest.raises(ValueError, match="val_every is given in epochs, and the iterator"):
        run(None, val_every="1ep", iterate=in_order(2))
    assert run(None, iters=2, val_every=1, iterate=in_order(2))[2].iterations == 2
    for wrong in ({"epochs": 0}, {"epochs": "3"}, {"val_every": "often"}):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            TrainingArgs(**wrong)
