"""Curves and bars as SVG in a page: no script, and colors by the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[int, float]]

_WIDTH, _HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 24
#: more points than this are averaged in groups
_MOST = 200


def curves(title: str, series: dict[str, Points], unit: str = "") -> str:
    """A figure of curves over the iterations, from 0 up; empty without a point.

    Each point has its numbers as a title, which browsers show under the pointer.
    """
    kept = {
        name: _thinned([(x, y) for x, y in points if math.isfinite(y)])
        for name, points in series.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    ticks = _ticks(min(0.0, *ys), max(ys))
    low, high = min(ticks[0], min(ys)), max(ticks[-1], max(ys))
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)
        return across, _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks:
        y = at(first, tick)[1]
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_say(tick)}</text>')
    for tick in _ticks(first, last, whole=True):
        if first <= tick <= last:
            x = at(tick, low)[0]
            anchor = "end" if x > _WIDTH - 24 else "middle"
            parts.append(
                f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{tick:,.0f}</text>'
            )
    for number, (name, points) in enumerate(kept.items()):
        places = [at(x, y) for x, y in points]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line s{number}" d="M{line}"/>')
        for (x, y), (iteration, value) in zip(places, points, strict=True):
            radius = 3 if len(points) <= 40 else 6
            shape = "dot" if len(points) <= 40 else "dot hidden"
            parts.append(
                f'<circle class="{shape} s{number}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
                f"<title>{escape(name)}, iteration {iteration:,}: {value:.6g}{unit}</title>"
                "</circle>"
            )
    names = "".join(
        f'<span class="key s{number}">{escape(name)} {points[-1][1]:.4g}{unit}</span>'
        for number, (name, points) in enumerate(kept.items())
    )
    label = f"{title} over the iterations: " + "; ".join(
        f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in kept.items()
    )
    return (
        f"<figure><figcaption>{escape(title)}<span>{names}</span></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def bars(rows: Sequence[tuple[str, float]]) -> str:
    """A list of names, each with a bar and its share in percent."""
    most = max((value for _, value in rows if math.isfinite(value)), default=0.0) or 1.0
    lines = []
    for name, value in rows:
        size = min(value / most, 1.0) * 100
        said = f"{value:.3%}" if math.isfinite(value) else "from 0"
        lines.append(
            f'<li><span class="name">{escape(name)}</span><span class="track">'
            f'<span class="bar" style="width:{size:.1f}%"></span></span>'
            f'<span class="value">{said}</span></li>'
        )
    return f'<ol class="bars">{"".join(lines)}</ol>'


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `_MOST` points: groups of neighbors become their means, at the last iteration."""
    if len(points) <= _MOST:
        return points
    bounds = [len(points) * i // _MOST for i in range(_MOST + 1)]
    groups = [points[bounds[i] : bounds[i + 1]] for i in range(_MOST)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About four round numbers from below `low` to above `high`."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next((factor for factor in (1, 2, 5) if span / (factor * step) <= 5), 10)
    step = max(step, 1.0) if whole else step
    begin, end = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(begin, max(end, begin + 1) + 1)]


def _say(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.4g}"
