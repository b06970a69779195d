"""`load`: a model with its tokenizer and, if requested, its adapter."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from pyloss.errors import counted
from pyloss.io.files import read_json
from pyloss.io.gguf import read_gguf
from pyloss.io.tensor_file import TensorFile
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.reading import read_model, resolve_model
from pyloss.models.transformer import Model

if TYPE_CHECKING:
    from pyloss.models.tokenizer import Tokenizer


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
    """`(model, tokenizer)`: a model with frozen parameters, and its tokenizer.

    The arguments are mlx-lm's. Weights are mapped from the file, not copied.

    Args:
        path_or_hf_repo: a GGUF file, a Hugging Face folder, or a name (see `resolve_model`).
        tokenizer_config: may set `eos_token` and `chat_template`.
        model_config: not supported: a model's configuration is in its files.
        adapter_path: a folder with an adapter for the model.
        lazy: without effect: weights are read when they are used.
        return_config: return the configuration too, as config.json has it.
        revision: of a model on the hub.
        trust_remote_code: without effect: a model's own code is never run.

    Raises:
        FileNotFoundError: no such model or adapter.
        FormatError: a malformed file.
        ValueError: an option that is not supported.
    """
    if tokenizer_config is not None and not isinstance(tokenizer_config, Mapping):
        raise TypeError(
            f"tokenizer_config is {tokenizer_config!r:.60}; it must be a mapping "
            "(an adapter is adapter_path=)"
        )
    if model_config:
        raise ValueError(
            f"model_config is {model_config!r:.80}; a model's configuration is what its files say"
        )
    place = resolve_model(path_or_hf_repo, revision)
    tokenizer: Any = None

    def read_tokenizer(config: ModelConfig, file: TensorFile) -> None:
        nonlocal tokenizer
        tokenizer = _tokenizer_in(place, file)
        more = len(tokenizer) - config.vocab_size
        if more > 0:
            warnings.warn(
                f"{place}: the tokenizer has {counted(more, 'token')} more than the model, "
                f"{config.vocab_size}: a text with one of them is refused",
                stacklevel=4,
            )

    model, _ = read_model(place, read_tokenizer)
    if adapter_path is not None:
        from pyloss.tuner.utils import load_adapters

        load_adapters(model, adapter_path)
    configure(tokenizer, tokenizer_config or {})
    if return_config:
        return (
            model,
            tokenizer,
            read_json(place / "config.json") if place.is_dir() else model.config.to_hf(),
        )
    return model, tokenizer


def load_tokenizer(path_or_hf_repo: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a model as `load` reads it; no weight is read or downloaded.

    Raises FileNotFoundError and FormatError as `load`.
    """
    place = resolve_model(path_or_hf_repo, hub_files=_TOKENIZER_FILES)
    return _tokenizer_in(place, None if place.is_dir() else read_gguf(place))


#: patterns of the tokenizer's files on the hub
_TOKENIZER_FILES = ("*.json", "*.jinja", "tokenizer.model")


def _tokenizer_in(place: Path, file: TensorFile | None) -> Tokenizer:
    from pyloss.models.tokenizer import Tokenizer

    if place.is_dir() or file is None:
        return Tokenizer.from_folder(place)
    return Tokenizer.from_gguf(file.metadata, place)


def configure(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Apply the `tokenizer_config` of mlx-lm's `load`; refuse unknown keys."""
    for key, value in settings.items():
        if key == "eos_token":
            ids = tokenizer.encode(value, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(
                    f"tokenizer_config: eos_token {value!r} is {len(ids)} tokens; "
                    "it must be a single one"
                )
            tokenizer.eos_token_ids.add(ids[0])
        elif key == "chat_template":
            tokenizer.chat_template = value
        elif key not in ("trust_remote_code", "use_fast"):
            known = "eos_token, chat_template, trust_remote_code, use_fast"
            raise ValueError(f"tokenizer_config: unknown key {key!r}; known are {known}")
