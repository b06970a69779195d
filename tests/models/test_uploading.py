"""Uploads to the hub, to a local server that stands in for it."""

import json

import pytest
from hub_server import TOKEN, hub, run_with

pytest.importorskip("huggingface_hub", reason="needs huggingface-hub (test extra)")

#: calls `check_push` and `push` with arguments in JSON, and prints the address or the error
CODE = """
import json, sys
from pathlib import Path
from pyloss.models.uploading import check_push, push
given = json.loads({0!r})
try:
    check_push(given["repository"])
    own = given.pop("own", True)
    print(push(place=Path(given.pop("place")), own_card=lambda text: own, **given))
except (ValueError, OSError, ImportError) as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def server(tmp_path):
    (tmp_path / "repositories").mkdir()
    with hub(tmp_path / "repositories") as found:
        yield found


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "fused"
    (folder / "previous-1").mkdir(parents=True)
    files = {"model.safetensors": b"weights", "config.json": b"{}", "README.md": b"ours"}
    for name, content in (files | {"previous-1/config.json": b"old", "secret.txt": b"x"}).items():
        (folder / name).write_bytes(content)
    return folder


def pushed(server, place, tmp_path, token=TOKEN, variables=None, **more):
    given = {
        "repository": "me/mine", "place": str(place),
        "names": ["model.safetensors", "config.json", "README.md"], **more,
    }  # fmt: skip
    environment = {"HF_TOKEN": token, **(variables or {})}
    _, out, err = run_with(
        server, tmp_path / "cache", CODE.format(json.dumps(given)), **environment
    )
    assert out, err
    return out.splitlines()[-1]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_becomes_a_repository_with_these_files_alone(server, place, tmp_path):
    assert pushed(server, place, tmp_path, private=True).endswith("/me/mine")
    there = contents(server.root / "me/mine")
    assert there == {
        "model.safetensors": b"weights", "config.json": b"{}", "README.md": b"ours",
    }  # fmt: skip
    assert server.private == {"me/mine": True}
    (place / "config.json").write_bytes(b'{"a": 1}')
    pushed(server, place, tmp_path)
    assert contents(server.root / "me/mine")["config.json"] == b'{"a": 1}'


def test_files_of_an_earlier_model_go_and_others_stay(server, place, tmp_path):
    there = server.root / "me/mine"
    there.mkdir(parents=True)
    old = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.md")
    for name in old:
        (there / name).write_bytes(b"old")
    patterns = ["model-*.safetensors", "model.safetensors.index.json", "config.json"]
    pushed(server, place, tmp_path, replaced=patterns)
    assert set(contents(there)) == {"model.safetensors", "config.json", "README.md", "notes.md"}


@pytest.mark.parametrize("own", [False, True])
def test_the_readme_of_a_repository_is_replaced_only_if_it_is_a_card(server, place, tmp_path, own):
    (server.root / "me/mine").mkdir(parents=True)
    (server.root / "me/mine/README.md").write_bytes(b"theirs")
    pushed(server, place, tmp_path, own=own)
    there = contents(server.root / "me/mine")
    assert there["README.md"] == (b"ours" if own else b"theirs")
    assert there["model.safetensors"] == b"weights"


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"repository": "mine"}, ["ValueError push must be owner/name", "'mine'"]),
        ({"repository": "a/b/c"}, ["ValueError push must be owner/name"]),
        ({"token": ""}, ["ValueError no token for the hub", "hf auth login", "HF_TOKEN"]),
        ({"variables": {"HF_HUB_OFFLINE": "1"}}, ["ValueError HF_HUB_OFFLINE is set"]),
        ({"token": "hf_wrong"}, ["Error the files are in", "did not take them as me/mine", "401"]),
        ({"repository": "others/x"}, ["Error the files are in", "others/x", "403"]),
    ],
)
def test_errors_say_what_is_missing(server, place, tmp_path, more, parts):
    found = pushed(server, place, tmp_path, **more)
    for part in parts:
        assert part in found
    assert not list(server.root.rglob("*.*"))


def test_the_package_is_named(monkeypatch):
    import sys

    from pyloss.models.uploading import check_push

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'pyloss\[hub\]'"):
        check_push("me/mine")
