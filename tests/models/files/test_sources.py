"""Both sources give the same tensors, with Hugging Face's names and row order."""

import numpy as np
import pytest
import tiny

from pyloss import FormatError
from pyloss.io.gguf import read_gguf
from pyloss.io.safetensors import read_safetensors
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.files.sources import FolderSource, GGUFSource

QUERY, VALUE = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


@pytest.fixture
def sources(tmp_path):
    """(arrays, [source of a folder, source of a GGUF file]) of one model."""
    pytest.importorskip("gguf")
    _, arrays = tiny.write_folder(tmp_path / "folder", bias=True)
    tiny.write_gguf(tmp_path / "model.gguf", bias=True)
    file = read_gguf(tmp_path / "model.gguf")
    config = ModelConfig.from_gguf(file.metadata, file.tensors)
    return arrays, [
        FolderSource(read_safetensors(tmp_path / "folder"), config),
        GGUFSource(file, config),
    ]


def test_arrays_and_matrices(sources):
    arrays, both = sources
    for source in both:
        for name in (QUERY, VALUE):
            rows, cols = arrays[f"{name}.weight"].shape
            rotary = name == QUERY
            weight = source.matrix(name, rows, cols, rotary=rotary)
            assert not weight.raw.flags.owndata
            np.testing.assert_array_equal(weight.dequantize(), arrays[f"{name}.weight"])
            np.testing.assert_array_equal(
                source.array(f"{name}.bias", rows, rotary=rotary), arrays[f"{name}.bias"]
            )
        np.testing.assert_array_equal(source.norm("model.norm", 32), arrays["model.norm.weight"])


def test_what_is_there(sources):
    for source in sources[1]:
        assert source.has("model.embed_tokens.weight") and source.has(f"{QUERY}.bias")
        assert not source.has("lm_head.weight") and not source.has(
            "model.layers.3.self_attn.q_proj.weight"
        )


def test_shapes_are_checked(sources):
    for source in sources[1]:
        with pytest.raises(
            FormatError, match=r"\(32, 32\), where the configuration gives \(32, 16\)"
        ):
            source.matrix(QUERY, 32, 16, rotary=True)
        with pytest.raises(FormatError, match=r"\(32,\), where the configuration gives \(16,\)"):
            source.array(f"{QUERY}.bias", 16, rotary=True)
        with pytest.raises(FormatError, match="missing"):
            source.array("lm_head.weight", 29, 32)
