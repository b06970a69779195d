"""Logits, generation and gradients against transformers and torch autograd on equal weights."""

import numpy as np
import pytest
from parity_gguf import write_gguf
from parity_models import (
    GEMMA2,
    GEMMA3,
    GEMMA4,
    GRANITE,
    GRANITE4,
    GRANITE4_GROUPS,
    GRANITE4_MAMBA,
    LFM2,
    LINEARS,
    LLAMA3,
    MINISTRAL3,
    OLMO2,
    OLMO3,
    PHI3,
    PHI4,
    QWEN3_5,
    QWEN3_5_EVEN,
    SMOLLM3,
    SMOLLM3_GGUF,
    YARN,
    add_adapter,
    longrope,
    make_tiny,
    our_logits,
    peft_matrices,
    peft_twin,
    ragged,
    relative,
    torch,
    torch_logits,
    torch_loss,
    torch_model,
    transformers,
)

import pyloss
from pyloss.tuner.losses import target_weights

TEXTS = [
    "The capital of France is Paris, and that of Italy is",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # 3",
    "日本語 текст 👩‍👩‍👧 \x07 ½",
    "a",
    "Once upon a time there was a river. " * 12,
]
VARIANTS = {
    "grouped": {},
    "ungrouped": {"num_key_value_heads": 4},
    "one key head": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "hidden_size": 48,
        "intermediate_size": 40,
        "vocab_size": 257,
    },
    "wide heads": {"head_dim": 32, "tie_word_embeddings": False},
    "narrow heads": {"head_dim": 6},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 rotary": {"rope_scaling": LLAMA3},
    "linear rotary": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {"family": "Mistral", "sliding_window": 24, "rope_theta": 1e6},
    "stored in bfloat16": {"stored": "bfloat16"},
    "stored in float16": {"stored": "float16", "tie_word_embeddings": False},
    "in shards": {"shards": "60KB"},
    "qwen2": {"family": "Qwen2"},
    "yarn rotary": {"family": "Qwen2", "rope_scaling": YARN},
    "qwen2 with windows": {
        "family": "Qwen2",
        "use_sliding_window": True,
        "sliding_window": 10,
        "max_window_layers": 1,
    },
    "qwen3": {"family": "Qwen3", "tie_word_embeddings": False},
    "qwen3 with biases": {"family": "Qwen3", "attention_bias": True},
    "granite": GRANITE,
    "granite with biases and a head": {
        **GRANITE,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "granite 4": GRANITE4,
    "granite 4 without positions": {
        **GRANITE4,
        "position_embedding_type": "nope",
        "tie_word_embeddings": False,
    },
    "granite 4 with a mamba layer": GRANITE4_MAMBA,
    "granite 4 with another mamba layer": GRANITE4_GROUPS,
    "ministral3": MINISTRAL3,
    "ministral3 with a window and another scale": {
        **MINISTRAL3,
        "sliding_window": 24,
        "tie_word_embeddings": False,
        "rope_scaling": {**MINISTRAL3["rope_scaling"], "mscale_all_dim": 0.5},
    },
    "smollm3": SMOLLM3,
    "smollm3 of llama.cpp's pattern": {**SMOLLM3_GGUF, "rope_scaling": YARN},
    "smollm3 with windows": {
        **SMOLLM3_GGUF,
        "no_rope_layers": [1, 0, 1, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 10,
        "mlp_bias": True,
    },
    "olmo2": OLMO2,
    "olmo2 of other sizes": {
        **OLMO2,
        "head_dim": 32,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "olmo3": {**OLMO3, "rope_scaling": YARN},
    "olmo3 with its own pattern": {
        **OLMO3,
        "layer_types": ["full_attention", *["sliding_attention"] * 2] * 2,
        "num_hidden_layers": 6,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "tie_word_embeddings": False,
    },
    "lfm2": LFM2,
    "lfm2 of other sizes": {
        **LFM2,
        "conv_bias": True,
        "conv_L_cache": 5,
        "block_ffn_dim_multiplier": 1.7,
        "tie_word_embeddings": False,
    },
    "qwen3_5": QWEN3_5,
    "qwen3_5 of other sizes": {
        **QWEN3_5_EVEN,
        "linear_conv_kernel_dim": 3,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "partial_rotary_factor": 1.0,
    },
    "qwen3_5 of as many heads": QWEN3_5_EVEN,
    "gemma2": GEMMA2,
    "gemma2 of another scale, without a cap of logits": {
        **GEMMA2,
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": None,
    },
    "phi3": {**PHI3, "tie_word_embeddings": False},
    "phi3 with a window": {**PHI3, "sliding_window": 24, "num_key_value_heads": 4},
    "phi4": PHI4,
    "phi3 with longrope": longrope(1, attention_factor=1.1),
    "gemma4": GEMMA4,
    "gemma4 without shared keys": {
        **GEMMA4,
        "num_kv_shared_layers": 0,
        "layer_types": None,
        "tie_word_embeddings": False,
    },
    "gemma4 without own embeddings": {
        **GEMMA4,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "final_logit_softcapping": None,
    },
    "gemma3": {"family": "Gemma3", **GEMMA3},
    "gemma3 with scaled positions": {
        "family": "Gemma3",
        **GEMMA3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3 of other sizes": {
        "family": "Gemma3",
        **GEMMA3,
        "query_pre_attn_scalar": 24,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
}
GGUF = (
    "grouped",
    "biases",
    "llama3 rotary",
    "linear rotary",
    "yarn rotary",
    "qwen2",
    "qwen3",
    "granite",
    "granite with biases and a head",
    "granite 4 without positions",
    "ministral3",
    "smollm3 of llama.cpp's pattern",
    "lfm2",
    "qwen3_5 of as many heads",
    "qwen3_5",
    "olmo2",
    "olmo3",
    "olmo3 with its own pattern",
    "gemma2",
    "phi3",
    "phi3 with a window",
    "phi4",
    "phi3 with longrope",
    "gemma3",
    "gemma3 with scaled positions",
)
VARIANTS |= {f"{name}, gguf": {**VARIANTS[name], "gguf": True} for name in GGUF}


@pytest.fixture(params=VARIANTS)
def tiny(request, tmp_path):
    """(our model, transformers' model) with the same stored weights, computing in float32."""
    options = dict(VARIANTS[request.param])
    stored, shards, gguf = (
        getattr(torch, options.pop("stored", "float32")),
        options.pop("shards", "1GB"),
        options.pop("gguf", False),
    )
    model = make_tiny(**options)
    if gguf:
        write_gguf(model, tmp_path / "model.gguf")
        return pyloss.load_model(tmp_path / "model.gguf"), model
    model.to(stored).save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (request.param == "in shards")
    theirs = torch_model(tmp_path)
    return pyloss.load_model(tmp_path), theirs.eval()


@pytest.fixture(scope="module")
def expected(smollm2, smollm2_folder):
    """(token ids, transformers' logits) of every text."""
    theirs = torch_model(smollm2_folder)
    return [(ids, torch_logits(theirs, ids)) for ids in map(smollm2[1].encode, TEXTS)]


@pytest.mark.parametrize("i", range(len(TEXTS)))
def test_logits(smollm2, expected, i):
    ids, logits = expected[i]
    np.testing.assert_allclose(our_logits(smollm2[0], ids), logits, rtol=0, atol=1e-3)


def test_logits_from_the_folder(smollm2_folder, expected):
    model, tokenizer = pyloss.load(smollm2_folder)
    ids, logits = expected[1]
    assert tokenizer.encode(TEXTS[1]) == ids
    np.testing.assert_allclose(our_logits(model, ids), logits, rtol=0, atol=1e-3)


def test_packed_sequences_do_not_see_each_other(smollm2, expected):
    model, _ = smollm2
    parts = [ids for ids, _ in expected[:4]]
    offsets = np.cumsum([0] + [len(part) for part in parts]).astype(np.int32)
    packed = pyloss.autograd.data(model.head(model.hidden(np.concatenate(parts), offsets)))
    for i in range(4):
        np.testing.assert_allclose(
            packed[offsets[i] : offsets[i + 1]], expected[i][1], rtol=0, atol=1e-3
        )


def test_logits_of_variants(tiny):
    ours, theirs = tiny
    for ids in ragged(ours.vocab_size, 1, 33, 200):
        expected = torch_logits(theirs, ids)
        assert expected.std() > 0.5  # large enough for differences to show
        np.testing.assert_allclose(our_logits(ours, ids), expected, rtol=0, atol=1e-4)


def test_rotary_scaling_matters_at_these_lengths(tmp_path):
    """Otherwise the variants would pass without scaling."""
    (ids,) = ragged(300, 200)
    plain = torch_logits(make_tiny(), ids)
    for name in ("llama3 rotary", "linear rotary", "yarn rotary"):
        scaling = VARIANTS[name]["rope_scaling"]
        assert np.abs(torch_logits(make_tiny(rope_scaling=scaling), ids) - plain).max() > 0.1


def test_rows_and_packed_sequences_of_variants(tiny):
    ours, theirs = tiny
    parts = ragged(ours.vocab_size, 7, 1, 40, 40)
    rows = pyloss.autograd.data(ours(np.stack(parts[2:])))
    offsets = np.cumsum([0] + [len(part) for part in parts]).astype(np.int32)
    packed = pyloss.autograd.data(ours.head(ours.hidden(np.concatenate(parts), offsets)))
    for i, part in enumerate(parts):
        expected = torch_logits(theirs, part)
        np.testing.assert_allclose(packed[offsets[i] : offsets[i + 1]], expected, rtol=0, atol=1e-4)
        if i >= 2:
            np.testing.assert_allclose(rows[i - 2], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "chunks", [(140,), (1,) * 140, (60, 1, 1, 70, *[1] * 8)], ids=["at once", "one by one", "mixed"]
)
def test_cache_of_variants(tiny, chunks):
    ours, theirs = tiny
    (ids,) = ragged(ours.vocab_size, sum(chunks))
    expected, cache, done = torch_logits(theirs, ids), ours.make_cache(), 0
    for n in chunks:
        logits = ours.step(ids[done : done + n], cache)
        done += n
        np.testing.assert_allclose(logits, expected[done - 1], rtol=0, atol=1e-4)
    assert cache.length == done


def test_cache(smollm2, expected):
    model, _ = smollm2
    ids, logits = expected[4]
    cache, done = model.make_cache(), 0
    for n in (50, *[1] * 16, 20):
        step = model.step(ids[done : done + n], cache)
        done += n
        np.testing.assert_allclose(step, logits[done - 1], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "prompt",
    [
        "Once upon a time, in a small village by the sea,",
        "def fibonacci(n):\n",
        [{"role": "user", "content": "Explain in detail how rain forms."}],
    ],
    ids=["story", "code", "chat"],
)
def test_greedy_generation(smollm2, smollm2_torch, prompt):
    model, tokenizer = smollm2
    ids = (
        tokenizer.encode(prompt)
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
    )
    theirs = smollm2_torch.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=44, pad_token_id=2
    )[0, len(ids) :].tolist()
    assert len(theirs) >= 40
    steps = list(pyloss.stream_generate(model, tokenizer, ids, max_tokens=44))
    assert [step.token for step in steps] == theirs
    assert steps[-1].finish_reason == (
        "stop" if theirs[-1] in tokenizer.eos_token_ids else "length"
    )


def test_generation_ends_where_transformers_ends(smollm2, smollm2_folder, smollm2_torch):
    model, tokenizer = smollm2
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    theirs = smollm2_torch.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=44, pad_token_id=2
    )[0, len(ids) :].tolist()
    steps = list(pyloss.stream_generate(model, tokenizer, ids, max_tokens=44))
    assert [step.token for step in steps] == theirs
    assert len(theirs) < 44 and steps[-1].finish_reason == "stop"
    answer = "".join(step.text for step in steps)
    assert (
        answer
        == theirs_tokenizer.decode(theirs, skip_special_tokens=True)
        == pyloss.generate(model, tokenizer, ids, max_tokens=44)
    )


def padded(rows):
    batch = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        batch[i, : len(row)] = row
    return batch


def test_gradients_of_lora(smollm2_gguf, smollm2_folder):
    """Over the quantized base; torch uses float64, since its float32 is off by more than 1e-4."""
    ours, tokenizer = pyloss.load(smollm2_gguf)
    add_adapter(ours)
    base = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float64)
    theirs = peft_twin(ours, base).double()
    batch = padded(
        [
            tokenizer.encode(TEXTS[0] + " Rome. It has been so since 1871"),
            tokenizer.encode("def add(a, b):\n    return a + b\n"),
        ]
    )
    lengths = np.array([[0, 20], [5, 12]], np.int32)
    (loss, total), grads = pyloss.nn.value_and_grad(ours, pyloss.tuner.default_loss)(
        ours, batch, lengths
    )
    expected = torch_loss(theirs, batch, target_weights(batch, lengths).astype(np.float64))
    expected.backward()
    assert total == 19 + 7
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    matrices = peft_matrices(theirs)
    assert grads.keys() == matrices.keys() and len(grads) == 2 * 30 * len(LINEARS)
    for name, parameter in matrices.items():
        assert relative(grads[name], parameter.grad.numpy().T) < 1e-4, name


def test_gradients_of_variants(tiny):
    """Gradients of the adapters and of all arrays that are not stored matrices: norms, biases."""
    ours, base = tiny
    add_adapter(ours, size=0.1)
    theirs = peft_twin(ours, base)
    trained = peft_matrices(theirs)
    ours.unfreeze()
    for name, parameter in theirs.named_parameters():
        if parameter.ndim == 1 or name.endswith(("conv.weight", "conv1d.weight")):
            parameter.requires_grad_(True)
            trained[name.removeprefix("base_model.model.").replace(".base_layer.", ".linear.")] = (
                parameter
            )
    batch = padded(ragged(ours.vocab_size, 40, 3, 21))
    weights = np.random.default_rng(1).uniform(0, 2, batch.shape).astype(np.float32)
    for row, n in zip(weights, (40, 3, 21), strict=True):
        row[n:] = 0
    (loss, _), grads = pyloss.nn.value_and_grad(ours, pyloss.tuner.default_loss)(
        ours, batch, weights
    )
    expected = torch_loss(theirs, batch, target_weights(batch, weights))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert grads.keys() == trained.keys()
    for name, parameter in trained.items():
        assert np.linalg.norm(grads[name]) > 0, name
        expected = parameter.grad.numpy()
        expected = expected.T if expected.ndim == 2 else expected
        assert relative(grads[name], expected) < 1e-4, name
