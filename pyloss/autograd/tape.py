"""The tape: records differentiable operations and runs their gradients backwards.

An operation computes its output on ndarrays. If `nodes_of(*inputs)` finds nodes, a gradient may be
needed, and it calls `record_on(nodes, output, vjp)`. `vjp(dy, grads)` puts the gradient of each
input with `grads.wanted(i)` into `grads`. `keep(x)` saves a value for the vjp; a value that is
cheap to recompute takes no memory. Backward drops saved values as soon as it has used them.

A training step visits this file between any two kernels, so its functions do little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyloss import _core
from pyloss.autograd.scope import OPEN, Root, local, no_grad
from pyloss.autograd.tensor import LazyTensor, Parameter, Tensor, refuse_elsewhere
from pyloss.runtime import device

_FLOAT32 = np.dtype(np.float32)


class Node:
    """A recorded operation or a leaf.

    Attributes:
        root: identifies the recording. To others, the node's Tensor is a constant.
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
        root: Root,
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


_OUTER = (
    "a value of one recording is used in another one within it, and its gradient would be lost: "
    "gradients of gradients are not computed; pyloss.stop_gradient(x) makes a constant"
)
_EARLIER = (
    "a value of an earlier recording, or one that left a checkpointed function other than by its "
    "result, is used here, and its gradient would be lost: compute it again, or make a constant of "
    "it with pyloss.stop_gradient(x) where it was computed"
)


class Gradients:
    """The gradients that a vjp writes, one per input of its operation.

    Attributes:
        passes: whether the gradient that the vjp was given may become an input's own.
    """

    __slots__ = ("nodes", "passes")

    def __init__(self, nodes: Nodes, passes: bool = False):
        self.nodes = nodes
        self.passes = passes

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
        refusing: the TypeError where a value of an outer recording is used, in place of the usual.
        replaying: runs a function a second time for its gradient. Outputs are computed when they
            are read, see `lazy_output`, and cheap values are kept, since backward follows at once.
    """

    def __init__(
        self,
        within: Tape | None = None,
        probing: bool = False,
        replaying: bool = False,
        refusing: str = _OUTER,
    ) -> None:
        self.root: Root = Root() if within is None else within.root
        self.refusing = refusing
        self.probing, self.replaying = probing, replaying
        # Whose nodes this tape knows. Those of a probing tape end with it.
        self.probe_root: Root = Root() if probing else self.root
        self.roots: tuple[Root, ...] = (self.root,) if within is None else within.roots
        if probing:
            self.roots = (*self.roots, self.probe_root)
        self.memory: list[Any] | None = None  # of a checkpoint, see `remembered`
        self.nodes: list[Node] = []
        self.enclosing: list[Tape] = []  # those of other recordings, while this one is entered
        self.leaves: dict[int, Node] = {} if within is None else within.leaves
        self._watched: list[np.ndarray] = [] if within is None else within._watched

    def watch(self, array: np.ndarray) -> Node:
        """Makes this very array a leaf: operations on it record a gradient."""
        leaf = Node(self.root)
        self.leaves[id(array)] = leaf
        self._watched.append(array)  # keeps the identity valid
        return leaf

    def node_of(self, x: Any) -> Node | None:
        """The node of a value; None for a constant. Other errors as `nodes_of`."""
        if not isinstance(x, Tensor):
            node = self.leaves.get(id(x))
        elif type(x) is Parameter:
            node, x = self.leaves.get(id(x._array)), x._array
        else:
            node = x._node
            if node is not None and not any(node.root is root for root in self.roots):
                outer = any(node.root is root for tape in self.enclosing for root in tape.roots)
                raise TypeError(self.refusing if outer else _EARLIER)
            return node
        if node is None and any(id(x) in tape.leaves for tape in self.enclosing):
            raise TypeError(self.refusing)
        return node

    def __enter__(self) -> Tape:
        self._outer = tape = local.tape
        self.enclosing = []
        while tape is not None:
            if tape.root is not self.root:
                self.enclosing.append(tape)
            tape = tape._outer
        local.tape = self
        local.inside += 1
        for root in {self.root, self.probe_root}:
            root.enter()
        return self

    def __exit__(self, *unused: object) -> None:
        local.tape = self._outer
        local.inside -= 1
        for root in {self.root, self.probe_root}:
            root.leave()

    def backward(self, output: Tensor, grad: np.ndarray) -> None:
        """Propagates `grad`, the gradient of `output`, to all leaves. Uses the tape up."""
        if output._node is not None:
            self.backward_from(output._node, grad)

    def backward_from(self, node: Node, grad: np.ndarray) -> None:
        """`backward` from the node of an operation, whose output may be gone."""
        self.backward_from_all([(node, grad)])

    def backward_from_all(self, ends: Sequence[tuple[Node, np.ndarray]]) -> None:
        """`backward_from` several nodes at once."""
        for node, grad in ends:
            node.add(grad)
        nodes, self.nodes = self.nodes, []
        with no_grad():
            while nodes:
                node = nodes.pop()
                if node.outputs is not None:
                    _backward_of_several(node)
                elif node.grad is not None and node.vjp is not None:
                    node.vjp(node.grad, Gradients(node.parents, node.owned))
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


def nodes_of(*inputs: Any) -> Nodes | None:
    """The nodes of an operation's inputs, None for constants; None if nothing is to be recorded.

    TypeError for a value of an outer recording: its gradient would be lost.
    """
    tape = local.tape
    if tape is None:
        if OPEN and not local.inside:
            refuse_elsewhere(inputs)
        return None
    root, leaves, inside, traced = tape.root, tape.leaves, bool(tape.enclosing), False
    found: list[Node | None] = []
    for x in inputs:
        kind, node = type(x), None
        if kind is Tensor and x._node is not None and x._node.root is root:
            node = x._node
        elif kind is not np.ndarray or inside:
            node = tape.node_of(x)
        else:
            node = leaves.get(id(x))
        traced = traced or node is not None
        found.append(node)
    return found if traced else None


def recording(*inputs: Any) -> bool:
    """Whether an operation on these inputs has to be recorded."""
    return nodes_of(*inputs) is not None


def reads_output(x: Any) -> bool:
    """Whether the vjp of the operation that made x reads x.

    An operation that overwrites x must then restore it in its own vjp.
    """
    nodes = nodes_of(x)
    return nodes is not None and nodes[0] is not None and nodes[0].reads_output


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
    tape = local.tape
    assert tape is not None
    if tape.probing:
        node = Node(tape.probe_root, (), None, None, reads_output)
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
    tape = local.tape
    assert tape is not None
    found = [Node(tape.probe_root, (), None, None, reads) for reads in reads_outputs]
    if not tape.probing:
        tape.nodes.append(Node(tape.root, nodes, vjp, outputs=found))
    return [_tensor(output, node) for output, node in zip(outputs, found, strict=True)]


def _tensor(output: np.ndarray | LazyTensor, node: Node) -> Tensor:
    if isinstance(output, LazyTensor):
        output._node = node
        return output
    return Tensor(output, node)


def replaying() -> bool:
    """Whether outputs are computed when they are read, see `lazy_output`."""
    tape = local.tape
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
    tape = local.tape
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
    nodes = nodes_of(x)
    node = None if nodes is None else nodes[0]
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
