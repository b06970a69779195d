"""What is trained beside adapters of low rank: whole modules, biases, and rows of tokens.

The settings are PEFT's: `modules_to_save`, `bias` and `trainable_token_indices`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError, listed
from pyloss.models.resizing import EMBEDDING, HEAD
from pyloss.nn import Module, SwitchLinear
from pyloss.tuner.adapters.adapter import Adapter
from pyloss.tuner.adapters.layout import BIAS, CONFIG_FILE, StoredAdapter, StoredLayer
from pyloss.tuner.adapters.registry import COMPANIONS, adapter_class, takes_adapter
from pyloss.tuner.adapters.selection import hints

if TYPE_CHECKING:
    from pyloss.tuner.adapters.lora_parameters import LoraParameters

BIASES = ("none", "lora_only", "all")
#: Rows of tokens by the name of their table.
TokenIndices = dict[str, tuple[int, ...]]


def read_modules(value: Any) -> tuple[str, ...]:
    """`modules_to_save`. Raises TypeError."""
    names = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"modules_to_save is {shown(value)}; it must be a list of modules' names")
    return tuple(names)


def read_indices(value: Any) -> TokenIndices:
    """`trainable_token_indices`: a list is one of the embedding. Raises TypeError."""
    given = value if isinstance(value, Mapping) else {EMBEDDING: value}
    found = {}
    for name, indices in given.items():
        whole = isinstance(indices, Sequence) and not isinstance(indices, str | bytes)
        if not (isinstance(name, str) and whole) or any(type(i) is not int for i in indices):
            raise TypeError(
                f"trainable_token_indices is {shown(value)}; it must be a list of token ids, or "
                "such lists by the name of their table"
            )
        found[name] = tuple(indices)
    return {name: indices for name, indices in found.items() if indices}


def modules_named(model: Any, key: str) -> dict[str, Any]:
    """The modules with that name or that end of a name, as in PEFT, and all that are in them."""
    found = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name and f".{name}".endswith(f".{key}"):
            inside = (*inside, name)
        if any(name == outer or name.startswith(f"{outer}.") for outer in inside):
            found[name] = module
    return found


def whole_modules(model: Any, keys: Iterable[str]) -> dict[str, Module]:
    """The layers that `modules_to_save` names. Raises ValueError for a name that none has."""
    found: dict[str, Module] = {}
    for key in keys:
        there = modules_named(model, key)
        chosen = {name: module for name, module in there.items() if takes_adapter(module, "whole")}
        if not chosen:
            if there and any(isinstance(module, Adapter) for module in there.values()):
                raise ValueError(f"{key} has an adapter already; fuse() or remove_lora_layers()")
            known = {
                name for name, module in model.named_modules() if takes_adapter(module, "whole")
            }
            raise ValueError(
                f"no layer that can be trained as a whole is named {key!r}; {hints([key], known)}"
            )
        found |= chosen
    return found


def check_saved(model: Any, adapter: StoredAdapter, stored: Mapping[str, StoredLayer]) -> None:
    """Checks that the weights of PEFT's `modules_to_save` are in the adapter's files.

    `stored` are the adapter's layers by the model's names. Raises FormatError naming the modules of
    the model that lack theirs; warns of a name that neither a module nor a tensor has: PEFT adds
    names of heads that some models do not have. Warns of a bias that the files lack, too: as in
    PEFT it stays the base's.
    """
    missing, unknown, kept = [], [], []
    for key in adapter.saved:
        there = modules_named(model, key)
        chosen = [name for name, module in there.items() if takes_adapter(module, "whole")]
        if f".{HEAD}".endswith(f".{key}") and getattr(model, HEAD, 0) is None:
            # a head that is the embedding
            chosen = [] if {HEAD, EMBEDDING} & set(stored) else [HEAD]
        missing += [f"{name}.weight" for name in chosen if name not in stored]
        kept += [
            f"{name}.bias"
            for name in set(chosen) & set(stored)
            if stored[name].kind == "whole" and "bias" not in stored[name].arrays
            if getattr(there[name], "bias", None) is not None
        ]
        if key in adapter.unheld and not chosen:
            unknown.append(key)
    if missing:
        raise FormatError(
            Path(adapter.path) / CONFIG_FILE,
            "modules_to_save",
            f"the file of tensors lacks:{listed(sorted(set(missing)))}",
        )
    if kept:
        warnings.warn(
            f"{adapter.path}: the file of tensors lacks {', '.join(sorted(set(kept)))}: the base's "
            "stays",
            stacklevel=4,
        )
    if unknown:
        warnings.warn(
            f"{adapter.path}: modules_to_save names {', '.join(unknown)}, and neither the model "
            "nor the file of tensors has such a module",
            stacklevel=4,
        )


def companions(
    model: Any, parameters: LoraParameters, layers: Mapping[str, Any]
) -> dict[str, Adapter]:
    """The adapters beside the `layers` of low rank; also makes these train their biases.

    Raises ValueError for names that no layer has, for tokens that a table does not have, and for
    layers that would have two adapters. The model is not changed.
    """
    whole = whole_modules(model, parameters.modules_to_save)
    found: dict[str, Adapter] = {
        name: adapter_class(module, "whole").from_base(module) for name, module in whole.items()
    }
    for key, indices in parameters.trainable_token_indices.items():
        tables = {
            name: module
            for name, module in modules_named(model, key).items()
            if takes_adapter(module, "tokens")
        }
        if len(tables) != 1:
            raise ValueError(
                f"trainable_token_indices names {key!r}, which is no embedding and no head"
            )
        for name, table in tables.items():
            if name in found:
                raise ValueError(f"{name} is in modules_to_save and in trainable_token_indices")
            found[name] = adapter_class(table, "tokens").from_base(table, indices=indices)
    if twice := sorted(set(found) & set(layers)):
        raise ValueError(
            f"{twice[0]} would have two adapters: name it in keys, or in modules_to_save or "
            "trainable_token_indices"
        )
    if parameters.bias != "none":
        for layer in layers.values():
            if getattr(getattr(layer, "linear", None), "bias", None) is not None:
                layer.train_bias()
    if parameters.bias == "all":
        found |= _biases(model, {*layers, *found})
    return found


def _biases(model: Any, taken: set[str]) -> dict[str, Adapter]:
    found = {}
    for name, module in model.named_modules():
        if name in taken or getattr(module, "bias", None) is None:
            continue
        if isinstance(module, SwitchLinear):
            raise ValueError(f"{name}: biases of experts are not trained; bias must be 'lora_only'")
        if takes_adapter(module, "whole"):
            found[name] = adapter_class(module, "whole").from_base(module, trained=("bias",))
    return found


def settings_of(adapters: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make these adapters' companions, as `lora_parameters` has them."""
    whole = [name for name, a in adapters.items() if a.kind == "whole" and "weight" in a.trained]
    tokens = {name: list(a.indices) for name, a in adapters.items() if a.kind == "tokens"}
    biased = [a for a in adapters.values() if a.kind == "whole" and a.trained == ("bias",)]
    only = [a for a in adapters.values() if BIAS in a.parameter_names()]
    found: dict[str, Any] = {}
    if whole:
        found["modules_to_save"] = sorted(whole)
    if tokens:
        found["trainable_token_indices"] = tokens
    if biased or only:
        found["bias"] = "all" if biased else "lora_only"
    return found


def main_adapters(adapters: Mapping[str, Any]) -> dict[str, Any]:
    """The adapters without their companions."""
    return {name: each for name, each in adapters.items() if each.kind not in COMPANIONS}
