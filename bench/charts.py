"""Charts of the results: SVG by hand, readable by day and by night."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import figure

_WIDTH = 920
_STYLE = """
text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;font-size:13px;fill:#5c6877}
.card{fill:#ffffff;stroke:#e1e5ea}.title{font-size:18px;font-weight:650;fill:#1b2430}.name{fill:#1b2430}
.strong{fill:#1b2430;font-weight:650}.small{font-size:11.5px}.grid{stroke:#e1e5ea}.zone{fill:#187a4b;opacity:.07}
.must{stroke:#1b2430;stroke-width:2}.stretch{stroke:#1b2430;stroke-width:2;stroke-dasharray:2 3}
.whisker{stroke:#1b2430;opacity:.55;stroke-width:1.5}
.ours{fill:#2f6fde}.theirs{fill:#aeb8c4}.good{fill:#187a4b}.best{fill:#0f8f8a}.bad{fill:#c8324a}.warn{fill:#e08a1e}
.l0{stroke:#2f6fde}.l1{stroke:#0f8f8a}.l2{stroke:#e08a1e}.l3{stroke:#c8324a}.l4{stroke:#8557c9}.l5{stroke:#7b8794}
.line{fill:none;stroke-width:2.25;stroke-linejoin:round}
@media(prefers-color-scheme:dark){
text{fill:#97a4b3}.card{fill:#1a212b;stroke:#2b3542}.title,.name,.strong{fill:#e6ebf1}.grid{stroke:#2b3542}
.zone{fill:#4cc98b;opacity:.09}
.must,.stretch,.whisker{stroke:#e6ebf1}.ours{fill:#5b95f5}.theirs{fill:#5c6877}.good{fill:#3fae78}.best{fill:#2bb3ad}
.bad{fill:#ef6479}.warn{fill:#f0a848}
.l0{stroke:#5b95f5}.l1{stroke:#2bb3ad}.l2{stroke:#f0a848}.l3{stroke:#ef6479}.l4{stroke:#a98ae0}.l5{stroke:#97a4b3}}
"""


@dataclass(frozen=True)
class Bar:
    """A bar: its name, its value, least and most of the runs, its class of colour."""

    name: str
    value: float
    low: float
    high: float
    look: str


def _text(x: float, y: float, words: str, look: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{look}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, look: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{look}"/>'


def _rect(x: float, y: float, width: float, height: float, look: str, radius: float = 3) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}" rx="{radius:g}" '
        f'class="{look}"/>'
    )


def _page(height: float, title: str, subtitle: str, body: Sequence[str]) -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" '
        f'height="{height:.0f}" role="img" aria-label="{html.escape(title)}">',
        f"<style>{_STYLE}</style>",
        _rect(0.5, 0.5, _WIDTH - 1, height - 1, "card", 12),
        _text(24, 36, title, "title"),
        _text(24, 58, subtitle),
        *body,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def overview(results: Mapping[str, Any]) -> str:
    """Each binding figure as a multiple of its must: a bar that ends in the green has reached it."""
    rows: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
    for row in results["rows"]:
        rows += [(row, c) for c in row["criteria"] if c["binding"] and c["median"] is not None and c["must"]]
    left, right, top, step = 340.0, _WIDTH - 240.0, 112.0, 34.0
    shares = [_share(c, c["median"]) for _, c in rows] or [1.0]
    # What is a hundred times better than it must be needs no longer scale.
    low = min(0.1, max(0.01, 10 ** math.floor(math.log10(max(1e-6, min(shares)) * 0.999))))
    high = max(2.0, max(shares) * 1.15)

    def place(share: float) -> float:
        share = min(high, max(low, share))
        return left + (right - left) * math.log(share / low) / math.log(high / low)

    bottom = top + step * len(rows)
    body = [_rect(left, top - 14, place(1.0) - left, bottom - top + 12, "zone", 0)]
    for tick in _log_ticks(low, high):
        body.append(_line(place(tick), top - 14, place(tick), bottom - 2, "grid"))
        if tick != 1:
            body.append(_text(place(tick), top - 20, f"{tick:g} ×", "small", "middle"))
    before = None
    for number, (row, criterion) in enumerate(rows):
        y = top + step * number
        share = _share(criterion, criterion["median"])
        look = {"stretch": "best", "must": "good", "missed": "bad"}.get(criterion["verdict"], "theirs")
        if before != row["row"]:
            body.append(_text(24, y + 14, f"{row['row']}", "strong"))
            before = row["row"]
        body.append(_text(52, y + 14, _short(criterion["name"], 44), "name"))
        body.append(_rect(left, y, max(4.0, place(share) - left), 19, look))
        ends = sorted(_share(criterion, value) for value in criterion["values"])
        body.append(_line(place(ends[0]), y + 9.5, place(ends[-1]), y + 9.5, "whisker"))
        if criterion["stretch"] is not None:
            mark = place(_share(criterion, criterion["stretch"]))
            body.append(_line(mark, y - 4, mark, y + 23, "stretch"))
        body.append(_text(right + 32, y + 14, figure(criterion["median"], criterion["unit"]), "strong"))
        bound = f"{'≤' if criterion['better'] == 'lower' else '≥'} {figure(criterion['must'])}"
        body.append(_text(_WIDTH - 24, y + 14, bound, "small", "end"))
    body += [
        _line(place(1.0), top - 18, place(1.0), bottom + 2, "must"),
        _text(place(1.0), top - 24, "must", "strong small", "middle"),
        _text(right + 32, top - 20, "figure", "small"),
        _text(_WIDTH - 24, top - 20, "must", "small", "end"),
    ]
    keys = (("stretch reached", "best"), ("must reached", "good"), ("missed", "bad"))
    x = 24.0
    for words, look in keys:
        body += [_rect(x, bottom + 16, 12, 12, look), _text(x + 18, bottom + 27, words, "small")]
        x += 40 + 6.6 * len(words)
    body += [_line(x + 4, bottom + 13, x + 4, bottom + 31, "stretch"), _text(x + 12, bottom + 27, "stretch", "small")]
    body += [
        _line(x + 74, bottom + 22, x + 96, bottom + 22, "whisker"),
        _text(x + 102, bottom + 27, "least and most of the pairs", "small"),
    ]
    subtitle = "Each figure's median as a multiple of what must be reached; shorter is better. Scale: logarithmic."
    return _page(bottom + 48, "How far from what must be", subtitle, body)


def _share(criterion: Mapping[str, Any], value: float) -> float:
    if criterion["better"] == "lower":
        return float(value / criterion["must"])
    return float(criterion["must"] / value) if value > 0 else 1e3


def _log_ticks(low: float, high: float) -> list[float]:
    found: list[float] = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        found += [m * 10.0**power for m in (1, 2, 5) if low <= m * 10.0**power <= high]
    return found if len(found) <= 6 else [t for t in found if f"{t:e}"[0] == "1"]


def _short(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def bars(title: str, subtitle: str, items: Sequence[Bar], unit: str) -> str:
    """Horizontal bars from zero, with the least and the most of the runs."""
    left, right, top, step = 250.0, _WIDTH - 150.0, 84.0, 34.0
    most = max((item.high for item in items), default=1.0) or 1.0
    scale = (right - left) / most
    bottom = top + step * len(items)
    body = []
    for tick in _ticks(most):
        x = left + tick * scale
        body.append(_line(x, top - 6, x, bottom, "grid"))
        body.append(_text(x, bottom + 16, f"{tick:g}", "small", "middle"))
    body.append(_text(right + 12, bottom + 16, unit, "small"))
    for number, item in enumerate(items):
        y = top + step * number
        ours = item.look == "ours"
        body.append(_text(left - 12, y + 15, _short(item.name, 36), "strong" if ours else "name", "end"))
        body.append(_rect(left, y, max(1.5, item.value * scale), 21, item.look))
        if item.high > item.low:
            low, high = left + item.low * scale, left + item.high * scale
            body.append(_line(low, y + 10.5, high, y + 10.5, "whisker"))
            body += [_line(x, y + 6, x, y + 15, "whisker") for x in (low, high)]
        end = left + max(item.value, item.high) * scale
        body.append(_text(end + 9, y + 15, figure(item.value, unit), "strong" if ours else ""))
    return _page(bottom + 34, title, subtitle, body)


def _ticks(most: float) -> list[float]:
    rough = most / 5.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough)
    return [round(k * step, 10) for k in range(int(most / step) + 1)]


def curves(
    title: str, subtitle: str, series: Mapping[str, Sequence[float]], marks: Sequence[tuple[float, float, str]]
) -> str:
    """Shares of changes (up) that were durable within a time (across, logarithmic, in ms).

    `series`: equally spaced percentiles in milliseconds; `marks`: points (ms, percent, words) that must lie to the
    right of our curve.
    """
    left, right, top, bottom = 76.0, _WIDTH - 30.0, 92.0, 420.0
    values = [value for each in series.values() for value in each if value > 0]
    low = 10.0 ** math.floor(math.log10(max(0.1, min(values, default=1.0))))
    high = 10.0 ** math.ceil(math.log10(max([1.0, *values, *(ms for ms, _, _ in marks)])))

    def across(value: float) -> float:
        value = max(low, value)
        return left + (right - left) * math.log(value / low) / math.log(high / low)

    def up(percent: float) -> float:
        return bottom - (bottom - top) * percent / 100.0

    body = []
    for percent in (0, 25, 50, 75, 99):
        body.append(_line(left, up(percent), right, up(percent), "grid"))
        body.append(_text(left - 10, up(percent) + 4, f"{percent} %", "small", "end"))
    tick = low
    while tick <= high * 1.001:
        body.append(_line(across(tick), top, across(tick), bottom, "grid"))
        body.append(_text(across(tick), bottom + 18, _milliseconds(tick), "small", "middle"))
        tick *= 10
    for number, (_, each) in enumerate(series.items()):
        points = " ".join(f"{across(value):.1f},{up(100.0 * k / (len(each) - 1)):.1f}" for k, value in enumerate(each))
        body.append(f'<polyline points="{points}" class="line l{number % 6}"/>')
    for ms, share, words in marks:
        x, y = across(ms), up(share)
        look = "must" if words.endswith("must") else "stretch"
        body.append(_line(x, y - 9, x, y + 9, look))
        body.append(_text(x + 6, y + (22 if share < 90 else -14), words, "small"))
    x, y = left, bottom + 46
    for number, name in enumerate(series):
        width = 46 + 7.2 * len(name)
        if x + width > right:
            x, y = left, y + 22
        body.append(_line(x, y - 4, x + 22, y - 4, f"line l{number % 6}"))
        body.append(_text(x + 28, y, name, "strong small" if name.startswith("farshore") else "small"))
        x += width
    return _page(y + 20, title, subtitle, body)


def _milliseconds(value: float) -> str:
    return f"{value:g} ms" if value < 1000 else f"{value / 1000:g} s"


def draw(results: Mapping[str, Any], out: Path) -> list[Path]:
    """Write all charts that the results have material for; returns their paths."""
    pages = {"overview": overview(results)}
    for row in results["rows"]:
        pages |= _of_row(row)
    written = []
    for name, page in pages.items():
        path = out / f"{name}.svg"
        path.write_text(page, encoding="utf-8")
        written.append(path)
    return written


def _of_row(row: Mapping[str, Any]) -> dict[str, str]:
    number, medians = row["row"], row["medians"]
    if number in (1, 3, 6, 12) and medians:
        items = [b for name, each in medians.items() if (b := _bar(name, each, "seconds", 1.0)) is not None]
        words = "Seconds until the change is durable on the other side; shorter is better. Thin lines: least and most."
        return {f"row-{number}": bars(_title(row), words, items, "s")}
    if number == 2 and medians:
        items = [b for name, each in medians.items() if (b := _bar(name, each, "wire", 1e-6)) is not None]
        changed = next((limit["value"] for limit in row["limits"]), 0.0) / 1e6
        if changed:
            items.append(Bar("the change itself", changed, changed, changed, "good"))
        return {"row-2": bars(_title(row), "Bytes on the wire in both directions; shorter is better.", items, "MB")}
    if number == 4:
        rates = [c for c in row["criteria"] if c["values"]]
        limits = [limit for limit in row["limits"] if limit["unit"] == "GB/s"]
        items = [_rate(c) for c in rates]
        items += [Bar(limit["name"], limit["value"], limit["value"], limit["value"], "good") for limit in limits]
        return {"row-4": bars(_title(row), "One core, in memory; longer is better.", items, "GB/s")} if items else {}
    if number == 5:
        items = [_rate(c) for c in row["criteria"] if c["values"] and c["binding"]]
        words = "Our speed on each input as a multiple of our speed on random data; 1 and more means: no trap."
        return {"row-5": bars(_title(row), words, items, "×")} if items else {}
    if number == 7 and any(row["series"].get("latency ms", {}).values()):
        marks = [(20, 50, "p50 must"), (100, 99, "p99 must"), (3, 50, "p50 stretch"), (15, 99, "p99 stretch")]
        words = "Share of changes on the replica within a time, above half the round trip; further left is better."
        series = {name: each for name, each in row["series"]["latency ms"].items() if each}
        return {"row-7": curves(_title(row), words, series, marks)}
    if number == 8 and any(row["series"].get("latency ms", {}).values()):
        held = [(ms, 99.0, f"{words} {bound}") for ms, words, bound in _HELD]
        words = (
            "Share of the changes that were seen, within a time; further left is better. What never came is not in it."
        )
        return {"row-8": curves(_title(row), words, row["series"]["latency ms"], held)}
    for each, (key, unit, words) in _OTHERS.items():
        if number == each and medians:
            items = [b for name, found in medians.items() if (b := _bar(name, found, key, 1.0)) is not None]
            return {f"row-{number}": bars(_title(row), words, items, unit)} if items else {}
    return {}


#: Bounds of row 8: milliseconds, of what, which.
_HELD = (
    (100.0, "appended", "stretch"),
    (1000.0, "appended", "must"),
    (5000.0, "mapped", "stretch"),
    (30_000.0, "mapped", "must"),
)

#: What the bars of other rows are: a figure of the samples, its unit, and words.
_OTHERS = {
    9: ("MB (PSS)", "MB", "Memory of the processes on the source, at rest; shorter is better."),
    10: ("seconds", "s", "Seconds until all was looked at; shorter is better. Thin lines: least and most."),
    11: ("s until the same", "s", "Seconds from the last change until both trees are the same; shorter is better."),
    13: ("MB/s", "MB/s", "MB/s through the same tunnel; longer is better."),
}


def _title(row: Mapping[str, Any]) -> str:
    title = str(row["title"])
    return f"{title[0].upper()}{title[1:]}"


def _look(name: str) -> str:
    return "ours" if name.startswith("farshore") else "theirs"


def _bar(name: str, each: Mapping[str, Any], key: str, factor: float) -> Bar | None:
    if key not in each:
        return None
    value = each[key]
    return Bar(name, value["median"] * factor, value["min"] * factor, value["max"] * factor, _look(name))


def _rate(criterion: Mapping[str, Any]) -> Bar:
    look = "ours" if criterion["binding"] or criterion["name"].startswith("encode") else "theirs"
    name = criterion["name"].removesuffix(": speed / random")
    return Bar(name, criterion["median"], min(criterion["values"]), max(criterion["values"]), look)
