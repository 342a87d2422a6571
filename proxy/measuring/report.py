"""A comparison as one self-contained HTML page: a table, and bars and lines drawn as SVG in the page.

It is made to be mailed, archived and printed: it loads no scripts, fonts or images, and follows the light or dark theme
of the reader's system.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from html import escape

from proxy.measuring.comparison import Comparison, Row, Series, Unit, show_factor, show_value

WIDTH, HEIGHT = 340.0, 170.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 12.0, 12.0, 26.0

STYLE = """
:root { --paper: #f6f7f9; --card: #fff; --ink: #16202c; --quiet: #5b6877; --line: #dde2e8;
  --before: #d4711a; --after: #1769c2; --good: #17803d; --bad: #c22f2f; }
@media (prefers-color-scheme: dark) { :root { --paper: #10151b; --card: #182029; --ink: #e6ebf0; --quiet: #94a2b1;
  --line: #2a3541; --before: #f0a35c; --after: #64aef2; --good: #54c57c; --bad: #ff7d76; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 28px 20px 40px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 24px; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 16px; margin: 28px 0 10px; }
.quiet { color: var(--quiet); margin: 2px 0 18px; }
.lead { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; }
.lead .bars { max-width: 240px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; min-width: 0; }
.card h3 { margin: 0; font-size: 13px; font-weight: 500; color: var(--quiet); }
.card p { margin: 0; }
.factor { font-size: 30px; font-weight: 650; letter-spacing: -.02em; color: var(--after); }
.bars { display: block; width: 100%; height: auto; margin-top: 6px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 12px; }
.legend { display: flex; gap: 18px; font-size: 13px; color: var(--quiet); margin: 0 0 10px; }
.key::before { content: ""; display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 7px;
  vertical-align: -1px; background: var(--before); }
.key.after::before { background: var(--after); }
svg text { fill: var(--quiet); font-size: 12px; }
svg .value { fill: var(--ink); font-size: 13px; }
svg .before { fill: var(--before); } svg .after { fill: var(--after); }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg polyline.before { stroke: var(--before); fill: none; } svg polyline.after { stroke: var(--after); fill: none; }
svg line { stroke: var(--line); }
/* A shadow at an edge beyond which the table goes on. */
.wide { overflow-x: auto; padding: 0; background:
  linear-gradient(to right, var(--card) 30%, transparent) left / 40px 100% no-repeat local,
  linear-gradient(to left, var(--card) 30%, transparent) right / 40px 100% no-repeat local,
  linear-gradient(to right, #8886, transparent) left / 14px 100% no-repeat scroll,
  linear-gradient(to left, #8886, transparent) right / 14px 100% no-repeat scroll, var(--card); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 8px 16px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-size: 13px; font-weight: 500; color: var(--quiet); }
tr:last-child td { border-bottom: 0; }
td small { color: var(--quiet); white-space: normal; display: block; max-width: 420px; }
.good { color: var(--good); } .bad { color: var(--bad); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 520px) { body { padding: 16px 12px; } th, td { padding: 8px 6px; font-size: 13px; }
  th, td:first-child { white-space: normal; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; } }
"""


def render_report(comparison: Comparison, version: str, at: float | None = None) -> str:
    """Return the page; `at` is the time of the measurement (Unix time; None = now)."""
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>watchmux: {escape(comparison.title)}</title><style>{STYLE}</style></head><body>",
        "<h1>What watchmux takes off etcd</h1>",
        f'<p class="quiet">{escape(comparison.title)}; {escape(comparison.subtitle)}</p>',
        _legend(comparison),
        '<div class="lead">',
        *(_card(row) for row in comparison.rows if row.compared),
        "</div>",
    ]
    if comparison.series:
        parts += ["<h2>Over time</h2>", _legend(comparison), '<div class="grid">']
        parts += [_lines(series) for series in comparison.series]
        parts.append("</div>")
    parts += ["<h2>In numbers</h2>", _table(comparison)]
    if comparison.warnings:
        parts.append('<h2>Mind</h2><div class="card">')
        parts += [f"<p>{escape(text)}</p>" for text in comparison.warnings]
        parts.append("</div>")
    if comparison.complaints:
        parts.append('<h2 class="bad">What went wrong</h2><div class="card">')
        parts += [f'<p class="bad">{escape(text)}</p>' for text in comparison.complaints]
        parts.append("</div>")
    facts = [*comparison.facts, ("measured", when), ("by", f"watchmux {version}")]
    parts.append('<h2>How it was measured</h2><div class="card"><dl>')
    parts += [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts]
    parts.append("</dl></div></body></html>")
    return "\n".join(parts) + "\n"


def _legend(comparison: Comparison) -> str:
    return (
        f'<p class="legend"><span class="key">{escape(comparison.before_name)}</span>'
        f'<span class="key after">{escape(comparison.after_name)}</span></p>'
    )


def _card(row: Row) -> str:
    """Draw one number as two bars, with its reduction."""
    most = max(row.before or 0.0, row.after or 0.0, 1e-9)
    bars = []
    for kind, value, y in (("before", row.before, 4), ("after", row.after, 34)):
        width = max(2.0, (value or 0.0) / most * 72)
        bars.append(f'<rect class="{kind}" x="0" y="{y}" width="{width:.1f}" height="22" rx="3"/>')
        text = escape(show_value(value, row.unit))
        bars.append(f'<text class="value" x="{width + 8:.1f}" y="{y + 16}">{text}</text>')
    label = escape(f"{row.name}: {show_value(row.before, row.unit)} and {show_value(row.after, row.unit)}")
    return (
        f'<div class="card"><h3>{escape(row.name)}</h3><p class="factor">{show_factor(row.factor) or "-"}</p>'
        f'<svg class="bars" viewBox="0 0 150 60" role="img" aria-label="{label}">{"".join(bars)}</svg></div>'
    )


def _lines(series: Series) -> str:
    """Draw one quantity over time, both sides on the same axes."""
    points = [*series.before, *series.after]
    last_s = max((at for at, _ in points), default=0.0) or 1.0
    highest = _nice(max((value for _, value in points), default=0.0), series.unit)
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)
        text = escape(_tick(share * highest, series.unit))
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for kind, line in (("before", series.before), ("after", series.after)):
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in _places(line, last_s, highest))
        parts.append(f'<polyline class="{kind}" points="{places}"/>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">0 s</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{last_s:.0f} s</text>')
    name = escape(series.name)
    return (
        f'<div class="card"><h3>{name}</h3><svg class="bars" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" '
        f'aria-label="{name} over time">{"".join(parts)}</svg></div>'
    )


def _tick(value: float, unit: Unit) -> str:
    if unit is Unit.SECONDS:
        return f"{value:g}"
    return show_value(value, unit).replace(".0 ", " ").replace(".0/", "/")


def _places(line: list[tuple[float, float]], last_s: float, highest: float) -> Iterator[tuple[float, float]]:
    for at, value in line:
        yield LEFT + at / last_s * (WIDTH - LEFT - RIGHT), TOP + (1 - value / highest) * (HEIGHT - TOP - BOTTOM)


def _nice(value: float, unit: Unit) -> float:
    """Return the smallest round number that is at least `value`; round in powers of 1024 for bytes."""
    if value <= 0:
        return 1.0
    base = 1024.0 ** math.floor(math.log(value, 1024)) if unit in (Unit.BYTES, Unit.BYTES_RATE) and value >= 1 else 1.0
    scaled = value / base
    step = 10.0 ** math.floor(math.log10(scaled))
    return base * next(times * step for times in (1, 2, 4, 5, 6, 8, 10) if times * step >= scaled * 0.999999)


def _table(comparison: Comparison) -> str:
    parts = [
        '<div class="card wide"><table><thead><tr><th>what etcd serves</th>',
        f"<th>{escape(comparison.before_name)}</th><th>{escape(comparison.after_name)}</th><th>reduction</th>",
        "</tr></thead><tbody>",
    ]
    for row in comparison.rows:
        note = f"<small>{escape(row.note)}</small>" if row.note else ""
        cells = [
            f"<td{_class(value, row.unit)}>{escape(show_value(value, row.unit))}</td>"
            for value in (row.before, row.after)
        ]
        factor = f"<b>{show_factor(row.factor)}</b>"
        parts.append(f"<tr><td>{escape(row.name)}{note}</td>{''.join(cells)}<td>{factor}</td></tr>")
    parts.append("</tbody></table></div>")
    return "".join(parts)


def _class(value: float | None, unit: Unit) -> str:
    if unit is not Unit.FAULTS or value is None:
        return ""
    return ' class="bad"' if value else ' class="good"'
