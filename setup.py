"""Builds the extension module; its kernels are compiled once per instruction set."""

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

# A build by pip does not look for modules beside this file.
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "csrc"))
import generate

# PYLOSS_BASELINE_ONLY leaves out the wider instruction sets, for a quick build.
X86 = platform.machine().lower() in ("x86_64", "amd64") and not os.environ.get(
    "PYLOSS_BASELINE_ONLY"
)
# Limited API: one build serves every CPython from 3.10 on; free-threaded builds have none.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")

CFLAGS = [
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]
# Names and lines for debuggers and profilers. Python's own -g adds half to the build's time.
CFLAGS += ["-g1"]
CFLAGS += [
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-pthread",
    *os.environ.get("PYLOSS_CFLAGS", "").split(),
]
LDFLAGS = ["-pthread", *os.environ.get("PYLOSS_LDFLAGS", "").split()]
if X86:
    CFLAGS.append("-DPL_X86")

ISA_FLAGS = {"baseline": []}
if X86:
    # The kernels are vectors already: looking for more is a fifth of their build, for
    # processors from before 2013.
    ISA_FLAGS["baseline"] = ["-fno-tree-vectorize"]
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    # Dots of bfloat16 are used where the processor has them; see pl_has_bf16_dots.
    ISA_FLAGS["avx512"] += ["-mavx512bf16", "-mprefer-vector-width=512"]

# Dots of bytes, used where the processor has them (pl_has_int8_dots): the unit "int8" is compiled
# again with these flags, if the compiler knows them.
DOT_FLAGS = {
    "avx2": ("-mavxvnni", "-DPL_AVX_VNNI"),
    "avx512": ("-mavx512vnni", "-DPL_AVX512_VNNI"),
}

# The tile unit, used where processor and system have it (pl_amx_missing), if the compiler knows it.
AMX_FLAGS = ["-mamx-tile", "-mamx-bf16"]

# What kernels/kernels.tpl.h compiles of an instruction set at a time, the longest first.
UNITS = ["products", "losses", "layers", "int8", "maps", "table"]
# int8's code for each format is in vectors as it stands: more than -O2 doubles its size.
UNIT_FLAGS = {"int8": ["-O2"]}

SOURCES = sorted(
    path
    for room in ("binding", "core", "encoders", "opencl")
    for path in glob.glob(f"csrc/{room}/**/*.c", recursive=True)
)
OPENCL_PROGRAMS = [
    *("elements", "maps", "axes", "layers", "delta", "matmul", "stored", "attention"),
    *(f"rowloss/{kind}" for kind in "class pair cosine sparse element map argmax".split()),
]


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


class BuildKernels(build_ext):
    """Generates C, compiles the kernels per instruction set and all other sources, links."""

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
                [*flags, *UNIT_FLAGS.get(unit, []), f"-DPL_UNIT_{unit.upper()}"],
                os.path.join(self.build_temp, unit),
            )
            for unit in UNITS
            for isa, flags in reversed(flags_of.items())
        ]
        jobs += [
            (
                f"csrc/kernels/isa_{isa}.c",
                [*flags_of[isa], flag, *UNIT_FLAGS["int8"], "-DPL_UNIT_INT8", "-DPL_DOTS"],
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
        *included("csrc"),
    ],
    include_dirs=[numpy.get_include()],
    define_macros=macros,
    extra_compile_args=CFLAGS,
    libraries=["m", "dl"],
    extra_link_args=LDFLAGS,
    py_limited_api=LIMITED,
)

setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[core],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
)
