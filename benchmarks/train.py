"""`make bench-train`: measures training, evaluation and generation of pyloss and its peers.

    python benchmarks/train.py [--quick] [--only PART ...] [--picture docs/benchmark.svg]

Prints the tables. Each measurement runs in its own process, which gives its peak memory. The
programs take turns, and the best of the rounds counts. Padding is not counted as tokens. The rows
of peers that are not installed are missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from bases import MODEL, float_folder, nf4_folder, q4_file, q8_file
from chat import chat_file
from common import WORK, compiled, free_gb, machine, run_json, table
from limit_tables import limit_table, shape_table
from picture import draw
from precision_tables import precision_tables
from shapes import SHAPES, shape_file

from pyloss.runtime.precision import has_instructions

AVX2 = {"PYLOSS_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


class Program(NamedTuple):
    """A measured program: a row of a table."""

    name: str
    script: str
    model: str
    flags: tuple[str, ...] = ()

    @property
    def peer(self) -> bool:
        return self.script == PEFT


PEFT, OURS = "step_peft.py", "step_pyloss.py"
Found = dict[str, dict[str, float]]


def measured(
    programs: Sequence[Program], *flags: object, rounds: int = 1, **environment: str
) -> Found:
    """The fastest run of each program, with its lowest peak memory. The programs take turns.

    A program whose first step takes minutes has one round, unless it compiles: the kernels of the
    first round are cached.
    """
    best: Found = {}
    for _ in range(rounds):
        for p in programs:
            slow = p.name in best and best[p.name]["first_s"] > 120
            if slow and "--compile" not in p.flags:
                continue
            got = run_json(
                p.script, p.model, *p.flags, *map(str, flags), **compiled(), **environment
            )
            if p.name not in best or got["tokens_per_s"] > best[p.name]["tokens_per_s"]:
                best[p.name] = {
                    **got,
                    "peak_gb": min(got["peak_gb"], best.get(p.name, got)["peak_gb"]),
                }
    return best


def eager(kind: str, *flags: str, name: str = "") -> Program:
    return Program(
        f"torch + PEFT, {NAMES[kind]}{name}", PEFT, float_folder(), ("--kind", kind, *flags)
    )


def ours(kind: str, base: str, *flags: str, name: str = "") -> Program:
    title, path = BASES[base]
    return Program(f"pyloss, {NAMES[kind]}, {title}{name}", OURS, path(), ("--kind", kind, *flags))


NAMES = {"lora": "LoRA", "dora": "DoRA"}
BASES: dict[str, tuple[str, Callable[[], str]]] = {
    "f32": ("float32", float_folder),
    "q8_0": ("Q8_0", q8_file),
    "q4_1": ("Q4_1", lambda: MODEL),
    "nf4": ("NF4", nf4_folder),
}
RECOMPUTED = ", checkpointing"
BFLOAT16 = ", bfloat16 products"
MIXED = ", mixed precision"
INT8 = ", int8 products"
IN_BFLOAT16 = ", bfloat16"


def rounded(base: str) -> list[Program]:
    """LoRA with products in bfloat16, and with activations, too."""
    return [
        ours("lora", base, "--precision", precision, name=name)
        for precision, name in (("bfloat16", BFLOAT16), ("mixed", MIXED))
    ]


def half_peers() -> list[Program]:
    """PEFT in bfloat16: eager, and compiled where that does not take minutes a step."""
    found = [eager("lora", "--dtype", "bfloat16", name=IN_BFLOAT16)]
    if has_instructions():
        flags = ("--compile", "--dtype", "bfloat16")
        found.append(eager("lora", *flags, name=f"{IN_BFLOAT16}, torch.compile"))
    return found


class Tables:
    """The parts of the run; each returns its tables. `full` is kept for the picture."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.full: Found = {}  # steps of 4 x 256 by the name of the program

    def steps(self) -> list[str]:
        """Steps of 4 x 256 tokens, and short steps of 4 x 48."""
        peers = [eager("lora"), eager("dora"), eager("lora", "--checkpoint", name=RECOMPUTED)]
        half, *compiled_half = half_peers()
        peers.append(half)
        once = [eager("lora", "--compile", name=", torch.compile"), *compiled_half]
        if find_spec("bitsandbytes"):
            once.append(eager("lora", name=", NF4 (bitsandbytes)")._replace(model=nf4_folder()))
        own = [ours(kind, base) for kind in NAMES for base in BASES]
        own += [ours("lora", base, "--checkpoint", name=RECOMPUTED) for base in ("f32", "q4_1")]
        own += [program for base in ("f32", "q4_1") for program in rounded(base)]
        passes = ("--passes", 1 if self.quick else 3)
        rounds = 1 if self.quick else 2
        found = measured([*peers, *own], *passes, rounds=rounds)
        found |= measured(once, *passes)
        varied = {"--checkpoint", "--precision", "--dtype"}
        plain = [p for p in (*peers, *own) if not varied & {*p.flags}]
        short = measured(plain, "--tokens", 48, "--passes", 4)
        self.full = {p.name: found[p.name] for p in (*peers[:1], *once, *peers[1:], *own)}
        speeds = {name: f["tokens_per_s"] for name, f in short.items()}
        lines = [
            (*row[:3], f"{speeds[row[0]]:.0f}" if row[0] in speeds else "", *row[3:])
            for row in rows_of(self.full, peak, base_size, loss)
        ]
        heads = (
            "step, 4 x 256",
            "tokens/s",
            "speed / PEFT, eager",
            "4 x 48, tokens/s",
            *MEMORY,
            "loss after the last step",
        )
        pairs = [
            (name, name.removesuffix(RECOMPUTED)) for name in self.full if name.endswith(RECOMPUTED)
        ]
        cost = [
            (name, f"{self.full[plain]['tokens_per_s'] / self.full[name]['tokens_per_s']:.2f}")
            for name, plain in pairs
        ]
        return [table(heads, lines), table(("checkpointing", "time / without"), cost)]

    def avx2(self) -> list[str]:
        """Steps with both sides restricted to AVX2."""
        found = measured(
            [eager("lora"), ours("lora", "f32"), ours("lora", "q4_1")], "--passes", 2, **AVX2
        )
        return [
            table(("step, 4 x 256, AVX2 on both sides", "tokens/s", "speed / PEFT"), rows_of(found))
        ]

    def long(self) -> list[str]:
        """Longer sequences."""
        parts = []
        for batch, tokens, gb in ((2, 1024, 12), (1, 4096, 20)):
            programs = [ours("lora", "f32"), ours("lora", "q4_1"), *rounded("f32")]
            if free_gb() > gb:
                programs = [eager("lora"), *half_peers(), *programs]
            found = measured(
                programs, "--batch", batch, "--tokens", tokens, "--passes", 1 if self.quick else 2
            )
            parts.append(
                table(
                    (f"step, {batch} x {tokens}", "tokens/s", "speed / PEFT", *MEMORY[:1]),
                    rows_of(found, peak),
                )
            )
        flags = ("--batch", 1, "--tokens", 1024 if self.quick else 8192, "--passes", 1)
        found = measured([ours("lora", "q4_1", "--checkpoint", name=RECOMPUTED)], *flags)
        heads = (f"step, 1 x {flags[3]}", "tokens/s", MEMORY[0])
        return [
            *parts,
            table(
                heads, [(name, f"{f['tokens_per_s']:.0f}", peak(f)) for name, f in found.items()]
            ),
        ]

    def chat(self) -> list[str]:
        """Conversations of 20 to 1000 tokens, four at a time, prompts masked."""
        flags = ("--chat", chat_file(4 if self.quick else 16), "--passes", 1)
        peers = [
            eager("lora"),
            eager("lora", "--grouped", name=", batches of similar lengths"),
            eager("dora"),
        ]
        own = [ours(kind, base) for kind in NAMES for base in ("f32", "q4_1")]
        found = measured([*peers, *own] if free_gb() > 18 else own, *flags)
        heads = ("training on conversations", "tokens/s", "speed / PEFT", *MEMORY[:1])
        return [table(heads, rows_of(found, peak))]

    def evaluation(self) -> list[str]:
        """The loss alone: full batches, and the conversations."""
        programs = [eager("lora"), *half_peers()[:1], ours("lora", "f32"), ours("lora", "q4_1")]
        programs += [program for base in ("f32", "q4_1") for program in rounded(base)[:1]]

        full = measured(
            programs,
            "--evaluate",
            "--passes",
            2 if self.quick else 3,
            rounds=1 if self.quick else 2,
        )
        real = measured(
            programs, "--evaluate", "--chat", chat_file(4 if self.quick else 16), "--passes", 1
        )
        rows = [(*one, *two[1:]) for one, two in zip(rows_of(full), rows_of(real), strict=True)]
        return [
            table(
                (
                    "evaluation",
                    "4 x 256, tokens/s",
                    "speed / PEFT",
                    "conversations, tokens/s",
                    "speed / PEFT",
                ),
                rows,
            )
        ]

    def growth(self) -> list[str]:
        """Updates of more and more batches, and a long run of short steps."""
        counts = (1, 2) if self.quick else (1, 8, 64)
        speeds = run_json("long_pyloss.py", "growth", MODEL, *map(str, counts))
        rows = [
            (f"{count * 1024}", f"{speed:.0f}", f"{speed / speeds[0][1]:.2f}")
            for count, speed in speeds
        ]
        steps = 1000 if self.quick else 10000
        memory = run_json("long_pyloss.py", "steps", str(steps))
        shown = [
            (f"{count}", f"{memory[str(count)]:.1f}") for count in (steps // 10, steps // 2, steps)
        ]
        first = table(
            (
                "tokens of an update, pyloss, LoRA, Q4_1, 4 x 256 at a time",
                "tokens/s",
                "speed / first",
            ),
            rows,
        )
        return [first, table(("short steps of a tiny model, pyloss", "resident memory, MB"), shown)]

    def generation(self) -> list[str]:
        """Reading a prompt and generating from the same Q4_1 file: one sequence, and many."""
        scripts: dict[str, tuple[str, ...]] = (
            {"llama.cpp (xllamacpp)": ("generate_llama.py",)} if find_spec("xllamacpp") else {}
        )
        own = ("generate_pyloss.py",)
        scripts |= {
            "pyloss": own,
            f"pyloss{BFLOAT16}": (*own, "bfloat16"),
            f"pyloss{INT8}": (*own, "int8"),
        }
        found: Found = {}
        for _ in range(1 if self.quick else 2):
            for name, (script, *more) in scripts.items():
                got = run_json(script, q4_file(), "256", "20" if self.quick else "64", *more)
                found[name] = {
                    key: max(speed, found.get(name, got)[key]) for key, speed in got.items()
                }
        peer = found.get("llama.cpp (xllamacpp)")
        rows = []
        for name, f in found.items():
            cells = [
                (f"{speed:.0f}", f"{speed / peer[key]:.2f}" if peer else "")
                for key, speed in f.items()
            ]
            rows.append((name, *cells[0], *cells[1]))
        peer_name = "speed / llama.cpp"
        heads = (
            "Q4_1, one sequence",
            "reading a prompt of 256, tokens/s",
            peer_name,
            "generating, tokens/s",
            peer_name,
        )
        return [table(heads, rows), self._batches()]

    def _batches(self) -> str:
        """Generating many sequences at a time. The programs take turns."""
        counts = ("1", "4") if self.quick else ("1", "4", "16", "64")
        sizes = ("32", "8" if self.quick else "64")
        int8 = f"pyloss{INT8}"
        scripts: dict[str, tuple[str, ...]] = {
            "pyloss": ("generate_batch.py",),
            int8: ("generate_batch.py", "--precision", "int8"),
        }
        if find_spec("xllamacpp"):
            scripts["llama.cpp"] = ("generate_batch_llama.py",)
        best: dict[tuple[str, str, str], float] = {}
        for _ in range(1 if self.quick else 2):
            for count in counts:
                for name, (script, *more) in scripts.items():
                    got = run_json(script, q4_file(), *sizes, count, *more)[count]
                    for key, speed in got.items():
                        at = (name, key, count)
                        best[at] = max(speed, best.get(at, 0.0))
        rows = []
        for count in counts:
            one, many = best["pyloss", "generating", "1"], best["pyloss", "generating", count]
            whole = best["pyloss", "with_prompts", count]
            peer = best.get(("llama.cpp", "with_prompts", count))
            integer = (best[int8, key, count] for key in ("generating", "with_prompts"))
            cells = (f"{many:.0f}", f"{many / one:.2f}", f"{whole:.0f}")
            cells += tuple(f"{speed:.0f}" for speed in integer)
            rows.append((count, *cells, *((f"{peer:.0f}", f"{whole / peer:.2f}") if peer else "")))
        heads = (
            f"Q4_1, sequences of {sizes[0]} + {sizes[1]} tokens at a time",
            "generating, tokens/s",
            "speed / one",
            "with prompts, tokens/s",
            "int8, generating",
            "int8, with prompts",
            *(("llama.cpp (xllamacpp)", "speed / llama.cpp") if len(scripts) > 2 else ()),
        )
        return table(heads, rows)

    def precision(self) -> list[str]:
        """The effect of each precision on the loss and on gradients."""
        return precision_tables(self.quick)

    def limits(self) -> list[str]:
        """The time of each operation of a step, and its time at the machine's limits."""
        found = run_json("step_limits.py", float_folder(), "--passes", "1" if self.quick else "4")
        return [limit_table(found, "LoRA, float32, 4 x 256")]

    def real(self) -> list[str]:
        """Steps at sizes that people use, over random weights, and their limits.

        A program that needs more memory than is free recomputes activations, or has no row.
        """
        parts = []
        for shape, batch, tokens in REAL:
            if self.quick and (shape, batch) != REAL[0][:2]:
                continue
            programs = [
                program
                for dtype in ("float32", "bfloat16")
                if (program := fitting_peer(shape, dtype, batch, tokens))
            ]
            file = shape_file(shape)
            for stored, name in REAL_TYPES.items():
                flags = ("--kind", "lora", "--type", stored)
                programs.append(Program(f"pyloss, LoRA, {name}", OURS, file, flags))
                for precision, suffix in (("bfloat16", BFLOAT16), ("mixed", MIXED)):
                    if has_instructions():
                        half = (*flags, "--precision", precision)
                        programs.append(Program(f"pyloss, LoRA, {name}{suffix}", OURS, file, half))
            if has_instructions() and (shape, batch) == REAL[0][:2]:
                flags = ("--kind", "lora", "--dtype", "bfloat16", "--compile")
                title = f"torch + PEFT, LoRA{IN_BFLOAT16}, torch.compile"
                programs.append(Program(title, PEFT, file, flags))
            if free_gb() < REAL_OWN_GB[shape]:
                programs = []
            sizes = ("--batch", batch, "--tokens", tokens)
            found = measured(
                programs, *sizes, "--passes", 2, rounds=1 if self.quick or batch > 1 else 2
            )
            heads = (
                f"step of {shape}'s shape, {batch} x {tokens}",
                "tokens/s",
                "speed / PEFT, float32",
                *MEMORY,
            )
            parts.append(table(heads, rows_of(found, peak, base_size)))
            if shape != REAL[0][0] or not programs:
                continue
            for stored, name in REAL_TYPES.items():
                flags = (*map(str, sizes), "--type", stored, "--passes", "1" if self.quick else "3")
                limits = run_json("step_limits.py", file, *flags)
                step = f"LoRA, {name}, {batch} x {tokens}"
                parts += [limit_table(limits, step), shape_table(limits, step)]
        return parts


#: model shape, sequences and tokens of each
REAL = (("Qwen3-0.6B", 1, 512), ("Qwen3-0.6B", 4, 512), ("Qwen3-1.7B", 1, 512))
REAL_TYPES = {"bf16": "bfloat16 weights", "q4_1": "Q4_1"}
REAL_OWN_GB = {"Qwen3-0.6B": 4, "Qwen3-1.7B": 7}


def peer_gb(shape: str, dtype: str, tokens: int, checkpoint: bool = False) -> float:
    """About the peak memory of a step of torch + PEFT.

    Weights; logits and their gradients, four times as float32; and of each layer (with
    checkpointing of one) 10 values of its input, MLP, queries and keys, in bfloat16 7 float32's,
    which is what 1 x 512 tokens of Qwen3-0.6B's shape took.
    """
    c = SHAPES[shape]
    hidden, inner, vocabulary, layers = (
        c[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
    )
    queries, keys = (
        c["head_dim"] * c[key] for key in ("num_attention_heads", "num_key_value_heads")
    )
    values = vocabulary * hidden + layers * hidden * (3 * inner + 2 * queries + 2 * keys)
    kept = (10 if dtype == "float32" else 7) * (hidden + inner + queries + keys)
    kept *= 1 if checkpoint else layers
    kept += layers * hidden * checkpoint
    size = 4 if dtype == "float32" else 2
    return (size * values + 4 * tokens * (4 * vocabulary + kept)) / 1e9


def fitting_peer(shape: str, dtype: str, batch: int, tokens: int) -> Program | None:
    """torch + PEFT at this size; with checkpointing, or None, where memory does not allow it.

    None for bfloat16 without instructions: 1 x 512 tokens of Qwen3-0.6B's shape took more than six
    minutes.
    """
    if dtype == "bfloat16" and not has_instructions():
        return None
    name = "" if dtype == "float32" else IN_BFLOAT16
    flags = ("--kind", "lora", "--dtype", dtype)
    for more, suffix in (((), ""), (("--checkpoint",), RECOMPUTED)):
        if free_gb() > 1.1 * peer_gb(shape, dtype, batch * tokens, bool(more)):
            title = f"torch + PEFT, LoRA{name}{suffix}"
            return Program(title, PEFT, shape_file(shape), (*flags, *more))
    return None


def rows_of(found: Found, *more: Callable[[dict], str]) -> list[tuple[str, ...]]:
    """Name, tokens/s, their ratio to PEFT's with the same kind of adapter, and `more` columns."""
    rows = []
    for name, f in found.items():
        peer = found.get(f"torch + PEFT, {NAMES['dora' if NAMES['dora'] in name else 'lora']}")
        ratio = f"{f['tokens_per_s'] / peer['tokens_per_s']:.2f}" if peer else ""
        rows.append((name, f"{f['tokens_per_s']:.0f}", ratio, *(column(f) for column in more)))
    return rows


def peak(found: dict) -> str:
    return f"{found['peak_gb']:.2f}"


def base_size(found: dict) -> str:
    return f"{found['base_gb']:.2f}"


def loss(found: dict) -> str:
    return f"{found['loss']:.4f}"


MEMORY = ("peak memory, GB", "base weights, GB")


PARTS = (
    "steps",
    "avx2",
    "long",
    "chat",
    "evaluation",
    "growth",
    "generation",
    "precision",
    "limits",
    "real",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="few runs: checks that everything works"
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--picture", type=Path, help="file of the picture of the steps (SVG)")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    tables = Tables(options.quick)
    for part in PARTS:
        if part in options.only:
            for text in getattr(tables, part)():
                print(f"\n{text}", flush=True)
    if options.picture and tables.full:
        shown = [
            name
            for name in tables.full
            if "LoRA" in name and any(base in name for base in ("PEFT", "float32", "Q4_1"))
        ]
        draw([{**tables.full[name], "name": name} for name in shown], options.picture)
        print(f"\ndrew {options.picture}")


if __name__ == "__main__":
    main()
