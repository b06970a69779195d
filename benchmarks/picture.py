"""Draws the README's picture."""

from __future__ import annotations

from pathlib import Path


def draw(results: list[dict], path: Path) -> None:
    """Draws two bar charts: speed and memory of the LoRA step."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pyloss"  # equal figures give equal files
    import matplotlib.pyplot as plt

    names = [r["name"] for r in results][::-1]
    colors = ["#c44e52" if "PEFT" in name else "#4c72b0" for name in names]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.8 + 0.3 * len(names)), sharey=True)
    for axis, key, title in (
        (axes[0], "tokens_per_s", "tokens/s (more is better)"),
        (axes[1], "peak_gb", "peak memory, GB (less is better)"),
    ):
        bars = axis.barh(names, [r[key] for r in results][::-1], color=colors)
        axis.bar_label(bars, fmt="%.0f" if key == "tokens_per_s" else "%.2f", padding=3, fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.suptitle("A LoRA step of SmolLM2-135M, batch 4 x 256, 2 CPU threads", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
