"""`StoredAdapter`, an adapter as read from files, and helpers that all layouts share."""

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
    """The adapter of one layer.

    Attributes:
        arrays: the parameters, float32, under the names and in the shapes of the `Adapter`.
        scale: the scale of a low-rank adapter.
        dropout: the dropout of a low-rank adapter.
    """

    arrays: dict[str, np.ndarray]
    scale: float = 1.0
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        """The rank of a low-rank adapter over one matrix or experts."""
        return self.arrays["lora_a"].shape[1]


@dataclass
class StoredAdapter:
    """An adapter as read.

    Attributes:
        path: its folder.
        kind: a key of `registry.KINDS`.
        layers: its layers by module name.
        config: its configuration in mlx-lm's form.
        bases: copies of base weights, which PEFT adds for an adapted head.
        untied: embeddings whose adapter does not apply to a tied head.
    """

    path: str
    kind: str
    layers: dict[str, StoredLayer]
    config: dict[str, Any]
    bases: dict[str, np.ndarray] = field(default_factory=dict)
    untied: set[str] = field(default_factory=set)


def adapter_place(path: PathLike) -> tuple[Path, str | None]:
    """The folder of an adapter; and the file's name if `path` is a file, such as a checkpoint."""
    place = user_path(path)
    return (
        (place.parent, place.name)
        if place.suffix == ".safetensors" and not place.is_dir()
        else (place, None)
    )


def arrays_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The tensors of a file in `folder` as float32 arrays. Raises FileNotFoundError."""
    if not (folder / name).is_file():
        raise FileNotFoundError(f"no adapter in {folder}: it has no {name}")
    return {key: tensor.array() for key, tensor in read_safetensors(folder / name).tensors.items()}


def grouped(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    suffixes: Mapping[str, str],
    dimensions: tuple[int, ...],
) -> dict[str, dict[str, np.ndarray]]:
    """Tensors named `<module><suffix>` as `{module: {parameter: array}}`.

    `suffixes` maps a suffix to its parameter. Raises FormatError listing all names without such a
    suffix, all arrays whose number of dimensions is not in `dimensions` (magnitudes have one
    less), and all missing halves.
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
            problems.append(f"{name}: another tensor holds this parameter of the layer")
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
    """Raises FormatError for DoRA layers without magnitudes and LoRA layers with them."""
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


def low_rank_kind(layout: str, layers: Mapping[str, Any]) -> str:
    """The one kind of the adapters, "lora" or "dora". Raises ValueError for others in `layout`."""
    kinds = {adapter.kind for adapter in layers.values()}
    if unknown := sorted(kinds - {"lora", "dora"}):
        raise ValueError(f"{layout} has no {unknown[0]} adapters; it has LoRA and DoRA")
    if len(kinds) > 1:
        raise ValueError(f"{layout} takes adapters of one kind; these are LoRA and DoRA")
    return str(kinds.pop())


def number(path: Path, config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number of a configuration. Raises FormatError naming the key."""
    defaults = {} if default is None else {key: default}
    value: float = Values(path, config, {key: real}, defaults)[key]
    return value
