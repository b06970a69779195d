"""GGUF files written by pyloss, run by llama.cpp: whole models, and adapters with their base."""

import llama_runner
import numpy as np
import pytest
import tokenizers
from parity_models import (
    GEMMA2,
    GEMMA3,
    GEMMA4,
    GEMMA4_EXPERTS,
    GRANITE,
    GRANITE4,
    GRANITE4_GROUPS,
    GRANITE4_MAMBA,
    LFM2,
    LLAMA3,
    MINISTRAL3,
    MIXTURES,
    OLMO2,
    OLMO3,
    PHI3,
    PHI4,
    QWEN3_5_EVEN,
    QWEN3_5_GGUF,
    SMOLLM3_GGUF,
    YARN,
    add_adapter,
    longrope,
    make_tiny,
    our_logits,
)

import pyloss
from pyloss.io.gguf import read_gguf
from pyloss.models import load_model
from pyloss.models.files.gguf_writer import write_gguf
from pyloss.models.text.gguf_tokenizer import PRE_TOKENIZERS
from pyloss.models.tokenizer import Tokenizer
from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.adapters.gguf import write_lora_gguf
from pyloss.weights.formats import SEARCHED

PROMPT = "The quick brown fox jumps over the lazy dog, and then it"
IDS = [int(i) for i in np.random.default_rng(0).integers(5, 260, 40)]
TOKENS = 12


@pytest.fixture(autouse=True)
def llama_cpp():
    llama_runner.require()


def difference(model, ids, answer):
    """Largest difference of log probabilities from llama.cpp's answer after `ids`."""
    logits = our_logits(model, ids + answer.tokens[:-1])[len(ids) - 1 :].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return max(
        abs(row[token] - value)
        for row, step in zip(logits, answer.logprobs)
        for token, value in step.items()
    )


def agree(model, ids, answer, atol=1e-3):
    assert difference(model, ids, answer) < atol
    assert [
        int(row.argmax()) for row in our_logits(model, ids + answer.tokens[:-1])[len(ids) - 1 :]
    ] == answer.tokens


# ---- The embedded model


@pytest.fixture(scope="module")
def adapted(smollm2_gguf):
    model, tokenizer = pyloss.load(smollm2_gguf)
    return add_adapter(model, size=0.03), tokenizer


def greedy(model, tokenizer, ids):
    return [step.token for step in pyloss.stream_generate(model, tokenizer, ids, max_tokens=TOKENS)]


def test_an_adapter_beside_its_base_and_fused(adapted, smollm2, tmp_path):
    model, tokenizer = adapted
    ids = tokenizer.encode(PROMPT)
    write_gguf(smollm2[0], tmp_path / "base.gguf", tokenizer, "f32")
    plain = llama_runner.run(tmp_path / "base.gguf", ids, TOKENS)
    agree(smollm2[0], ids, plain)

    write_lora_gguf(model, tmp_path / "lora.gguf")
    beside = llama_runner.run(tmp_path / "base.gguf", ids, TOKENS, tmp_path / "lora.gguf")
    assert beside.tokens != plain.tokens  # the adapter has an effect
    agree(model, ids, beside)
    assert beside.tokens == greedy(model, tokenizer, ids)

    fused, _ = pyloss.load("smollm2-135m")
    add_adapter(fused, size=0.03)
    write_gguf(fused.fuse(dequantize=True), tmp_path / "fused.gguf", tokenizer, "f32")
    agree(model, ids, llama_runner.run(tmp_path / "fused.gguf", ids, TOKENS))


@pytest.mark.filterwarnings("ignore:storing the fused weight")
def test_a_model_fused_into_its_own_formats(smollm2_gguf, tmp_path):
    """Q4_1 and Q8_0 as stored; llama.cpp also quantizes the other operand."""
    model, tokenizer = pyloss.load(smollm2_gguf)
    write_gguf(add_adapter(model, size=0.2).fuse(), tmp_path / "fused.gguf", tokenizer)
    ids = tokenizer.encode(PROMPT)
    answer = llama_runner.run(tmp_path / "fused.gguf", ids, TOKENS)
    again, _ = pyloss.load(tmp_path / "fused.gguf")
    np.testing.assert_array_equal(our_logits(again, ids), our_logits(model, ids))
    assert difference(again, ids, answer) < 0.7


def test_a_split_model(smollm2, smollm2_gguf, tmp_path):
    _, tokenizer = pyloss.load(smollm2_gguf)
    model = smollm2[0]
    first = write_gguf(model, tmp_path / "m.gguf", tokenizer, "f16", split_max_size=100_000_000)
    assert len(list(tmp_path.iterdir())) > 2
    ids = tokenizer.encode(PROMPT)
    answer = llama_runner.run(first, ids, TOKENS)
    agree(load_model(first), ids, answer, atol=2e-2)


# ---- Every family and option, over a tiny model

MODELS = {
    "llama": {},
    "llama-bias": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "rope_scaling": LLAMA3,
    },
    "llama-heads": {"head_dim": 32, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {"family": "Mistral", "sliding_window": 100, "tie_word_embeddings": False},
    "qwen2": {"family": "Qwen2", "rope_scaling": YARN},
    "qwen3": {"family": "Qwen3", "tie_word_embeddings": False},
    "granite": GRANITE,
    "granite-bias": {
        **GRANITE,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "rope_scaling": LLAMA3,
    },
    "granite4": GRANITE4,
    "granite4-mamba": GRANITE4_MAMBA,
    "granite4-mamba-groups": {
        **GRANITE4_GROUPS,
        "mamba_expand": 2,
        "mamba_n_heads": 8,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "time_step_limit": [0.0, float("inf")],
    },
    "granite4-nope": {**GRANITE4, "position_embedding_type": "nope", "tie_word_embeddings": False},
    "ministral3": MINISTRAL3,
    "ministral3 of another scale": {
        **MINISTRAL3,
        "tie_word_embeddings": False,
        "rope_scaling": {**MINISTRAL3["rope_scaling"], "mscale_all_dim": 0.5},
    },
    "smollm3": {**SMOLLM3_GGUF, "rope_scaling": YARN},
    "olmo2": {**OLMO2, "tie_word_embeddings": False, "rope_scaling": YARN},
    "olmo2-tied": OLMO2,
    "olmo3": {**OLMO3, "tie_word_embeddings": False, "rope_scaling": YARN},
    "olmo3-pattern": {
        **OLMO3,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    },
    "gemma2": GEMMA2,
    "gemma4": GEMMA4,
    "gemma4-plain": {**GEMMA4, "num_kv_shared_layers": 0},
    "gemma4-experts": GEMMA4_EXPERTS,
    "lfm2": LFM2,
    "qwen3_5": QWEN3_5_GGUF,
    "qwen3_5-even": QWEN3_5_EVEN,
    "phi3": {**PHI3, "sliding_window": 100, "tie_word_embeddings": False},
    # llama.cpp takes the long factors if its context, 512, is longer than the original length.
    "phi4": {**PHI4, "original_max_position_embeddings": 512, "max_position_embeddings": 2048},
    "phi3-longrope": longrope(32),
    "gemma3": {
        "family": "Gemma3",
        **GEMMA3,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    **MIXTURES,
    "granitemoehybrid-mamba": {
        **GRANITE4_MAMBA,
        **MIXTURES["granitemoehybrid"],
        "layer_types": ["mamba", "attention"],
        "position_embedding_type": "nope",
    },
    # llama.cpp expects k's norm to be as wide as q's.
    "olmoe": {**MIXTURES["olmoe"], "num_key_value_heads": 4},
    "olmoe-tied": {**MIXTURES["olmoe"], "num_key_value_heads": 4, "tie_word_embeddings": True},
}


def plain_tokenizer():
    """Tokens that are ASCII letters, since llama.cpp's server holds back incomplete UTF-8."""
    words = {word: i for i, word in enumerate(["t", "x", "tx", *(f"t{i}" for i in range(3, 300))])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[("t", "x")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Tokenizer(backend, {"eos_token": "tx"})


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_vocabularies_of_sentencepiece(kind, tmp_path):
    """Written from a folder; llama.cpp's answers show that it reads texts as the same tokens."""
    spm = pytest.importorskip("trained_sentencepiece", reason="needs SentencePiece (parity extra)")
    processor = spm.train(kind, tmp_path)
    Tokenizer.from_gguf(spm.gguf_metadata(processor, kind)).save(tmp_path / "hf")
    theirs = make_tiny(vocab_size=spm.SIZE)
    for index in range(spm.SIZE):  # no byte tokens in answers: the server would hold them back
        theirs.model.embed_tokens.weight.data[index] *= not (
            processor.is_byte(index) or processor.is_control(index)
        )
    theirs.save_pretrained(tmp_path / "hf")
    model, tokenizer = pyloss.load(tmp_path / "hf")
    write_gguf(model, tmp_path / "m.gguf", tokenizer)
    for text in (
        PROMPT,
        " two  spaces,\n\n    four, é→日 <b>x</b>",
        "a<end_of_turn>\n<start_of_turn>b c",
    ):
        agree(model, tokenizer.encode(text), llama_runner.run(tmp_path / "m.gguf", text, 3))


@pytest.mark.parametrize("name", ["tuned Phi3 of mine", "something else"])
def test_special_tokens_of_phi3_strip_the_space_after_them(name, tmp_path):
    """By the name of the model, which is all that llama.cpp goes by."""
    spm = pytest.importorskip("trained_sentencepiece", reason="needs SentencePiece (parity extra)")
    processor = spm.train("llama", tmp_path)
    metadata = spm.gguf_metadata(processor, "llama")
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[tokens.index("<start_of_turn>")] = "<|endoftext|>"
    Tokenizer.from_gguf({**metadata, "general.name": name}).save(tmp_path / "hf")
    theirs = make_tiny(vocab_size=spm.SIZE)
    for index in range(spm.SIZE):
        theirs.model.embed_tokens.weight.data[index] *= not (
            processor.is_byte(index) or processor.is_control(index)
        )
    theirs.save_pretrained(tmp_path / "hf")
    model, tokenizer = pyloss.load(tmp_path / "hf")
    write_gguf(model, tmp_path / "phi-3.gguf", tokenizer)
    again, read = pyloss.load(tmp_path / "phi-3.gguf")
    found = read_gguf(tmp_path / "phi-3.gguf").metadata["general.name"]
    assert found == ("phi-3" if "Phi" in name else "Phi 3")
    for text in ("a<end_of_turn>\n b c", "a<end_of_turn>  b<|endoftext|>\n\n c</s>\nd"):
        ids = tokenizer.encode(text)
        assert read.encode(text) == ids
        agree(again, ids, llama_runner.run(tmp_path / "phi-3.gguf", text, 3))
    plain = Tokenizer.from_gguf(metadata)
    assert (plain.encode(text) == ids) == (name == "something else")


TEXTS = (
    PROMPT,
    "It's 1234567 x'LL WE'RE  two   spaces\n\n  é→日 don't3.14",
    "getHTTPResponse a/\nb._c--=\t\tT\r\n 12 34 ",
)
# Some cross the borders of some pre-tokenizers only.
MERGES = (
    "t h", "th e", "Ġ Ġ", "Ġ x", "' s", "' L", "'L L", "1 2", "12 3", "3 4", "123 4", "4 5", "Ċ Ċ", "Ċ Ġ", "/ Ċ", ". _", "e t", "t H", "- -",
    "Ġ 1", "Ġ1 2",
)  # fmt: skip


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_texts_are_cut_as_llama_cpp_cuts_them(pre, tmp_path, monkeypatch):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, *dict.fromkeys(merge.replace(" ", "") for merge in MERGES)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    monkeypatch.setattr(
        "pyloss.models.files.gguf_writer.vocabulary_metadata", lambda tokenizer, size: metadata
    )
    theirs = make_tiny(vocab_size=len(tokens))
    for index, token in enumerate(
        tokens
    ):  # answers of letters alone: incomplete UTF-8 is held back
        theirs.model.embed_tokens.weight.data[index] *= token.isascii() and token.isalpha()
    theirs.save_pretrained(tmp_path / "hf")
    tokenizer = Tokenizer.from_gguf(metadata)
    write_gguf(load_model(tmp_path / "hf"), tmp_path / "m.gguf", tokenizer)
    model = load_model(tmp_path / "m.gguf")
    for text in TEXTS:
        agree(model, tokenizer.encode(text), llama_runner.run(tmp_path / "m.gguf", text, 3))


@pytest.mark.parametrize("type", list(SEARCHED))
def test_searched_formats(type, tmp_path):
    """llama.cpp also quantizes the other operand, to 8 bits in blocks of 32 or 256."""
    make_tiny(hidden_size=256, intermediate_size=512).save_pretrained(tmp_path / "hf")
    model = load_model(tmp_path / "hf")
    write_gguf(model, tmp_path / "m.gguf", plain_tokenizer(), type)
    written = load_model(tmp_path / "m.gguf")
    assert written.layers[0].mlp.up_proj.weight.format == type
    answer = llama_runner.run(tmp_path / "m.gguf", IDS, TOKENS)
    assert difference(written, IDS, answer) < min(0.5, difference(model, IDS, answer))


@pytest.mark.parametrize("name", list(MODELS))
def test_families(name, tmp_path):
    make_tiny(**MODELS[name]).save_pretrained(tmp_path / "hf")
    model, tokenizer = load_model(tmp_path / "hf"), plain_tokenizer()
    write_gguf(model, tmp_path / "base.gguf", tokenizer)
    # llama.cpp's GELU is a float16 table. Its keys and values are float16, and the norms of the
    # delta rule's results that are near 0 multiply the difference.
    atol = 5e-3 if name.startswith(("gemma", "qwen3_5", "qwen3_next")) else 1e-3
    agree(model, IDS, llama_runner.run(tmp_path / "base.gguf", IDS, TOKENS), atol)
    block = {"mixtral": "block_sparse_moe.switch_mlp"}.get(
        name,
        "mlp.switch_mlp"
        if name.removesuffix("-tied").removesuffix("-mamba") in MIXTURES
        else "mlp",
    )
    keys = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", f"{block}.down_proj"]
    if name.startswith("phi"):
        keys[:2] = ["self_attn.qkv_proj", "mlp.gate_up_proj"]
    last = f"{block}.down_proj"
    if name.removesuffix("-mamba") in ("granitemoeshared", "granitemoehybrid"):
        keys += ["shared_mlp.input_linear", "shared_mlp.output_linear"]
    if name.startswith("granitemoe"):
        last = "block_sparse_moe.switch_mlp.down_proj"
        keys = [key.replace("mlp.switch_mlp", "block_sparse_moe.switch_mlp") for key in keys]
    if name.startswith("granite4"):
        last = "shared_mlp.output_linear"
        keys[-1:] = ["shared_mlp.input_linear", last]
    if "mamba" in name:
        keys += ["mamba.in_proj", "mamba.out_proj"]
    if name == "lfm2_moe":
        last = "feed_forward.w2"
        keys = ["self_attn.k_proj", "conv.in_proj", last, "feed_forward.switch_mlp.down_proj"]
    if name == "lfm2":
        last = "feed_forward.w2"
        keys = ["self_attn.k_proj", "self_attn.out_proj", "conv.in_proj", "conv.out_proj", last]
    if name == "gemma4-experts":
        keys += ["router.proj", "switch_mlp.gate_proj", "switch_mlp.down_proj"]
    if name == "qwen3_next":
        keys += [f"linear_attn.{part}" for part in ("in_proj_qkvz", "in_proj_ba", "out_proj")]
    elif name.startswith("qwen3_5"):
        keys += [f"linear_attn.{part}" for part in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")]  # fmt: skip
    add_adapter(
        model,
        keys=keys + ([] if model.lm_head is None else ["lm_head", "model.embed_tokens"]),
        size=0.2,
    )
    adapter_modules(model)[f"model.layers.0.{last}"].scale = 5.0
    write_lora_gguf(model, tmp_path / "lora.gguf")
    agree(
        model,
        IDS,
        llama_runner.run(tmp_path / "base.gguf", IDS, TOKENS, tmp_path / "lora.gguf"),
        atol,
    )


@pytest.mark.parametrize(
    "said",
    [
        {"rope.scaling.factor": 4.0},
        {"rope.scale_linear": 4.0},
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
    ],
    ids=str,
)
def test_rotary_scaling_without_a_type(said, tmp_path, monkeypatch):
    make_tiny().save_pretrained(tmp_path / "hf")
    model = load_model(tmp_path / "hf")
    monkeypatch.setattr("pyloss.models.files.gguf_writer.gguf_scaling", lambda *_: said)
    write_gguf(model, tmp_path / "m.gguf", plain_tokenizer())
    answer = llama_runner.run(tmp_path / "m.gguf", IDS, TOKENS)
    agree(load_model(tmp_path / "m.gguf"), IDS, answer)
    # The factor has an effect.
    assert (difference(model, IDS, answer) > 0.01) == ("rope.scaling.type" not in said)
