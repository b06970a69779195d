"""Builds the extension module; its kernels are compiled once per instruction set.

The environment: PYLOSS_DEBUG_INFO=1 keeps names and lines for debuggers and profilers,
PYLOSS_BASELINE_ONLY=1 leaves out the wider instruction sets, PYLOSS_CFLAGS and PYLOSS_LDFLAGS are
added to the flags. _PYTHON_HOST_PLATFORM and ARCHFLAGS name another target than this machine.
"""

import glob
import os
import platform
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

# A build by pip does not look for modules beside this file.
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "csrc"))
import generate
import target

TARGET = target.current(os.environ, sysconfig.get_platform(), platform.machine())
if sys.platform == "darwin" and TARGET.processor in target.ARCHS:
    # Pythons for both processors would compile each file for both; the flags below are for one.
    arch = target.ARCHS[TARGET.processor]
    os.environ.setdefault("ARCHFLAGS", f"-arch {arch}")
    os.environ.setdefault("MACOSX_DEPLOYMENT_TARGET", "11.0")
    os.environ.setdefault(
        "_PYTHON_HOST_PLATFORM", f"macosx-{os.environ['MACOSX_DEPLOYMENT_TARGET']}-{arch}"
    )
X86 = TARGET.processor == "x86_64" and not os.environ.get("PYLOSS_BASELINE_ONLY")
DEBUG = bool(os.environ.get("PYLOSS_DEBUG_INFO"))
# Limited API: one build serves every CPython from 3.10 on; free-threaded builds have none.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")

CFLAGS = [
    "-std=gnu11",
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]
# Debug information is three quarters of the extension, and Python's own flags ask for it. -g1 has
# what debuggers and profilers need; -g adds half to the build's time.
CFLAGS += ["-g1"] if DEBUG else ["-g0", "-fno-asynchronous-unwind-tables"]
CFLAGS += ["-Wall", "-Wextra", "-Wno-psabi"]
LDFLAGS, LIBRARIES = [], []
if TARGET.system != "windows":
    CFLAGS += ["-fPIC", "-pthread"]
    LDFLAGS += ["-pthread"]
if TARGET.system == "linux":
    LIBRARIES += ["m", "dl"]
    LDFLAGS += [] if DEBUG else ["-s"]
if X86:
    CFLAGS.append("-DPL_X86")
CFLAGS += os.environ.get("PYLOSS_CFLAGS", "").split()
LDFLAGS += os.environ.get("PYLOSS_LDFLAGS", "").split()

ISA_FLAGS = {"baseline": []}
if X86:
    # The kernels are vectors already: looking for more is a fifth of their build, for
    # processors from before 2013.
    ISA_FLAGS["baseline"] = ["-fno-tree-vectorize"]
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    # Dots of bfloat16 are used where the processor has them; see pl_has_bf16_dots.
    ISA_FLAGS["avx512"] += ["-mavx512bf16", "-mprefer-vector-width=512"]

# Dots of bytes, used where the processor has them (pl_int8_dots): the unit "int8" is compiled
# again with these flags, if the compiler knows them.
DOT_FLAGS = {
    "avx2": ("-mavxvnni", "-DPL_AVX_VNNI"),
    "avx512": ("-mavx512vnni", "-DPL_AVX512_VNNI"),
}
if TARGET.processor == "aarch64":
    DOT_FLAGS["baseline"] = ("-march=armv8.2-a+dotprod", "-DPL_DOTPROD")

# The tile unit, used where processor and system have it (pl_amx_missing), if the compiler knows it.
AMX_FLAGS = ["-mamx-tile", "-mamx-bf16"]

# What kernels/kernels.tpl.h compiles of an instruction set at a time, the longest first.
UNITS = ["products", "losses", "layers", "int8", "maps", "table"]
# Measured to be as fast with -O2 as with -O3, and smaller: int8's code by half.
SMALL = [("int8", isa) for isa in ISA_FLAGS]
if X86:
    SMALL += [(unit, "avx512") for unit in ("products", "losses", "maps")]
    SMALL += [(unit, "baseline") for unit in ("losses", "layers", "maps")]

SOURCES = sorted(
    path
    for room in ("binding", "core", "encoders", "opencl")
    for path in glob.glob(f"csrc/{room}/**/*.c", recursive=True)
)
OPENCL_PROGRAMS = [
    *("elements", "maps", "axes", "layers", "delta", "matmul", "stored", "attention"),
    *(f"rowloss/{kind}" for kind in "class pair cosine sparse element map argmax".split()),
]


# Files beside the folders of the sdist.
PAGES = [
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "Makefile",
    ".clang-format",
]
WINDOWS_ABI3 = LIMITED and TARGET.system == "windows"


def cores():
    """How many sources are compiled in parallel."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def included(folder):
    """Files that the sources include, and the kernels of all machines, for the sdist."""
    wanted = re.compile(r"isa_\w+\.c|.*\.(h|def|cl)")
    found = [
        os.path.join(at, n)
        for at, _, names in os.walk(folder)
        for n in names
        if wanted.fullmatch(n)
    ]
    return sorted(found)


class SourceDistribution(sdist):
    """Adds what the tests need, and the pages."""

    # Not add_defaults: the command egg_info makes the list of files.
    def make_distribution(self):
        for folder in ("tests", "docs", "examples", "benchmarks"):
            for at, folders, names in os.walk(folder):
                folders[:] = sorted(name for name in folders if name != "__pycache__")
                self.filelist.extend(os.path.join(at, name) for name in sorted(names))
        self.filelist.extend(name for name in PAGES if os.path.exists(name))
        self.filelist.remove_duplicates()
        super().make_distribution()


class BuildKernels(build_ext):
    """Generates C, compiles the kernels per instruction set and all other sources, links."""

    def finalize_options(self):
        # The kernels are in GNU C, which Microsoft's compiler does not know.
        if TARGET.system == "windows" and self.compiler is None:
            self.compiler = "mingw32"
        super().finalize_options()

    def get_libraries(self, ext):
        # setuptools names the library of this very Python.
        return [*ext.libraries, "python3"] if WINDOWS_ABI3 else super().get_libraries(ext)

    def generate(self):
        """Writes the generated C files; their folder, and the path of the one to compile."""
        folder = os.path.join(self.build_temp, "generated")
        os.makedirs(folder, exist_ok=True)
        source, preprocessed = (
            generate.table_source(os.path.join(folder, "table.c")),
            os.path.join(folder, "table.i"),
        )
        self.compiler.preprocess(source, preprocessed, include_dirs=["csrc"], extra_postargs=["-P"])
        with open(preprocessed, encoding="utf-8") as f:
            generate.write_headers(generate.operations(f.read()), folder)
        return folder, generate.write_programs(OPENCL_PROGRAMS, "csrc/opencl/programs", folder)

    def accepts(self, flags, folder):
        """Whether the compiler knows the flags."""
        source = os.path.join(folder, "empty.c")
        with open(source, "w", encoding="utf-8") as f:
            f.write("typedef int nothing;\n")
        known = subprocess.run(
            [*self.compiler.compiler, *flags, "-c", source, "-o", source + ".o"],
            capture_output=True,
        )
        return known.returncode == 0

    def build_extension(self, ext):
        folder, texts = self.generate()
        flags_of, common = ISA_FLAGS, CFLAGS
        if X86 and self.accepts(["-Werror", *AMX_FLAGS], folder):
            flags_of = {**ISA_FLAGS, "avx512": [*ISA_FLAGS["avx512"], *AMX_FLAGS]}
            common = [*CFLAGS, "-DPL_AMX"]
        dots = {}
        for isa, (flag, macro) in DOT_FLAGS.items():
            if isa in flags_of and self.accepts(["-Werror", flag], folder):
                dots[isa] = flag
                common = [*common, macro]
        include_dirs = [*ext.include_dirs, "csrc", folder]
        jobs = [
            (
                f"csrc/kernels/isa_{isa}.c",
                [*flags, *(["-O2"] if (unit, isa) in SMALL else []), f"-DPL_UNIT_{unit.upper()}"],
                os.path.join(self.build_temp, unit),
            )
            for unit in UNITS
            for isa, flags in reversed(flags_of.items())
        ]
        jobs += [
            (
                f"csrc/kernels/isa_{isa}.c",
                [*flags_of[isa], flag, "-O2", "-DPL_UNIT_INT8", "-DPL_DOTS"],
                os.path.join(self.build_temp, "int8_dots"),
            )
            for isa, flag in dots.items()
        ]
        jobs += [(source, [], self.build_temp) for source in (*ext.sources, texts)]

        def compiled(job):
            source, flags, to = job
            return self.compiler.compile(
                [source],
                output_dir=to,
                macros=ext.define_macros,
                include_dirs=include_dirs,
                extra_postargs=common + flags,
            )

        with ThreadPoolExecutor(cores()) as pool:
            objects = [path for paths in pool.map(compiled, jobs) for path in paths]
        # setuptools only links.
        sources, ext.sources, ext.extra_objects = ext.sources, [], objects
        super().build_extension(ext)
        ext.sources = sources


macros = [("NPY_TARGET_VERSION", "NPY_1_23_API_VERSION")]
if LIMITED:
    macros.append(("Py_LIMITED_API", "0x030A0000"))

core = Extension(
    "pyloss._core",
    sources=SOURCES,
    depends=[
        "csrc/generate.py",
        "csrc/target.py",
        *included("csrc"),
    ],
    include_dirs=[numpy.get_include()],
    define_macros=macros,
    extra_compile_args=CFLAGS,
    libraries=LIBRARIES,
    extra_link_args=LDFLAGS,
    py_limited_api=LIMITED,
)

setup(
    cmdclass={"build_ext": BuildKernels, "sdist": SourceDistribution},
    ext_modules=[core],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
)
