"""The reference has every public name, flag and key, and each says what it is."""

import argparse
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import pyloss
from pyloss.cli.flags import build_parser
from pyloss.tuner.run.settings import DISTILLATION_SCHEMA, LORA_SCHEMA, SCHEMA

DOCS = Path(__file__).resolve().parents[2] / "docs"
if not DOCS.is_dir():
    pytest.skip("the pages are not part of the package", allow_module_level=True)
sys.path.insert(0, str(DOCS / "_site"))

from site_api import (
    MODULES,
    PLAIN,
    constant_comment,
    is_constant,
    public_api,
    restructured,
)
from site_commands import commands_page
from site_settings import settings_page

#: packages whose names are not for users, or are another library's
LEFT_OUT = ("pyloss.cli", "pyloss.arithmetic", "pyloss.mlx", "pyloss.mlx_lm")
HERE = tuple(module for module in (*MODULES, *PLAIN) if module != "pyloss.interop.torch")


def undocumented(api):
    for full, (place, name, value) in api.items():
        if is_constant(value):
            if not constant_comment(place, name):
                yield f"{full} has no comment `#: ...`"
            continue
        if not inspect.getdoc(value):
            yield f"{full} has no docstring"
        if inspect.isclass(value):
            for member in vars(value):
                given = inspect.getattr_static(value, member)
                is_shown = isinstance(given, (property, classmethod, staticmethod))
                if member[0] != "_" and (is_shown or inspect.isroutine(given)):
                    if not inspect.getdoc(getattr(value, member)):
                        yield f"{full}.{member} has no docstring"


def test_public_names_say_what_they_are():
    assert not list(undocumented(public_api(HERE)))


def test_public_names_of_interop_say_what_they_are():
    pytest.importorskip("torch", reason="pyloss.interop.torch needs torch")
    assert not list(undocumented(public_api(("pyloss.interop.torch",))))


def test_an_undocumented_name_is_found():
    class Mute:
        def method(self):
            pass

    found = list(undocumented({"pyloss.Mute": ("pyloss", "Mute", Mute)}))
    assert found == ["pyloss.Mute has no docstring", "pyloss.Mute.method has no docstring"]


def test_every_package_with_public_names_is_in_the_reference():
    packages = {"pyloss"}
    for each in pkgutil.walk_packages(pyloss.__path__, "pyloss."):
        if each.ispkg and not f"{each.name}.".startswith(tuple(f"{p}." for p in LEFT_OUT)):
            try:
                package = importlib.import_module(each.name)
            except ImportError:  # where an extra is missing
                continue
            if hasattr(package, "__all__"):
                packages.add(each.name)
    assert packages <= set(MODULES), sorted(packages - set(MODULES))
    shown = [
        module
        for page in (DOCS / "reference").glob("*.md")
        for module in re.findall(r"<!-- site: api (\S+) -->", page.read_text(encoding="utf-8"))
    ]
    assert sorted(shown) == sorted((*MODULES, *PLAIN))


def test_the_index_lists_every_page():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[[^\]]+\]\(([^)#:]+\.md)\)", index, re.MULTILINE)
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - {"index.md"}
    assert sorted(listed) == sorted(pages)


def test_every_flag_is_in_the_list_of_commands():
    page = commands_page()
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    sections = dict(re.findall(r"^## pyloss (\S+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    assert set(sections) == set(commands.choices)
    for name, command in commands.choices.items():
        given = re.findall(r"^```\{option\} (.*)$", sections[name], re.MULTILINE)
        flags = {word for line in given for word in re.findall(r"(?<!\S)-{1,2}[\w-]+", line)}
        actions = [each for each in command._actions if each.help != argparse.SUPPRESS]
        assert flags == {flag for action in actions for flag in action.option_strings}
        assert len(given) == len(actions)


def test_every_key_is_in_the_tables_of_settings():
    page = settings_page()
    keys = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]* \| [^|]* \|$", page, re.MULTILINE)
    assert keys == [*SCHEMA, *LORA_SCHEMA, *DISTILLATION_SCHEMA]
    assert (
        "| `learning_rate` | a finite number of at least 0 | `1e-05` | `--learning-rate` |" in page
    )
    assert "| `teacher` |" in page and "`--teacher` |" in page


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("The `rank` of *all* layers_.", "The ``rank`` of \\*all\\* layers\\_."),
        ("Sum:\n\n    a * b\n\nThen", "Sum:\n\n::\n\n    a * b\n\nThen"),
        ("Either:\n- a\n- b", "Either:\n\n- a\n- b"),
        ("Args:\n    x: the `input`.", "Args:\n    x: the ``input``."),
        ("Uses `f(a,\n    b)`.", "Uses ``f(a, b)``."),
    ],
)
def test_docstrings_become_restructured_text(given, made):
    assert "\n".join(restructured(given.split("\n"), lambda code: f"``{code}``")) == made
