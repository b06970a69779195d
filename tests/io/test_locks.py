"""Locks of folders: the holder is named, dead processes hold none, and their files are removed."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from pyloss.io import locks
from pyloss.io.locks import LOCK_FILE, locked

HOLDER = """
import sys, time
from pathlib import Path
from pyloss.io.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def dead_pid():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_the_holder_is_named_and_a_dead_one_holds_nothing(tmp_path, holder):
    with pytest.raises(BlockingIOError) as raised, locked(tmp_path):
        pass
    said = str(raised.value)
    assert (
        f"process {holder.pid} on {socket.gethostname()}, started 20" in said
        and str(tmp_path) in said
    )
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == holder.pid
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()


def test_the_lock_goes_whatever_ends_the_block(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    with locked(tmp_path), pytest.raises(BlockingIOError), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_child_that_outlives_the_run_does_not_keep_the_lock(tmp_path):
    reading, writing = os.pipe()
    run = os.fork()
    if run == 0:
        held = locked(tmp_path)
        held.__enter__()
        if os.fork() == 0:  # a worker that outlives its parent
            os.write(writing, b"%d" % os.getpid())
            time.sleep(20)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(run, 0)
    worker = int(os.read(reading, 20))
    try:
        with locked(tmp_path):
            os.kill(worker, 0)  # still alive
    finally:
        os.kill(worker, signal.SIGKILL)


def test_of_many_threads_one_holds_it(tmp_path):
    inside, refused, barrier = [], [], threading.Barrier(8)

    def work():
        barrier.wait()
        try:
            with locked(tmp_path):
                inside.append(1)
                assert sum(inside) == 1
                barrier.wait()
                inside.pop()
        except BlockingIOError:
            refused.append(1)
            barrier.wait()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7


@pytest.mark.parametrize(
    ("pid", "host", "free"),
    [("dead", None, True), ("own", None, True), ("alive", None, False), ("dead", "another", False)],
)
def test_without_locks_of_the_file_system_the_file_counts(tmp_path, monkeypatch, pid, host, free):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    number = {"dead": dead_pid, "own": os.getpid, "alive": os.getppid}[pid]()
    said = {
        "pid": number,
        "host": host or socket.gethostname(),
        "started": "2026-01-01 10:00:00 +0000",
    }
    (tmp_path / LOCK_FILE).write_text(json.dumps(said))
    if free:
        with locked(tmp_path):
            assert (tmp_path / LOCK_FILE).exists()
    else:
        with (
            pytest.raises(BlockingIOError, match=f"process {number} on .*, started 2026-01-01"),
            locked(tmp_path),
        ):
            pass


@pytest.mark.parametrize("text", ["", "[", "[]", '{"pid": "x"}', "9" * 5000, "[" * 4000])
def test_a_lock_file_of_any_content_is_taken(tmp_path, text):
    (tmp_path / LOCK_FILE).write_text(text)
    with locked(tmp_path), pytest.raises(BlockingIOError), locked(tmp_path):
        pass


def test_a_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / LOCK_FILE).symlink_to("precious")
    with pytest.raises(OSError, match="cannot write here"), locked(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path):
    dead, alive = dead_pid(), os.getppid()
    gone = [f".trainer_state.safetensors.{dead}.00ff00ff.tmp", f".a.b.{dead}.12345678.tmp"]
    stays = [
        f".adapters.safetensors.{alive}.00ff00ff.tmp", f".adapters.safetensors.{os.getpid()}.00ff00ff.tmp",
        f"adapters.safetensors.{dead}.00ff00ff.tmp", f".x.{dead}.00ff.tmp", ".x.0.00ff00ff.tmp", f".x.{10**10 - 1}.00ff00ff.tmp",
        "adapters.safetensors",
    ]  # fmt: skip
    for name in gone + stays:
        (tmp_path / name).write_text("")
    with locked(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {*stays, LOCK_FILE}
