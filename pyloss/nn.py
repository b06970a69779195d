"""Modules: named parameters, frozen or trained, and the plain layers."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, TypeVar

import numpy as np

from pyloss import ops, random
from pyloss.autograd.differentiation import leaf_gradient, run_backward
from pyloss.autograd.recorded import Recorded
from pyloss.autograd.tape import Tape
from pyloss.checks.numbers import real, whole
from pyloss.errors import listed
from pyloss.ops.projection import Projection
from pyloss.runtime.device import DeviceArray
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import FORMATS, Weight

M = TypeVar("M", bound="Module")


class Module:
    """A tree of parameters.

    float32 ndarray attributes are parameters; `Module` attributes, and lists and dicts of modules,
    are submodules; attributes whose names begin with `_` are neither. Parameters are trained unless
    frozen; a `Weight` (a stored matrix) is never trained.
    """

    #: Changes whenever an attribute of any module is set; facts about modules may then be outdated.
    assignments: ClassVar[object] = object()
    #: As `assignments`, but for `results`.
    structure: ClassVar[object] = object()
    #: Attributes that hold results computed from the others.
    results: ClassVar[frozenset[str]] = frozenset()
    #: Whether instances of this very class, not of its subclasses, make the same calls of the core
    #: whatever the values of their arrays and inputs; see `recorded_module`.
    recordable: ClassVar[bool] = False

    def __setattr__(self, name: str, value: Any) -> None:
        self._changed(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._changed(name)
        super().__delattr__(name)

    def _changed(self, name: str) -> None:
        Module.assignments = object()
        if name not in self.results:
            Module.structure = object()

    def __init__(self) -> None:
        self._frozen: set[str] = set()
        self._training = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward computation")

    def children(self) -> Iterator[tuple[str, Module]]:
        """The submodules of this module with their names, such as `("layers.0", ...)`."""
        for name, value in vars(self).items():
            if name.startswith("_"):
                continue
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list | tuple | dict):
                for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                    if isinstance(item, Module):
                        yield f"{name}.{key}", item

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, with dotted names; this one's name is `prefix`."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def modules(self) -> Iterator[Module]:
        """This module and all below it."""
        return (module for _, module in self.named_modules())

    def set_module(self, path: str, module: Module) -> None:
        """Replaces the submodule with the dotted name `path` by `module`."""
        *parents, last = path.split(".")
        owner: Any = self
        self._changed(last)  # also where the owner is a list or a dict
        vars(self).pop("_trained", None)
        for part in parents:
            if isinstance(owner, list):
                owner = owner[int(part)]
            else:
                owner = owner[part] if isinstance(owner, dict) else getattr(owner, part)
        if isinstance(owner, list):
            owner[int(last)] = module
        elif isinstance(owner, dict):
            owner[last] = module
        else:
            setattr(owner, last, module)

    def _own(self) -> Iterator[tuple[str, Any]]:
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray | DeviceArray) and not name.startswith("_"):
                yield name, value

    def parameters(self) -> dict[str, np.ndarray]:
        """All parameters by dotted name, without the stored matrices."""
        return {
            _join(path, name): value
            for path, module in self.named_modules()
            for name, value in module._own()
        }

    def trainable_parameters(self) -> dict[str, np.ndarray]:
        """The parameters that are not frozen, by dotted name; a shared array appears once."""
        kept: _Trained | None = vars(self).get("_trained")
        if kept is None or not kept.holds():
            kept = _Trained(self)
            object.__setattr__(self, "_trained", kept)
        return {path: vars(module)[name] for path, module, name in kept.places}

    def stored(self) -> dict[str, Weight | WeightStack]:
        """The stored matrices, and stacks of them, by dotted name."""
        return {
            _join(path, name): value
            for path, module in self.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Weight | WeightStack)
        }

    def freeze(self, *, recurse: bool = True, keys: Iterable[str] | None = None) -> Module:
        """Excludes parameters from training: all, or those with the names `keys`.

        `recurse=False`: in this module only.
        """
        wanted = None if keys is None else set(keys)
        for module in self.modules() if recurse else (self,):
            names = {name for name, _ in module._own()}
            module._frozen |= names if wanted is None else names & wanted
        return self

    def unfreeze(self, *, recurse: bool = True, keys: Iterable[str] | None = None) -> Module:
        """The opposite of `freeze`."""
        wanted = None if keys is None else set(keys)
        for module in self.modules() if recurse else (self,):
            module._frozen -= set(module._frozen) if wanted is None else wanted
        return self

    @property
    def training(self) -> bool:
        """Whether dropout acts."""
        return self._training

    def train(self, mode: bool = True) -> Module:
        """Switches to training, or with `mode=False` to evaluation."""
        for module in self.modules():
            module._training = mode
        return self

    def eval(self) -> Module:
        """Switches to evaluation: no dropout."""
        return self.train(False)

    def moved(self, put: Callable[[Any], Any]) -> Module:
        """This module, with `put`'s results for its arrays and weights; shared ones stay shared."""
        known: dict[int, Any] = {}
        vars(self).pop("_trained", None)
        for module in self.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, np.ndarray | DeviceArray | Weight | WeightStack):
                    if id(value) not in known:
                        known[id(value)] = (
                            value,
                            value.moved(put) if hasattr(value, "moved") else put(value),
                        )
                    setattr(module, name, known[id(value)][1])
        return self

    def load_weights(self, weights: Any, strict: bool = True) -> Module:
        """Copies `weights` into the parameters of the same names.

        `weights` is a dict, (name, array) pairs, or the path of a safetensors file. ValueError,
        before any change, for unknown names, other shapes, and with `strict` for missing
        parameters.
        """
        if isinstance(weights, str | os.PathLike):
            from pyloss.io.safetensors import read_safetensors

            weights = {
                name: tensor.array() for name, tensor in read_safetensors(weights).tensors.items()
            }
        weights, own = dict(weights), self.parameters()
        problems = [f"{k}: no such parameter" for k in weights if k not in own]
        problems += [
            f"{k}: shape {np.shape(v)}, expected {own[k].shape}"
            for k, v in weights.items()
            if k in own and np.shape(v) != own[k].shape
        ]
        problems += [f"{k}: missing" for k in own if strict and k not in weights]
        if problems:
            raise ValueError(f"these weights do not fit the model:{listed(problems)}")
        for name, value in weights.items():
            own[name][...] = value
        return self


class _Trained:
    """Where a module's trainable parameters are: a walk over all modules takes milliseconds.

    Attributes:
        places: (dotted name, module, attribute) of each.
    """

    def __init__(self, root: Module):
        self.structure = Module.structure
        self.places: list[tuple[str, Module, str]] = []
        # Lists and dicts of modules, with what was in them: they may change unseen.
        self.containers: list[tuple[list | dict, list]] = []
        seen: set[int] = set()
        for path, module in root.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, list | dict) and not name.startswith("_"):
                    self.containers.append((value, _items(value)))
            for name, value in module._own():
                if name not in module._frozen and id(value) not in seen:
                    seen.add(id(value))
                    self.places.append((_join(path, name), module, name))

    def holds(self) -> bool:
        """Whether the modules are as they were."""
        return self.structure is Module.structure and all(
            _same_items(_items(container), items) for container, items in self.containers
        )


def _items(container: list | dict) -> list:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _same_items(a: list, b: list) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def count_parameters(model: Any) -> tuple[int, int]:
    """How many numbers of a model are trained, and how many it has, stored matrices included."""
    stored = model.stored().values() if hasattr(model, "stored") else ()
    trained = sum(math.prod(array.shape) for array in model.trainable_parameters().values())
    return trained, sum(math.prod(array.shape) for array in (*model.parameters().values(), *stored))


def uniform(shape: tuple[int, ...], bound: float) -> np.ndarray:
    """float32 in [-bound, bound), from the library's random state."""
    return random.generator().uniform(-bound, bound, shape).astype(np.float32)


def _over(
    plain: type[M], quantized: type[M], weight: np.ndarray | Weight | WeightStack, **more: Any
) -> M:
    """A layer over `weight` and the attributes `more`, without a copy.

    It is a `plain` one, or a `quantized` one over a quantized weight.
    """
    cls = quantized if isinstance(weight, Weight | WeightStack) and not weight.is_float else plain
    layer = cls.__new__(cls)
    Module.__init__(layer)
    for name, value in {"weight": weight, **more}.items():
        setattr(layer, name, value)
    return layer


class Projecting(Module):
    """A layer that is one projection of its input, by the arrays of `projection()`."""

    def projection(self) -> ops.Projection:
        """The layer's arrays, for callers that compute several projections or losses at once."""
        raise NotImplementedError

    def __call__(self, x: Any) -> Any:
        return ops.project(x, self.projection())


def project_each(x: Any, *layers: Module) -> list[Any]:
    """The results of layers for one x; in one operation where all are plain projections."""
    if all(type(layer).__call__ is Projecting.__call__ for layer in layers):
        return ops.project_all(x, [layer.projection() for layer in layers])  # type: ignore[attr-defined]
    return [layer(x) for layer in layers]


def recorded_module(module: Module) -> Recorded | None:
    """What records the calls of a module, as it is now; None if that cannot be."""
    parameters: list[np.ndarray] = []
    constants: list[Any] = []
    for part in module.modules():
        if not vars(type(part)).get("recordable", False):
            return None
        for name, value in vars(part).items():
            if isinstance(value, DeviceArray):
                return None
            if isinstance(value, Weight):
                constants.append(value.handle)
            elif isinstance(value, np.ndarray):
                (constants if name.startswith("_") else parameters).append(value)
    return Recorded(parameters, constants)


class Linear(Projecting):
    """x [..., in] -> x weight^T + bias, [..., out].

    `weight` [out, in] is an ndarray (trained unless frozen) or a stored float `Weight` (never
    trained).
    """

    recordable = True

    def __init__(self, input_dims: int, output_dims: int, bias: bool = True):
        super().__init__()
        input_dims, output_dims = (
            whole(input_dims, "input_dims", 1),
            whole(output_dims, "output_dims", 1),
        )
        bound = 1 / math.sqrt(input_dims)
        self.weight: np.ndarray | Weight = uniform((output_dims, input_dims), bound)
        self.bias: np.ndarray | None = uniform((output_dims,), bound) if bias else None

    @staticmethod
    def from_weight(weight: np.ndarray | Weight, bias: np.ndarray | None = None) -> Linear:
        """A layer over existing arrays, without a copy.

        A quantized weight makes a `QuantizedLinear`.
        """
        return _over(Linear, QuantizedLinear, weight, bias=bias)

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features)"""
        return (self.weight.shape[0], self.weight.shape[1])

    def projection(self) -> ops.Projection:
        return ops.Projection(self.weight, self.bias)

    def __repr__(self) -> str:
        kind = self.weight.format if isinstance(self.weight, Weight) else "float32"
        return (
            f"{type(self).__name__}(in={self.shape[1]}, out={self.shape[0]}, "
            f"bias={self.bias is not None}, {kind})"
        )


def _affine(values: Any, group_size: int, bits: int) -> Weight:
    """A matrix in mlx's affine format with so many bits. ValueError for unsupported sizes."""
    count = whole(bits, "bits")
    if f"affine{count}" not in FORMATS:
        known = ", ".join(
            name.removeprefix("affine") for name in FORMATS if name.startswith("affine")
        )
        raise ValueError(f"bits is {bits}; it must be one of {known}")
    return Weight.quantize(values, f"affine{count}", group_size=whole(group_size, "group_size", 1))


class QuantizedLinear(Linear):
    """A `Linear` over a group-quantized weight, which is never trained.

    `QuantizedLinear(in, out)` begins with random values, stored as by mlx.nn's layer of this name:
    affine, in groups of `group_size` along each row, `bits` per value. `Linear.from_weight`
    makes one over a `Weight` of any quantized format.

    ValueError for sizes that the format does not have: `input_dims` must be a multiple of
    `group_size`.
    """

    recordable = True
    weight: Weight

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        bias: bool = True,
        group_size: int = 64,
        bits: int = 4,
    ):
        super().__init__(input_dims, output_dims, bias)
        self.weight = _affine(self.weight, group_size, bits)


class SwitchLinear(Module):
    """The linear layers of E experts: x [M, in], rows sorted by expert, to [M, out].

    `weight` [E, out, in] is an ndarray (trained unless frozen) or a `WeightStack` of floats (never
    trained), `bias` [E, out].
    """

    def __init__(self, input_dims: int, output_dims: int, num_experts: int, bias: bool = True):
        super().__init__()
        input_dims, output_dims = (
            whole(input_dims, "input_dims", 1),
            whole(output_dims, "output_dims", 1),
        )
        num_experts = whole(num_experts, "num_experts", 1)
        self.weight: np.ndarray | WeightStack = uniform(
            (num_experts, output_dims, input_dims), 1 / math.sqrt(input_dims)
        )
        self.bias: np.ndarray | None = (
            np.zeros((num_experts, output_dims), np.float32) if bias else None
        )

    @staticmethod
    def from_weight(
        weight: np.ndarray | WeightStack, bias: np.ndarray | None = None
    ) -> SwitchLinear:
        """A layer over existing arrays, without a copy.

        Quantized weights make a `QuantizedSwitchLinear`.
        """
        return _over(SwitchLinear, QuantizedSwitchLinear, weight, bias=bias)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, out features, in features)"""
        return (self.weight.shape[0], self.weight.shape[1], self.weight.shape[2])

    def __call__(self, x: Any, offsets: np.ndarray) -> Any:
        """Expert e has the rows [offsets[e], offsets[e + 1]) of x.

        `offsets` int32 [E + 1], see `ops.route`.
        """
        return ops.expert_project(x, offsets, Projection(self.weight, self.bias))

    def __repr__(self) -> str:
        experts, rows, cols = self.shape
        kind = self.weight.format if isinstance(self.weight, WeightStack) else "float32"
        return (
            f"{type(self).__name__}(in={cols}, out={rows}, experts={experts}, "
            f"bias={self.bias is not None}, {kind})"
        )


class QuantizedSwitchLinear(SwitchLinear):
    """A `SwitchLinear` over group-quantized weights, which are never trained.

    Arguments and errors as for `QuantizedLinear`. `SwitchLinear.from_weight` makes one over a
    `WeightStack`.
    """

    weight: WeightStack

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        num_experts: int,
        bias: bool = True,
        group_size: int = 64,
        bits: int = 4,
    ):
        super().__init__(input_dims, output_dims, num_experts, bias)
        drawn: Any = self.weight  # [E, out, in]
        self.weight = WeightStack([_affine(matrix, group_size, bits) for matrix in drawn])


class Embedding(Module):
    """Token ids [...] -> rows of weight [V, D], [..., D]."""

    def __init__(self, num_embeddings: int, dims: int):
        super().__init__()
        num_embeddings, dims = whole(num_embeddings, "num_embeddings", 1), whole(dims, "dims", 1)
        values = random.generator().standard_normal((num_embeddings, dims)) / math.sqrt(dims)
        self.weight: np.ndarray | Weight = values.astype(np.float32)

    @staticmethod
    def from_weight(weight: np.ndarray | Weight) -> Embedding:
        """A layer over an existing table, without a copy.

        A quantized table makes a `QuantizedEmbedding`.
        """
        return _over(Embedding, QuantizedEmbedding, weight)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows of the table, dimensions)"""
        return (self.weight.shape[0], self.weight.shape[1])

    def __call__(self, ids: Any) -> Any:
        return ops.embedding(ids, self.weight)

    def projection(self) -> ops.Projection:
        """The arrays of `as_linear`."""
        return ops.Projection(self.weight)

    def as_linear(self, x: Any) -> Any:
        """x [..., D] against the table as a tied head: [..., V]."""
        return ops.project(x, self.projection())

    def __repr__(self) -> str:
        kind = self.weight.format if isinstance(self.weight, Weight) else "float32"
        return f"{type(self).__name__}(rows={self.shape[0]}, dims={self.shape[1]}, {kind})"


class QuantizedEmbedding(Embedding):
    """An `Embedding` over a group-quantized table, which is never trained.

    `group_size`, `bits` and errors as for `QuantizedLinear`. `Embedding.from_weight` makes one over
    a `Weight`.
    """

    weight: Weight

    def __init__(self, num_embeddings: int, dims: int, group_size: int = 64, bits: int = 4):
        super().__init__(num_embeddings, dims)
        self.weight = _affine(self.weight, group_size, bits)


class RMSNorm(Module):
    """x / rms(x) * (weight + offset) along the last axis."""

    recordable = True

    def __init__(self, dims: int, eps: float = 1e-5, offset: float = 0.0):
        super().__init__()
        dims, offset = whole(dims, "dims", 1), real(offset, "offset")
        self.weight = np.full(dims, 1 - offset, np.float32)
        self.eps = real(eps, "eps", 0)
        self._offset = np.full(dims, offset, np.float32) if offset else None

    def __call__(self, x: Any) -> Any:
        weight = self.weight if self._offset is None else ops.add(self.weight, self._offset)
        return ops.rms_norm(x, weight, self.eps)


def value_and_grad(model: Any, function: Callable) -> Callable:
    """A function that returns `(value, grads)` of `function`, by the trainable parameters.

    `function` returns a scalar, or a tuple that begins with one. `grads` is a flat dict keyed like
    `model.trainable_parameters()`, with zeros for parameters that took no part.
    """

    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, np.ndarray]]:
        parameters = model.trainable_parameters()
        with Tape() as tape:
            leaves = {name: tape.watch(array) for name, array in parameters.items()}
            value = run_backward(tape, function(*args, **kwargs))
        return value, {name: leaf_gradient(leaf, parameters[name]) for name, leaf in leaves.items()}

    return wrapped
