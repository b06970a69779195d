"""Tuned quantizations: mlx-lm and llama.cpp compute what pyloss computes of the same files."""

import llama_runner
import numpy as np
import pytest
import tiny

import pyloss
from pyloss.models import load_model
from pyloss.quantizing import quantize

mx = pytest.importorskip("mlx.core", reason="compares with mlx (parity extra)")
mlx_utils = pytest.importorskip("mlx_lm.utils", reason="compares with mlx-lm (parity extra)")

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": tiny.TOKENS}
TEXT = [f"the {i} hens lay {i + 3} eggs before the week is over" for i in range(30)]
TUNING = {"iters": 20, "learning_rate": 4e-3, "batch_size": 2, "progress": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random model of bfloat16 with a tokenizer, and texts."""
    folder = tmp_path_factory.mktemp("source")
    tiny.write_folder(folder / "plain", dtype="bf16", **SIZES)
    load_model(folder / "plain").save(folder / "model", tiny.byte_tokenizer())
    (folder / "texts.txt").write_text("\n\n".join(TEXT), encoding="utf-8")
    return folder


def tuned(source, path, to, **options):
    found = quantize(
        source / "model", path, to, tune_data=str(source / "texts.txt"), tuning=TUNING,
        data_options={"valid_split": 0.3}, **options,
    )  # fmt: skip
    assert found.kept, found
    return path


@pytest.mark.parametrize("to", ["q3", "q4"])
def test_mlx_lm_loads_a_tuned_folder(source, tmp_path, to):
    place = tuned(source, tmp_path / "tuned", to, group_size=32)
    ids = np.arange(5, 45).reshape(2, 20)
    theirs, config = mlx_utils.load_model(place)
    assert config["quantization"]["bits"] == int(to[1:])
    theirs.set_dtype(mx.float32)
    expected = np.array(theirs(mx.array(ids)))
    ours = load_model(place)(ids)
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
    quantize(source / "model", tmp_path / "plain", to, group_size=32)
    assert np.abs(load_model(tmp_path / "plain")(ids) - ours).max() > 0.05


def test_llama_cpp_runs_a_tuned_file(source, tmp_path):
    llama_runner.require()
    place = tuned(source, tmp_path / "tuned.gguf", "q5_1")
    model, tokenizer = pyloss.load(place)
    ids = tokenizer.encode(TEXT[0])
    answer = llama_runner.run(place, ids, 1)
    logits = model(np.array([ids]))[0, -1].astype(np.float64)
    logits -= logits.max() + np.log(np.exp(logits - logits.max()).sum())
    # llama.cpp rounds the other operand to 8 bits
    known = answer.logprobs[0]
    assert max(abs(logits[k] - value) for k, value in known.items()) < 0.03 * np.ptp(logits)
    assert int(logits.argmax()) == max(known, key=known.__getitem__)
