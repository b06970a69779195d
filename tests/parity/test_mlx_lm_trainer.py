"""mlx_lm.tuner.trainer beside pyloss's: batches, loss, runs and what they report and write."""

import json
import os

import numpy as np
import pytest
from mlx_sides import Reports, Samples, adapted, compare, filled, refused, rows

FIELDS = {"batch_size": 2, "iters": 6, "steps_per_report": 1, "steps_per_eval": 4, "val_batches": 2}


def run(side, folder, tmp_path, model=None, optimizer=None, val=True, loss=None, **settings):
    """Train under one library; the reports, the final weights and the files."""
    trainer, reports = side("tuner.trainer"), Reports()
    model = model or adapted(side, folder)[0]
    place = tmp_path / ("ours" if side.own else "theirs")
    place.mkdir(exist_ok=True)
    args = trainer.TrainingArgs(
        **FIELDS | {"adapter_file": str(place / "adapters.safetensors")} | settings
    )
    optimizer = optimizer or side.optim.Adam(learning_rate=1e-2)
    np.random.seed(5)
    extra = {} if loss is None else {"loss": loss(side)}
    cached = side("tuner.datasets").CacheDataset
    trainer.train(
        model,
        optimizer,
        cached(Samples(rows())),
        cached(Samples(rows(5, seed=9))) if val else None,
        args,
        training_callback=reports,
        **extra,
    )
    weights = {
        name: np.array(value)
        for name, value in side.tree.tree_flatten(model.trainable_parameters())
    }
    return {"train": reports.train, "val": reports.val, "weights": weights}


def test_a_run(made, tmp_path):
    found = compare(run, made, tmp_path, atol=1e-4)
    assert len(found["train"]) == 6
    losses = [info["train_loss"] for info in found["train"]]
    assert losses[-1] < losses[0]
    assert [info["iteration"] for info in found["val"]] == [0, 3, 5]


def test_a_run_of_several_epochs(made, tmp_path):
    def case(side):
        optimizer = side.optim.Adam(learning_rate=1e-3)
        return run(side, made, tmp_path, optimizer=optimizer, iters=9, steps_per_eval=5)

    compare(case, atol=1e-3)


def test_accumulated_batches_count_equally(made, tmp_path):
    settings = {"iters": 8, "grad_accumulation_steps": 3, "steps_per_report": 4}
    compare(lambda side: run(side, made, tmp_path, **settings), atol=1e-4)


def test_no_validation_data(made, tmp_path):
    assert compare(lambda side: run(side, made, tmp_path, val=False), atol=1e-4)["val"] == []


def test_all_validation_data(made, tmp_path):
    compare(lambda side: run(side, made, tmp_path, val_batches=-1, iters=2), atol=1e-4)


def test_checkpointing_changes_nothing(made, tmp_path):
    compare(lambda side: run(side, made, tmp_path, grad_checkpoint=True), atol=1e-4)


def test_short_windows(made, tmp_path):
    compare(lambda side: run(side, made, tmp_path, max_seq_length=24), atol=1e-4)


OPTIMIZERS = {
    "Adam": {"learning_rate": 1e-2},
    "AdamW": {"learning_rate": 1e-2, "weight_decay": 0.1},
    "SGD": {"learning_rate": 0.01, "momentum": 0.9},
    "Adafactor": {"learning_rate": 1e-2, "relative_step": False, "scale_parameter": False},
    "Lion": {"learning_rate": 1e-3},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(made, tmp_path, name):
    def case(side):
        optimizer = getattr(side.optim, name)(**OPTIMIZERS[name])
        return run(side, made, tmp_path, optimizer=optimizer, val=False)

    compare(case, atol=3e-4)


def test_a_schedule(made, tmp_path):
    config = {
        "name": "cosine_decay",
        "arguments": [1e-2, 6, 1e-4],
        "warmup": 3,
        "warmup_init": 1e-5,
    }

    def case(side):
        rate = side("tuner.utils").build_schedule(config)
        return run(side, made, tmp_path, optimizer=side.optim.Adam(learning_rate=rate))

    compare(case, atol=2e-4)


def test_dora(made, tmp_path):
    def case(side):
        return run(side, made, tmp_path, model=adapted(side, made, dora=True)[0])

    compare(case, atol=5e-4)


def masked_loss(side):
    """A user's own loss, with MLX's functions."""
    mx, nn = side.mx, side.nn

    def loss(model, batch, lengths):
        inputs, targets = batch[:, :-1], batch[:, 1:]
        logits = model(inputs).astype(mx.float32)
        steps = mx.arange(1, targets.shape[1] + 1)
        mask = mx.logical_and(steps >= lengths[:, 0:1], steps < lengths[:, 1:])
        ce = nn.losses.cross_entropy(logits, targets, label_smoothing=0.1) * mask
        count = mask.sum()
        return ce.sum() / count + 0.01 * (
            mx.logsumexp(logits, axis=-1) * mask
        ).square().mean(), count

    return loss


def test_a_loss_of_ones_own(made, tmp_path):
    def case(side):
        optimizer = side.optim.Adam(learning_rate=1e-3)
        return run(side, made, tmp_path, optimizer=optimizer, loss=masked_loss)

    compare(case, atol=3e-4)


def test_full_training_of_the_last_layer(made, tmp_path):
    def case(side):
        model, _ = side().load(str(made / "base"))
        model.freeze()
        model.layers[-1].unfreeze()
        return run(side, made, tmp_path, model=model, optimizer=side.optim.SGD(learning_rate=0.01))

    compare(case, atol=1e-3)


def test_files_of_a_run(made, tmp_path):
    def case(side):
        run(side, made, tmp_path, iters=5, steps_per_save=2, val=False)
        place = tmp_path / ("ours" if side.own else "theirs")
        adapters = sorted(
            name for name in os.listdir(place) if name.endswith("adapters.safetensors")
        )
        loaded = side.mx.load(str(place / "adapters.safetensors"))
        return adapters, {name: np.array(value) for name, value in loaded.items()}

    names, _ = compare(case, atol=1e-4)
    assert names == [
        "0000002_adapters.safetensors",
        "0000004_adapters.safetensors",
        "adapters.safetensors",
    ]


def test_a_run_goes_on_from_saved_weights(made, tmp_path):
    def case(side):
        run(side, made, tmp_path, iters=3, val=False)
        place = tmp_path / ("ours" if side.own else "theirs") / "adapters.safetensors"
        model = filled(side, adapted(side, made)[0], seed=8)
        model.load_weights(str(place), strict=False)
        return run(side, made, tmp_path, model=model, iters=3, val=False)

    compare(case, atol=3e-4)


def test_an_iterator_of_ones_own(made, tmp_path):
    """Samples of three parts, and a loss that takes their batches."""

    def case(side):
        mx, trainer = side.mx, side("tuner.trainer")
        samples = [(tokens, offset, i / 7) for i, (tokens, offset) in enumerate(rows())]

        def batches(dataset, batch_size, max_seq_length, loop=False, comm_group=None):
            while True:
                for begin in range(0, len(dataset) - batch_size + 1, batch_size):
                    part = [dataset[begin + i] for i in range(batch_size)]
                    width = max(len(p[0]) for p in part)
                    tokens = mx.array([p[0] + [0] * (width - len(p[0])) for p in part])
                    yield (
                        tokens,
                        mx.array([[p[1], len(p[0])] for p in part]),
                        mx.array([p[2] for p in part]),
                    )
                if not loop:
                    return

        def loss(model, batch, lengths, weights):
            logits = model(batch[:, :-1])
            ce = side.nn.losses.cross_entropy(logits, batch[:, 1:])
            steps = mx.arange(1, batch.shape[1])
            mask = mx.logical_and(steps >= lengths[:, :1], steps < lengths[:, 1:])
            return (ce * mask * weights[:, None]).sum() / mask.sum(), mask.sum()

        model, reports = adapted(side, made)[0], Reports()
        place = tmp_path / ("ours" if side.own else "theirs")
        place.mkdir(exist_ok=True)
        args = trainer.TrainingArgs(**FIELDS, adapter_file=str(place / "adapters.safetensors"))
        optimizer = side.optim.Adam(learning_rate=1e-2)
        trainer.train(model, optimizer, Samples(samples), Samples(samples[:4]), args, loss=loss,
                      iterate_batches=batches, training_callback=reports)  # fmt: skip
        return reports.train, reports.val

    compare(case, atol=2e-4)


@pytest.mark.parametrize("iters", [1, 2])
def test_runs_of_few_iterations(made, tmp_path, iters):
    compare(lambda side: run(side, made, tmp_path, iters=iters, steps_per_report=10), atol=1e-4)


# ---- batches


def drawn(side, samples, size, window, count, cached=True, **options):
    trainer = side("tuner.trainer")
    data = side("tuner.datasets").CacheDataset(Samples(samples)) if cached else Samples(samples)
    np.random.seed(11)
    batches = trainer.iterate_batches(data, size, window, **options)
    return [
        [np.array(part) for part in batch] for batch, _ in zip(batches, range(count), strict=False)
    ]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("size", [1, 3, 14])
def test_batches(cached, size):
    compare(lambda side: drawn(side, rows(), size, 2048, 99, cached))


def test_batches_of_several_epochs():
    assert len(compare(lambda side: drawn(side, rows(), 4, 2048, 11, loop=True))) == 11


def test_batches_by_a_seed():
    compare(lambda side: drawn(side, rows(), 2, 2048, 20, loop=True, seed=3))


@pytest.mark.parametrize("window", [8, 32, 33, 64])
def test_windows_of_batches(window):
    compare(lambda side: drawn(side, rows(), 2, window, 7))


def test_samples_without_offsets():
    tokens = [row for row, _ in rows()]
    compare(lambda side: drawn(side, tokens, 2, 64, 7))


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_of_several_workers(rank):
    class Group:
        def rank(self):
            return rank

        def size(self):
            return 2

    compare(lambda side: drawn(side, rows(), 4, 64, 5, comm_group=Group()))


def test_refused_batches():
    def case(side):
        class Group:
            def rank(self):
                return 0

            def size(self):
                return 2

        return [
            refused(lambda: drawn(side, rows(3), 4, 64, 1), ValueError),
            refused(lambda: drawn(side, rows(9), 3, 64, 1, comm_group=Group()), ValueError),
        ]

    assert compare(case) == ["ValueError", "ValueError"]


# ---- loss and evaluation


@pytest.mark.parametrize("first", [0, 1, 5])
def test_the_loss(made, first):
    """The token behind a row's last one is a target."""

    def case(side):
        model, _ = side().load(str(made / "base"))
        batch = np.random.default_rng(2).integers(0, 200, (3, 12)).astype(np.int32)
        lengths = side.mx.array([[first, 12], [first, 7], [first, 9]])
        loss, count = side("tuner.trainer").default_loss(model, side.mx.array(batch), lengths)
        return np.array(loss), int(count.item())

    compare(case)


@pytest.mark.parametrize("batches", [1, 2, -1])
def test_evaluation(made, batches):
    def case(side):
        trainer, model = side("tuner.trainer"), adapted(side, made)[0]
        np.random.seed(2)
        data = side("tuner.datasets").CacheDataset(Samples(rows()))
        seen = []
        loss = trainer.evaluate(
            model, data, 3, batches, 32, progress_callback=lambda: seen.append(1)
        )
        return float(loss), len(seen)

    compare(case)


def test_evaluation_by_a_loss_of_ones_own(made):
    def case(side):
        np.random.seed(2)
        data = side("tuner.datasets").CacheDataset(Samples(rows()))
        model = adapted(side, made)[0]
        return float(side("tuner.trainer").evaluate(model, data, 2, 3, loss=masked_loss(side)))

    compare(case)


# ---- what others made


def test_files_of_others_are_kept(made, tmp_path):
    """pyloss alone: mlx-lm overwrites them."""
    from mlx_sides import Side

    side, place = Side(True), tmp_path / "ours"
    run(side, made, tmp_path, iters=2, val=False)
    first = (place / "adapters.safetensors").read_bytes()
    own = {"num_layers": 3, "note": "mine", "model": "/a/place", "lora_parameters": {"rank": 2}}
    (place / "adapter_config.json").write_text(json.dumps(own))
    run(side, made, tmp_path, iters=2, val=False, max_seq_length=16)
    assert json.loads((place / "adapter_config.json").read_text()) == own
    assert (place / "previous-1" / "adapters.safetensors").read_bytes() == first
    assert json.loads((place / "previous-1" / "adapter_config.json").read_text()) == own
