"""Files are written completely or not at all, and checked when they are read."""

import contextlib
import errno
import json
import os
import pickle
import resource
import stat
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pyloss.errors import FormatError
from pyloss.io import files
from pyloss.io.safetensors import read_safetensors


@contextlib.contextmanager
def file_size_limit(size):
    """Simulate a full disk: the operating system refuses to write beyond `size`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_format_error_says_where_what_and_why():
    error = FormatError("a.gguf", "blk.0", "too short")
    assert str(error) == "a.gguf: blk.0: too short"
    assert (error.path, error.what, error.reason) == ("a.gguf", "blk.0", "too short")
    assert isinstance(error, ValueError)
    assert str(FormatError("a.gguf", None, "empty")) == "a.gguf: empty"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_names_and_values_as_long_as_a_file_are_cut_in_messages():
    error = FormatError("a.gguf", "blk." * 50_000, "x" * 100_000 + " is too long")
    assert (
        error.what.startswith("blk.")
        and error.reason.endswith("is too long")
        and len(str(error)) < 2300
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_write_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "file"
    files.write_bytes(path, b"old")
    files.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "write",
    [lambda path: files.write_bytes(path, b""), lambda path: files.write_safetensors(path, {})],
    ids=["bytes", "safetensors"],
)
def test_the_new_file_has_usual_permissions_and_a_replaced_one_keeps_its_own(tmp_path, write):
    path = tmp_path / "file"
    umask = os.umask(0o022)
    try:
        write(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        path.chmod(0o640)
        write(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    finally:
        os.umask(umask)


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    files.write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_while_writing_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(failure), files.replacing(path) as beside:
        beside.write_bytes(b"half")
        raise failure
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_bytes(path, bytes(1 << 20)),
        lambda path: files.write_safetensors(path, {"w": np.zeros(1 << 18, np.float32)}),
    ],
)
def test_a_full_disk_is_an_oserror_naming_the_target(tmp_path, write):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with file_size_limit(1 << 16), pytest.raises(OSError, match="cannot write") as caught:
        write(path)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_flush_failures_count(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        files.write_bytes(tmp_path / "file", b"new")
    assert caught.value.filename == str(tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_missing_folder_and_folder_in_the_way(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        files.write_bytes(tmp_path / "none" / "file", b"")
    assert caught.value.filename == str(tmp_path / "none" / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        files.write_bytes(tmp_path / "folder", b"")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError) as caught:
        files.write_bytes(tmp_path / "file", b"")
    assert caught.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": }', "line 2 column 7: not JSON"),
        (b"", "line 1 column 1: not JSON"),
        (b'{"a": "\xff"}', "byte 7: not UTF-8"),
        (b"[1]", "holds a list, expected an object"),
        (b"null", "holds null, expected an object"),
        (b"true", "holds true or false, expected an object"),
        (b"[" * 200_000, "not JSON that can be read"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "not JSON that can be read"),
    ],
)
def test_bad_json_says_where(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        files.read_json(path)
    assert caught.value.path == str(path)


def test_json_round_trip_and_refusals(tmp_path):
    path = tmp_path / "a.json"
    value = {"b": [1, 2.5, None, "é"], "a": True}
    files.write_json(path, value)
    assert files.read_json(path) == value
    assert "é" in path.read_text(encoding="utf-8")
    for bad in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((TypeError, ValueError)):
            files.write_json(path, bad)
    assert json.loads(path.read_text()) == value
    assert files.read_json(path, kind=object) == value


def test_map_file_is_read_only_and_refuses_empty_files(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    mapped = files.map_file(path)
    assert mapped.tobytes() == b"abc"
    assert not mapped.flags.writeable
    (tmp_path / "empty").touch()
    with pytest.raises(FormatError, match="empty"):
        files.map_file(tmp_path / "empty")


def test_safetensors_of_any_strides_and_types(tmp_path):
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((6, 10)).astype(np.float32)
    arrays = {
        "plain": matrix,
        "transposed": matrix.T,
        "sliced": matrix[::2, 1::3],
        "reversed": matrix[::-1],
        "swapped": matrix.astype(">f4"),
        "half": matrix.astype(np.float16),
        "bfloat": matrix.astype(ml_dtypes.bfloat16),
        "scalar": np.array(3.5, np.float32),
        "none": np.zeros((0, 4), np.float32),
    }
    path = tmp_path / "a.safetensors"
    files.write_safetensors(path, arrays, {"format": "np"})
    read = read_safetensors(path)
    assert read.metadata == {"format": "np"}
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(
            read.tensor(name).array(), array.astype(np.float32), err_msg=name
        )


def test_safetensors_with_the_same_content_are_the_same_file(tmp_path):
    """The library writes the keys of metadata in any order."""
    metadata = {"é\n": 'a "quoted" \u2028 \x7f', "base": "b", "checkpoint": "{}", "z": "/"}
    tensors = {"b": np.arange(3, dtype=np.float32), "a": np.ones(2, np.float32)}
    found = set()
    for i in range(8):
        files.write_safetensors(tmp_path / f"{i}", tensors, metadata)
        found.add((tmp_path / f"{i}").read_bytes())
    assert len(found) == 1
    read = read_safetensors(tmp_path / "0")
    assert read.metadata == metadata
    assert {name: t.array().tolist() for name, t in read.tensors.items()} == {
        name: array.tolist() for name, array in tensors.items()
    }


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"a": np.array([object()])}, None),
        ({"a": [1.0]}, None),
        ({1: np.zeros(1)}, None),
        ({"a": np.zeros(1)}, {"step": 3}),
    ],
)
def test_safetensors_refuses_what_it_cannot_hold(tmp_path, tensors, metadata):
    with pytest.raises(TypeError):
        files.write_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    assert os.listdir(tmp_path) == []


def test_a_users_path_has_its_home_and_reads_the_same_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    for given, meant in [
        ("~", home),
        ("~/a/b", home / "a/b"),
        (Path("~/a"), home / "a"),
        (b"~/a", home / "a"),
        ("a/~", Path("a/~")),
        ("a", Path("a")),
        ("./~", tmp_path / "~"),
        ("./~/a", tmp_path / "~/a"),
        ("~nobody-of-this-name/a", tmp_path / "~nobody-of-this-name/a"),
        (b"\xff/\xc3\xa4", Path("\udcff/ä")),
    ]:
        found = files.user_path(given)
        assert found == meant
        assert files.user_path(found) == found
    assert os.fsencode(files.user_path(b"\xff")) == b"\xff"


@pytest.mark.parametrize("wrong", ["", "a\0b", b""])
def test_paths_that_no_file_can_have_are_refused(wrong):
    with pytest.raises(ValueError, match="path"):
        files.user_path(wrong)


@pytest.mark.parametrize("wrong", [None, 3, ["a"]])
def test_what_is_no_path_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="must be text or a path object"):
        files.user_path(wrong)


def test_files_are_read_and_written_at_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    files.write_json("~/a.json", {"a": 1})
    assert files.read_json("~/a.json") == {"a": 1}
    assert files.map_file("~/a.json")[0] == ord("{")
    assert os.listdir(tmp_path) == ["a.json"]


def test_json_holds_names_of_files_that_are_not_utf_8(tmp_path):
    name = os.fsdecode(b"\xff\xc3\xa4")
    files.write_json(tmp_path / "a.json", {"data": name})
    assert (
        files.read_json(tmp_path / "a.json")
        == json.loads((tmp_path / "a.json").read_bytes())
        == {"data": name}
    )
    assert b'"\\udcff\xc3\xa4"' in (tmp_path / "a.json").read_bytes()


def read_by_mapping(path):
    return files.map_file(path)


@pytest.mark.parametrize("read", [files.read_json, files.read_text, read_by_mapping])
def test_pipes_devices_and_folders_are_no_files(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in (
        (tmp_path / "pipe", "a pipe"),
        (Path("/dev/zero"), "a device"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(FormatError, match=f"^{path}: this is {kind}; expected a regular file$"):
            read(path)


@pytest.mark.parametrize("read", [files.read_json, files.read_text, read_by_mapping])
def test_a_git_lfs_pointer_is_said_to_be_one(tmp_path, read):
    path = tmp_path / "model"
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
    )
    with pytest.raises(
        FormatError,
        match="this is a Git LFS pointer; the file itself was not downloaded: run git lfs pull",
    ):
        read(path)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(tmp_path / "a.json") == {"a": 1}
    assert files.read_text(tmp_path / "a.json") == '{"a": 1}'


def test_what_a_killed_write_of_tensors_leaves_is_swept(tmp_path):
    """Killed while the library writes: its file lies in a folder with the process's number."""
    script = (
        "import os, sys, numpy as np, pyloss.io.files as files\n"
        "from pathlib import Path\n"
        "def killed(tensors, path, metadata):\n"
        "    Path(path).with_name('.tmpAbCdE').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), 9)\n"
        "import safetensors.numpy\n"
        "safetensors.numpy.save_file = killed\n"
        "files.write_safetensors(sys.argv[1], {'a': np.ones(3, np.float32)})\n"
    )
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"before")
    done = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert done.returncode == -9
    assert {path.name for path in tmp_path.iterdir()} > {"a.safetensors"}
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert target.read_bytes() == b"before"
