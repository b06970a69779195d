"""One HTML page of what is known of a run: it has no script and reads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from pyloss.checks.durations import duration_text
from pyloss.evaluation import Difference
from pyloss.evaluation.comparison import RESAMPLES
from pyloss.reports.changes import by_layer
from pyloss.reports.charts import bars, curves
from pyloss.reports.findings import Findings
from pyloss.reports.marking import marked
from pyloss.tuner.run.metrics import column

#: weights that are listed one by one
_WEIGHTS = 15
#: settings of one call of the command, and those that say nothing of a run
_HIDDEN = ("resume", "overwrite", "preview", "config", "train", "test", "trust_remote_code")

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --soft: #f3f5f8; --text: #1c2330;
  --faint: #5b6676; --edge: #d8dee7; --s0: #1f6feb; --s1: #c2570c; --del: #ffd9d6;
  --ins: #c9f2d3 }
@media (prefers-color-scheme: dark) { :root { --back: #12161d; --soft: #1b212b; --text: #e4e9f0;
  --faint: #98a4b5; --edge: #323b49; --s0: #6cb0ff; --s1: #ff9d57; --del: #6b2226;
  --ins: #1c5730 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: .5rem 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .75rem }
h3 { font-size: 1rem; margin: 1rem 0 .5rem }
p { margin: .5rem 0 } .faint { color: var(--faint) }
nav a { margin-right: .9rem; white-space: nowrap } a { color: var(--s0) }
.grid2 { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
figure { margin: 0; padding: .6rem; border: 1px solid var(--edge); border-radius: .5rem;
  background: var(--soft); min-width: 0 }
figcaption { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-weight: 600 }
.key { font-weight: 400; margin-right: .8rem; font-size: .85rem }
.key::before { content: ""; display: inline-block; width: .8em; height: .2em; margin-right: .35em;
  vertical-align: middle; background: currentColor }
.key.s0 { color: var(--s0) } .key.s1 { color: var(--s1) }
svg { display: block; width: 100%; height: auto }
svg text { font-size: 11px; fill: var(--faint) } .grid { stroke: var(--edge); fill: none }
.line { fill: none; stroke-width: 2; stroke-linejoin: round }
.line.s0 { stroke: var(--s0) } .line.s1 { stroke: var(--s1) }
.dot.s0 { fill: var(--s0) } .dot.s1 { fill: var(--s1) } .hidden { opacity: 0 }
.hidden:hover { opacity: 1 }
.wide { overflow-x: auto } .wide td:first-child { white-space: nowrap }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--edge);
  vertical-align: top }
th { font-weight: 600 } .settings th { font-weight: 400; color: var(--faint); width: 40% }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
pre { margin: 0; white-space: pre-wrap; font: .85rem/1.45 ui-monospace, monospace }
pre.data { white-space: pre; overflow-x: auto; background: var(--soft); padding: .6rem;
  border-radius: .5rem }
.bars { list-style: none; margin: 0; padding: 0; font-size: .85rem }
.bars li { display: grid; grid-template-columns: minmax(0, 1fr) 30% 4.5rem; gap: .5rem;
  align-items: center; padding: .1rem 0 }
.track { background: var(--edge); border-radius: .2rem; height: .6rem }
.bar { display: block; height: 100%; border-radius: .2rem; background: var(--s0) }
.value { text-align: right; font-variant-numeric: tabular-nums }
details { border: 1px solid var(--edge); border-radius: .5rem; padding: .5rem .75rem;
  margin: .5rem 0 } summary { cursor: pointer }
.pair { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)) }
.pair > div { background: var(--soft); border-radius: .5rem; padding: .5rem .6rem; min-width: 0 }
.pair h4, details h4 { margin: 0 0 .25rem; font-size: .8rem; color: var(--faint) }
del, ins { text-decoration: none; border-radius: .2rem } del { background: var(--del) }
ins { background: var(--ins) }
"""


def page(found: Findings) -> str:
    """The page."""
    sections = {
        "Curves": _curves(found),
        "Metrics": _metrics(found),
        "Answers": _answers(found),
        "Layers": _layers(found),
        "Data": "".join(
            f"<h3>{escape(name)}</h3><pre class='data'>{escape(chr(10).join(lines))}</pre>"
            for name, lines in found.data.items()
        ),
        "Settings": _table(_settings(found.config)),
        "Machine": "<p class='faint'>The machine that made this page.</p>" + _table(found.machine),
    }
    sections = {name: body for name, body in sections.items() if body}
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in sections)
    notes = "".join(f"<p class='faint'>{escape(note)}</p>" for note in found.notes)
    bodies = "".join(
        f'<section id="{name.lower()}"><h2>{name}</h2>{body}</section>'
        for name, body in sections.items()
    )
    title = f"Training run: {escape(found.name)}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1><p>{escape(_summary(found))}</p>{notes}<nav>{links}</nav>"
        f"{bodies}</body></html>\n"
    )


def _summary(found: Findings) -> str:
    """A sentence or two about the run."""
    config, rows = found.config, found.rows
    kind = config.get("fine_tune_type") or config.get("peft_type") or "adapter"
    base = config.get("model") or config.get("base_model_name_or_path")
    parts = [f"{kind} over {base}" if base else str(kind)]
    if rows:
        last = max(row["iteration"] for row in rows)
        parts.append(f"{last:,} iterations in {duration_text(rows[-1].get('seconds') or 0.0)}")
    if trained := column(rows, "trained_tokens"):
        parts.append(f"{trained[-1][1]:,.0f} tokens trained")
    losses = column(rows, "val_loss")
    if losses:
        at, best = min(losses, key=lambda pair: pair[1])
        parts.append(f"lowest validation loss {best:.4f} at iteration {at:,}")
    elif losses := column(rows, "train_loss"):
        parts.append(f"training loss {losses[0][1]:.4f} to {losses[-1][1]:.4f}")
    return "; ".join(parts) + "."


def _curves(found: Findings) -> str:
    rows = found.rows
    figures = [
        curves(
            "Loss",
            {"training": column(rows, "train_loss"), "validation": column(rows, "val_loss")},
        ),
        *(
            curves(title, {label: column(rows, name)}, unit)
            for title, label, name, unit in (
                ("Learning rate", "last", "learning_rate", ""),
                ("Gradient norm", "last", "grad_norm", ""),
                ("Speed", "last", "tokens_per_second", " tokens/s"),
                ("Peak memory", "last", "peak_memory", " GB"),
            )
        ),
    ]
    drawn = "".join(figures)
    return f'<div class="grid2">{drawn}</div>' if drawn else ""


def _metrics(found: Findings) -> str:
    if not (found.losses or found.scores):
        return ""
    rows = []
    for differences, count in zip((found.losses, found.scores), found.counted, strict=True):
        rows += [_metric(name, d, count) for name, d in differences.items()]
    head = "<tr><th>metric</th>" + "".join(
        f'<th class="n">{name}</th>'
        for name in ("adapter", "base", "difference", "95 % interval", "records")
    )
    return (
        f"<p class='faint'>On the {escape(found.split)} data; intervals of the difference by a "
        f"paired bootstrap of {RESAMPLES:,} resamples.</p>"
        f'<div class="wide"><table>{head}</tr>{"".join(rows)}</table></div>'
    )


def _metric(name: str, d: Difference, count: int) -> str:
    cells = (
        f"{d.score:.4f}",
        f"{d.base:.4f}",
        f"{d.difference:+.4f}",
        f"{d.low:+.4f} to {d.high:+.4f}",
        f"{count:,}",
    )
    return f"<tr><td>{name}</td>" + "".join(f'<td class="n">{c}</td>' for c in cells) + "</tr>"


def _answers(found: Findings) -> str:
    if not found.answers:
        return ""
    parts = []
    for number, (question, prompt, reference, base, tuned) in enumerate(found.answers, 1):
        left, right = marked(base, tuned)
        state = "same answer" if base == tuned else "differs"
        head = " ".join(question.split())
        head = head if len(head) <= 90 else head[:88] + " …"
        parts.append(
            f"<details{' open' if number <= 5 else ''}><summary>{number}. {escape(head)} "
            f'<span class="faint">({state})</span></summary>'
            f"<h4>prompt</h4><pre>{escape(prompt)}</pre>"
            f'<div class="pair"><div><h4>base</h4><pre>{left}</pre></div>'
            f"<div><h4>adapter</h4><pre>{right}</pre></div>"
            f"<div><h4>the data's answer</h4><pre>{escape(reference)}</pre></div></div></details>"
        )
    return (
        f"<p class='faint'>Greedy answers to prompts of the {escape(found.split)} data. Marked: "
        "<del>only the base</del>, <ins>only the adapter</ins>.</p>" + "".join(parts)
    )


def _layers(found: Findings) -> str:
    if not found.layers:
        return ""
    most = sorted(found.layers, key=lambda change: change.relative, reverse=True)[:_WEIGHTS]
    whole = [(change.name, change.relative) for change in by_layer(found.layers)]
    return (
        "<p class='faint'>The norm of the change, in percent of the weight's.</p>"
        f'<div class="grid2"><div><h3>By layer</h3>{bars(whole)}</div>'
        f"<div><h3>Most changed weights</h3>"
        f"{bars([(change.name, change.relative) for change in most])}</div></div>"
    )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that have a value, those of a mapping under its name."""
    flat: dict[str, Any] = {}
    for key, value in sorted(config.items()):
        if key in _HIDDEN or value is None or value == {}:
            continue
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": item for name, item in value.items() if item is not None}
        else:
            flat[key] = value
    return flat


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_text(value))}</td></tr>"
        for name, value in values.items()
    )
    return f'<table class="settings">{rows}</table>'


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, _items(value)))
    return str(value)


def _items(values: Iterable[Any]) -> Iterable[Any]:
    return (value if not isinstance(value, Mapping) else dict(value) for value in values)
