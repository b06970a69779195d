"""`StoredAdapter`: an adapter as its files give it, whichever layout they are in, and what reading both layouts needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.errors import FormatError, listed
from pyloss.io.files import PathLike, user_path
from pyloss.io.safetensors import read_safetensors
from pyloss.models.config.values import Values, real

CONFIG_FILE = "adapter_config.json"
MLX_FILE = "adapters.safetensors"
PEFT_FILE = "adapter_model.safetensors"


@dataclass
class StoredLayer:
    """The adapter of one layer: its parameters, float32, under the names and in the shapes of `Adapter`s, and how they act."""

    arrays: dict[str, np.ndarray]
    scale: float
    dropout: float

    @property
    def rank(self) -> int:
        """The length that `lora_a` and `lora_b` share."""
        return self.arrays["lora_a"].shape[1]


@dataclass
class StoredAdapter:
    """An adapter as read: its kind ("lora" or "dora") and its layers by module name."""

    path: str
    kind: str
    layers: dict[str, StoredLayer]
    config: dict[str, Any]  # as mlx-lm writes it
    # copies of base weights, which PEFT adds for an adapted head
    bases: dict[str, np.ndarray] = field(default_factory=dict)
    # embeddings whose adapter leaves a tied head as it is
    untied: set[str] = field(default_factory=set)


def adapter_place(path: PathLike) -> tuple[Path, str | None]:
    """The folder of an adapter, and the name of the file in it where `path` is one: a numbered checkpoint, the best adapter."""
    place = user_path(path)
    return (
        (place.parent, place.name)
        if place.suffix == ".safetensors" and not place.is_dir()
        else (place, None)
    )


def arrays_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The tensors of a file in `folder` as float32 arrays. FileNotFoundError when there is no such file."""
    if not (folder / name).is_file():
        raise FileNotFoundError(f"no adapter in {folder}: it has no {name}")
    return {key: tensor.array() for key, tensor in read_safetensors(folder / name).tensors.items()}


def grouped(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    suffixes: Mapping[str, str],
    dimensions: tuple[int, ...],
) -> dict[str, dict[str, np.ndarray]]:
    """`{module: {parameter: array}}` of tensors named `<module><suffix>`; `suffixes` gives the parameter of each.

    FormatError listing every name that is none of these, every array whose dimensions are not among `dimensions` (magnitudes
    have one less), and every half that is missing.
    """
    problems = []
    found: dict[str, dict[str, np.ndarray]] = {}
    ends: dict[str, str] = {}
    for name, array in arrays.items():
        suffix = next((s for s in suffixes if name.endswith(s)), None)
        if suffix is None:
            problems.append(
                f"{name}: is not a LoRA matrix; expected names that end in {', '.join(suffixes)}"
            )
            continue
        parameter, module = suffixes[suffix], name[: -len(suffix)]
        if array.ndim + (parameter == "m") not in dimensions:
            problems.append(
                f"{name}: has shape {array.shape}, expected {_words(dimensions, parameter)}"
            )
        ends[parameter] = suffix
        if parameter in found.setdefault(module, {}):
            problems.append(f"{name}: another tensor says the same of this layer")
        found[module][parameter] = array
    for module, parts in found.items():
        for half, other in (("lora_a", "lora_b"), ("lora_b", "lora_a")):
            if half not in parts:
                there = ends.get(half) or next(
                    s for s, parameter in suffixes.items() if parameter == half
                )
                reason = (
                    "is missing, though its other half is there" if other in parts else "is missing"
                )
                problems.append(f"{module}{there}: {reason}")
    if problems:
        raise FormatError(path, None, f"is not an adapter:{listed(problems)}")
    return found


def _words(dimensions: tuple[int, ...], parameter: str) -> str:
    names = {1: "one", 2: "two", 3: "three"}
    text = " or ".join(names[n - (parameter == "m")] for n in dimensions)
    return f"{text} dimension{'' if text == 'one' else 's'}"


def check_kind(path: Path, kind: str, layers: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """FormatError when DoRA layers have no magnitudes, or LoRA layers have some."""
    wrong = [name for name, parts in layers.items() if ("m" in parts) != (kind == "dora")]
    if wrong:
        reason = (
            "has no magnitudes, which DoRA needs"
            if kind == "dora"
            else "has magnitudes, and the configuration says LoRA"
        )
        raise FormatError(
            path,
            None,
            f"does not fit the tensors:{listed([f'{name}: {reason}' for name in wrong])}",
        )


def number(path: Path, config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number of a configuration; FormatError naming the key for anything else."""
    defaults = {} if default is None else {key: default}
    value: float = Values(path, config, {key: real}, defaults)[key]
    return value
