"""Fixtures of the tests of datasets: a tokenizer, and folders of records."""

import json

import pytest
from fake import FakeTokenizer


@pytest.fixture
def tokenizer():
    return FakeTokenizer()


@pytest.fixture
def folder(tmp_path):
    """Write splits as JSONL: `folder(train=[...], valid=b"raw")` returns the folder."""

    def write(**splits):
        for name, content in splits.items():
            lines = (
                content
                if isinstance(content, bytes)
                else "".join(json.dumps(r) + "\n" for r in content).encode()
            )
            (tmp_path / f"{name}.jsonl").write_bytes(lines)
        return tmp_path

    return write
