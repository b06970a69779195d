"""The names, signatures and defaults of pyloss.mlx_lm beside those of the installed mlx-lm."""

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="compares with mlx-lm (parity extra)")

from pyloss.mlx_lm import names

#: modules whose import needs more than mlx-lm
NEEDS = {"evaluate": "lm_eval"}


def pair(module):
    """The module here and mlx-lm's."""
    if module in NEEDS:
        pytest.importorskip(NEEDS[module])
    tail = f".{module}" if module else ""
    ours, theirs = (
        importlib.import_module(f"{home}{tail}") for home in ("pyloss.mlx_lm", "mlx_lm")
    )
    return ours, theirs


def public(module):
    """The public names that a module of mlx-lm defines itself."""
    found = set()
    for name, value in vars(module).items():
        home = getattr(value, "__module__", None)
        made = inspect.isfunction(value) or inspect.isclass(value)
        if name.startswith("_") or isinstance(value, types.ModuleType):
            continue
        if (made and home != module.__name__) or (not made and home in ("typing", "functools")):
            continue
        if made or (name.isupper() and value is not None):
            found.add(name)
    return found


@pytest.mark.parametrize("module", names.MODULES)
def test_every_public_name_is_here_or_refused(module):
    ours, theirs = pair(module)
    here, refused = set(ours.__all__), set(names.REFUSED.get(module, {}))
    constants = {
        name for name in public(theirs) if name.startswith("DEFAULT_") or name == "MAX_FILE_SIZE_GB"
    }
    missing = public(theirs) - here - refused - {name for name in constants if hasattr(ours, name)}
    assert not missing, f"{module} lacks {sorted(missing)}"
    assert not here & refused
    unknown = refused - set(vars(theirs))
    assert not unknown, f"mlx-lm's {module} has no {sorted(unknown)}"
    assert set(names.DIFFERENT.get(module, {})) <= here
    for name in ours.__all__:
        assert hasattr(ours, name)


@pytest.mark.parametrize("module", names.MODULES)
def test_constants_are_mlx_lms(module):
    ours, theirs = pair(module)
    for name, value in vars(theirs).items():
        if name in ("LM", "SUPPORT_CALLBACK") or name in names.REFUSED.get(module, {}):
            continue
        if name.isupper() and not name.startswith("_"):
            assert getattr(ours, name) == value, name


def shape(function):
    """The parameters of a function: names, kinds and defaults."""
    return [
        (p.name, p.kind, type(p.default).__name__ if unlike(p.default) else p.default)
        for p in inspect.signature(function).parameters.values()
    ]


def unlike(default):
    """Whether two libraries' values of a default cannot be equal."""
    return (
        callable(default) or dataclasses.is_dataclass(default) or "Stream" in type(default).__name__
    )


#: parameters whose defaults are objects of the library; pyloss has none
OTHERS = {"stream": "NoneType", "get_model_classes": "NoneType"}


@pytest.mark.parametrize("module", names.MODULES)
def test_signatures_are_mlx_lms(module):
    ours, theirs = pair(module)
    compared = 0
    for name in sorted(set(ours.__all__) & set(vars(theirs))):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if inspect.isclass(other) and issubclass(other, Exception):
            continue
        if not callable(other) or (module.startswith("models.") and name in ("Model", "ModelArgs")):
            compared += 1
            continue
        if inspect.isclass(other) and not dataclasses.is_dataclass(other):
            compared += compare_class(module, name, mine, other)
            continue
        here, there = shape(mine), shape(other)
        there = [(n, kind, None if n in OTHERS else default) for n, kind, default in there]
        assert here == there, (
            f"{module}.{name}: {inspect.signature(mine)} {inspect.signature(other)}"
        )
        compared += 1
    assert compared


def compare_class(module, name, mine, other):
    """Compare the constructor and the methods of a class; 1 if there was something to compare."""
    if module in ("tuner.lora", "tuner.dora", "models.switch_layers"):
        here = list(inspect.signature(mine.__init__).parameters)
        there = list(inspect.signature(other.__init__).parameters)
        assert here[: len(there)] == there, name
    elif "__init__" in vars(other):
        here, there = (
            [p for p in shape(kind.__init__) if p[0] != "self"] for kind in (mine, other)
        )
        strip = lambda found: [
            (n, k, "class" if n == "detokenizer_class" else d) for n, k, d in found
        ]
        if module == "tuner.callbacks":
            strip = lambda found: [n for n, _, _ in found]
        assert strip(here) == strip(there), f"{module}.{name}"
    methods = {
        key
        for key, value in vars(other).items()
        if not key.startswith("_")
        and (callable(value) or isinstance(value, property | classmethod))
    }
    lacking = sorted(key for key in methods if not hasattr(mine, key))
    known = names.LACKING.get(f"{module}.{name}", ())
    assert lacking == sorted(known), f"{module}.{name} lacks {lacking}"
    return 1


def options(parser):
    """The flags of a parser: names, type, choices, default, action and number of values."""
    found = {}
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            kind = getattr(action.type, "__name__", None)
            found[tuple(action.option_strings)] = (
                action.dest,
                "size" if kind in ("_parse_size", "flag_size") else kind,
                None if action.choices is None else list(action.choices),
                action.default,
                type(action).__name__,
                action.nargs,
                action.required,
            )
    return found


class Caught(Exception):
    pass


def parser_of(module, function, monkeypatch):
    """The parser that a function makes, also where it parses at once."""
    kept = []

    def parse(self, *args, **kwargs):
        kept.append(self)
        raise Caught

    made = getattr(module, function)
    if function not in ("main", "parse_arguments"):
        return made()
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Caught):
        made()
    return kept[0]


PARSERS = [
    ("lora", "build_parser"),
    ("convert", "configure_parser"),
    ("fuse", "parse_arguments"),
    ("generate", "setup_arg_parser"),
    ("perplexity", "main"),
]


@pytest.mark.parametrize(("module", "function"), PARSERS)
def test_flags_are_mlx_lms(module, function, monkeypatch):
    ours, theirs = (options(parser_of(one, function, monkeypatch)) for one in pair(module))
    assert ours == theirs


def test_training_settings_are_mlx_lms():
    ours, theirs = pair("tuner.trainer")
    fields = [
        [
            (f.name, f.type if isinstance(f.type, str) else f.type.__name__, f.default)
            for f in dataclasses.fields(m.TrainingArgs)
        ]
        for m in (ours, theirs)
    ]
    assert fields[0] == fields[1]


def test_the_version_is_the_installed_one():
    import mlx_lm

    assert names.VERSION.split(".")[:2] == mlx_lm.__version__.split(".")[:2]


def test_missing_modules_are_mlx_lms():
    import mlx_lm

    folder = Path(mlx_lm.__file__).parent
    for module in names.MISSING_MODULES:
        assert (folder / f"{module.replace('.', '/')}.py").exists(), module
    here = {*names.MODULES, *names.MISSING_MODULES}
    inner = ("_", "cli", "generate_utils")
    for path in folder.glob("*.py"):
        if not path.stem.startswith(inner):
            assert path.stem in here, path.stem


@pytest.mark.parametrize("module", names.MODULES)
def test_names_that_modules_import_from_others(module):
    """Scripts import them from there, too: they are here, or refused."""
    ours, theirs = pair(module)
    inner = ("mlx_lm.cli_ui", "mlx_lm.gguf", "mlx_lm.generate_utils", "mlx_lm.processors")
    for name, value in vars(theirs).items():
        home = getattr(value, "__module__", None) or ""
        other = home.startswith("mlx_lm.") and home != theirs.__name__
        if name.startswith("_") or not other or home in (*inner, "mlx_lm.models.activations"):
            continue
        if home.startswith("mlx_lm.models.") and module.startswith("models."):
            continue
        if not hasattr(ours, name):
            with pytest.raises(AttributeError, match="is not in pyloss: (?!docs/coming)"):
                getattr(ours, name)


def test_nothing_of_mlx_is_imported():
    assert "mlx_lm.models.llama" not in vars(sys.modules["pyloss.mlx_lm"])
    for name, module in list(sys.modules.items()):
        if re.match(r"pyloss\.mlx", name):
            assert "mlx.core" not in {
                getattr(v, "__name__", "")
                for v in vars(module).values()
                if isinstance(v, types.ModuleType)
            }
