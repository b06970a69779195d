"""A room of the package imports only itself and the rooms below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyloss

ROOT = Path(pyloss.__file__).parent

#: rooms from the bottom up; rooms of one line do not import each other
LAYERS = [
    ["_core", "starting"],
    ["errors"],
    ["checks"],
    ["random"],
    ["runtime"],
    ["arithmetic", "weights"],
    ["io"],
    ["distributed"],
    ["autograd"],
    ["ops"],
    ["nn", "optim"],
    ["losses", "gradient_check"],
    ["models"],
    ["generation"],
    ["tuner"],
    ["loading"],
    ["describing", "distillation", "evaluation", "exporting", "measuring", "model_card"],
    ["quantizing"],
    ["reports"],
    ["recursive"],
    ["mlx"],
    ["cli", "interop"],
    ["mlx_lm"],
    ["__main__"],
]
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
#: Imports that go up: (importing file, imported room). Only shorten this list.
EXCEPTIONS = {
    ("models/__init__.py", "loading"),  # the public name pyloss.models.load
}


def room_of(module: str) -> str | None:
    """The room of a dotted module name; None for the package itself and other libraries."""
    package, _, rest = module.partition(".")
    return rest.split(".")[0] if package == "pyloss" and rest else None


def imported_rooms(path: Path) -> Iterator[str]:
    """The rooms that a file imports, also inside functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            whole = node.module == "pyloss"
            modules = [f"pyloss.{a.name}" for a in node.names] if whole else [node.module or ""]
        yield from filter(None, map(room_of, modules))


def files() -> list[str]:
    """The package's files without its façade, relative to the package."""
    found = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
    return sorted(file for file in found if file != "__init__.py")


@pytest.mark.parametrize("file", files())
def test_a_file_imports_only_rooms_below(file):
    room = file.split("/")[0].removesuffix(".py")
    assert room in HEIGHT, f"{room} stands in no line of LAYERS"
    for other in imported_rooms(ROOT / file):
        if other in HEIGHT and other != room and (file, other) not in EXCEPTIONS:
            assert HEIGHT[other] < HEIGHT[room], f"{file} imports {other}"


def test_exceptions_are_still_needed():
    for file, room in EXCEPTIONS:
        assert room in imported_rooms(ROOT / file)
