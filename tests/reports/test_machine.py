"""`pyloss info --report`: what it says, and that it names no person, computer or path."""

import getpass
import os
import platform
import socket
from importlib import metadata

import numpy as np
import pytest

import pyloss
from pyloss.cli import main
from pyloss.reports import machine


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    """The lines by their names, with settings of which one is a path."""
    monkeypatch.setenv("PYLOSS_CACHE", str(tmp_path))
    monkeypatch.setenv("PYLOSS_NUM_THREADS", "3")
    assert main(["info", "--report"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return dict(line.split(": ", 1) for line in out.splitlines())


def test_versions_processor_features_memory_and_packages(said):
    assert said["pyloss"] == pyloss.__version__
    assert said["Python"].startswith(platform.python_version())
    assert said["system"].startswith(f"{platform.system()} {platform.release()}")
    assert said["processor"].endswith(f"{os.cpu_count()} logical")
    assert said["memory"].endswith(" free") and " in all, " in said["memory"]
    assert said["isa"] in said["isas"].split(", ")
    assert said["device cpu"] == f"C kernels ({pyloss.info()['isa']})"
    try:
        metadata.version("pyloss")
    except metadata.PackageNotFoundError:
        assert "not installed" in said["packages"]
    else:
        packages = dict(text.split(" ") for text in said["packages"].split(", "))
        assert packages["numpy"] == np.__version__ and "safetensors" in packages


def test_the_features_are_those_of_the_instruction_set(said):
    isa = said["isa"]
    if isa in ("avx2", "avx512"):
        assert {"avx2", "fma", "f16c"} <= set(said["features"].split(", "))
    assert ("avx512f" in said["features"]) >= (isa == "avx512")


def test_names_and_paths_are_left_out(said, tmp_path):
    text = "\n".join(f"{name}: {value}" for name, value in said.items())
    assert said["environment"] == "PYLOSS_NUM_THREADS=3, PYLOSS_CACHE is set"
    assert str(tmp_path) not in text and os.getcwd() not in text
    assert os.path.expanduser("~") not in text
    names = {socket.gethostname(), getpass.getuser()}
    assert not names & set(text.replace(",", " ").split()), names


def test_a_system_that_tells_nothing(monkeypatch):
    monkeypatch.setattr(machine, "_cpuinfo", lambda *keys: "")
    monkeypatch.setattr(machine, "total_memory", lambda: None)
    monkeypatch.setattr(machine, "free_memory", lambda: None)
    said = dict(line.split(": ", 1) for line in machine.report())
    assert said["features"] == said["memory"] == "not told by the system"
    assert said["processor"]


def test_a_model_beside_it_is_refused(capsys):
    assert main(["info", "smollm2-135m", "--report"]) == 2
    assert "--report is about this machine: leave out MODEL" in capsys.readouterr().err
