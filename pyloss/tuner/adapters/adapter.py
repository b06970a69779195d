"""The base class of all adapters: a frozen layer and the trained parameters that change its output.

Nothing here knows what an adapter computes. Kinds are in files of their own (`low_rank.py`), and
`registry.py` lists them.
"""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from pyloss.autograd.tape import data
from pyloss.models.fusing import LEAST_KEPT, loss_warning
from pyloss.models.resizing import tables
from pyloss.nn import Module
from pyloss.runtime.device import DeviceArray, to_device
from pyloss.tuner.adapters.merging import Fused, dense, merge, with_weight

if TYPE_CHECKING:
    from pyloss.tuner.adapters.layout import StoredLayer

A = TypeVar("A", bound="Adapter")


@dataclass(frozen=True, kw_only=True)
class AdapterParameters:
    """The parameters of a kind of adapter, read from `lora_parameters` and checked.

    A kind with parameters of its own has a subclass, and names it as `Adapter.parameters_type`.

    Attributes:
        keys: names of the layers that get an adapter; None means all that can have one.
    """

    keys: tuple[str, ...] | None = None

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> AdapterParameters:
        """Reads `lora_parameters`, here the keys alone. Raises ValueError or TypeError."""
        keys = config.get("keys")
        return cls(keys=None if keys is None else tuple(keys))

    @classmethod
    def of(cls, adapters: Mapping[str, Any]) -> AdapterParameters:
        """Parameters that describe existing adapters, given by their full names."""
        return cls(keys=tuple(sorted(adapters)))

    @classmethod
    def stored_options(cls, path: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The options of `from_base` in `lora_parameters` of the configuration `path`.

        Raises FormatError naming a key that is missing or wrong.
        """
        return {}

    def check_layers(self, model: Any, layers: Mapping[str, Module]) -> None:
        """Raises ValueError for parameters that do not fit the layers to be adapted."""

    def options(self, name: str) -> dict[str, Any]:
        """The options of `from_base` for the layer of the full name `name`."""
        return {}

    def initialize(self, adapters: Mapping[str, Any]) -> None:
        """Sets initial values that depend on the base or on another model."""

    def companions(self, model: Any, layers: Mapping[str, Any]) -> dict[str, Any]:
        """What is trained beside the adapters `layers`, by name; it may change these."""
        return {}

    def stored(self) -> dict[str, Any]:
        """`lora_parameters` as adapter_config.json has them."""
        return {} if self.keys is None else {"keys": list(self.keys)}


class Adapter(Module):
    """A frozen base layer and the trained parameters that change its output.

    A subclass for one type of layer defines `kind`, `base_name` and `base_type`, the forward
    computation and the abstract methods. An entry in `registry.KINDS` makes it known. An adapter
    that may lie over the head also has `projection()`: losses multiply by that.

    Attributes:
        kind: the name of the kind, which is also `fine_tune_type` in files.
        base_name: the attribute that holds the base layer.
        base_type: the type of layer that the adapter goes over.
        parts: the names of the trained arrays, with their numbers of dimensions over one matrix;
            over experts, arrays have one dimension more. Files use these names.
        parameters_type: the class that reads the kind's parameters.
    """

    kind: ClassVar[str]
    base_name: ClassVar[str]
    base_type: ClassVar[type[Module]]
    parts: ClassVar[Mapping[str, int]]
    parameters_type: ClassVar[type[AdapterParameters]] = AdapterParameters

    @classmethod
    def from_base(cls: type[A], layer: Module, *args: Any, **options: Any) -> A:
        """The adapter over an existing layer, which is shared and frozen, not copied.

        The further arguments are those of the kind. Raises TypeError for a layer of another type.
        """
        adapter = cls.__new__(cls)
        Module.__init__(adapter)
        adapter._attach(layer, *args, **options)
        return adapter

    @classmethod
    def from_stored(cls: type[A], layer: Module, stored: StoredLayer) -> A:
        """The adapter over `layer` with the arrays of a file.

        Raises ValueError saying which arrays do not fit, with the layer left as it was.
        """
        expected = cls.shapes(layer)
        if {name: array.shape for name, array in stored.arrays.items()} != expected:
            raise ValueError(misfit(stored.arrays, expected))
        adapter = cls.from_base(layer, **stored.options)
        adapter._take_arrays(stored.arrays)
        return adapter

    @classmethod
    @abstractmethod
    def shapes(cls, layer: Any, *args: Any, **sizes: Any) -> dict[str, tuple[int, ...]]:
        """The shapes of the adapter's parts over `layer`, by name.

        The further arguments are those of the kind, such as a rank.
        """

    @abstractmethod
    def _attach(self, layer: Module, *args: Any, **options: Any) -> None:
        """Takes the base and makes the parameters: `_check_base`, `_take_base`, the arrays."""

    def parameter_names(self) -> tuple[str, ...]:
        """The names of the adapter's own trained parameters."""
        return tuple(self.parts)

    @abstractmethod
    def merged(self, weight: np.ndarray) -> np.ndarray:
        """The base's dense float32 `weight` with the adapter in it, a new array."""

    @property
    def base(self) -> Any:
        """The layer below."""
        return getattr(self, self.base_name)

    def original(self) -> Any:
        """The layer that the adapter was put over."""
        return self.base

    @property
    def shape(self) -> Any:
        """The base's shape."""
        return self.base.shape

    def fixed_arrays(self) -> dict[str, np.ndarray]:
        """Arrays by name that are not trained and that a resumed run needs."""
        return {}

    def storable(self: A) -> A:
        """This adapter in the form that files hold: on the host; itself where it has that form."""
        return self._on_host() if self._array_on_device() is not None else self

    def storable_arrays(
        self, arrays: Mapping[str, np.ndarray], parameters: Mapping[str, Any]
    ) -> dict[str, np.ndarray]:
        """Trained parameters by name, current or saved, as mlx-lm's files hold them.

        `parameters` is `lora_parameters` of the model's configuration.
        """
        return dict(arrays)

    def delta(self) -> np.ndarray:
        """The change of the base's weight: float32, of its shape, on the host."""
        return (self if self._array_on_device() is None else self._on_host())._delta()

    def fuse(self, dequantize: bool = False) -> Any:
        """The base with the adapter merged into its weight: a plain layer, frozen.

        A float base keeps its type, and the sum is computed in float32. Over a quantized base the
        sum is quantized to the base's format, or left in float32 with `dequantize=True`. Warns
        when rounding loses most of the adapter.
        """
        layer, kept = self.fused(dequantize)
        if kept < LEAST_KEPT:
            weight: Any = getattr(layer, "weight")  # noqa: B009
            warnings.warn(loss_warning(weight.format, kept), stacklevel=2)
        return layer

    def fused(self, dequantize: bool = False) -> Fused:
        """`fuse` with the share of the change that is kept, and no warning.

        The layer is on the adapter's device.
        """
        there = self._array_on_device()
        if there is None:
            return self._fused(dequantize)
        layer, kept = self._on_host()._fused(dequantize)
        return Fused(layer.moved(lambda part: to_device(part, there)), kept)

    @classmethod
    def _check_base(cls, layer: Module) -> None:
        if not isinstance(layer, cls.base_type):
            article = "an" if cls.base_type.__name__[0] in "AEIOU" else "a"
            raise TypeError(
                f"{cls.__name__} goes over {article} {cls.base_type.__name__}, "
                f"not {type(layer).__name__}"
            )

    def _take_base(self, layer: Module) -> None:
        setattr(self, self.base_name, layer)
        layer.freeze()

    def _take_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            getattr(self, name)[...] = array

    def _array_on_device(self) -> DeviceArray | None:
        """A parameter in device memory; None where the adapter is on the host."""
        found = data(getattr(self, self.parameter_names()[0]))
        return found if isinstance(found, DeviceArray) else None

    def _on_host(self: A) -> A:
        """A copy of this adapter with all arrays on the host, the base's included."""
        adapter = copy.copy(self)
        setattr(adapter, self.base_name, copy.copy(self.base))
        adapter.moved(lambda part: to_device(part, "cpu"))
        return adapter

    def _delta(self) -> np.ndarray:
        weight = dense(self.base.weight)
        return self.merged(weight) - weight

    def _fused(self, dequantize: bool) -> Fused:
        base = self.base
        stored, kept = merge(base.weight, self.merged, dequantize)
        return Fused(with_weight(base, stored).freeze(), kept)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(base={self.base!r})"


def misfit(arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[Any, ...]]) -> str:
    """The text for stored arrays whose names or shapes are not the expected ones."""
    found = " and ".join(f"{name} {array.shape}" for name, array in arrays.items())
    shapes = " and ".join(f"({', '.join(map(str, shape))})" for shape in expected.values())
    return f"{found}, expected {shapes}"


def adapter_modules(model: Module) -> dict[str, Any]:
    """The adapters of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def storable_adapters(model: Module) -> dict[str, Any]:
    """The adapters of a model by name, in the form that files hold; see `Adapter.storable`."""
    return {name: adapter.storable() for name, adapter in adapter_modules(model).items()}


def fixed_arrays(model: Module) -> dict[str, np.ndarray]:
    """The fixed arrays of a model's adapters by full name; most have none."""
    return {
        f"{name}.{part}": array
        for name, adapter in adapter_modules(model).items()
        for part, array in adapter.fixed_arrays().items()
    }


def storable_arrays(model: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Trained parameters by full name, current or saved, as mlx-lm's files hold them."""
    found = dict(arrays)
    parameters = (getattr(model, "adapter_config", None) or {}).get("lora_parameters") or {}
    for name, adapter in adapter_modules(model).items():
        full_names = {part: f"{name}.{part}" for part in adapter.parameter_names()}
        own = {part: arrays[full] for part, full in full_names.items() if full in arrays}
        stored = adapter.storable_arrays(own, parameters)
        found |= {full_names[part]: array for part, array in stored.items()}
    return found | own_tables(model)


def own_tables(model: Any) -> dict[str, np.ndarray]:
    """The tables that are not those of the base's files, by their names, in float32.

    They are the embedding and the head, see `models.resizing`; adapters carry them.
    """
    if not getattr(model, "own_tables", False):
        return {}
    found = {}
    for name, layer in tables(model).items():
        if not isinstance(layer, Adapter):
            found[f"{name}.weight"] = dense(to_device(layer.weight, "cpu"))
        elif layer.kind != "whole":  # whose weight is a trained one
            found[f"{name}.{layer.base_name}.weight"] = dense(to_device(layer.base.weight, "cpu"))
    return found
