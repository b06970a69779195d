"""Ollama's Modelfile: the parameters that it takes of a model's folder."""

import json

import pytest
import tiny

from pyloss.models.files.modelfile import modelfile
from pyloss.models.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}{{ '<assistant>' }}"
)


@pytest.fixture
def lines(tmp_path):
    """The parameters of the Modelfile of a folder with this generation_config.json."""

    def of(said):
        tokenizer = tiny.byte_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save(tmp_path)
        if said is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(said))
        config = type("Config", (), {"max_position_embeddings": 512})
        text = modelfile("model.gguf", Tokenizer.from_folder(tmp_path), config)
        return [line for line in text.splitlines() if line.startswith("PARAMETER")]

    return of


def test_sampling_is_as_the_folder_says(lines):
    said = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None,
        "repetition_penalty": 1.05, "transformers_version": "5.0",
    }  # fmt: skip
    assert lines(said) == [
        'PARAMETER stop "</s>"', "PARAMETER temperature 0.6", "PARAMETER top_p 0.95",
        "PARAMETER top_k 20", "PARAMETER repeat_penalty 1.05", "PARAMETER num_ctx 512",
    ]  # fmt: skip


def test_without_it_ollamas_defaults_stay(lines):
    plain = ['PARAMETER stop "</s>"', "PARAMETER num_ctx 512"]
    assert lines(None) == plain
    assert lines({"eos_token_id": 2}) == plain


def test_greedy_generation_has_temperature_0(lines):
    found = lines({"do_sample": False, "temperature": 0.6})
    assert "PARAMETER temperature 0" in found and len(found) == 3


@pytest.mark.parametrize("value", ["warm", -1, True])
def test_what_is_no_number_is_refused(lines, value):
    with pytest.raises((ValueError, TypeError), match=r"generation_config.json: temperature"):
        lines({"temperature": value})
