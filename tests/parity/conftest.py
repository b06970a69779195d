"""The embedded model for parity tests: its GGUF file, and a Hugging Face folder in float32."""

import pytest


@pytest.fixture(scope="session")
def smollm2_gguf():
    """The path of SmolLM2-135M-Instruct's Q4_1 file."""
    from pyloss.models.reading import resolve_model

    try:
        return resolve_model("smollm2-135m")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf):
    """(model, tokenizer) from the GGUF file; tests must not change the model."""
    import pyloss

    return pyloss.load(smollm2_gguf)


@pytest.fixture(scope="session")
def smollm2_folder(smollm2, smollm2_gguf, tmp_path_factory):
    """A folder written by pyloss; transformers and gguf read equal tensors from the GGUF file."""
    torch = pytest.importorskip("torch", reason="compares with torch (parity extra)")
    transformers = pytest.importorskip(
        "transformers", reason="compares with transformers (parity extra)"
    )
    pytest.importorskip("gguf", reason="transformers reads GGUF files with it (parity extra)")
    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = smollm2
    model.save(folder, tokenizer)
    kind = transformers.AutoModelForCausalLM
    theirs = kind.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    reread = kind.from_pretrained(folder, dtype=torch.float32)
    expected, found = theirs.state_dict(), reread.state_dict()
    assert expected.keys() == found.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    assert not different, different[:5]
    for name in (
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
        "rope_parameters",
        "eos_token_id",
    ):
        assert getattr(reread.config, name) == getattr(theirs.config, name), name
    assert reread.config.rms_norm_eps == pytest.approx(theirs.config.rms_norm_eps, rel=1e-6)
    return folder


@pytest.fixture
def smollm2_torch(smollm2_folder):
    """The same weights in transformers; a new model per test, which may change it."""
    from parity_models import torch_model

    return torch_model(smollm2_folder)
