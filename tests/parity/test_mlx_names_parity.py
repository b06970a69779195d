"""Every public name of MLX's modules is there, with its arguments, or refused by a sentence."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core")
import mlx.core
import mlx_names

NAMES = [(name, key) for name in mlx_names.MODULES for key in mlx_names.public(name)]
STUBS = Path(mlx.core.__file__).parent


def test_there_are_names():
    assert len(NAMES) > 450


@pytest.mark.parametrize("name", mlx_names.MODULES)
def test_each_name_is_there_or_refused(name):
    ours = mlx_names.module("pyloss.mlx", name)
    for key in mlx_names.public(name):
        kind, _ = mlx_names.status(name, key)
        assert kind != "missing", f"{name}.{key}"
        if kind == "refused":
            with pytest.raises(AttributeError, match=f"{name}.{key} is not here"):
                getattr(ours, key)
    with pytest.raises(AttributeError, match="no 'no_such_name' here"):
        ours.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", mlx_names.MODULES)
def test_what_is_said_to_differ_is_there(name):
    theirs = mlx_names.public(name)
    assert [key for key in mlx_names.DIFFERENCES[name] if key not in theirs] == []
    from pyloss.mlx.core.refused import REFUSED

    ours = mlx_names.module("pyloss.mlx", name)
    assert [key for key in REFUSED[name] if key in vars(ours)] == []
    assert [key for key in REFUSED[name] if key not in theirs] == []


@pytest.mark.parametrize("name", ["nn", "losses", "init", "optimizers", "utils"])
def test_arguments_of_python_functions(name):
    theirs, ours = (mlx_names.module(library, name) for library in ("mlx", "pyloss.mlx"))
    for key in mlx_names.public(name):
        if key in vars(ours):
            want = mlx_names.parameters(getattr(theirs, key))
            found = mlx_names.parameters(getattr(ours, key))
            if want is None or any(n in ("args", "kwargs") for n, _ in want):
                continue
            assert _alike(found) == _alike(want), f"{name}.{key}"


def _alike(parameters):
    """Names and defaults; types by their name, and no [] where () is the same."""
    shown = {(): "empty", None: "None"}
    return [
        (n, str(d).removeprefix("mlx.core.") if "float" in str(d) else shown.get(d, d))
        if not callable(d) or isinstance(d, np.dtype) or "float" in str(d)
        else (n, "function")
        for n, d in parameters or []
    ]


def stubs(file):
    tree = ast.parse((STUBS / file).read_text(encoding="utf-8"))
    return {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(
    "name, file",
    [
        ("core", "core/__init__.pyi"), ("random", "core/random.pyi"), ("fast", "core/fast.pyi"),
        ("linalg", "core/linalg.pyi"), ("distributed", "core/distributed.pyi"),
    ],
)  # fmt: skip
def test_arguments_of_functions_in_c(name, file):
    """The names of MLX's arguments, which may be given by keyword unless they stand before /."""
    import inspect

    if not (STUBS / file).exists():
        file = file.removeprefix("core/")
    ours = mlx_names.module("pyloss.mlx", name)
    for key, args in stubs(file).items():
        function = vars(ours).get(key)
        if function is None or key.startswith("_") or inspect.isclass(function):
            continue
        if key in ("arange", "stream"):  # overloaded; a context
            continue
        found = inspect.signature(function).parameters
        named = [a.arg for a in (*args.args, *args.kwonlyargs)]
        lacking = [n for n in named if n not in found and n not in ("stream", "s")]
        assert lacking == [], f"{name}.{key}"
        if "stream" in named:
            assert "stream" in found, f"{name}.{key}"


def test_the_page_has_the_tables():
    text = mlx_names.PAGE.read_text(encoding="utf-8")
    assert mlx_names.tables() in text, "run .venv/bin/python tests/parity/mlx_names.py"
