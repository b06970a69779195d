"""The table of names, and the sentences for what is missing."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyloss.mlx_lm import names

PAGE = Path(__file__).parents[2] / "docs" / "coming_from_mlx.md"


def test_the_page_has_the_table():
    found = re.search(
        r"<!-- names of mlx-lm -->\n\n(.*?)\n<!-- end of the names of mlx-lm -->",
        PAGE.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert found is not None and found[1] == names.table(), (
        "python -m pyloss.mlx_lm.names prints it"
    )


@pytest.mark.parametrize("module", names.MODULES)
def test_names_are_there(module):
    home = importlib.import_module(f"pyloss.mlx_lm.{module}".rstrip("."))
    assert all(hasattr(home, name) for name in home.__all__)
    assert not set(home.__all__) & set(names.REFUSED.get(module, {}))
    assert set(names.DIFFERENT.get(module, {})) <= set(home.__all__)


@pytest.mark.parametrize("module", names.REFUSED)
def test_missing_names_are_said_in_a_sentence(module):
    home = importlib.import_module(f"pyloss.mlx_lm.{module}")
    for name, reason in names.REFUSED[module].items():
        text = re.escape(f"mlx_lm.{module}.{name} is not in pyloss: {reason}")
        with pytest.raises(AttributeError, match=text):
            getattr(home, name)
        assert not hasattr(home, name)


def test_an_import_says_it_too():
    for line, text in (
        ("from pyloss.mlx_lm.utils import sharded_load", "mpirun"),
        ("from pyloss.mlx_lm.models.cache import KVCache, QuantizedKVCache", "stay float32"),
        ("from pyloss.mlx_lm import server", "pyloss export --to ollama"),
        ("from pyloss.mlx_lm.tuner import nothing", "docs/coming_from_mlx.md"),
        ("from pyloss.mlx_lm import laod", "the nearest name is 'load'"),
    ):
        with pytest.raises(ImportError, match=text):
            exec(line, {})


def test_functions_have_precedence_over_modules_of_their_names():
    code = (
        "from pyloss.mlx_lm import convert, generate, load\n"
        "import pyloss.mlx_lm.convert, pyloss.mlx_lm.generate\n"
        "from pyloss.mlx_lm import generate as again\n"
        "assert again is generate and callable(again) and callable(convert)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pyloss_does_not_import_it():
    code = "import sys, pyloss, pyloss.tuner\nassert not [m for m in sys.modules if 'mlx_lm' in m]"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["quant", "quant.dwq", "quant.gptq"])
def test_modules_of_quant_are_refused_by_a_sentence(name):
    with pytest.raises(ImportError, match="mlx_lm.quant is not in pyloss: `pyloss quantize`"):
        importlib.import_module(f"pyloss.mlx_lm.{name}")
