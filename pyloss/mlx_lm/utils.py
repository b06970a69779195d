"""mlx_lm.utils: loading, quantizing and writing models."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyloss import loading
from pyloss.io.console import out
from pyloss.io.files import read_json, user_path, write_bytes, write_json
from pyloss.mlx_lm.arrays import seen_as_mlx
from pyloss.mlx_lm.command import flag_size
from pyloss.mlx_lm.names import absent
from pyloss.mlx_lm.tokenizer_utils import TokenizerWrapper, load as load_wrapper, wrapped
from pyloss.models import conversion
from pyloss.models.reading import read_model, resolve_model
from pyloss.models.saving import model_dtype, save_model as write_model
from pyloss.nn import count_parameters
from pyloss.tuner.run.plan import stored_bytes

__all__ = [
    "TokenizerWrapper",
    "can_run_metal",
    "common_prefix_len",
    "compute_bits_per_weight",
    "dequantize_model",
    "does_model_support_input_embeddings",
    "get_total_parameters",
    "load",
    "load_adapters",
    "load_config",
    "load_model",
    "load_tokenizer",
    "make_shards",
    "maybe_set_recommended_wired_limit",
    "quantize_model",
    "save",
    "save_config",
    "save_model",
]

__getattr__ = absent(__name__)

MAX_FILE_SIZE_GB = 5

_parse_size = flag_size  # mlx-lm's name, which scripts with flags of their own use

#: transformers' form of numbers that JSON lacks
_TAG = "__float__"
_TAGGED = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def can_run_metal() -> bool:
    """False: pyloss computes on the processor."""
    return False


def maybe_set_recommended_wired_limit() -> int | None:
    """None: there is no such limit."""
    return None


def get_total_parameters(model: Any) -> int:
    """The number of a model's parameters, those of quantized layers included."""
    return count_parameters(model)[1]


def compute_bits_per_weight(model: Any) -> float:
    """The bits that a parameter takes on average."""
    return stored_bytes(model) * 8 / count_parameters(model)[1]


def load_config(model_path: Path) -> dict[str, Any]:
    """The config.json of a folder, with the end tokens of its generation_config.json."""
    place = user_path(model_path)
    config: dict[str, Any] = _decoded(read_json(place / "config.json"))
    generation = place / "generation_config.json"
    if generation.exists():
        try:
            found = json.loads(generation.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            found = {}
        if ends := found.get("eos_token_id", False):
            config["eos_token_id"] = ends
    return config


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TAG} and value[_TAG] in _TAGGED:
            return _TAGGED[value[_TAG]]
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _encoded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        tags = {number: tag for tag, number in _TAGGED.items() if not math.isnan(number)}
        return {_TAG: tags.get(value, "NaN")}
    if isinstance(value, Mapping):
        return {key: _encoded(item) for key, item in value.items()}
    return [_encoded(item) for item in value] if isinstance(value, list | tuple) else value


def load_model(
    model_path: Path,
    lazy: bool = False,
    strict: bool = True,
    model_config: dict[str, Any] | None = None,
    get_model_classes: Callable[..., Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """`(model, config)` of a folder or GGUF file.

    Weights are mapped, whatever `lazy` says, and must be complete, whatever `strict` says.
    Raises FileNotFoundError, FormatError for malformed files, ValueError for `get_model_classes`
    and for changes by `model_config`.
    """
    if get_model_classes is not None:
        raise ValueError(
            "get_model_classes is not supported: pyloss builds models from their configuration, "
            "see pyloss.models"
        )
    _refuse_changes(model_config)
    place = resolve_model(model_path)
    model, _ = read_model(place)
    return seen_as_mlx(model).unfreeze(), _config_of(place, model)


def _refuse_changes(model_config: Mapping[str, Any] | None) -> None:
    changes = {key: value for key, value in (model_config or {}).items() if value}
    if changes:
        raise ValueError(
            f"model_config is {changes!r:.80}; a model's configuration is what its files say: "
            "change a copy of its config.json"
        )


def _config_of(place: Path, model: Any) -> dict[str, Any]:
    return load_config(place) if place.is_dir() else model.config.to_hf()


def load_adapters(model: Any, adapter_path: str) -> Any:
    """The model with the adapter of a folder."""
    from pyloss.mlx_lm.tuner.utils import load_adapters as load_them

    return load_them(model, adapter_path)


def load_tokenizer(
    model_path: Any, tokenizer_config_extra: Any = None, eos_token_ids: Any = None
) -> TokenizerWrapper:
    """The tokenizer of a model, as `tokenizer_utils.load`."""
    return load_wrapper(model_path, tokenizer_config_extra, eos_token_ids)


def load(
    path_or_hf_repo: str,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """`(model, tokenizer)`, and the configuration with `return_config`; see `pyloss.load`.

    All parameters can be trained, as in mlx-lm; with an adapter, the adapter's alone. Raises as
    `pyloss.load`.
    """
    _refuse_changes(model_config)
    place = resolve_model(path_or_hf_repo, revision)
    model, tokenizer = loading.load(place, tokenizer_config, lazy=lazy)
    config = _config_of(place, model)
    ends = config.get("eos_token_id")
    shown = seen_as_mlx(model)
    if adapter_path is None:
        shown.unfreeze()
    else:
        load_adapters(shown, adapter_path)
        model.eval()
    tokens = wrapped(tokenizer, [ends] if isinstance(ends, int) else ends)
    return (shown, tokens, config) if return_config else (shown, tokens)


def make_shards(
    weights: Mapping[str, Any], max_file_size_gb: int = MAX_FILE_SIZE_GB
) -> list[dict[str, Any]]:
    """Weights in parts of at most so many GiB; a larger tensor is a part of its own."""
    most = max_file_size_gb << 30
    shards: list[dict[str, Any]] = []
    used = 0
    for name, value in weights.items():
        if not shards or used + value.nbytes > most:
            shards.append({})
            used = 0
        shards[-1][name] = value
        used += value.nbytes
    return shards


def save_model(save_path: str | Path, model: Any, *, donate_model: bool = False) -> None:
    """Write the weights and the configuration of a model into a folder.

    A model that is there moves to `previous-N`. Raises ValueError for unfused adapters.
    """
    size = MAX_FILE_SIZE_GB << 30
    write_model(model, save_path, shard_size=size)


def quantize_model(
    model: Any,
    config: dict[str, Any],
    group_size: int | None,
    bits: int | None,
    mode: str = "affine",
    global_scale: bool = False,
    quant_predicate: Callable[[str, Any], bool | dict[str, Any]] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Quantize the layers of a model in place; return it and the configuration that says so.

    `quant_predicate(path, module)` is False for layers that stay, True for those that do not, or
    their `{"bits": ..., "group_size": ...}`. Raises ValueError for other modes than "affine".
    """
    given = (config, group_size, bits, mode, global_scale, quant_predicate)
    return quantized(model, *given, model_dtype(model))


def quantized(
    model: Any,
    config: dict[str, Any],
    group_size: int | None,
    bits: int | None,
    mode: str,
    global_scale: bool,
    quant_predicate: Callable[[str, Any], bool | dict[str, Any]] | None,
    floats: str,
) -> tuple[Any, dict[str, Any]]:
    """`quantize_model`, with scales of the type `floats`, to which weights are rounded first."""
    if mode != "affine" or global_scale:
        raise ValueError(
            f"mode is {mode!r}, and pyloss writes 'affine' alone (pyloss convert --quantize nf4 "
            "writes bitsandbytes' NF4)"
        )
    params = {"group_size": group_size or 64, "bits": bits or 4, "mode": mode}
    changed = copy.deepcopy(config)
    partly = "quantization" in changed
    changed.setdefault("quantization", dict(params))
    chosen: dict[tuple[int, int], list[str]] = {}
    for path, module in conversion.quantizable(model):
        found: Any = True if quant_predicate is None else quant_predicate(path, module)
        if not found:
            continue
        here: dict[str, Any] = params | found if isinstance(found, dict) else dict(params)
        if isinstance(found, dict) or partly:
            changed["quantization"][path] = found if isinstance(found, dict) else here
        chosen.setdefault((int(here["bits"]), int(here["group_size"])), []).append(path)
    for (wide, size), paths in chosen.items():
        conversion.quantize_model(model, f"q{wide}", size, floats, names=paths)
    changed["quantization_config"] = changed["quantization"]
    out(f"[INFO] Quantized model with {compute_bits_per_weight(model):.3f} bits per weight.")
    return model, changed


def dequantize_model(model: Any) -> Any:
    """The model with its quantized layers as floats, in place."""
    conversion.dequantize_model(model)
    return model


def save_config(
    config: dict[str, Any], config_path: str | Path, *, keep_vision_config: bool = False
) -> None:
    """Write a configuration to the file `config_path`, its keys sorted."""
    dropped = {"_name_or_path"} | (set() if keep_vision_config else {"vision_config"})
    for key in dropped:
        config.pop(key, None)
    if "quantization" in config:
        config["quantization_config"] = config["quantization"]
    write_json(user_path(config_path), _encoded(config), sort_keys=True)


def save(
    dst_path: str | Path,
    src_path_or_repo: str | Path,
    model: Any,
    tokenizer: TokenizerWrapper,
    config: dict[str, Any],
    donate_model: bool = True,
) -> None:
    """Write a model with its tokenizer and configuration into a folder.

    A model that is there moves to `previous-N`. The configuration is that of the model's layers,
    with the keys of `config` that these do not say.
    """
    write(dst_path, src_path_or_repo, model, tokenizer, config)


def write(
    dst_path: str | Path,
    src_path_or_repo: str | Path,
    model: Any,
    tokenizer: TokenizerWrapper,
    config: Mapping[str, Any],
    dtype: str | None = None,
) -> None:
    """`save`, with floats of the type `dtype`."""
    folder, source = user_path(dst_path), user_path(src_path_or_repo)
    tokens, size = getattr(tokenizer, "plain", tokenizer), MAX_FILE_SIZE_GB << 30
    generation = source / "generation_config.json"
    # Read first: the source may be the folder whose files move away.
    settings = generation.read_bytes() if generation.is_file() else None
    write_model(model, folder, tokens, dtype, shard_size=size)
    written = read_json(folder / "config.json")
    left_out = {"quantization", "quantization_config", "_name_or_path", "vision_config"}
    kept = {key: value for key, value in config.items() if key not in left_out}
    save_config({**kept, **written}, folder / "config.json")
    if settings is not None:
        write_bytes(folder / generation.name, settings)


def common_prefix_len(list1: Any, list2: Any) -> int:
    """How many items two lists begin with alike."""
    same = (a == b for a, b in zip(list1, list2, strict=False))
    return next((i for i, equal in enumerate(same) if not equal), min(len(list1), len(list2)))


def does_model_support_input_embeddings(model: Any) -> bool:
    """False: pyloss's models take token ids."""
    return False
