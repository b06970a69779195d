"""Executes the notebooks of this folder, and writes their outputs back.

    python examples/notebooks/execute.py [NAME ...]

Each runs in an empty folder, as for somebody who has only installed the package. tests/
test_notebooks.py executes them by the same function, with smaller parameters.
"""

import base64
import io
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent


def executed(path, folder, parameters=""):
    """The notebook after all of its cells ran in `folder`.

    `parameters` are lines of Python that follow the cell of the parameters. Raises nbclient's
    CellExecutionError where a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    if parameters:
        (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
        cell.source += f"\n{parameters}"
    NotebookClient(
        notebook,
        timeout=3600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    # Without the versions of this machine's Python.
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    return notebook


def smaller(picture):
    """A PNG in base64 with 48 colors, a third of the bytes."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    file = io.BytesIO()
    image.quantize(48).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main():
    paths = [HERE / f"{name}.ipynb" for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, folder)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
