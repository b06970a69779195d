"""What all adapters share: the base they go over, how they are made, found in a model and merged into the base again."""

from __future__ import annotations

import copy
import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from pyloss import ops, random
from pyloss.autograd.tape import data
from pyloss.checks.numbers import real, shown
from pyloss.nn import Module, uniform
from pyloss.runtime.device import DeviceArray, to_device
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

A = TypeVar("A", bound="Adapter")

#: The adapter of each kind over each type of layer; `Adapter`'s subclasses enter themselves.
_CLASSES: dict[tuple[str, type[Module]], type[Adapter]] = {}


LITTLE = 0.5  # a smaller share of an adapter, left by storing it, is warned of


class Fused(NamedTuple):
    """A merged layer, and the share of the adapter's change that storing it left: 1 - |error|^2 / |change|^2."""

    layer: Module
    kept: float


class Adapter(Module):
    """A frozen base layer and the trained parameters that change what it computes.

    `lora_a` begins uniform, `lora_b` zero, so that an adapter begins as its base. `scale` multiplies their product as it is
    (PEFT's lora_alpha / r); `dropout` acts in training, on the adapter's branch alone.

    A subclass says `kind`, `base_name` (the attribute that holds the base) and `base_type`, and has `shapes`, `merged` and the
    forward computation, which multiplies by `factors()`. That enters it in the registry, see `adapter_class`.
    """

    kind: ClassVar[str]
    base_name: ClassVar[str]
    base_type: ClassVar[type[Module]]
    #: fixed factors, shaped as `lora_a` and `lora_b`, whose product is added to theirs; see `take_off_start`
    origin_a: np.ndarray | None = None
    origin_b: np.ndarray | None = None
    #: the trained lengths of the rows, of kinds that have them
    m: Any = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in vars(cls):
            _CLASSES[cls.kind, cls.base_type] = cls

    @classmethod
    def from_base(
        cls: type[A], layer: Module, r: int = 8, dropout: float = 0.0, scale: float = 20.0
    ) -> A:
        """The adapter over an existing layer, which is shared, not copied, and frozen.

        Raises TypeError for a layer of another type, ValueError for a rank below 1 or above both dimensions, a dropout outside
        [0, 1) or a scale that is not finite.
        """
        adapter = cls.__new__(cls)
        Module.__init__(adapter)
        adapter._attach(layer, r, dropout, scale)
        return adapter

    def _attach(self, layer: Module, r: int, dropout: float, scale: float) -> None:
        if not isinstance(layer, self.base_type):
            article = "an" if self.base_type.__name__[0] in "AEIOU" else "a"
            raise TypeError(
                f"{type(self).__name__} goes over {article} {self.base_type.__name__}, not {type(layer).__name__}"
            )
        most = max(layer.shape[-2:])  # type: ignore[attr-defined]
        if isinstance(r, bool) or not isinstance(r, int | np.integer) or not 1 <= r <= most:
            raise ValueError(
                f"rank must be an integer from 1 to {most}, the larger dimension, not {shown(r)}"
            )
        dropout, scale = real(dropout, "dropout", 0, below=1), real(scale, "scale")
        setattr(self, self.base_name, layer)
        layer.freeze()
        self.dropout = dropout
        self.scale = scale
        self._rank = int(r)
        self._initialise(self.shapes(layer, int(r)))

    def _initialise(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Makes the parameters, within mlx-lm's bounds: 1 / sqrt(in), for a table 1 / sqrt(rows)."""
        shape = shapes["lora_a"]
        self.lora_a = uniform(shape, 1 / math.sqrt(shape[0] if len(shape) == 2 else shape[-1]))
        self.lora_b = np.zeros(shapes["lora_b"], np.float32)

    @classmethod
    @abstractmethod
    def shapes(cls, layer: Any, r: int) -> dict[str, tuple[int, ...]]:
        """The adapter's parameters over `layer`, by name, with their shapes."""

    @abstractmethod
    def merged(self, weight: np.ndarray) -> np.ndarray:
        """The base's dense float32 `weight` with the adapter in it, a new array."""

    @property
    def base(self) -> Any:
        """The layer below."""
        return getattr(self, self.base_name)

    @property
    def shape(self) -> Any:
        """The base's."""
        return self.base.shape

    @property
    def rank(self) -> int:
        """The inner dimension of the product of lora_a and lora_b."""
        return self._rank

    def matrices(self) -> tuple[str, ...]:
        """The names of the adapter's own parameters."""
        return tuple(self.shapes(self.base, self.rank))

    def factors(self) -> tuple[Any, Any]:
        """What the adapter multiplies by: `lora_a` and `lora_b`, lengthened by the fixed factors where it has them."""
        if self.origin_a is None or self.origin_b is None:
            return self.lora_a, self.lora_b
        a_axis, b_axis = self.rank_axes()
        return ops.lengthen(self.lora_a, self.origin_a, a_axis), ops.lengthen(
            self.lora_b, self.origin_b, b_axis
        )

    def rank_axes(self) -> tuple[int, int]:
        """The axes of `lora_a` and `lora_b` that are as long as the rank."""
        return (1, 0) if self.lora_a.ndim == 2 else (1, 2)

    def take_off_start(self) -> None:
        """Takes the product of `lora_a` and `lora_b`, as they are now, off whatever they become, by fixed factors beside them.

        Adapters that begin with a part of the base's weight (PiSSA) thus need no base without that part.
        """
        self.origin_a, self.origin_b = self.lora_a.copy(), -self.lora_b
        self.freeze(recurse=False, keys=("origin_a", "origin_b"))

    def begin_magnitude(self) -> None:
        """Lets DoRA's `m` begin as the norms of the rows with the product in them, so that it changes nothing; LoRA has none."""

    def settled(self: A) -> A:
        """This adapter as files can hold it: on the host, without fixed factors; itself if it is so, else of twice the rank."""
        if isinstance(data(self.lora_a), DeviceArray):
            return self._on_host().settled()
        if self.origin_a is None:
            return self
        adapter = copy.copy(self)
        adapter.origin_a = adapter.origin_b = None
        a, b = self.factors()
        adapter.lora_a, adapter.lora_b, adapter._rank = data(a), data(b), 2 * self.rank
        return adapter

    def _dropout(self) -> tuple[float, int]:
        """The dropout that acts now and the seed of its mask."""
        p = self.dropout if self.training else 0.0
        return p, random.next_seed() if p else 0

    def delta(self) -> np.ndarray:
        """What the adapter adds to the base's weight: float32, of its shape, on the host."""
        return (self._on_host() if isinstance(data(self.lora_a), DeviceArray) else self)._delta()

    def _delta(self) -> np.ndarray:
        weight = dense(self.base.weight)
        return self.merged(weight) - weight

    def fuse(self, dequantize: bool = False) -> Any:
        """The base with the adapter merged into its weight, as a plain layer, frozen as its base was.

        A float base keeps its type, and the sum is computed in float32; over a quantised base the sum is quantised again to the
        base's format, or left in float32 with `dequantize=True`. Warns when rounding loses most of the adapter.
        """
        layer, kept = self.fused(dequantize)
        if kept < LITTLE:
            warnings.warn(lost(layer.weight.format, kept), stacklevel=2)  # type: ignore[attr-defined]
        return layer

    def fused(self, dequantize: bool = False) -> Fused:
        """`fuse` with the share of the change that storing left, without a warning; the layer is where the adapter is."""
        there = data(self.lora_a)
        if not isinstance(there, DeviceArray):
            return self._fused(dequantize)
        layer, kept = self._on_host()._fused(dequantize)
        return Fused(layer.moved(lambda part: to_device(part, there)), kept)

    def _on_host(self: A) -> A:
        """The same adapter over the same base with all arrays on the host; this one stays as it is."""
        adapter = copy.copy(self)
        setattr(adapter, self.base_name, copy.copy(self.base))
        adapter.moved(lambda part: to_device(part, "cpu"))
        return adapter

    def _fused(self, dequantize: bool) -> Fused:
        base = self.base
        stored, kept = merge(base.weight, self.merged, dequantize)
        return Fused(with_weight(base, stored).freeze(), kept)

    def __repr__(self) -> str:
        name = type(self).__name__
        return (
            f"{name}(r={self.rank}, scale={self.scale}, dropout={self.dropout}, base={self.base!r})"
        )


def with_weight(layer: Any, weight: Any) -> Any:
    """A layer of the same kind with another weight, stored or float32, and the same bias."""
    return (
        layer.from_weight(weight, layer.bias)
        if hasattr(layer, "bias")
        else layer.from_weight(weight)
    )


def dense(weight: np.ndarray | Weight | WeightStack) -> np.ndarray:
    """A weight as a float32 array; a stored one is a copy."""
    return weight.dequantize() if isinstance(weight, Weight | WeightStack) else weight


def merge(
    base: np.ndarray | Weight, merged: Any, dequantize: bool
) -> tuple[np.ndarray | Weight, float]:
    """`merged(dense base)`, stored as the base is (or in float32 with `dequantize`, if that is quantised), and the share kept.

    A format that cannot be written here makes float32 too, with a warning.
    """
    if not isinstance(base, Weight):
        return merged(base), 1.0
    stored, change, error = merge_stored(base, merged, dequantize)
    return stored, share_kept(change, error)


def merge_stored(base: Weight, merged: Any, dequantize: bool) -> tuple[Weight, float, float]:
    """`merge` of a stored matrix: what is stored, |change|^2 and |error|^2."""
    before = base.dequantize()
    after = merged(before)
    if not (dequantize or base.can_requantize):
        warnings.warn(
            f"{base.format} can be read but not written here: weights fused over it are kept in float32",
            stacklevel=2,
        )
    if base.format == "f32" or not (base.is_float or (base.can_requantize and not dequantize)):
        return Weight.quantize(after, "f32"), 1.0, 0.0
    stored = base.requantize(after)
    change = np.subtract(after, before, dtype=np.float64)
    error = np.subtract(stored.dequantize(), after, dtype=np.float64)
    return stored, float(np.sum(change**2)), float(np.sum(error**2))


def share_kept(change: float, error: float) -> float:
    """The share of a change that storing left, of the squares of both norms."""
    return 1 - error / change if change else 1.0


def lost(format: str, kept: float) -> str:
    """The warning for a fused weight that keeps little."""
    share = f"{max(kept, 0):.0%}"
    return f"storing the fused weight as {format} keeps {share} of the adapter; fuse(dequantize=True) keeps all of it"


def adapter_class(layer: Module, kind: str = "lora") -> type[Adapter]:
    """The adapter class of a kind ("lora" or "dora") for a layer.

    Raises ValueError for an unknown kind, TypeError for a layer that has no adapter of that kind.
    """
    known = sorted({k for k, _ in _CLASSES})
    if kind not in known:
        raise ValueError(f"the kind of adapter must be one of {known}, not {kind!r}")
    for (of, base), cls in _CLASSES.items():
        if of == kind and isinstance(layer, base):
            return cls
    bases = sorted(base.__name__ for of, base in _CLASSES if of == kind)
    raise TypeError(f"a {kind} adapter goes over one of {bases}, not {type(layer).__name__}")


def takes_adapter(layer: Any, kind: str = "lora") -> bool:
    """Whether there is an adapter of that kind for a layer."""
    return any(of == kind and isinstance(layer, base) for of, base in _CLASSES)


def settled_adapters(model: Module) -> dict[str, Any]:
    """The adapters of a model by name, as files can hold them; see `Adapter.settled`."""
    return {name: adapter.settled() for name, adapter in adapter_modules(model).items()}


def fixed_factors(model: Module) -> dict[str, np.ndarray]:
    """The fixed factors of a model's adapters by name; most have none."""
    found = {
        name: adapter
        for name, adapter in adapter_modules(model).items()
        if adapter.origin_a is not None
    }
    return {
        f"{name}.{part}": getattr(adapter, part)
        for name, adapter in found.items()
        for part in ("origin_a", "origin_b")
    }


def settled_arrays(model: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Trained parameters by name, of whatever moment, as mlx-lm's files hold them.

    That is with the fixed factors behind them, and with scales that are not the one of the model's `adapter_config`, which such
    a file has for all layers, worked into `lora_b`.
    """
    found, fixed = dict(arrays), fixed_factors(model)
    common = ((getattr(model, "adapter_config", None) or {}).get("lora_parameters") or {}).get(
        "scale"
    )
    for name, adapter in adapter_modules(model).items():
        for part, axis in zip(("a", "b"), adapter.rank_axes(), strict=True):
            if (tail := fixed.get(f"{name}.origin_{part}")) is not None:
                found[f"{name}.lora_{part}"] = np.concatenate(
                    (arrays[f"{name}.lora_{part}"], tail), axis
                )
        if common and adapter.scale != common and f"{name}.lora_b" in found:
            found[f"{name}.lora_b"] = found[f"{name}.lora_b"] * np.float32(adapter.scale / common)
    return found


def adapter_modules(model: Module) -> dict[str, Adapter]:
    """The adapters of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
