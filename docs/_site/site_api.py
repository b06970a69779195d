"""The reference of the API: which names are public, where each is documented, and docstrings.

A name that several modules have is documented in the first of them in `MODULES`; the others list
it. Docstrings are prose with code in backticks, as in Markdown; Sphinx reads reStructuredText.
"""

from __future__ import annotations

import importlib
import inspect
import re
import types
from pathlib import Path
from typing import Any

#: Modules with public names, in the order of the reference. Those of `pyloss.mlx` and
#: `pyloss.mlx_lm` are MLX's and mlx-lm's, one by one in docs/coming_from_mlx.md.
MODULES = (
    "pyloss",
    "pyloss.tuner",
    "pyloss.optim",
    "pyloss.nn",
    "pyloss.models",
    "pyloss.models.config",
    "pyloss.generation",
    "pyloss.evaluation",
    "pyloss.distillation.stored",
    "pyloss.distributed",
    "pyloss.recursive",
    "pyloss.recursive.data",
    "pyloss.weights",
    "pyloss.losses",
    "pyloss.autograd",
    "pyloss.autograd.functions",
    "pyloss.ops",
    "pyloss.interop.torch",
)
#: modules without `__all__`: all functions and classes that they define and do not begin with "_"
PLAIN = ("pyloss.random", "pyloss.nn.init", "pyloss.quantizing", "pyloss.models.pruning")

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Example|Examples|Note):$")


def public_names(module: types.ModuleType) -> list[str]:
    """Return the public names of a module, in their order."""
    if hasattr(module, "__all__"):
        return list(dict.fromkeys(module.__all__))
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", None) == module.__name__
    ]


def public_api(modules: tuple[str, ...] = (*MODULES, *PLAIN)) -> dict[str, tuple[str, str, Any]]:
    """Return the place, name and value of each public object, by its full name.

    The full name is that of the module that documents it, and occurs once for an object. Modules
    are no such objects.
    """
    found: dict[str, tuple[str, str, Any]] = {}
    for place, name, value in _all_names(modules):
        if not isinstance(value, types.ModuleType):
            known = next((n for n, (_, _, v) in found.items() if v is value), None)
            if known is None or is_constant(value):
                found[f"{place}.{name}"] = (place, name, value)
    return found


def constant_comment(place: str, name: str) -> str:
    """Return the text of the comment `#: ...` above a constant of the module, or ""."""
    file = Path(importlib.import_module(place).__file__ or "")
    files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    for each in files:
        found = re.search(
            rf"((?:^#:.*\n)+){name}\b", each.read_text(encoding="utf-8"), re.MULTILINE
        )
        if found:
            return " ".join(line.removeprefix("#:").strip() for line in found[1].splitlines())
    return ""


def is_constant(value: Any) -> bool:
    """Whether a public value is described by a comment: it has no docstring of its own."""
    return not (inspect.isclass(value) or inspect.isroutine(value))


def _all_names(modules: tuple[str, ...]) -> Any:
    for place in modules:
        module = importlib.import_module(place)
        for name in public_names(module):
            yield place, name, getattr(module, name)


class Api:
    """The public names, their pages' text, and what a docstring's code refers to."""

    def __init__(self) -> None:
        self.documented = public_api()
        self.by_object = {id(value): full for full, (_, _, value) in self.documented.items()}
        # Where the objects are defined, as annotations name them.
        self.defined = {
            f"{value.__module__}.{value.__qualname__}": full
            for full, (_, _, value) in self.documented.items()
            if not is_constant(value)
        }
        #: the places that document names of a module of the code
        self.places: dict[str, set[str]] = {}
        for place, _, value in self.documented.values():
            if not is_constant(value):
                self.places.setdefault(value.__module__, set()).add(place)
        short: dict[str, list[str]] = {}
        for full, (_, name, value) in self.documented.items():
            # Names that could be a parameter's are no references.
            if inspect.isclass(value) or "_" in name:
                short.setdefault(name, []).append(full)
        self.short = {name: fulls[0] for name, fulls in short.items() if len(fulls) == 1}

    def page(self, place: str) -> str:
        """Return the Markdown that documents a module."""
        module = importlib.import_module(place)
        lines = [f".. automodule:: {place}", "   :no-members:", ""]
        others = []
        for name in public_names(module):
            value = getattr(module, name)
            full = f"{place}.{name}"
            if isinstance(value, types.ModuleType):
                continue
            if full not in self.documented:
                others.append(self.by_object[id(value)])
            elif inspect.isclass(value):
                lines += [f".. autoclass:: {full}", "   :members:"]
                lines += ["   :show-inheritance:"] * (value.__bases__ != (object,)) + [""]
            elif inspect.isroutine(value):
                lines += [f".. autofunction:: {full}", ""]
            else:
                lines += [f".. py:data:: {full}", ""]
                lines += [f"   {line}" for line in self.constant(place, name, value)] + [""]
        if others:
            refs = ", ".join(f":py:obj:`~{full}`" for full in others)
            lines += ["", f"Also here, described elsewhere: {refs}.", ""]
        text = "\n".join(lines)
        return f"````{{eval-rst}}\n{text}\n````"

    def constant(self, place: str, name: str, value: Any) -> list[str]:
        """Return the description of a constant: its comment, and what it has."""
        lines = restructured(
            [constant_comment(place, name), ""], lambda code: self.role(code, set())
        )
        if isinstance(value, (dict, tuple)) and all(isinstance(item, str) for item in value):
            lines += [
                ("Keys: " if isinstance(value, dict) else "Items: ")
                + ", ".join(f"``{item}``" for item in value)
                + "."
            ]
        return lines

    def docstring(
        self, app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
    ) -> None:
        """Called by autodoc: turns the code of a docstring into reStructuredText."""
        names: set[str] = set()
        if inspect.isroutine(obj) or inspect.isclass(obj):
            try:
                names = set(inspect.signature(obj).parameters)
            except (TypeError, ValueError):
                pass
        lines[:] = restructured(lines, lambda code: self.role(code, names))
        if what in ("attribute", "property"):
            lines.insert(0, "")  # else napoleon takes "The transpose: ..." for a type

    def role(self, code: str, parameters: set[str]) -> str:
        """Return the markup of a piece of code: a reference, if it is a public name."""
        name = code.removesuffix("()")
        full = name if name in self.documented else self.short.get(name)
        if full is None or name in parameters:
            return f"``{code}``"
        return f":py:obj:`{name} <{full}>`"

    def anchors(self, app: Any, tree: Any) -> None:
        """Called by Sphinx for a page: adds the anchors that the pages of the code link to.

        These name all objects of a file by one of the modules that document some of them.
        """
        for node in tree.findall(lambda node: "fullname" in getattr(node, "attributes", ())):
            place, name = node.get("module"), node["fullname"]
            found = self.documented.get(f"{place}.{name.partition('.')[0]}")
            if found and not is_constant(found[2]):
                others = self.places[found[2].__module__] - {place}
                node["ids"] += [f"{other}.{name}" for other in sorted(others)]

    def reference(self, app: Any, env: Any, node: Any, contnode: Any) -> Any:
        """Called by Sphinx for a name without a target, such as an annotation's."""
        if node.get("refdomain") != "py":
            return None
        target = node["reftarget"]
        full = self.defined.get(target) or self.short.get(target.rpartition(".")[2])
        if full and full != target:
            domain = env.get_domain("py")
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, "obj", full, node, contnode
            )
        return None if full or target in self.documented else contnode


def restructured(lines: list[str], role: Any) -> list[str]:
    """Return a docstring's lines as reStructuredText.

    `role` gives the markup of the code between backticks. Indented lines outside of sections and
    lists are formulas or code, which are shown as they are; so are fenced blocks.
    """
    found: list[str] = []
    literal = fenced = False
    in_section = False
    text = _joined(lines)
    for line in text:
        bare = line.strip()
        indent = len(line) - len(line.lstrip())
        if bare.startswith("```"):
            fenced = not fenced
            if fenced:
                found += [
                    "",
                    f"{line[:indent]}.. code-block:: {bare[3:].split(' ')[0] or 'text'}",
                    "",
                ]
            else:
                found.append("")
            continue
        if fenced:
            found.append(f"   {line}")
            continue
        if not bare:
            literal = literal and True
            found.append("")
            continue
        if literal and indent >= 4:
            found.append(line)
            continue
        literal = False
        if indent == 0:
            in_section = bool(SECTION.match(bare))
        before = next((each for each in reversed(found) if each.strip()), "")
        blank = bool(found) and not found[-1].strip()
        if indent >= 4 and not in_section and blank and not _item(before) and before[:1] != " ":
            literal = True
            found += ["::", "", line]
            continue
        if _item(line) and before and not blank and not _item(before) and before[:1] != " ":
            found.append("")  # reStructuredText wants an empty line before a list
        found.append(_inline(line, role))
    return found


def _item(line: str) -> bool:
    return bool(re.match(r"\s*(-|\d+\.) ", line))


def _joined(lines: list[str]) -> list[str]:
    """Join lines within which a piece of code goes on, as Markdown allows."""
    found: list[str] = []
    fenced = False
    for line in lines:
        fence = line.strip().startswith("```")
        if not fenced and not fence and found and _odd(found[-1]) and line.strip():
            found[-1] += " " + line.strip()
        else:
            found.append(line)
        fenced ^= fence
    return found


def _odd(line: str) -> bool:
    return not line.strip().startswith("```") and line.count("`") % 2 == 1


def _inline(line: str, role: Any) -> str:
    pieces = re.split(r"(`[^`]+`)", line)
    done = []
    for i, piece in enumerate(pieces):
        if i % 2:
            markup = role(piece[1:-1])
            # Markup ends before white space or punctuation only.
            after = pieces[i + 1][:1]
            done.append(markup + ("\\ " if after.isalnum() else ""))
        else:
            piece = re.sub(r"\[([^\]]+)\]\([^)]*\.md[^)]*\)", r"\1", piece)
            piece = re.sub(r"(?<!^)(?<=[^\s])?\*", r"\\*", piece) if piece else piece
            done.append(re.sub(r"(\w)_(?=\W|$)", r"\1\\_", piece).replace("|", "\\|"))
    return "".join(done)
