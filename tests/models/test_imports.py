"""Dependencies point one way: models know nothing of what trains them."""

import ast
from pathlib import Path

import pyloss
from pyloss import models
from pyloss.loading import load

ABOVE = ("pyloss.tuner", "pyloss.cli", "pyloss.exporting", "pyloss.loading", "pyloss.generation")


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_models_import_nothing_above_them():
    folder = Path(models.__file__).parent
    found = {
        (file.relative_to(folder).as_posix(), name)
        for file in folder.rglob("*.py")
        for name in imported(file)
        if name.startswith(ABOVE)
    }
    # the public name `pyloss.models.load`, imported when it is asked for
    assert found == {("__init__.py", "pyloss.loading.load")}


def test_load_has_one_home_and_two_names():
    assert models.load is pyloss.load is load
