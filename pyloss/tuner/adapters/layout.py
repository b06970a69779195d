"""What the layouts of adapter files share: `StoredAdapter`, the result of reading, and checks.

`mlx.py` and `peft.py` are the layouts. The arrays of an adapter are its kind's `Adapter.parts`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.errors import FormatError, listed
from pyloss.io.files import PathLike, user_path
from pyloss.io.safetensors import read_safetensors
from pyloss.io.torch_file import read_state_dict
from pyloss.models.config.values import Values, real
from pyloss.tuner.adapters.base import Base, read_base
from pyloss.tuner.adapters.registry import COMPANIONS, parts_of

CONFIG_FILE = "adapter_config.json"
MLX_FILE = "adapters.safetensors"
PEFT_FILE = "adapter_model.safetensors"
#: What PEFT wrote before safetensors, and writes with `safe_serialization=False`.
PEFT_TORCH_FILE = "adapter_model.bin"


@dataclass
class StoredLayer:
    """The adapter of one layer.

    Attributes:
        arrays: the parameters, float32, under the names and in the shapes of the `Adapter`.
        options: the kind's options of `Adapter.from_base` that the arrays do not show.
        kind: one of `registry.COMPANIONS`; None: the adapter's.
    """

    arrays: dict[str, np.ndarray]
    options: dict[str, Any] = field(default_factory=dict)
    kind: str | None = None


@dataclass
class StoredAdapter:
    """An adapter as read.

    Attributes:
        path: its folder.
        kind: a key of `registry.KINDS`.
        layers: its layers by module name.
        config: its configuration in mlx-lm's form.
        tables: weights of the embedding and the head that the adapter was made over.
        tied: whether an adapter over an embedding also applies to a tied head.
        base: the base that it was made for; None: its file does not say it.
        saved: PEFT's `modules_to_save`: names of modules whose weights must be among `layers`.
        unheld: those of `saved` that no tensor of the file belongs to.
    """

    path: str
    kind: str
    layers: dict[str, StoredLayer]
    config: dict[str, Any]
    tables: dict[str, np.ndarray] = field(default_factory=dict)
    tied: bool = True
    base: Base | None = None
    saved: tuple[str, ...] = ()
    unheld: tuple[str, ...] = ()


#: The trained bias of the layer below an adapter.
BIAS = "linear.bias"
#: The names of the layer below an adapter, in the names of tables that adapters carry.
BASES = ("base_layer", "embedding", "linear")


def is_table(name: str) -> bool:
    """Whether a module's name is that of an embedding of tokens or of the head."""
    return name.split(".")[-1] in ("embed_tokens", "lm_head")


def adapter_place(path: PathLike) -> tuple[Path, str | None]:
    """The folder of an adapter; and the file's name if `path` is a file, such as a checkpoint.

    `folder@400`, `folder@best` and `folder@last` are files, see `tuner.run.stored`.
    """
    from pyloss.tuner.run.stored import checkpoint_file

    place = checkpoint_file(path) or user_path(path)
    return (
        (place.parent, place.name)
        if place.suffix in (".safetensors", ".bin") and not place.is_dir()
        else (place, None)
    )


def arrays_of(folder: Path, name: str) -> tuple[dict[str, np.ndarray], Base | None]:
    """The tensors of a file in `folder` as float32 arrays, and the base that they were made for.

    Raises FileNotFoundError. Warns of tensors that are not finite.
    """
    if not (folder / name).is_file():
        raise FileNotFoundError(f"no adapter in {folder}: it has no {name}")
    read = read_state_dict if name.endswith(".bin") else read_safetensors
    file = read(folder / name)
    arrays = {key: tensor.array() for key, tensor in file.tensors.items()}
    with np.errstate(invalid="ignore"):  # NaN is the least and the greatest of what it is in
        odd = [k for k, a in arrays.items() if a.size and not np.isfinite([a.min(), a.max()]).all()]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        warnings.warn(
            f"{folder / name}: {odd[0]}{more} of {len(arrays)} tensors are not finite: the model's "
            "results will not be either",
            stacklevel=5,
        )
    return arrays, read_base(folder / name, file.metadata)


def grouped(
    path: Path,
    source: Path,
    kind: str,
    arrays: Mapping[str, np.ndarray],
    suffixes: Mapping[str, str],
    experts: bool = False,
) -> dict[str, dict[str, np.ndarray]]:
    """Tensors of the file `path` named `<module><suffix>` as `{module: {part: array}}`.

    `suffixes` maps a suffix to its part. `experts` says whether the layout has arrays of experts,
    with one dimension more. Raises FormatError listing all names without a suffix of the kind's
    parts, all arrays with another number of dimensions, and all missing parts. `source`, the
    configuration, gives the kind.
    """
    parts = parts_of(kind)
    own = {suffix: part for suffix, part in suffixes.items() if part in parts}
    problems = []
    found: dict[str, dict[str, np.ndarray]] = {}
    ends = {part: suffix for suffix, part in reversed(own.items())}
    for name, array in arrays.items():
        suffix = next((s for s in own if name.endswith(s)), None)
        if suffix is None:
            problems.append(
                f"{name}: is not one of its arrays; expected names that end in {', '.join(own)}"
            )
            continue
        part, module = own[suffix], name[: -len(suffix)]
        dimensions = [parts[part], parts[part] + 1] if experts else [parts[part]]
        if array.ndim not in dimensions:
            problems.append(f"{name}: has shape {array.shape}, expected {_words(dimensions)}")
        ends[part] = suffix
        if part in found.setdefault(module, {}):
            problems.append(f"{name}: another tensor holds this parameter of the layer")
        found[module][part] = array
    problems += [
        f"{module}{ends[part]}: is missing"
        for module, there in found.items()
        for part in parts
        if part not in there
    ]
    if problems:
        raise FormatError(
            path,
            None,
            f"is not an adapter of the kind {kind!r}, which {source} gives:{listed(problems)}",
        )
    return found


def _words(dimensions: Iterable[int]) -> str:
    names = {1: "one", 2: "two", 3: "three"}
    text = " or ".join(names.get(n, str(n)) for n in dimensions)
    return f"{text} dimension{'' if text == 'one' else 's'}"


def one_kind(layout: str, layers: Mapping[str, Any]) -> str:
    """The one kind of the adapters, beside `COMPANIONS`. Raises ValueError for several."""
    kinds = sorted({adapter.kind for adapter in layers.values()} - COMPANIONS.keys())
    if len(kinds) > 1:
        raise ValueError(f"{layout} takes adapters of one kind; these are {' and '.join(kinds)}")
    return str(kinds[0]) if kinds else "lora"


def low_rank_kind(layout: str, layers: Mapping[str, Any]) -> str:
    """The one kind of the adapters, "lora" or "dora". Raises ValueError for others in `layout`."""
    kind = one_kind(layout, layers)
    if kind not in ("lora", "dora"):
        raise ValueError(f"{layout} has no {kind} adapters; it has LoRA and DoRA")
    return kind


def number(path: Path, config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number of a configuration. Raises FormatError naming the key."""
    defaults = {} if default is None else {key: default}
    value: float = Values(path, config, {key: real}, defaults)[key]
    return value
