"""The wheel and its imports, its wide instructions, and the environment variables."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pyloss import _core

ROOT = Path(__file__).parents[1]
SYSTEM_PYTHON = "/usr/bin/python3"
X86 = platform.machine().lower() in ("x86_64", "amd64")
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")
#: bytes of the wheel, and of the extension as it is installed
LARGEST_WHEEL, LARGEST_EXTENSION = 2.5e6, 4e6
#: what the source distribution is made of
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "pyloss", "tests")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "CITATION.cff")
FILES += ("CHANGELOG.md", "CONTRIBUTING.md", ".clang-format")


def unavailable(reason):
    """Skip, except in CI, which has everything that these tests need."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must have it: {reason}")
    pytest.skip(reason)


def run(*command, cwd=None, **environment):
    inherited = {
        k: v
        for k, v in os.environ.items()
        if k not in ("PYLOSS_ISA", "PYLOSS_NUM_THREADS", "OMP_NUM_THREADS", "PYTHONPATH")
    }
    return subprocess.run(
        command,
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def python(script, **environment):
    done = run(sys.executable, "-c", script, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, unpacked source distribution that it was built from, the file names in that)."""
    try:
        import setuptools
    except ImportError:
        unavailable("needs setuptools: pip install 'pyloss[test]'")
    if int(setuptools.__version__.split(".")[0]) < 77 or int(np.__version__.split(".")[0]) < 2:
        unavailable("building needs setuptools >= 77 and NumPy 2")
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    tree.mkdir()
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )

    def build(what, source):
        done = run(
            sys.executable,
            "-c",
            f"import setuptools.build_meta as b; b.build_{what}({str(folder)!r})",
            cwd=source,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    build("sdist", tree)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    source = folder / archive.name.removesuffix(".tar.gz")
    build("wheel", source)
    (wheel,) = folder.glob("*.whl")
    return wheel, source, names


@pytest.mark.slow
def test_the_source_distribution_holds_all_of_the_core(built):
    _, _, names = built
    held = {name.split("/", 1)[1] for name in names if "/" in name}
    files = [
        p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".c", ".h", ".def", ".cl", ".py")
    ]
    assert {p.relative_to(ROOT).as_posix() for p in files} <= held
    assert {*FILES, "pyloss/py.typed", "pyloss/_core.pyi"} <= held
    others = {
        p.relative_to(ROOT).as_posix()
        for folder in ("benchmarks", "docs", "examples", "tests")
        for p in (ROOT / folder).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert others <= held
    assert not [name for name in held if name.endswith((".pyc", ".so", ".o"))]


@pytest.mark.slow
def test_tests_run_from_the_source_distribution(built):
    """With the extension built in its place; these need helpers, data and settings beside them."""
    _, source, _ = built
    (extension,) = (source / "build").glob("lib*/pyloss/_core*.so")
    shutil.copy(extension, source / "pyloss")
    chosen = ("test_conftest.py", "checks", "cli/test_inspecting.py", "optim/test_schedules.py")
    done = run(
        *(sys.executable, "-m", "pytest", "-q", "--each-value", "-p", "no:cacheprovider"),
        *(f"tests/{name}" for name in chosen),
        cwd=source,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert re.search(r"^\d+ passed", done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_wheel_is_small_complete_and_for_every_python(built):
    wheel, _, _ = built
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        sizes = {info.filename: info.file_size for info in z.infolist()}
    # The extension was 12.6 MB with debug information; docs/releases.md says both limits.
    (extension,) = (name for name in names if name.startswith("pyloss/_core") and "pyi" not in name)
    assert sizes[extension] <= LARGEST_EXTENSION
    assert wheel.stat().st_size <= LARGEST_WHEEL
    with zipfile.ZipFile(wheel) as z:
        (metadata,) = (z.read(n).decode() for n in names if n.endswith("/METADATA"))
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "pyloss").rglob("*.py")} | {
        "pyloss/py.typed",
        "pyloss/_core.pyi",
    }
    assert wanted <= names
    assert not [n for n in names if n.startswith(("tests", "csrc"))]
    assert "License-Expression: MIT" in metadata
    if LIMITED:
        assert "-cp310-abi3-" in wheel.name
        assert "pyloss/_core.abi3.so" in names


CALLS = """
import json, sys
import numpy as np
import pyloss
from pyloss import _core, nn, optim

rng = np.random.default_rng(0)
x, w, dy = (rng.standard_normal(s).astype(np.float32) for s in ((7, 33), (5, 33), (7, 5)))
isas = _core.isas()
for isa in isas:
    _core.use_isa(isa)
    y, dx = np.empty((7, 5), np.float32), np.empty((7, 33), np.float32)
    _core.linear_forward(x, w, None, None, None, 1.0, None, y)
    assert np.abs(y - x @ w.T).max() < 1e-4
    _core.linear_input_grad(dy, w, None, None, 0, None, dx)
    assert np.abs(dx - dy @ w).max() < 1e-4

    labels = np.array([0, 3, -100, 4, 1, 2, 0])
    loss, grad = pyloss.value_and_grad(lambda z: pyloss.softmax_cross_entropy(z, labels, reduction="mean"))(y)
    p = np.exp(y.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    rows = labels >= 0
    want = -np.log(p[np.arange(7), np.maximum(labels, 0)])[rows].mean()
    assert abs(float(loss) - want) < 1e-5
    p[np.arange(7), np.maximum(labels, 0)] -= 1
    assert np.abs(grad - p * rows[:, None] / rows.sum()).max() < 1e-5

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(33, 5)

    model = Model()
    step = nn.value_and_grad(model, lambda: pyloss.softmax_cross_entropy(model.head(x), labels, reduction="mean"))
    adamw, losses = optim.AdamW(1e-2), []
    for _ in range(5):
        value, grads = step()
        adamw.update(model, grads)
        losses.append(float(value))
    assert losses[-1] < losses[0], losses
print(json.dumps([np.__version__, isas, pyloss.__file__]))
"""


@pytest.mark.slow
def test_the_wheel_runs_on_the_numpy_of_the_system(built, tmp_path):
    """Built with the headers of NumPy 2, run on NumPy 1."""
    wheel, _, _ = built
    asked = "import numpy, sys; print(numpy.__version__, *sys.version_info[:2])"
    found = run(SYSTEM_PYTHON, "-c", asked) if os.path.exists(SYSTEM_PYTHON) else None
    version = found.stdout.split() if found and found.returncode == 0 else ["0", "0", "0"]
    if version[0].split(".")[0] != "1" or (int(version[1]), int(version[2])) < (3, 10):
        unavailable(f"needs a NumPy 1 under {SYSTEM_PYTHON}: apt-get install python3-numpy")
    # Another Python installs the wheel, which suits all of them: the system's may lack pip.
    done = run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    )
    assert done.returncode == 0, done.stderr
    done = run(SYSTEM_PYTHON, "-c", CALLS, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    numpy, isas, file = json.loads(done.stdout)
    assert numpy == version[0]
    assert isas == _core.isas()
    assert file.startswith(str(tmp_path))


def test_the_same_calls_on_the_numpy_of_the_tests():
    assert json.loads(python(CALLS))[0] == np.__version__


def test_importing_pyloss_imports_numpy_alone():
    script = """
import sys
before = set(sys.modules)
import pyloss
new = set(sys.modules) - before
print(*sorted({m.split(".")[0] for m in new} - set(sys.stdlib_module_names)))
print(*sorted(m for m in new if m.startswith(("pyloss.models", "pyloss.tuner", "pyloss.cli", "pyloss.generation"))))
"""
    packages, *later = python(script).splitlines()
    assert packages.split() == ["numpy", "pyloss"]
    assert not later or later == [""], "imported before its first use"


def objects_of(built):
    """The object files that the wheel was linked from."""
    return sorted((built[1] / "build").rglob("*.o"))


def instructions(path):
    """The disassembly of an object file, one instruction per line."""
    done = run("objdump", "-d", "--no-show-raw-insn", str(path))
    assert done.returncode == 0, done.stderr
    return re.findall(r"^\s*[0-9a-f]+:\t(.+)$", done.stdout, re.MULTILINE)


@pytest.mark.skipif(not X86, reason="wide instructions are an x86 matter")
@pytest.mark.slow
def test_wide_instructions_are_in_their_own_objects_only(built):
    if not shutil.which("objdump"):
        unavailable("needs objdump: apt-get install binutils")
    objects = objects_of(built)
    kernels = {p.stem.removeprefix("isa_") for p in objects if p.stem.startswith("isa_")}
    assert kernels == {"baseline", "avx2", "avx512"}
    avx512 = re.compile(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b")
    found = {path: instructions(path) for path in objects}
    assert any(
        avx512.search(i) for path, text in found.items() if path.stem == "isa_avx512" for i in text
    )
    avx2 = [i for path, text in found.items() if path.stem == "isa_avx2" for i in text]
    assert any("%ymm" in i for i in avx2)
    assert not [i for i in avx2 if avx512.search(i)]
    for path, text in found.items():
        if path.stem in ("isa_avx2", "isa_avx512"):
            continue
        # All AVX instructions start with v. Older ones that do (ver[rw], vm*) are never compiled
        # code.
        wide = [i for i in text if i.startswith("v") or avx512.search(i)]
        assert not wide, f"{path}: {wide[:5]}"


@pytest.mark.skipif(not X86, reason="wide instructions are an x86 matter")
@pytest.mark.slow
def test_instructions_for_bfloat16_are_in_functions_for_processors_that_have_them(built):
    if not shutil.which("objdump"):
        unavailable("needs objdump: apt-get install binutils")
    text = "".join(
        run("objdump", "-d", "--no-show-raw-insn", str(path)).stdout
        for path in objects_of(built)
        if path.stem == "isa_avx512"
    )
    bodies = re.split(r"^[0-9a-f]+ <(.+)>:$", text, flags=re.MULTILINE)
    using = {
        name
        for name, body in zip(bodies[1::2], bodies[2::2], strict=True)
        if re.search(r"\t([vt]dpbf16ps|vcvtne2?ps2?bf16|ldtile|tile[lsrz])", body)
    }
    assert using
    own = re.compile(
        r"native_pairs|^amx_((strip|product|pack_down)_native|configure|release)"
        r"|^(pack_[ab]|attn_(forward|grad|pack))_amx|^words_of_rows?_"
    )
    assert all(own.search(name) for name in using), using


@pytest.mark.skipif(not X86, reason="wide instructions are an x86 matter")
@pytest.mark.slow
def test_dots_of_bytes_are_in_their_own_objects_only(built):
    if not shutil.which("objdump"):
        unavailable("needs objdump: apt-get install binutils")
    using = {
        path.relative_to(built[1] / "build").parts[1]
        for path in objects_of(built)
        if any(re.search(r"\bvpdp(busd|wssd)", i) for i in instructions(path))
    }
    assert using == {"int8_dots"}


@pytest.mark.skipif(not X86, reason="wide instructions are an x86 matter")
@pytest.mark.slow
def test_objects_of_kernels_share_what_has_their_instruction_set_in_its_name(built):
    """The linker could take a function that two objects define from the wider one."""
    if not shutil.which("nm"):
        unavailable("needs nm: apt-get install binutils")
    for isa in ("baseline", "avx2", "avx512"):
        shared = set()
        for path in objects_of(built):
            if path.stem == f"isa_{isa}":
                done = run("nm", "--defined-only", "--extern-only", "--format=posix", str(path))
                shared |= {line.split()[0] for line in done.stdout.splitlines()}
        wanted = {f"pl_table_{isa}", f"int8_run_{isa}"} | {
            f"{name}_{isa}" for name, _ in _core.ops()
        }
        # int8 products once more, where the compiler knows the dots of bytes.
        assert shared - {f"int8_dots_run_{isa}"} == wanted
        assert isa != "baseline" or shared == wanted


@pytest.mark.parametrize("isa", _core.isas())
def test_pyloss_isa_selects(isa):
    assert python("import pyloss; print(pyloss.info()['isa'])", PYLOSS_ISA=isa) == isa


def test_the_best_instruction_set_is_the_default():
    assert python("import pyloss; print(pyloss.info()['isa'])") == _core.isas()[-1]


def test_an_impossible_pyloss_isa_names_the_possible_ones():
    done = run(sys.executable, "-c", "import pyloss", PYLOSS_ISA="sse9")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last == f"ImportError: PYLOSS_ISA=sse9: this machine can run {', '.join(_core.isas())} only"
    )


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"PYLOSS_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"PYLOSS_NUM_THREADS": "1", "OMP_NUM_THREADS": "5"}, 1),
        ({"PYLOSS_NUM_THREADS": "", "OMP_NUM_THREADS": "4,2"}, 4),
    ],
)
def test_the_environment_sets_the_threads(environment, threads):
    assert python("import pyloss; print(pyloss.get_num_threads())", **environment) == str(threads)


def test_without_an_environment_threads_are_the_processors_allowed():
    script = "import os, pyloss; print(pyloss.get_num_threads(), len(os.sched_getaffinity(0)))"
    threads, allowed = map(int, python(script).split())
    assert 1 <= threads <= allowed
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import pyloss; print(pyloss.get_num_threads())"
    assert python(one) == "1"


def test_the_version_is_one():
    from importlib import metadata

    import pyloss

    try:
        installed = metadata.version("pyloss")
    except metadata.PackageNotFoundError:
        pytest.skip("pyloss is not installed but in the path")
    assert installed == pyloss.__version__
