"""Adapters of experts in PEFT's layout: one for a whole parameter (`target_parameters`) of a block.

The parameters are `gate_up_proj`, which stacks gates above ups, and `down_proj`. `lora_A` [E r, in]
stacks the experts, `lora_B` [out, r E] has them side by side for each rank. If both parameters are
adapted, the tensors of the first one are under `experts.base_layer`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.tuner.adapters.low_rank import LowRankAdapter

# In the order in which PEFT wraps them, the innermost first.
_PARAMETERS = ("gate_up_proj", "down_proj")
_NAME = re.compile(r"(.+\.experts)((?:\.base_layer)*)\.lora_([AB])\.weight")
# The names before transformers 5, when every expert had its own layers.
_OWN_NAME = re.compile(
    r"((.+)\.experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj))\.lora_([AB])\.weight"
)
_OWN_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
Matrices = dict[str, np.ndarray]


def check_targets(source: Path, config: Mapping[str, Any]) -> list[str]:
    """`target_parameters`. Raises ValueError unless all are parameters of experts or weights."""
    targets = config.get("target_parameters") or []
    known = isinstance(targets, list) and all(
        str(name).split(".")[-1] in (*_PARAMETERS, "weight") for name in targets
    )
    if not known:
        supported = ", ".join(_PARAMETERS)
        raise ValueError(
            f"{source}: target_parameters = {shown(targets)} is not supported; "
            f"supported are {supported}"
        )
    return targets


def take_experts(
    file: Path, arrays: Matrices, targets: list[str], rank_of: Callable[[str], float]
) -> Iterator[tuple[str, str, Matrices]]:
    """Takes the adapters of whole parameters out of `arrays`.

    Yields the layer's name, the parameter's name, and `lora_a` [E, r, in] with `lora_b`. `rank_of`
    gives the configured rank of a parameter. Raises FormatError for tensors that do not fit it.
    """
    found: dict[str, dict[int, Matrices]] = {}
    for name in list(arrays):
        if match := _NAME.fullmatch(name):
            depth = match[2].count(".base_layer")
            found.setdefault(match[1], {}).setdefault(depth, {})[match[3]] = arrays.pop(name)
    for module, depths in found.items():
        adapted = [
            p
            for p in _PARAMETERS
            if any(f".{module}.{p}".endswith(f".{target}") for target in targets)
        ]
        if sorted(depths) != list(range(len(adapted))) or any(
            sorted(pair) != ["A", "B"] for pair in depths.values()
        ):
            there = (
                f"tensors at {len(depths)} depths"
                if all(len(p) == 2 for p in depths.values())
                else "half of a pair"
            )
            raise FormatError(
                file,
                module,
                f"has {there}, where target_parameters has {' and '.join(adapted) or 'none'} of it",
            )
        for depth, parameter in enumerate(reversed(adapted)):
            yield from _layers(
                file, module, parameter, depths[depth], rank_of(f"{module}.{parameter}")
            )


def take_own_layers(
    file: Path, arrays: Matrices, rank_and_scale: Callable[[str], tuple[float, float]]
) -> Iterator[tuple[str, float, Matrices]]:
    """Takes the adapters of experts with their own layers out of `arrays`.

    Yields the layer's name, the scale, and `lora_a` with `lora_b`. Raises FormatError for missing
    experts and for experts of several ranks.
    """
    found: dict[str, dict[int, tuple[str, Matrices]]] = {}
    for name in list(arrays):
        if match := _OWN_NAME.fullmatch(name):
            layer = f"{match[2]}.switch_mlp.{_OWN_PARTS.get(match[4], match[4])}"
            found.setdefault(layer, {}).setdefault(int(match[3]), (match[1], {}))[1][match[5]] = (
                arrays.pop(name)
            )
    for layer, experts in found.items():
        if sorted(experts) != list(range(len(experts))):
            missing = min(set(range(max(experts))) - set(experts))
            raise FormatError(
                file,
                layer,
                f"has adapters for {len(experts)} experts, and none for expert {missing}",
            )
        _, scale = rank_and_scale(experts[0][0])
        first: list[np.ndarray] = []
        second: list[np.ndarray] = []
        for _, (name, pair) in sorted(experts.items()):
            rank, own = rank_and_scale(name)
            shapes = {half: pair[half].shape for half in sorted(pair)}
            fits = set(pair) == {"A", "B"} and pair["A"].ndim == pair["B"].ndim == 2
            if not fits or not pair["A"].shape[0] == pair["B"].shape[1] == rank:
                raise FormatError(
                    file, name, f"matrices of shapes {shapes} are not a pair of rank {rank:g}"
                )
            if first and (pair["A"].shape, pair["B"].shape) != (first[0].shape, second[0].shape):
                raise FormatError(
                    file,
                    name,
                    f"matrices of shapes {shapes} differ from those of the first expert",
                )
            first.append(pair["A"])
            second.append(pair["B"] * np.float32(own / scale if scale else 0))
        yield layer, scale, {"lora_a": np.stack(first), "lora_b": np.stack(second)}


def _layers(
    file: Path, module: str, parameter: str, pair: Matrices, rank: float
) -> Iterator[tuple[str, str, Matrices]]:
    a, b = pair["A"], pair["B"]
    fits = (
        a.ndim == b.ndim == 2
        and a.shape[0] == b.shape[1]
        and rank >= 1
        and a.shape[0] % int(rank) == 0
    )
    if not fits or (parameter == "gate_up_proj" and b.shape[0] % 2):
        shapes = f"lora_A {a.shape} and lora_B {b.shape}"
        raise FormatError(
            file, f"{module}.{parameter}", f"{shapes} are not those of experts of rank {rank:g}"
        )
    experts = a.shape[0] // int(rank)
    first = np.ascontiguousarray(a.reshape(experts, -1, a.shape[1]))
    second = np.ascontiguousarray(b.reshape(b.shape[0], -1, experts).transpose(2, 0, 1))
    switch, half = f"{module.removesuffix('.experts')}.switch_mlp", second.shape[1] // 2
    whole = f"{module}.{parameter}"
    if parameter == "down_proj":
        yield f"{switch}.down_proj", whole, {"lora_a": first, "lora_b": second}
    else:
        for name, rows in (("gate_proj", slice(None, half)), ("up_proj", slice(half, None))):
            yield (
                f"{switch}.{name}",
                whole,
                {"lora_a": first.copy(), "lora_b": np.ascontiguousarray(second[:, rows])},
            )


def whole_parameters(
    layers: Mapping[str, LowRankAdapter], own_names: bool = False
) -> Iterator[tuple[str, str, int, float, Matrices]]:
    """The adapters of experts by parameter.

    Yields the prefix of the tensors, the parameter's name, rank, scale and {"A": ..., "B": ...}.
    `own_names` as in `peft_name`.
    Gates and ups with different `lora_a` become one pair, whose rank is the sum of theirs.
    """
    blocks: dict[str, dict[str, LowRankAdapter]] = {}
    for name, layer in layers.items():
        block, _, part = name.partition(".switch_mlp.")
        blocks.setdefault(peft_name(block, own_names), {})[part] = layer
    for block, parts in blocks.items():
        pairs = {}
        if "gate_proj" in parts or "up_proj" in parts:
            pairs["gate_up_proj"] = _joined(parts.get("gate_proj"), parts.get("up_proj"))
        if "down_proj" in parts:
            down = parts["down_proj"]
            pairs["down_proj"] = (down.lora_a, down.lora_b, down.scale)
        for depth, parameter in enumerate(reversed(list(pairs))):
            a, b, scale = pairs[parameter]
            experts, rank, _ = a.shape
            flat = {
                "A": a.reshape(experts * rank, -1),
                "B": b.transpose(1, 2, 0).reshape(b.shape[1], -1),
            }
            yield (
                f"{block}.experts{'.base_layer' * depth}",
                f"{block}.experts.{parameter}",
                rank,
                scale,
                flat,
            )


def peft_name(name: str, own_names: bool = False) -> str:
    """transformers' name of a part of a block of experts: Mixtral's files have another.

    `own_names`: the model is a Granite, whose files have transformers' names.
    """
    return name if own_names else name.replace(".block_sparse_moe", ".mlp")


def _joined(
    gate: LowRankAdapter | None, up: LowRankAdapter | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """One `lora_a`, `lora_b` and scale for the stacked gates and ups."""
    one = gate or up
    assert one is not None
    if gate and up and gate.scale == up.scale and np.array_equal(gate.lora_a, up.lora_a):
        return gate.lora_a, np.concatenate([gate.lora_b, up.lora_b], axis=1), gate.scale
    present = [layer for layer in (gate, up) if layer]
    ranks = sum(layer.rank for layer in present)
    experts, rows, _ = one.lora_b.shape
    b = np.zeros((experts, 2 * rows, ranks), np.float32)
    column = 0
    for row, layer in ((0, gate), (rows, up)):
        if layer:
            factor = layer.scale / one.scale if one.scale else 0.0
            b[:, row : row + rows, column : column + layer.rank] = layer.lora_b * np.float32(factor)
            column += layer.rank
    return np.concatenate([layer.lora_a for layer in present], axis=1), b, one.scale
