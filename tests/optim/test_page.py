"""The examples of docs/optimizers.md run as they stand, one after the other."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="the pages are not part of the package")
def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall("```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), names)
    assert names["optimizer"].step == 5
