"""The measured models: SmolLM2-135M in each format; `load` makes those of `shapes` too.

Files are written once for all programs.
"""

from __future__ import annotations

from pathlib import Path

from common import WORK

import pyloss
from pyloss.models import quantize_model
from pyloss.models.synthetic import STORED_TYPES, random_model, shape_of
from pyloss.models.transformer import Model

MODEL = "smollm2-135m"  # Q4_1; the embedded model


def load(model: str, stored_type: str | None = None) -> Model:
    """A pyloss model; of a config.json one with random weights, stored as `stored_type`."""
    if not model.endswith(".json"):
        return pyloss.load_model(model)
    config, format = shape_of(Path(model))
    return random_model(config, STORED_TYPES[stored_type] if stored_type else format)


def float_folder() -> str:
    """A float32 Hugging Face folder."""
    folder = WORK / "smollm2-f32"
    if not (folder / "config.json").exists():
        model, tokenizer = pyloss.load(MODEL)
        model.save(folder, tokenizer)
    return str(folder)


def nf4_folder() -> str:
    """The model in NF4, as `pyloss convert --quantize nf4` writes it and transformers reads it."""
    folder = WORK / "smollm2-nf4"
    if not (folder / "config.json").exists():
        model, tokenizer = pyloss.load(float_folder())
        quantize_model(model, "nf4")
        model.save(folder, tokenizer)
    return str(folder)


def q8_file() -> str:
    """The model as a Q8_0 GGUF file."""
    path = WORK / "smollm2-q8_0.gguf"
    if not path.exists():
        model, tokenizer = pyloss.load(float_folder())
        pyloss.export(model, path, "gguf", tokenizer, type="q8_0")
    return str(path)


def q4_file() -> str:
    """The embedded GGUF file."""
    return str(pyloss.models.resolve_model(MODEL))


def documents() -> str:
    """This project's pages, end to end."""
    root = Path(__file__).resolve().parent.parent
    pages = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)
