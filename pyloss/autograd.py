"""The tape: records differentiable operations and runs their gradients backwards.

An operation computes its output on ndarrays and, when `recording(*inputs)` says that a gradient may be asked for, calls
`record(output, inputs, vjp)`. `vjp(dy, grads)` puts the gradient of each input that `grads.wanted(i)` into `grads`. What an
operation needs later it takes with `keep(x)`, which costs no memory for values that are cheap to compute again.
Saved values are dropped as soon as backward has used them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _core, random

_local = threading.local()


class Node:
    """One recorded operation (or a leaf): where its gradient gathers, and how it goes on from there."""

    __slots__ = ("root", "parents", "vjp", "again", "cache", "grad", "owned")

    def __init__(
        self, root: object, parents: tuple[Node | None, ...] = (), vjp: Callable | None = None, again: Callable | None = None
    ):
        self.root = root  # of the tape it was recorded by; to others its Tensor is a constant
        self.parents = parents
        self.vjp = vjp
        self.again = again  # computes the output again, instead of keeping it
        self.cache: np.ndarray | None = None
        self.grad: np.ndarray | None = None
        self.owned = False  # grad is a buffer of this node's own, which may be added into

    def add(self, grad: np.ndarray, own: bool = False) -> None:
        """Adds to the gradient; `own` says that nobody else will read `grad`."""
        if self.grad is None:
            self.grad, self.owned = grad, own
        elif not self.owned:
            self.grad, self.owned = _added(self.grad, grad), True
        elif self.grad is not grad:  # else the operation added in place, see Gradients.partial
            _add_into(self.grad, grad)


def _added(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype == np.float32 and a.flags.c_contiguous and b.flags.c_contiguous and b.dtype == np.float32:
        out = _core.empty(a.shape)
        _core.add(a, b, out)
        return out
    return np.asarray(a + b)  # of arrays without dimensions NumPy makes a scalar, which nothing can be added into


def _add_into(a: np.ndarray, b: np.ndarray) -> None:
    if a.dtype == np.float32 and a.flags.c_contiguous and b.flags.c_contiguous and b.dtype == np.float32:
        _core.axpy(1.0, b, a)
    else:
        a += b


class Gradients:
    """What a vjp writes to: one slot per input of its operation."""

    __slots__ = ("nodes",)

    def __init__(self, nodes: tuple[Node | None, ...]):
        self.nodes = nodes

    def wanted(self, i: int) -> bool:
        """Whether the gradient of input i is needed."""
        return self.nodes[i] is not None

    def partial(self, i: int) -> np.ndarray | None:
        """The gradient of input i so far, if it may be added into in place."""
        node = self.nodes[i]
        return node.grad if node is not None and node.owned else None

    def put(self, i: int, grad: np.ndarray, own: bool = True) -> None:
        """Adds `grad` to input i. `own=False` when somebody else may still read the array."""
        node = self.nodes[i]
        if node is not None:
            node.add(grad, own)


class Tape:
    """Records operations while it is entered; `watch` makes ndarrays leaves by identity.

    `within` another tape, its Tensors are known here too. A `probing` tape only finds out whether there is anything to record.
    """

    def __init__(self, within: Tape | None = None, probing: bool = False) -> None:
        self.root: object = object() if within is None else within.root
        self.probing = probing
        self.nodes: list[Node] = []
        self.leaves: dict[int, Node] = {}
        self._watched: list[np.ndarray] = []

    def watch(self, array: np.ndarray) -> Node:
        """Operations that are given this very array record a gradient for it."""
        leaf = Node(self.root)
        self.leaves[id(array)] = leaf
        self._watched.append(array)  # keeps the identity valid
        return leaf

    def __enter__(self) -> Tape:
        self._outer = current_tape()
        _local.tape = self
        return self

    def __exit__(self, *unused: object) -> None:
        _local.tape = self._outer

    def backward(self, output: Tensor, grad: np.ndarray) -> None:
        """Propagates `grad`, the gradient of `output`, to all leaves. Uses the tape up."""
        if output._node is None:
            return
        output._node.add(grad)
        nodes, self.nodes = self.nodes, []
        with _no_tape():
            while nodes:
                node = nodes.pop()
                if node.grad is not None and node.vjp is not None:
                    node.vjp(node.grad, Gradients(node.parents))
                node.vjp = node.again = node.cache = node.grad = None


class _no_tape:
    """No recording inside."""

    def __enter__(self) -> None:
        self._outer = current_tape()
        _local.tape = None

    def __exit__(self, *unused: object) -> None:
        _local.tape = self._outer


def current_tape() -> Tape | None:
    """The tape of this thread that records now."""
    return getattr(_local, "tape", None)


def _node_of(x: Any) -> Node | None:
    tape = current_tape()
    if tape is None:
        return None
    if isinstance(x, Tensor):
        return x._node if x._node is not None and x._node.root is tape.root else None
    return tape.leaves.get(id(x))


def recording(*inputs: Any) -> bool:
    """Whether an operation on these inputs has to be recorded."""
    return current_tape() is not None and any(_node_of(x) is not None for x in inputs)


def record(output: np.ndarray, inputs: Sequence[Any], vjp: Callable, again: Callable | None = None) -> Tensor:
    """The Tensor of an operation's output. `again()`, where given, returns the output anew for those who keep it."""
    tape = current_tape()
    assert tape is not None
    if tape.probing:
        return Tensor(output, Node(tape.root))
    node = Node(tape.root, tuple(_node_of(x) for x in inputs), vjp, again)
    tape.nodes.append(node)
    return Tensor(output, node)


def data(x: Any) -> np.ndarray:
    """The ndarray of a Tensor or array-like."""
    return x.data if isinstance(x, Tensor) else np.asarray(x)


def keep(x: Any) -> Callable[[], np.ndarray]:
    """Saves a value for backward: a function that gives it, computed again if that was recorded as cheap."""
    node = _node_of(x)
    if node is None or node.again is None:
        value = data(x)
        return lambda: value

    def get() -> np.ndarray:
        if node.cache is None:
            assert node.again is not None
            node.cache = node.again()
        return node.cache

    return get


def _unbroadcast(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums a gradient over the axes along which an input of `shape` was broadcast."""
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape)))) if grad.ndim > len(shape) else grad
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and grad.shape[i] != 1)
    return grad.sum(axis=axes, keepdims=True) if axes else grad


def _elementwise(function: Callable, partials: Callable, a: Any, b: Any) -> Tensor | np.ndarray:
    """A binary operation with broadcasting; `partials(a, b, y)` gives both derivatives."""
    operands: list[Any] = [v if np.isscalar(v) else data(v) for v in (a, b)]
    out = function(*operands)
    if not recording(a, b):
        return out

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        for i, (value, partial) in enumerate(zip(operands, partials(*operands, out), strict=True)):
            if grads.wanted(i):
                grads.put(i, np.asarray(_unbroadcast(dy * partial, np.shape(value)), value.dtype, order="C"))

    return record(out, (a, b), vjp)


class Tensor:
    """A traced array: what a function under `value_and_grad` computes with.

    `+ - * / **` with arrays and numbers (NumPy broadcasting), `sum`, `mean`, `reshape`, and all of `pyloss`'s functions carry the
    gradient; `.data` is the ndarray, for everything else.
    """

    __slots__ = ("data", "_node")
    __array_ufunc__ = None  # ndarray + Tensor is ours

    def __init__(self, data: np.ndarray, node: Node | None = None):
        self.data = data
        self._node = node

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
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
        return _elementwise(np.add, lambda a, b, y: (1, 1), self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return _elementwise(np.subtract, lambda a, b, y: (1, -1), self, other)

    def __rsub__(self, other: Any) -> Any:
        return _elementwise(np.subtract, lambda a, b, y: (1, -1), other, self)

    def __mul__(self, other: Any) -> Any:
        return _elementwise(np.multiply, lambda a, b, y: (b, a), self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return _elementwise(np.divide, lambda a, b, y: (1 / b, -y / b), self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _elementwise(np.divide, lambda a, b, y: (1 / b, -y / b), other, self)

    def __pow__(self, other: float) -> Any:
        if isinstance(other, Tensor):
            raise TypeError("an exponent must be a number or a plain array: it gets no gradient")
        return _elementwise(np.power, lambda a, b, y: (b * a ** np.where(b == 0, 1, b - 1), 0), self, other)

    def __neg__(self) -> Any:
        return self * -1

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
        """The sum over an axis, several, or all."""
        out = np.asarray(self.data.sum(axis=axis, keepdims=keepdims))
        if not recording(self):
            return out
        kept = self.data.sum(axis=axis, keepdims=True).shape if axis is not None else (1,) * self.ndim
        shape = self.shape

        def vjp(dy: np.ndarray, grads: Gradients) -> None:
            dx = np.empty(shape, dy.dtype)
            dx[...] = dy.reshape(kept)
            grads.put(0, dx)

        return record(out, (self,), vjp)

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
        """The mean over an axis, several, or all."""
        total = self.sum(axis, keepdims)
        return total * (np.size(data(total)) / max(self.size, 1))

    def reshape(self, *shape: Any) -> Any:
        """The same elements in another shape."""
        before = self.shape
        out = self.data.reshape(*shape)
        return record(out, (self,), lambda dy, grads: grads.put(0, dy.reshape(before), own=False)) if recording(self) else out


def _tree_map(function: Callable, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _tree_map(function, v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        mapped = (_tree_map(function, v) for v in tree)
        return type(tree)(*mapped) if hasattr(tree, "_fields") else type(tree)(mapped)
    return function(tree)


def _plain(value: Any) -> Any:
    return _tree_map(lambda v: v.data[()] if isinstance(v, Tensor) else v, value)


def leaf_gradient(leaf: Node, array: np.ndarray) -> np.ndarray:
    """The gradient that gathered at the leaf of `array`, of its type, for the caller alone; zeros where there is none."""
    if leaf.grad is None:
        return np.zeros_like(array)
    return leaf.grad.astype(array.dtype, copy=not leaf.owned)


def run_backward(tape: Tape, result: Any) -> Any:
    """Runs backward from a scalar result (or the first of a tuple); returns the result as plain arrays."""
    loss = result[0] if isinstance(result, tuple) else result
    if np.size(data(loss)) != 1:
        raise ValueError(f"the function must return a scalar to be differentiated, not an array of shape {np.shape(data(loss))}")
    if isinstance(loss, Tensor):
        tape.backward(loss, np.ones_like(loss.data))
    return _plain(result)


def value_and_grad(function: Callable, argnums: int | Sequence[int] = 0) -> Callable:
    """A function that returns `(value, gradients)` of `function`.

    `function` returns a scalar, or a tuple whose first element is one (the others come back as they are). The gradients are those
    of the arguments at `argnums`: float arrays, or dicts, lists and tuples of them; one gradient for an int, a tuple of gradients
    for a sequence. float32 and float64 arguments keep their type; other numbers are computed in float32.
    """
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def leaf(value: Any, root: object) -> Tensor:
        array = np.asarray(value)
        if array.dtype not in (np.float32, np.float64):
            if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
                raise TypeError(f"cannot differentiate with respect to dtype {array.dtype}; it must hold real numbers")
            native = array.dtype.newbyteorder("=")
            array = array.astype(native if native == np.float64 else np.float32)
        return Tensor(array, Node(root))

    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for i in positions:
            if not -len(args) <= i < len(args):
                raise ValueError(f"argnums names argument {i}, but the function was called with {len(args)} arguments")
        traced, tape = list(args), Tape()
        for i in positions:
            traced[i] = _tree_map(lambda value: leaf(value, tape.root), args[i])
        with tape:
            value = run_backward(tape, function(*traced, **kwargs))

        def gradient(t: Tensor) -> np.ndarray:
            assert t._node is not None
            return leaf_gradient(t._node, t.data)

        grads = tuple(_tree_map(gradient, traced[i]) for i in positions)
        return value, grads[0] if isinstance(argnums, int) else grads

    return wrapped


def grad(function: Callable, argnums: int | Sequence[int] = 0) -> Callable:
    """Like `value_and_grad`, returning the gradients alone."""
    both = value_and_grad(function, argnums)
    return lambda *args, **kwargs: both(*args, **kwargs)[1]


def checkpoint(function: Callable, x: Any) -> Any:
    """`function(x)` without keeping what its operations save: backward runs it again (Chen et al., arXiv:1604.06174)."""
    outer = current_tape()
    if outer is None:
        return function(x)
    traced, kept, state = _node_of(x) is not None, keep(x), random.state()
    with Tape(within=outer, probing=True) as probe:
        probe.leaves = outer.leaves
        result = function(Tensor(data(x), Node(probe.root)) if traced else data(x))
    if not isinstance(result, Tensor):
        return result
    out = result.data
    del result

    def vjp(dy: np.ndarray, grads: Gradients) -> None:
        later = random.state()
        random.set_state(state)
        try:
            with Tape(within=outer) as tape:
                leaf = Node(tape.root) if grads.wanted(0) else None
                for array in outer._watched:
                    tape.watch(array)
                tape.backward(function(Tensor(kept(), leaf) if leaf is not None else kept()), dy)
        finally:
            random.set_state(later)
        for key, node in tape.leaves.items():
            if node.grad is not None:
                outer.leaves[key].add(node.grad, own=node.owned)
        if leaf is not None and leaf.grad is not None:
            grads.put(0, leaf.grad, own=leaf.owned)

    return record(out, (x,), vjp)
