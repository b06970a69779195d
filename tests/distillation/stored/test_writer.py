"""Writing a stored teacher: its bytes, continued runs, and what is refused."""

import logging
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_data

from pyloss.distillation.stored import StoredTeacher, write_teacher
from pyloss.distillation.stored.folder import read_index
from pyloss.io.locks import locked

SMALL = 400  # bytes of a shard: several shards


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_data.models(tmp_path_factory.mktemp("models"))[1]


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.mark.parametrize("kind", [{"top_k": 5}, {"samples": 6}])
def test_two_calls_write_the_same_bytes(teacher, tmp_path, kind):
    for name in "ab":
        write_teacher(teacher, tiny_data.data(), tmp_path / name, shard_bytes=SMALL, **kind)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert len(content(tmp_path / "a")) > 3


def test_the_size_is_said_before_and_is_that_of_the_files(teacher, tmp_path, caplog):
    caplog.set_level(logging.INFO, "pyloss")
    folder = write_teacher(teacher, tiny_data.data(), tmp_path / "t", top_k=5)
    settings = read_index(folder).settings
    assert caplog.messages[0] == (
        f"stored teacher {folder}: {settings.targets} target tokens x 5 likeliest classes, "
        f"24 bytes a token: {settings.nbytes} bytes"
    )
    files = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert settings.nbytes < files < settings.nbytes + 1000


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import tiny_data
from pyloss.distillation.stored import folder, writer
from pyloss.models import load_model

at, write = int(sys.argv[3]), writer.{place}

def killed(*args, **more):
    killed.calls += 1
    if killed.calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*args, **more)

killed.calls = 0
writer.{place} = killed
writer.write_teacher(
    load_model(sys.argv[1]), tiny_data.data(), sys.argv[2], samples=6, shard_bytes={small}
)
"""


@pytest.mark.parametrize("place", ["write_shard", "_computed", "Index.write"])
def test_a_killed_run_goes_on_with_the_same_bytes(teacher, tmp_path, place):
    model = tmp_path / "teacher"
    teacher.save(model)
    whole = write_teacher(
        teacher, tiny_data.data(), tmp_path / "whole", samples=6, shard_bytes=SMALL
    )
    script = KILLED.format(path=sys.path, place=place, small=SMALL)
    for at in (1, 3):
        killed = tmp_path / f"{place}-{at}"
        run = subprocess.run([sys.executable, "-c", script, model, killed, str(at)], timeout=120)
        assert run.returncode == -signal.SIGKILL
        if (killed / "teacher.json").exists():
            assert not read_index(killed).complete
            with pytest.raises(ValueError, match=r"samples: write it again with the same settings"):
                StoredTeacher(killed)
        write_teacher(teacher, tiny_data.data(), killed, samples=6, shard_bytes=SMALL)
        assert content(killed) == content(whole)


def test_complete_shards_are_kept(teacher, tmp_path, monkeypatch):
    folder = write_teacher(teacher, tiny_data.data(), tmp_path / "t", shard_bytes=SMALL, top_k=5)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    monkeypatch.setattr(type(teacher), "hidden", lambda *args: pytest.fail("the teacher ran"))
    write_teacher(teacher, tiny_data.data(), folder, shard_bytes=SMALL, top_k=5)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_a_damaged_shard_is_written_anew(teacher, tmp_path):
    folder = write_teacher(teacher, tiny_data.data(), tmp_path / "t", shard_bytes=SMALL, top_k=5)
    before = content(folder)
    shard = folder / "teacher-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    (folder / "teacher-00001.safetensors").unlink()
    write_teacher(teacher, tiny_data.data(), folder, shard_bytes=SMALL, top_k=5)
    assert content(folder) == before


def test_other_settings_are_refused_or_overwrite(teacher, tmp_path):
    folder = write_teacher(teacher, tiny_data.data(), tmp_path / "t", top_k=5, shard_bytes=SMALL)
    before = content(folder)
    with pytest.raises(ValueError, match=r"has a stored teacher with count 5, not 6: give another"):
        write_teacher(teacher, tiny_data.data(), folder, top_k=6, shard_bytes=SMALL)
    with pytest.raises(ValueError, match=r"with data \w+, not \w+, samples 8, not 7"):
        write_teacher(teacher, tiny_data.data(7), folder, top_k=5, shard_bytes=SMALL)
    assert content(folder) == before
    write_teacher(teacher, tiny_data.data(), folder, top_k=5, overwrite=True)
    assert sorted(content(folder)) == ["teacher-00001.safetensors", "teacher.json"]


def test_files_of_others_are_kept(teacher, tmp_path):
    (tmp_path / "teacher-00001.safetensors").write_text("mine")
    write_teacher(teacher, tiny_data.data(), tmp_path)
    assert (tmp_path / "previous-1" / "teacher-00001.safetensors").read_text() == "mine"


def test_one_writer_per_folder(teacher, tmp_path):
    with locked(tmp_path), pytest.raises(BlockingIOError, match="another run is writing here"):
        write_teacher(teacher, tiny_data.data(), tmp_path)


def test_a_disk_without_room_is_refused(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"needs \d+ bytes, and the disk has 100 bytes"):
        write_teacher(teacher, tiny_data.data(), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_equal_samples_are_stored_once(teacher, tmp_path):
    data = tiny_data.data()
    folder = write_teacher(teacher, data, tmp_path / "t", val_dataset=data)
    assert read_index(folder).settings.samples == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 30}, "top_k is 30; it must be a whole number from 1 to 29"),
        ({"top_k": 0}, "top_k is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"temperature": 0}, "temperature is 0; it must be a finite number above 0"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be"),
        ({"max_seq_length": 1}, "max_seq_length is 1"),
    ],
)
def test_refused_arguments(teacher, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_teacher(teacher, tiny_data.data(), tmp_path / "t", **{"top_k": 5, **arguments})
    assert not (tmp_path / "t").exists()


def test_refused_teachers_and_data(teacher, tmp_path):
    with pytest.raises(TypeError, match=r"must be a model of pyloss.load, not a dict"):
        write_teacher({}, tiny_data.data(), tmp_path / "t")
    with pytest.raises(ValueError, match="no sample has a target within max_seq_length=2048"):
        write_teacher(teacher, tiny_data.Tokens([([1, 2], 2)]), tmp_path / "t")
    with pytest.raises(ValueError, match=r"sample 0 has a token id outside .* \[0, 29\)"):
        write_teacher(teacher, tiny_data.Tokens([([1, 29, 2], 0)]), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_logits_that_are_not_finite(tmp_path):
    _, teacher = tiny_data.models(tmp_path)
    next(iter(teacher.parameters().values()))[...] = np.nan
    with pytest.raises(ValueError, match="the teacher's logits are not finite"):
        write_teacher(teacher, tiny_data.data(), tmp_path / "t", top_k=5)
