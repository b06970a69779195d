"""The notebooks of examples/notebooks: what is committed is whole and small, and each runs in an
empty folder, with few iterations.
"""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

import pyloss

ROOT = Path(pyloss.__file__).parents[1]
FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NAMES = ("fine_tune", "distil", "own_loss", "sudoku", "look_inside")
# What replaces the parameters of each.
SMALL = {
    "fine_tune": "ITERATIONS, VALID, TEST = 2, 2, 3",
    "distil": "STEPS, ITERATIONS, TOKENS = 20, 1, 8",
    "own_loss": "ITERATIONS, PROMPTS, LENGTH = 1, 4, 8",
    "sudoku": "UPDATES, PUZZLES = 12, 64",
    "look_inside": "LAYERS, ITERATIONS = range(1), 1",
}


def read(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_cells(name):
    return [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]


def assigned(source):
    """The names that lines of Python assign."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        for target in getattr(node, "targets", ()):
            found |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
    return found


def test_the_folder_has_these_notebooks_and_the_page_names_them():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)
    page = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"(notebooks/{name}.ipynb)" in page for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_is_whole_and_small(name):
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < 150_000
    cells = code_cells(name)
    # As after one run from top to bottom.
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {
        "stream", "display_data", "execute_result",
    }  # fmt: skip
    # No warnings, nor progress bars.
    assert not [o for o in outputs if o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    said = json.dumps([{**o, "data": {**o.get("data", {}), "image/png": ""}} for o in outputs])
    assert not re.findall(r"/(?:home|root|tmp|work|Users|usr|opt)/", said)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_ran_with_its_own_parameters(name):
    """The parameters that the tests replace are in the cell that has the tag."""
    (cell,) = (c for c in code_cells(name) if "parameters" in c["metadata"].get("tags", ()))
    assert assigned(SMALL[name]) <= assigned("".join(cell["source"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, tmp_path, monkeypatch):
    for needed in ("nbformat", "nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(needed)
    if name != "sudoku":
        try:
            pyloss.models.resolve_model("smollm2-135m")
        except FileNotFoundError as error:
            pytest.skip(str(error))
    # The kernel is another process, in a folder that has nothing.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    execute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(execute)
    done = execute.executed(FOLDER / f"{name}.ipynb", tmp_path, SMALL[name])
    said = [
        o["text"] for c in done.cells for o in c.get("outputs", ()) if o.get("name") == "stderr"
    ]
    assert not said
    # Nothing is written outside of the folder that the notebooks name.
    assert {path.name for path in tmp_path.iterdir()} <= {"notebook-output"}
