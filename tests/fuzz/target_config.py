"""Folders with a malformed config.json or generation_config.json."""

import tiny_files
from mutation import words_of
from running import put_files

from pyloss.models.config.families import FAMILIES

WORDS = words_of(
    "models/config/model_config",
    "models/config/hf_reader",
    "models/config/fields",
    "models/config/mixture",
    "models/config/rope_scaling",
    "models/config/families",
    "models/files/quantized",
    "models/reading",
)
EXTRA = {
    "rope_scaling": ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, {"type": "linear", "factor": 2.0},
                     {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
    "rope_parameters": ({"rope_theta": 100.0, "rope_type": "default"}, {"full_attention": {"rope_theta": 1e4}},
                        {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e3, "rope_type": "default"}}),
    "layer_types": (["full_attention", "sliding_attention"],),
    "sliding_window": (4,),
    "no_rope_layers": ([1, 0], [0, 0], [1], [2, 1]),
    "no_rope_layer_interval": (1, 2),
    "quantization": ({"group_size": 32, "bits": 4}, {"group_size": 64, "bits": 8, "mode": "affine"}),
    "quantization_config": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "version": "gemm"},
    ),
    "text_config": ({"hidden_size": 16},),
    "tie_word_embeddings": (True, False),
}  # fmt: skip


#: formats of quantized folders
GROUPED = ("affine4", "nf4", *tiny_files.PACKED)


def prepare():
    for family in FAMILIES:
        tiny_files.folder(family)
    for format in GROUPED:
        tiny_files.folder("llama", format)


def make(m):
    family = m.pick(list(FAMILIES))
    format = m.pick(GROUPED) if family == "llama" and m.chance(0.3) else "f32"
    files = {
        k: v
        for k, v in tiny_files.folder(family, format).items()
        if k in ("config.json", "model.safetensors")
    }
    name = "config.json"
    text = files[name].decode()
    if m.chance(0.3) and not m.pristine:
        key = m.pick(list(EXTRA))
        text = (
            text.rstrip().removesuffix("}") + f', "{key}": {m.dumps(m.pick(EXTRA[key])).decode()}}}'
        )
    files[name] = m.json(text, WORDS)
    return files


def use(files, folder):
    from pyloss.models import load_model

    put_files(folder, files)
    with tiny_files.quiet():
        tiny_files.exercise(load_model(folder))
