"""How modules and tables of arrays are shown: as text, and as HTML in notebooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from pyloss.autograd.tensor import Tensor
from pyloss.errors import counted, size_text
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

if TYPE_CHECKING:
    from pyloss.nn.module import Module

_STORED = (Weight, WeightStack)
_MOST_ROWS = 60  # of a table: more are left out in the middle


@dataclass
class _Counts:
    """The arrays of a module and those below it, each counted once.

    Attributes:
        sizes: by the identity of an array, its number of elements.
        trained: the identities of the trained ones.
    """

    sizes: dict[int, int] = field(default_factory=dict)
    trained: set[int] = field(default_factory=set)

    def add(self, array: Any, trained: bool) -> None:
        self.sizes[id(array)] = math.prod(array.shape)
        if trained:
            self.trained.add(id(array))

    def update(self, other: _Counts) -> None:
        self.sizes |= other.sizes
        self.trained |= other.trained

    def numbers(self) -> tuple[int, int]:
        """How many parameters are trained, and how many are frozen."""
        trained = sum(self.sizes[key] for key in self.trained)
        return trained, sum(self.sizes.values()) - trained


@dataclass
class _Node:
    """One line of the tree, or the first line of a module with submodules.

    Attributes:
        names: of the submodules that the line stands for, neighbors that look alike.
        head: the name of the class, or the module's own repr.
        arrays: a text for each of the module's own arrays.
        whole: whether `head` says everything.
    """

    names: list[str]
    head: str
    arrays: list[str] = field(default_factory=list)
    children: list[_Node] = field(default_factory=list)
    whole: bool = False
    trained: int = 0
    frozen: int = 0

    def looks_like(self, other: _Node) -> bool:
        return (self.head, self.arrays, self.whole, self.trained, self.frozen) == (
            (other.head, other.arrays, other.whole, other.trained, other.frozen)
        ) and (
            len(self.children) == len(other.children)
            and all(
                a.names == b.names and a.looks_like(b)
                for a, b in zip(self.children, other.children, strict=True)
            )
        )

    def label(self) -> str:
        if not self.names:
            return ""
        if len(self.names) == 1:
            return f"({self.names[0]}): "
        return f"({self.names[0]}-{self.names[-1].split('.')[-1]}): {len(self.names)} x "

    def counts(self) -> str:
        total = self.trained + self.frozen
        if not self.names:
            said = f"{counted_in_thousands(total, 'parameter')}: "
            return f"{said}{self.trained:,} trained, {self.frozen:,} frozen"
        each = "each " if len(self.names) > 1 and total else ""
        if self.trained and self.frozen:
            return f"{each}{total:,}: {self.trained:,} trained, {self.frozen:,} frozen"
        kind = "trained" if self.trained else "frozen"
        return f"{each}{total:,} {kind}" if total else ""

    def lines(self) -> list[str]:
        counts = f"  # {self.counts()}" if self.counts() else ""
        if self.whole:
            first, *rest = self.head.split("\n")
            return [f"{self.label()}{first}{counts}", *rest]
        if not self.children:
            return [f"{self.label()}{self.head}({', '.join(self.arrays)}){counts}"]
        inner = [*self.arrays, *(line for child in self.children for line in child.lines())]
        return [f"{self.label()}{self.head}({counts}", *(f"  {line}" for line in inner), ")"]

    def html(self, depth: int = 0) -> str:
        counts = f' <span style="opacity:0.6">{escape(self.counts())}</span>'
        if self.whole or not self.children:
            head = self.head if self.whole else f"{self.head}({', '.join(self.arrays)})"
            return f"<div>{escape(self.label() + head)}{counts}</div>"
        inner = [f"<div>{escape(array)}</div>" for array in self.arrays]
        inner += [child.html(depth + 1) for child in self.children]
        return (
            f"<details{' open' if depth < 2 else ''}>"
            f"<summary>{escape(self.label() + self.head)}{counts}</summary>"
            f'<div style="margin-left:1.5em">{"".join(inner)}</div></details>'
        )


def counted_in_thousands(count: int, thing: str, plural: str = "") -> str:
    """ "1 record", "12,000 records"."""
    return counted(count, thing, plural).replace(str(count), f"{count:,}", 1)


def _array(value: Any) -> Any:
    return value.data if isinstance(value, Tensor) else value


def shape_text(shape: Iterable[int]) -> str:
    """ "[3, 4]" """
    return f"[{', '.join(map(str, shape))}]"


def _own(module: Module) -> list[tuple[str, Any, str]]:
    """The module's own arrays with their names, and "trained", "frozen" or "buffer"."""
    arrays = [
        (name, _array(value), "buffer" if not parameter else state)
        for name, value, parameter in module._own_arrays()
        for state in ["frozen" if name in module._frozen else "trained"]
    ]
    stored = [(k, v, "frozen") for k, v in vars(module).items() if isinstance(v, _STORED)]
    return arrays + stored


def _kind(array: Any) -> str:
    return str(array.format if isinstance(array, _STORED) else array.dtype)


def _nodes(module: Module, names: list[str], above: frozenset[int]) -> tuple[_Node, _Counts]:
    """The tree of a module; `above` has the identities of the modules that it is in."""
    counts, name = _Counts(), type(module).__name__
    if "_frozen" not in vars(module):
        return _Node(names, f"{name}(before super().__init__())", whole=True), counts
    if id(module) in above:
        return _Node(names, f"{name}(which this is in)", whole=True), counts
    node = _Node(names, name)
    for path, array, state in _own(module):
        node.arrays.append(f"{path}: {shape_text(array.shape)} {_kind(array)}, {state}")
        if state != "buffer":
            counts.add(array, state == "trained")
    for path, child in module._children():
        below, its = _nodes(child, [path], above | {id(module)})
        counts.update(its)
        last = node.children[-1] if node.children else None
        if last is not None and _follows(last.names[-1], path) and last.looks_like(below):
            last.names.append(path)
        else:
            node.children.append(below)
    shown_by: Any = type(module).__repr__
    if names and shown_by is not tree_text:
        node.head, node.whole = repr(module), True
        node.children = []
    node.trained, node.frozen = counts.numbers()
    return node, counts


def _follows(name: str, following: str) -> bool:
    """Whether these are names such as "layers.3" and "layers.4"."""
    (before, _, a), (after, _, b) = name.rpartition("."), following.rpartition(".")
    return before == after and a.isdecimal() and b.isdecimal() and int(a) + 1 == int(b)


def _text(tree: _Node) -> str:
    return "\n".join(tree.lines())


def _html(tree: _Node) -> str:
    return f'<div style="font-family:monospace">{tree.html()}</div>'


def tree_text(module: Module) -> str:
    """`repr` of a module: its submodules with shapes and numbers of parameters."""
    return _text(_nodes(module, [], frozenset())[0])


def tree_html(module: Module) -> str:
    """As `tree_text`, with parts that open and close."""
    return _html(_nodes(module, [], frozenset())[0])


class Shown(str):
    """A text that is shown as it is, without quotes; `_repr_html_` for notebooks."""

    html: str

    def __new__(cls, text: str, html: str) -> Shown:
        shown = super().__new__(cls, text)
        shown.html = html
        return shown

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self.html


def summary(module: Module) -> Shown:
    """The tree of a module, and a table of its parameters by the class they are in."""
    tree, counts = _nodes(module, [], frozenset())
    rows: dict[str, list[int]] = {}
    seen: set[int] = set()
    for part in {id(part): part for part in module.modules()}.values():
        row = rows.setdefault(type(part).__name__, [0, 0, 0, 0])
        row[0] += 1
        for _, array, state in _own(part):
            if state != "buffer" and id(array) not in seen:
                seen.add(id(array))
                row[1 if id(array) in counts.trained else 2] += math.prod(array.shape)
                row[3] += array.nbytes
    total = [sum(row[i] for row in rows.values()) for i in range(4)]

    def cells(name: str, row: list[int]) -> list[str]:
        modules, trained, frozen, size = row
        said = (modules, trained + frozen, trained, frozen)
        bytes_text = size_text(size) if size >= 1e6 else f"{size / 1e3:.1f} kB"
        return [name, *(f"{number:,}" for number in said), bytes_text]

    header = ["class", "modules", "parameters", "trained", "frozen", "size"]
    table = [cells(name, row) for name, row in rows.items() if sum(row[1:3])]
    table.append(cells("total", total))
    return Shown(
        f"{_text(tree)}\n\n{text_table(header, table)}",
        _html(tree) + html_table(header, table),
    )


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table with a line under its header; the first `left` columns are flush left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(header), rule, *map(line, rows)])


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """As `text_table`."""

    def line(tag: str, cells: Sequence[str]) -> str:
        aligned = (
            f'<{tag} style="text-align:{"left" if i < left else "right"}">{escape(cell)}</{tag}>'
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(aligned)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>"


class ArrayTable(dict[str, Any]):
    """Arrays by name; shown as a table of names, shapes, types and counts."""

    def _table(self, make: Callable[[Sequence[str], Sequence[Sequence[str]], int], str]) -> str:
        rows = [
            [name, shape_text(array.shape), str(array.dtype), f"{math.prod(array.shape):,}"]
            for name, array in self.items()
        ]
        if len(rows) > _MOST_ROWS:
            half = _MOST_ROWS // 2
            gap = [f"... {len(rows) - 2 * half} more", "", "", ""]
            rows = [*rows[:half], gap, *rows[-half:]]
        total = sum(math.prod(array.shape) for array in self.values())
        rows.append([f"total: {counted(len(self), 'array')}", "", "", f"{total:,}"])
        return make(["name", "shape", "type", "count"], rows, 3)

    def __repr__(self) -> str:
        return self._table(text_table)

    def _repr_html_(self) -> str:
        return self._table(html_table)
