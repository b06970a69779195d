"""The tape: records differentiable operations and runs their gradients backwards.

An operation computes its output on ndarrays. If `nodes_of(*inputs)` finds nodes, a gradient may be
needed, and it calls `record_on(nodes, output, vjp)`. `vjp(dy, grads)` puts the gradient of each
input with `grads.wanted(i)` into `grads`. `keep(x)` saves a value for the vjp; a value that is
cheap to recompute takes no memory. Backward drops saved values as soon as it has used them.

A training step visits this file between any two kernels, so its functions do little.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.runtime import device


class _Local(threading.local):
    tape: Tape | None = None


_local = _Local()
_FLOAT32 = np.dtype(np.float32)


class Node:
    """A recorded operation or a leaf.

    Attributes:
        root: identifies the tape. To other tapes, the node's Tensor is a constant.
        parents: the nodes of the inputs, None for constants.
        vjp: computes the inputs' gradients; None for a leaf.
        recompute: computes the output instead of keeping it, or None.
        cache: the recomputed output.
        grad: the gradient so far.
        owned: whether `grad` is this node's own buffer, which may be added to in place.
        reads_output: whether `vjp` reads the output. An operation that overwrites the output must
            restore it in its own vjp, which runs earlier.
        outputs: the nodes of the outputs, if the operation has several. `vjp` then gets a list of
            their gradients, None for an output that took no part, and may empty it.
    """

    __slots__ = (
        "root", "parents", "vjp", "recompute", "cache", "grad", "owned", "reads_output", "outputs",
    )  # fmt: skip

    def __init__(
        self,
        root: object,
        parents: Nodes = (),
        vjp: Callable | None = None,
        recompute: Callable | None = None,
        reads_output: bool = False,
        outputs: list[Node] | None = None,
    ):
        self.root = root
        self.parents = parents
        self.vjp = vjp
        self.recompute = recompute
        self.cache: np.ndarray | None = None
        self.grad: np.ndarray | None = None
        self.owned = False
        self.reads_output = reads_output
        self.outputs = outputs

    def add(self, grad: np.ndarray, own: bool = False) -> None:
        """Adds to the gradient; `own` says that nobody else will read `grad`."""
        if self.grad is None:
            self.grad, self.owned = grad, own
        elif not self.owned:
            self.grad, self.owned = _added(self.grad, grad), True
        elif self.grad is not grad:  # else the operation added in place, see Gradients.partial
            _add_into(self.grad, grad)


Nodes = Sequence[Node | None]


def _plain_float32(a: Any) -> bool:
    return type(a) is np.ndarray and a.dtype is _FLOAT32 and a.flags.c_contiguous


def _on_device(a: Any, b: Any) -> bool:
    """Whether both are float32 in one place of device memory."""
    both = isinstance(a, device.DeviceArray) and isinstance(b, device.DeviceArray)
    return both and a.kind == b.kind == "f32" and a.place == b.place


def _added(a: Any, b: Any) -> Any:
    if _plain_float32(a) and _plain_float32(b):
        out = _core.empty(a.shape)
        _core.add(a, b, out)
        return out
    if _on_device(a, b):
        there = device.empty(a.shape, np.float32, a)
        _core.add(a, b, there)
        return there
    if isinstance(a, device.DeviceArray) or isinstance(b, device.DeviceArray):
        return a + b if isinstance(a, device.DeviceArray) else b + a
    # NumPy returns a scalar for arrays without dimensions, and a scalar cannot be added to.
    return np.asarray(a + b)


def _add_into(a: Any, b: Any) -> None:
    if (_plain_float32(a) and _plain_float32(b)) or _on_device(a, b):
        _core.axpy(1.0, b, a)
    elif isinstance(a, device.DeviceArray):
        a.write(np.asarray(a) + np.asarray(b))
    else:
        a += b


class Gradients:
    """The gradients that a vjp writes, one per input of its operation."""

    __slots__ = ("nodes",)

    def __init__(self, nodes: Nodes):
        self.nodes = nodes

    def wanted(self, i: int) -> bool:
        """Whether the gradient of input i is needed."""
        return self.nodes[i] is not None

    def partial(self, i: int) -> np.ndarray | None:
        """The gradient of input i so far, if it may be added into in place."""
        node = self.nodes[i]
        return node.grad if node is not None and node.owned else None

    def put(self, i: int, grad: np.ndarray, own: bool = True) -> None:
        """Adds `grad` to input i. `own=False`: somebody else may still read the array."""
        node = self.nodes[i]
        if node is not None:
            node.add(grad, own)

    def put_all(self, first: int, grads: Sequence[Any]) -> None:
        """Adds owned gradients to the inputs from `first` on; None for an input without one."""
        onto, more = [], []
        for node, grad in zip(self.nodes[first : first + len(grads)], grads, strict=True):
            if node is None or grad is None:
                continue
            if node.grad is None:
                node.grad, node.owned = grad, True
            elif node.owned and _plain_float32(node.grad) and _plain_float32(grad):
                onto.append(node.grad)
                more.append(grad)
            else:
                node.add(grad, True)
        if more:
            _core.axpy(1.0, more, onto)


class Tape:
    """Records operations while it is entered; `watch` makes ndarrays leaves by identity.

    Args:
        within: another tape, whose Tensors and leaves this one knows too.
        probing: only finds out whether there is anything to record.
        replaying: runs a function a second time for its gradient. Outputs are computed when they
            are read, see `lazy_output`, and cheap values are kept, since backward follows at once.
    """

    def __init__(
        self, within: Tape | None = None, probing: bool = False, replaying: bool = False
    ) -> None:
        self.root: object = object() if within is None else within.root
        self.probing, self.replaying = probing, replaying
        self.memory: list[Any] | None = None  # of a checkpoint, see `remembered`
        self.nodes: list[Node] = []
        self.leaves: dict[int, Node] = {} if within is None else within.leaves
        self._watched: list[np.ndarray] = [] if within is None else within._watched

    def watch(self, array: np.ndarray) -> Node:
        """Makes this very array a leaf: operations on it record a gradient."""
        leaf = Node(self.root)
        self.leaves[id(array)] = leaf
        self._watched.append(array)  # keeps the identity valid
        return leaf

    def __enter__(self) -> Tape:
        self._outer = _local.tape
        _local.tape = self
        return self

    def __exit__(self, *unused: object) -> None:
        _local.tape = self._outer

    def backward(self, output: Tensor, grad: np.ndarray) -> None:
        """Propagates `grad`, the gradient of `output`, to all leaves. Uses the tape up."""
        if output._node is not None:
            self.backward_from(output._node, grad)

    def backward_from(self, node: Node, grad: np.ndarray) -> None:
        """`backward` from the node of an operation, whose output may be gone."""
        node.add(grad)
        nodes, self.nodes = self.nodes, []
        with no_grad():
            while nodes:
                node = nodes.pop()
                if node.outputs is not None:
                    _backward_of_several(node)
                elif node.grad is not None and node.vjp is not None:
                    node.vjp(node.grad, Gradients(node.parents))
                node.vjp = node.recompute = node.cache = node.grad = None


def _backward_of_several(node: Node) -> None:
    """The vjp of an operation with several outputs."""
    assert node.outputs is not None and node.vjp is not None
    dys = []
    for output in node.outputs:
        dys.append(output.grad)
        output.cache = output.grad = None
    if any(dy is not None for dy in dys):
        node.vjp(dys, Gradients(node.parents))
    node.outputs = None


class no_grad:
    """A context in which nothing is recorded; results are constants to the outer tape."""

    def __enter__(self) -> None:
        self._outer = _local.tape
        _local.tape = None

    def __exit__(self, *unused: object) -> None:
        _local.tape = self._outer


def current_tape() -> Tape | None:
    """The tape that this thread records to, or None."""
    return _local.tape


def _node_of(x: Any) -> Node | None:
    nodes = nodes_of(x)
    return None if nodes is None else nodes[0]


def nodes_of(*inputs: Any) -> Nodes | None:
    """The nodes of an operation's inputs, None for constants; None if nothing is to be recorded."""
    tape = _local.tape
    if tape is None:
        return None
    root, leaves, found, traced = tape.root, tape.leaves, [], False
    for x in inputs:
        if isinstance(x, Tensor):
            node = x._node
            if node is not None and node.root is not root:
                node = None
        else:
            node = leaves.get(id(x))
        if node is not None:
            traced = True
        found.append(node)
    return found if traced else None


def recording(*inputs: Any) -> bool:
    """Whether an operation on these inputs has to be recorded."""
    return nodes_of(*inputs) is not None


def reads_output(x: Any) -> bool:
    """Whether the vjp of the operation that made x reads x.

    An operation that overwrites x must then restore it in its own vjp.
    """
    node = _node_of(x)
    return node is not None and node.reads_output


def record(
    output: np.ndarray | LazyTensor,
    inputs: Sequence[Any],
    vjp: Callable,
    recompute: Callable | None = None,
    reads_output: bool = False,
) -> Tensor:
    """The Tensor of an operation's output. `recompute()`, if given, stands in for keeping it."""
    nodes = nodes_of(*inputs) or (None,) * len(inputs)
    return record_on(nodes, output, vjp, recompute, reads_output)


def record_on(
    nodes: Nodes,
    output: np.ndarray | LazyTensor,
    vjp: Callable,
    recompute: Callable | None = None,
    reads_output: bool = False,
) -> Tensor:
    """`record`, with the inputs' nodes from `nodes_of`."""
    tape = _local.tape
    assert tape is not None
    if tape.probing:
        node = Node(tape.root, (), None, None, reads_output)
    else:
        node = Node(tape.root, nodes, vjp, None if tape.replaying else recompute, reads_output)
        tape.nodes.append(node)
    return _tensor(output, node)


def record_several(
    nodes: Nodes,
    outputs: Sequence[np.ndarray | LazyTensor],
    vjp: Callable,
    reads_outputs: Sequence[bool],
) -> list[Tensor]:
    """The Tensors of an operation with several outputs, see `Node.outputs`."""
    tape = _local.tape
    assert tape is not None
    root = tape.root
    found = [Node(root, (), None, None, reads) for reads in reads_outputs]
    if not tape.probing:
        tape.nodes.append(Node(root, nodes, vjp, outputs=found))
    return [_tensor(output, node) for output, node in zip(outputs, found, strict=True)]


def _tensor(output: np.ndarray | LazyTensor, node: Node) -> Tensor:
    if isinstance(output, LazyTensor):
        output._node = node
        return output
    return Tensor(output, node)


def replaying() -> bool:
    """Whether outputs are computed when they are read, see `lazy_output`."""
    tape = _local.tape
    return tape is not None and tape.replaying


def lazy_output(
    shape: tuple[int, ...], compute: Callable[[], np.ndarray]
) -> np.ndarray | LazyTensor:
    """The float32 output of a recorded operation.

    It is `compute()`; while a tape replays, it is computed when it is first read.
    """
    return LazyTensor(shape, _FLOAT32, compute) if replaying() else compute()


def remembered(compute: Callable[[], Any]) -> Any:
    """`compute()`, kept by a checkpoint with `remember` for its second run.

    For results that take much time to compute and little memory.
    """
    tape = _local.tape
    if tape is None or tape.memory is None:
        return compute()
    if tape.replaying:
        return tape.memory.pop(0)
    tape.memory.append(compute())
    return tape.memory[-1]


def data(x: Any, name: str = "the argument") -> Any:
    """The array of a Tensor or array-like: an ndarray, or a DeviceArray.

    Errors call the argument `name`.
    """
    return x.data if isinstance(x, Tensor) else device.array(x, name)


def keep(x: Any) -> Callable[[], np.ndarray]:
    """Saves a value for backward. Returns a function that gives or recomputes it."""
    node = _node_of(x)
    if node is None or node.recompute is None:
        if isinstance(x, LazyTensor):
            return lambda: x.data
        value = data(x)
        return lambda: value

    def get() -> np.ndarray:
        if node.cache is None:
            assert node.recompute is not None
            node.cache = node.recompute()
        return node.cache

    return get


def _unbroadcast(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums a gradient over the axes along which an input of `shape` was broadcast."""
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape)))) if grad.ndim > len(shape) else grad
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and grad.shape[i] != 1)
    return grad.sum(axis=axes, keepdims=True) if axes else grad


def _value(x: Any) -> Any:
    return x if np.isscalar(x) else data(x)


def _elementwise(function: Callable, partials: tuple[Callable, Callable], a: Any, b: Any) -> Any:
    """A binary operation with broadcasting.

    `partials` are its derivatives, functions of both arguments and the result.
    """
    if not recording(a, b):
        return function(_value(a), _value(b))
    a, b = (v if np.isscalar(v) or isinstance(v, Tensor) else np.asarray(v) for v in (a, b))
    if isinstance(a, LazyTensor) or isinstance(b, LazyTensor):
        shape = np.broadcast_shapes(
            *(v.shape if isinstance(v, Tensor) else np.shape(v) for v in (a, b))
        )
        small = (v if np.isscalar(v) else np.ones((1,) * v.ndim, v.dtype) for v in (a, b))
        out: Any = LazyTensor(
            shape, function(*small).dtype, lambda: np.asarray(function(_value(a), _value(b)))
        )
    else:
        out = function(_value(a), _value(b))

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        for i, operand in enumerate((a, b)):
            if grads.wanted(i):
                partial = _value(partials[i](a, b, out))
                grads.put(
                    i,
                    np.asarray(_unbroadcast(dy * partial, operand.shape), operand.dtype, order="C"),
                )

    return record(out, (a, b), vjp)


class Tensor:
    """A traced array: functions under `value_and_grad` compute with these.

    `+ - * / **` with arrays and numbers (NumPy's broadcasting), `sum`, `mean`, `reshape` and
    pyloss's functions carry the gradient. `.data` is the ndarray.
    """

    __slots__ = ("_data", "_node")
    __array_ufunc__ = None  # ndarray + Tensor is ours

    def __init__(self, data: np.ndarray, node: Node | None = None):
        self._data = data
        self._node = node

    @property
    def data(self) -> np.ndarray:
        """The ndarray."""
        return self._data

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        """The element type."""
        return self.data.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.data.size

    def item(self) -> float:
        """The value of a Tensor with one element."""
        return self.data.item()

    def __float__(self) -> float:
        return float(self.data.item())

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"Tensor({self.data!r})"

    def __add__(self, other: Any) -> Any:
        return _elementwise(np.add, (lambda a, b, y: 1, lambda a, b, y: 1), self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return _elementwise(np.subtract, (lambda a, b, y: 1, lambda a, b, y: -1), self, other)

    def __rsub__(self, other: Any) -> Any:
        return _elementwise(np.subtract, (lambda a, b, y: 1, lambda a, b, y: -1), other, self)

    def __mul__(self, other: Any) -> Any:
        return _elementwise(np.multiply, (lambda a, b, y: b, lambda a, b, y: a), self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return _elementwise(np.divide, (_over, lambda a, b, y: -_value(y) / _value(b)), self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _elementwise(np.divide, (_over, lambda a, b, y: -_value(y) / _value(b)), other, self)

    def __pow__(self, other: float) -> Any:
        if isinstance(other, Tensor):
            raise TypeError("an exponent must be a number or a plain array: it gets no gradient")
        return _elementwise(np.power, (_power_slope, lambda a, b, y: 0), self, other)

    def __neg__(self) -> Any:
        return self * -1

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
        """The sum over an axis, several, or all; added up in float64."""
        shape = self.shape
        kept = (
            np.empty(shape, np.bool_).sum(axis=axis, keepdims=True).shape
            if axis is not None
            else (1,) * self.ndim
        )
        dims = (
            kept
            if keepdims
            else np.empty(shape, np.bool_).sum(axis=axis).shape
            if axis is not None
            else ()
        )

        def total(x: np.ndarray) -> np.ndarray:
            wide = np.float64 if x.dtype.itemsize < 8 and x.dtype.kind not in "iub" else None
            return np.asarray(
                x.sum(axis=axis, keepdims=keepdims, dtype=wide), x.dtype if wide else None
            )

        out = self._derived(dims, total)
        if not recording(self):
            return out

        def vjp(dy: np.ndarray, grads: Gradients) -> None:
            dx = np.empty(shape, dy.dtype)
            dx[...] = dy.reshape(kept)
            grads.put(0, dx)

        return record(out, (self,), vjp)

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
        """The mean over an axis, several, or all."""
        total = self.sum(axis, keepdims)
        return total * (math.prod(total.shape) / max(self.size, 1))

    def reshape(self, *shape: Any) -> Any:
        """The same elements in another shape."""
        before = self.shape
        out = self._derived(
            np.empty(before, np.bool_).reshape(*shape).shape, lambda x: x.reshape(*shape)
        )
        if not recording(self):
            return out

        def vjp(dy: np.ndarray, grads: Gradients) -> None:
            grads.put(0, dy.reshape(before), own=False)

        return record(out, (self,), vjp, reads_output=reads_output(self))

    def _derived(self, shape: tuple[int, ...], function: Callable[[np.ndarray], np.ndarray]) -> Any:
        """`function` of the data; deferred while these are not computed."""
        return function(self.data)


class LazyTensor(Tensor):
    """A Tensor that computes its data when they are first read.

    Backward does not read the data of a loss, so the core computes a loss and its gradient in one
    call.
    """

    __slots__ = ("_compute", "_dtype", "_shape")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, compute: Callable[[], np.ndarray]):
        self._compute: Callable[[], np.ndarray] | None = compute
        self._shape, self._dtype = shape, dtype
        self._node = None

    @property
    def data(self) -> np.ndarray:
        if self._compute is not None:
            with no_grad():
                self.set_data(self._compute())
        return self._data

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> np.dtype:
        return self._dtype

    @property
    def ndim(self) -> int:
        return len(self._shape)

    @property
    def size(self) -> int:
        return math.prod(self._shape)

    def __len__(self) -> int:
        if not self._shape:
            raise TypeError("len() of a Tensor without dimensions")
        return self._shape[0]

    def set_data(self, data: np.ndarray) -> None:
        """Sets the data, when backward has computed them already."""
        self._data, self._compute = data, None

    def _derived(self, shape: tuple[int, ...], function: Callable[[np.ndarray], np.ndarray]) -> Any:
        return LazyTensor(shape, self._dtype, lambda: function(self.data))


def _over(a: Any, b: Any, y: Any) -> Any:
    return 1 / _value(b)


def _power_slope(a: Any, b: Any, y: Any) -> Any:
    base, exponent = _value(a), _value(b)
    return exponent * base ** np.where(exponent == 0, 1, exponent - 1)
