"""Tables of what step_limits.py prints: a step's operations beside the limits of the machine.

A limit is the FLOP at the speed of a plain product or the bytes at the bandwidth of memory,
whichever takes longer.
"""

from __future__ import annotations

from common import table


def limit_table(found: dict, step: str) -> str:
    """The operations of a step with their limits, and the sums of their kinds."""
    rows, limits, spent = [], 0.0, 0.0
    kinds = {"matrix products": [0.0, 0.0], "attention": [0.0, 0.0]}
    for name, (calls, ms, gflop, gigabytes) in sorted(
        found["operations"].items(), key=lambda item: -item[1][1]
    ):
        limit = 1e3 * max(gflop / found["matrix_gflops"], gigabytes / found["memory_gb_s"])
        limits, spent = limits + limit, spent + ms
        if gflop:
            kind = kinds["attention" if name.startswith("attention") else "matrix products"]
            kind[0], kind[1] = kind[0] + ms, kind[1] + limit
        speed = f"{gflop / ms * 1e3:.0f} GFLOP/s" if gflop else f"{gigabytes / ms * 1e3:.0f} GB/s"
        rows.append((name, calls, f"{ms:.1f}", f"{limit:.1f}", f"{limit / ms:.2f}", speed))
    step_ms = found["step_ms"]

    def total(name: str, ms: float, limit: float, last: str) -> None:
        ratio = f"{limit / ms:.2f}" if limit and ms else ""
        rows.append((name, "", f"{ms:.1f}", f"{limit:.1f}", ratio, last))

    total("between operations (Python)", step_ms - spent, 0.0, "")
    total("all", step_ms, limits, "")
    for name, (ms, limit) in kinds.items():
        total(name, ms, limit, f"{ms / step_ms:.0%} of all")
    others = step_ms - sum(ms for ms, _ in kinds.values())
    total(
        "everything else",
        others,
        limits - sum(limit for _, limit in kinds.values()),
        f"{others / step_ms:.0%} of all",
    )
    plain = 1e3 * found["base_gflop"] / found["matrix_gflops"]
    total("all, against the base's products alone", step_ms, plain, "")
    speeds = f"{found['matrix_gflops']:.0f} GFLOP/s, {found['memory_gb_s']:.0f} GB/s"
    title = f"{step}; {speeds}"
    return table((title, "calls", "ms", "limit, ms", "limit / time", "speed"), rows)


def shape_table(found: dict, step: str, rows: int = 16) -> str:
    """The operations of a step by shape, each at its quickest call, and the sums of their kinds.

    The `rows` that lose most against a plain product's speed are shown.
    """
    lines, kinds = (
        [],
        {"matrix products": [0.0, 0.0], "attention": [0.0, 0.0], "others": [0.0, 0.0]},
    )
    for name, (calls, ms, gflop) in found["shapes"].items():
        limit = 1e3 * gflop / found["matrix_gflops"]
        kind = (
            "others" if not gflop else "attention" if name[:9] == "attention" else "matrix products"
        )
        kinds[kind][0] += ms
        kinds[kind][1] += limit
        lines.append((name, calls, ms, limit))
    lines.sort(key=lambda line: line[3] - line[2])
    total = sum(ms for ms, _ in kinds.values())
    lines = lines[:rows] + [(name, "", *sums) for name, sums in kinds.items()]
    lines.append(("all", "", total, sum(limit for _, limit in kinds.values())))
    plain = 1e3 * found["base_gflop"] / found["matrix_gflops"]
    lines.append(("all, against the base's products alone", "", total, plain))
    heads = (
        "quickest calls, by shape",
        "calls",
        "ms",
        "limit, ms",
        "limit / time",
        "lost, ms",
        "share",
    )
    return table(
        (f"{step}; {heads[0]}", *heads[1:]),
        [
            (
                name,
                calls,
                f"{ms:.1f}",
                f"{limit:.1f}",
                f"{limit / ms:.2f}" if limit else "",
                f"{ms - limit:.1f}",
                f"{ms / total:.1%}",
            )
            for name, calls, ms, limit in lines
        ],
    )
