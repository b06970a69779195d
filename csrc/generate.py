"""Generates C from the tables and programs of csrc; setup.py compiles it with csrc.

    args.h            for each operation of ops.def a struct of its arguments by name, and the
                      function that fills it from a call
    places.h          for launchers, a struct of the places of an operation's arrays on a device
    options.h         the number of each option of a loss, for C and OpenCL C
    opencl_sources.c  the programs of csrc/opencl/programs with their includes, as constants

No other file contains the position of an argument.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

# Types of arguments: the C type of an input, of an output, and the member of pl_value.
TYPES = {
    "f32": ("const float *", "float *", "in"),
    "f64": ("const double *", "double *", "in"),
    "i32": ("const int32_t *", "int32_t *", "in"),
    "i64": ("const int64_t *", "int64_t *", "in"),
    "u8": ("const uint8_t *", "uint8_t *", "in"),
    "acc": ("const void *", "void *", "in"),
    "weight": ("const pl_weight *", "", "w"),
    "stack": ("const pl_weight *", "", "stack"),
    "half": ("const float *", "float *", "in"),
    "act": ("pl_act ", "pl_act ", "act"),
    "float": ("const pl_rows *", "const pl_rows *", "rows"),
    "int": ("int64_t ", "", "i"),
    "real": ("double ", "", "f"),
}
#: members of pl_value that are passed by address
BY_ADDRESS = ("w", "rows")
HEAD = "/* Written by csrc/generate.py from ops.def. */\n"


class Argument(NamedTuple):
    """One argument of an operation."""

    name: str
    type: str
    output: bool


class Operation(NamedTuple):
    """One line of ops.def; `options` are those of a loss, None for other operations."""

    name: str
    arguments: list[Argument]
    options: list[str] | None


def table_source(path: str) -> str:
    """Writes a C file with the tables; `operations` reads its preprocessed text."""
    with open(path, "w", encoding="utf-8") as f:
        f.write(
            "#define PL_OP(name, spec) OPERATION name spec\n"
            '#include "ops.def"\n#define PL_LOSS_TABLE\n'
        )
        for kind in (
            "CLASS_LOSS(name, family, options, mean, cap)",
            "PAIR_LOSS(name, options, sums)",
            "ELEMENT_LOSS(name, options)",
        ):
            sparse = " OPTIONS sparse_##name options" if kind.startswith("PAIR") else ""
            f.write(f"#define PL_{kind} OPTIONS name options{sparse}\n")
        f.write('#define PL_ROW_MAP(name, family, logarithm)\n#include "losses.def"\n')
    return path


def operations(preprocessed: str) -> list[Operation]:
    """The operations in the order of ops.def."""

    def lines(word: str) -> Iterator[tuple[str, str]]:
        for name, strings in re.findall(rf'\b{word} (\w+)((?:\s*"[^"]*")*)', preprocessed):
            yield name, "".join(re.findall(r'"([^"]*)"', strings))

    options = {name: re.findall(r"(\w+):", text) for name, text in lines("OPTIONS")}
    found = []
    for name, text in lines("OPERATION"):
        inputs, outputs = text.split(">")
        arguments = [
            Argument(*argument, output)
            for part, output in ((inputs, False), (outputs, True))
            for argument in re.findall(r"=?(\w+)\??:(\w+)", part)
        ]
        found.append(Operation(name, arguments, options.get(name)))
    if not found:
        raise ValueError("the preprocessor found no operation in csrc/ops.def")
    return found


def value_of(argument: Argument, position: int) -> str:
    """The expression of an argument's value in a call."""
    member = TYPES[argument.type][2]
    if member == "in" and argument.output:
        member = "out"
    return f"{'&' if member in BY_ADDRESS else ''}call->arg[{position}].{member}"


def struct_of(name: str, members: Iterable[tuple[str, str, str]], parameter: str) -> str:
    """A struct of (type, name, value) and the function that fills it."""
    members = list(members)
    fields = "".join(f"    {type}{field};\n" for type, field, _ in members)
    values = "".join(f"        .{field} = {value},\n" for _, field, value in members)
    return (
        f"\ntypedef struct {{\n{fields}}} {name};\n"
        f"static inline {name} {name}_of({parameter}) {{\n"
        f"    return ({name}){{\n{values}    }};\n}}\n"
    )


def arguments_of(operation: Operation) -> str:
    """The struct <operation>_args; for a loss also the function that fills its options."""

    def members() -> Iterator[tuple[str, str, str]]:
        for i, argument in enumerate(operation.arguments):
            yield TYPES[argument.type][argument.output], argument.name, value_of(argument, i)

    text = struct_of(f"{operation.name}_args", members(), "const pl_call *call")
    if operation.options is not None:
        args = "const pl_call *call, double *option"
        text += f"static inline void {operation.name}_options_of({args}) {{\n"
        text += "    (void)call, (void)option;\n"
        for i, argument in enumerate(operation.arguments):
            if argument.name in operation.options:
                text += f"    option[{operation.name}_{argument.name}] = {value_of(argument, i)};\n"
        text += "}\n"
    return text


def places_of(operation: Operation) -> str:
    """The struct <operation>_places."""
    arrays = [(i, a) for i, a in enumerate(operation.arguments) if a.type not in ("int", "real")]
    members = (("pl_cl_place ", a.name, f"operation->place[{i}]") for i, a in arrays)
    return struct_of(f"{operation.name}_places", members, "const pl_cl_operation *operation")


def options_of(operation: Operation) -> str:
    """The numbers of a loss's options; <loss>_none stands for no option."""
    if operation.options is None:
        return ""
    names = ["none = -1", *operation.options, "options"]
    return "enum { " + ", ".join(f"{operation.name}_{name}" for name in names) + " };\n"


def write_headers(table: list[Operation], folder: str) -> None:
    """Writes args.h, places.h and options.h."""
    headers: dict[str, tuple[str, Callable[[Operation], str]]] = {
        "args.h": ('#include "pyloss.h"\n#include "options.h"\n', arguments_of),
        "places.h": ('#include "opencl/launch.h"\n', places_of),
        "options.h": ("", options_of),
    }
    for name, (includes, text_of) in headers.items():
        guard = f"PYLOSS_GENERATED_{name.upper().replace('.', '_')}"
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            f.write(f"{HEAD}#ifndef {guard}\n#define {guard}\n{includes}")
            f.writelines(text_of(operation) for operation in table)
            f.write("\n#endif\n")


def flattened(path: str, generated: str) -> Iterator[str]:
    """The lines of an OpenCL source, with its includes in place; drivers take one text.

    Without comments, indentation and empty lines, nearly a third of the texts, since the extension
    holds them all.
    """
    with open(path, encoding="utf-8") as f:
        code = re.sub(r"/\*.*?\*/|//[^\n]*", " ", f.read(), flags=re.DOTALL)
    for line in filter(None, map(str.strip, code.splitlines())):
        include = re.match(r'#include "(.+)"', line)
        if include:
            included = os.path.normpath(os.path.join(os.path.dirname(path), include[1]))
            if not os.path.exists(included):
                included = os.path.join(generated, include[1])
            yield from flattened(included, generated)
        else:
            yield line


def write_programs(stems: Iterable[str], folder: str, generated: str) -> str:
    """Writes a C file with the OpenCL programs of `folder` as constants pl_cl_source_<stem>.

    In the names of constants a stem's "/" is "_". pl_cl_programs lists the programs by their stems.
    """
    sources = {stem: f"pl_cl_source_{stem.replace('/', '_')}" for stem in stems}
    path = os.path.join(generated, "opencl_sources.c")
    with open(path, "w", encoding="utf-8") as f:
        f.write('#include "opencl/launch.h"\n')
        for stem, name in sources.items():
            f.write(f"const char {name}[] =\n")
            for line in flattened(f"{folder}/{stem}.cl", generated):
                f.write('"' + line.replace("\\", "\\\\").replace('"', '\\"') + '\\n"\n')
            f.write(";\n")
        listed = "".join(f'    {{"{stem}", {name}}},\n' for stem, name in sources.items())
        ends = "{\n" + listed + "    {NULL, NULL},\n};\n"
        f.write(f"const pl_cl_named_source pl_cl_programs[] = {ends}")
    return path
