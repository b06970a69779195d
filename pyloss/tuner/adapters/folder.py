"""The folder of an adapter, in mlx-lm's layout (pyloss's own) or PEFT's: reading and writing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pyloss.io.files import check_target, read_json, user_path, write_json, write_safetensors
from pyloss.io.outputs import folder_for, output
from pyloss.models.files.names import (
    MLX_EXPERTS,
    MLX_MLP,
    OWN_EXPERTS,
    language_model_name,
    mlx_names,
)
from pyloss.nn import Module
from pyloss.tuner.adapters.adapter import Adapter, own_tables, storable_adapters
from pyloss.tuner.adapters.base import base_of, not_for, warn_of_other_base
from pyloss.tuner.adapters.companions import check_saved
from pyloss.tuner.adapters.full import is_full
from pyloss.tuner.adapters.layout import (
    CONFIG_FILE,
    MLX_FILE,
    PEFT_FILE,
    PEFT_TORCH_FILE,
    StoredAdapter,
    StoredLayer,
    adapter_place,
)
from pyloss.tuner.adapters.mlx import read_mlx, write_mlx
from pyloss.tuner.adapters.peft import read_peft, write_peft
from pyloss.tuner.adapters.registry import adapter_class, takes_adapter
from pyloss.tuner.adapters.tables import Tables
from pyloss.tuner.data.system_prompt import system_prompt_of
from pyloss.tuner.run.run_folder import read_adapter_config, run_files, with_own_keys


def read_adapter(folder: str | os.PathLike[str]) -> StoredAdapter:
    """Reads the adapter in `folder`, or in a file of it, such as a numbered checkpoint.

    Raises FileNotFoundError naming the missing file, FormatError for damaged files, ValueError for
    an adapter with unsupported features.
    """
    place, file = adapter_place(folder)
    if not (place / CONFIG_FILE).is_file():
        if place.is_dir():
            found = f"it has no {CONFIG_FILE}"
        elif place.exists():
            found = "it is neither a folder nor the .safetensors file of an adapter"
        else:
            found = "the folder does not exist"
        raise FileNotFoundError(f"no adapter in {place}: {found}")
    config = read_json(place / CONFIG_FILE)
    if "peft_type" in config:
        older = (place / PEFT_TORCH_FILE).is_file() and not (place / PEFT_FILE).is_file()
        return read_peft(place, config, file or (PEFT_TORCH_FILE if older else PEFT_FILE))
    return read_mlx(place, config, file or MLX_FILE)


def put_adapter(model: Any, adapter: StoredAdapter) -> None:
    """Puts a stored adapter over the model's layers, trainable.

    Raises ValueError listing every name and shape that does not fit, FormatError where the files
    lack what the configuration names, with the model left as it was.
    """
    before = Tables(model)
    modules = dict(model.named_modules())
    stored = {_own_name(name, modules): layer for name, layer in adapter.layers.items()}
    tables = {_own_name(name, modules): table for name, table in adapter.tables.items()}
    check_saved(model, adapter, stored)
    try:
        problems = before.change(adapter.tied, stored, tables)
        modules = dict(model.named_modules())
        layers: dict[str, Adapter] = {}
        for name, each in stored.items():
            layer = _over(modules.get(name), each.kind or adapter.kind, each)
            if isinstance(layer, str):
                problems.append(f"{name}: {layer}")
            else:
                layers[name] = layer
        if problems:
            raise ValueError(not_for(model, adapter.base, adapter.path, problems))
        if not layers:
            raise ValueError(f"the adapter in {adapter.path} has no matrices")
    except BaseException:
        before.restore()
        raise
    warn_of_other_base(model, adapter.base, adapter.path)
    for name, layer in layers.items():
        layer.train(model.training)
        model.set_module(name, layer)
    model.adapter_config, model.trained_from = adapter.config, None


def _own_name(said: str, modules: Mapping[str, Any]) -> str:
    """The name that a layer of an adapter's file has in the model."""
    name = said if said in modules else language_model_name(said)
    # transformers names Mixtral's blocks like others'; Mixtral's files and pyloss do not.
    if name not in modules and (other := name.replace(".mlp.", ".block_sparse_moe.")) in modules:
        name = other
    if name not in modules:
        for own, theirs in MLX_MLP.items():
            other = name.replace(f".feed_forward.{theirs}", f".feed_forward.{own}")
            name = other if other in modules else name
    if name not in modules:
        name = name.replace(MLX_EXPERTS, OWN_EXPERTS)
    # Granite's router, a parameter in transformers
    return f"{name}.layer" if f"{name}.layer" in modules else name


def _over(base: Any, kind: str, stored: StoredLayer) -> Adapter | str:
    """The stored adapter over a layer, or the reason why it does not fit."""
    if isinstance(base, Adapter):
        return "has an adapter already; fuse() or remove_lora_layers() first"
    if not takes_adapter(base, kind):
        return "the model has no such layer" + (
            "" if base is None or kind == "lora" else f" that takes a {kind} adapter"
        )
    try:
        return adapter_class(base, kind).from_stored(base, stored)
    except ValueError as error:
        return str(error)


def _for_mlx(model: Any, layers: dict[str, Adapter], config: Any) -> tuple[dict[str, Adapter], Any]:
    """Adapters and their configuration under the names that mlx-lm has for the layers."""
    family = getattr(getattr(model, "config", None), "family", None)
    if family is None:
        return layers, config

    def renamed(name: str) -> str:
        (found,) = mlx_names(f".{name}.weight", family, True)
        whole = family.mlx_wrapped and name.startswith(("model.", "lm_head"))
        prefix = "language_model." if whole else ""
        return prefix + found.removeprefix(".").removesuffix(".weight")

    parameters = (config or {}).get("lora_parameters") or {}
    if keys := parameters.get("keys"):
        # keys within a layer have no prefix
        parameters = {**parameters, "keys": [renamed(key) for key in keys]}
        config = {**config, "lora_parameters": parameters}
    return {renamed(name): layer for name, layer in layers.items()}, config


def save_adapter(
    model: Module,
    folder: str | os.PathLike[str],
    format: str = "mlx",
    base_model: str | None = None,
    one_rank: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes the model's adapter into `folder`, in the layout "mlx" (pyloss's own) or "peft".

    `base_model` is the base's name in PEFT's configuration. With `one_rank`, the layout "mlx" pads
    all layers to the largest rank: mlx-lm reads no others. An earlier adapter and the files of its
    run move to a folder `previous-N` there, or are replaced with `overwrite`.

    Raises ValueError for a model without an adapter and for adapters that the format cannot
    express, OSError naming the file that cannot be written.
    """
    if format not in ("mlx", "peft"):
        raise ValueError(f"format must be 'mlx' or 'peft', not {format!r}")
    config = getattr(model, "adapter_config", None)
    layers, full = storable_adapters(model), is_full(config)
    if full and format != "mlx":
        raise ValueError(
            "weights trained in full are saved in the layout 'mlx' or by model.save(folder), "
            f"not as {format!r}"
        )
    if full and not model.trainable_parameters():
        raise ValueError("the model has no trainable weights to save; call unfreeze_layers first")
    if not (layers or full):
        raise ValueError("the model has no adapter; call linear_to_lora_layers first")
    check_target(folder, folder=True)
    place = user_path(folder)
    old = read_adapter_config(place)
    base = base_of(model)
    metadata = None if base is None else base.metadata()
    carried = own_tables(model)
    with (
        folder_for(place, "adapter folder"),
        output(place, [*run_files(place), CONFIG_FILE], overwrite),
    ):
        if full:
            write_safetensors(place / MLX_FILE, model.trainable_parameters(), metadata)
            write_json(place / CONFIG_FILE, with_own_keys(config or {}, old), sort_keys=True)
        elif format == "mlx":
            if one_rank:
                layers, config = _for_mlx(model, layers, config)
            write_mlx(place, layers, config, one_rank, old, metadata, carried)
        else:
            blocks = {
                name
                for name, _ in model.named_modules()
                if name.endswith((".switch_mlp", ".router"))
            }
            write_peft(
                place,
                layers,
                base_model,
                getattr(model, "lm_head", None) is None,
                blocks,
                system_prompt_of(config),
                metadata,
                carried,
            )
