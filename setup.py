"""Builds the extension: the kernels once per instruction set, each with its own flags, then the module."""

import os
import platform
import re
import sysconfig

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# PYLOSS_BASELINE_ONLY leaves out the wider instruction sets: a quick build, for a look at something.
X86 = platform.machine().lower() in ("x86_64", "amd64") and not os.environ.get("PYLOSS_BASELINE_ONLY")
# Limited API: one build serves every CPython from 3.10 on; free-threaded builds have none.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")

CFLAGS = ["-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
CFLAGS += ["-Wall", "-Wextra", "-Wno-psabi", "-pthread", *os.environ.get("PYLOSS_CFLAGS", "").split()]
LDFLAGS = ["-pthread", *os.environ.get("PYLOSS_LDFLAGS", "").split()]
if X86:
    CFLAGS.append("-DPL_X86")

ISA_FLAGS = {"baseline": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    # Dots of bfloat16 are used where the processor has them; see pl_has_bf16_dots.
    ISA_FLAGS["avx512"] += ["-mavx512bf16", "-mprefer-vector-width=512"]

SOURCES = ["csrc/binding/module.c", "csrc/binding/spec.c", "csrc/binding/device.c"]
SOURCES += ["csrc/core/buffers.c", "csrc/core/cpu.c", "csrc/core/precision.c", "csrc/core/threads.c"]
OPENCL_FAMILIES = ["rowloss", "elements", "layers", "matmul", "norms", "attention"]
SOURCES += [f"csrc/opencl/{stem}.c" for stem in ("library", "device", "cache", "program", "launch", *OPENCL_FAMILIES)]
OPENCL_PROGRAMS = ["rowloss", "elements", "layers", "matmul", "stored", "attention"]


def included(*folders):
    """What the sources include, and the kernels of every machine: the source distribution takes its C files from here."""
    wanted = re.compile(r"isa_\w+\.c|.*\.(h|def|cl)")
    return [os.path.join(f, n) for f in folders for n in sorted(os.listdir(f)) if wanted.fullmatch(n)]


def flattened(path):
    """An OpenCL source with what it includes in place: drivers read one text."""
    with open(path, encoding="utf-8") as f:
        for line in f:
            include = re.match(r'#include "(.+)"', line)
            if include:
                yield from flattened(os.path.normpath(os.path.join(os.path.dirname(path), include[1])))
            else:
                yield line


def embedded(folder, to):
    """Writes the OpenCL programs of `folder` as constants of a C file: pl_cl_source_<stem>."""
    os.makedirs(os.path.dirname(to), exist_ok=True)
    with open(to, "w", encoding="utf-8") as f:
        for stem in OPENCL_PROGRAMS:
            f.write(f"const char pl_cl_source_{stem}[] =\n")
            for line in flattened(f"{folder}/{stem}.cl"):
                f.write('"' + line.rstrip("\n").replace("\\", "\\\\").replace('"', '\\"') + '\\n"\n')
            f.write(";\n")
    return to


class BuildKernels(build_ext):
    """Compiles the kernels once per instruction set and the OpenCL programs' texts, then the module that links them."""

    def build_extension(self, ext):
        texts = embedded("csrc/opencl", os.path.join(self.build_temp, "opencl_sources.c"))
        ext.extra_objects += self.compiler.compile([texts], output_dir=self.build_temp, extra_postargs=CFLAGS)
        for isa, flags in ISA_FLAGS.items():
            ext.extra_objects += self.compiler.compile(
                [f"csrc/kernels/isa_{isa}.c"],
                output_dir=self.build_temp,
                extra_postargs=CFLAGS + flags,
            )
        super().build_extension(ext)


macros = [("NPY_TARGET_VERSION", "NPY_1_23_API_VERSION")]
if LIMITED:
    macros.append(("Py_LIMITED_API", "0x030A0000"))

core = Extension(
    "pyloss._core",
    sources=SOURCES,
    depends=included("csrc", "csrc/binding", "csrc/kernels", "csrc/losses", "csrc/opencl"),
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
