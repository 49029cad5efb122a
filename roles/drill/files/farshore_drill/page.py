"""The report as one page that needs nothing else: for whoever has to answer whether the business is safe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from html import escape
from typing import Any

from .style import CSS

Report = Mapping[str, Any]

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 1000.0, 250.0, 44.0, 46.0, 30.0


def render(report: Report) -> str:
    """The page; everything in it that came from elsewhere is escaped."""
    word = "passed" if report["passed"] else "failed"
    title = f"Disaster drill {word}" + (f": {report['group']}" if report["group"] else "")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>",
        *_head(report),
        *_figures(report),
        *_timeline(report),
        *_checks(report),
        *_steps(report),
        *_evidence(report),
        "<footer>Written by the drill of Farshore. The same figures for programs are in report.json beside this page; "
        "the users’ history, both manifests and the packet capture are there, too.</footer>",
        "</main></body></html>\n",
    ]
    return "\n".join(parts)


def _t(value: object) -> str:
    return escape(str(value))


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if 0 < value < 0.01:
        return "< 0.01 s"
    return "0 s" if value == 0 else f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def _many(value: int | None) -> str:
    return "–" if value is None else f"{value:,}".replace(",", " ")


def _size(value: int | None) -> str:
    if value is None:
        return "–"
    size = float(value)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _head(report: Report) -> Iterator[str]:
    passed = report["passed"]
    local, backup = _t(report["local"] or "the local server"), _t(report["backup"] or "the backup server")
    when = datetime.fromisoformat(report["started"]).strftime("%d %B %Y, %H:%M UTC") if report["started"] else ""
    took = f", {report['seconds'] / 60:.1f} minutes" if report["seconds"] else ""
    yield f'<header class="{"good" if passed else "bad"}">'
    of = " of " + _t(report["group"]) if report["group"] else ""
    yield f'<p class="kicker">Disaster drill{of} · {when}{took}</p>'
    if passed:
        yield f"<h1>The drill has passed</h1><p>{local} failed, {backup} took over, the data came home, and {local} "
        yield "serves again. " + _verdict(report) + "</p>"
    elif report["failure"]:
        failure = report["failure"]
        yield f"<h1>The drill was not finished</h1><p>It ended in the step “{_t(failure['step'])}”.</p>"
        yield f"<pre>{_t(failure['reason'])}</pre>"
    else:
        missed = [check["text"] for check in report["checks"] if not check["ok"]]
        yield "<h1>The drill has not passed</h1><p>This was not fulfilled:</p>"
        yield "<ul>" + "".join(f"<li>{_t(text)}</li>" for text in missed) + "</ul>"
    yield "</header>"


def _verdict(report: Report) -> str:
    lost = report["user_writes_lost_at_switch"]
    if not report["user_writes_acknowledged"]:
        return ""
    if not lost:
        return "Nothing that users had saved was lost."
    if lost == 1:
        return "One write that a user had saved just before the failure was not on the backup server yet."
    return f"{lost} writes that users had saved just before the failure were not on the backup server yet."


def _figures(report: Report) -> Iterator[str]:
    lost = report["user_writes_lost_at_switch"]
    backup = report["backup"] or "the backup server"
    written = bool(report["user_writes_acknowledged"])
    yield '<section class="figures">'
    yield _figure(
        _seconds(report["rto_seconds"]),
        "until users were served again",
        "From the last answer of the failed server to the first answer of the other one (RTO).",
        "neutral",
    )
    if report["rpo_seconds"] is not None and not lost:
        text = f"Every write that had been confirmed to a user was on {backup} at the moment of the switch (RPO)."
    else:
        text = f"Age of the oldest confirmed write that {backup} did not have when it took over (RPO): {lost} in all."
    yield _figure(_seconds(report["rpo_seconds"]), "of work lost at the failure", text, "warn" if lost else "neutral")
    yield _figure(
        _seconds(report["failback_pause_seconds"]),
        "pause when the service moved back",
        "The longest wait between two successful writes while the users were returned.",
        "neutral",
    )
    yield _figure(
        _many(report["user_writes_acknowledged"]) if written else "–",
        "writes confirmed to users",
        f"{_many(report['user_writes_lost_after_failback'])} of them missing at the end, "
        f"{_many(report['user_documents_verified'])} documents read back to see.",
        "bad" if report["user_writes_lost_after_failback"] else "neutral",
    )
    yield _figure(
        _many(report["files_differing"]),
        "files differ between the sites",
        f"{_many(report['files_compared'])} compared by content, owner, mode, time, links and attributes.",
        "bad" if report["files_differing"] else "neutral",
    )
    yield _figure(
        _many(report["plaintext_packets"]),
        "readable packets on the Internet",
        f"{_many(report['internet_packets'])} packets between the two sites were captured and searched.",
        "bad" if report["plaintext_packets"] else "neutral",
    )
    yield "</section>"


def _figure(value: str, label: str, text: str, kind: str) -> str:
    return (
        f'<div class="figure {kind}"><div class="value">{_t(value)}</div>'
        f'<div class="label">{_t(label)}</div><p>{_t(text)}</p></div>'
    )


def _timeline(report: Report) -> Iterator[str]:
    line = report["timeline"]
    if not line:
        return
    events = [event for event in report["events"] if event.get("at")]
    yield '<section class="panel"><h2>What users saw</h2>'
    yield '<p class="legend">'
    yield f'<span><i class="key local"></i>answered by {_t(report["local"])}</span>'
    yield f'<span><i class="key backup"></i>answered by {_t(report["backup"])}</span>'
    yield '<span><i class="key failed"></i>no answer</span>'
    yield '<span><i class="key gap"></i>nobody served</span></p>'
    yield _svg(report, line, events)
    start = line["start"]
    yield '<ol class="events">'
    for event in events:
        yield f"<li><b>{event['at'] - start:.1f} s</b> {_t(event['what'])}</li>"
    yield "</ol></section>"


def _svg(report: Report, line: Report, events: list[Mapping[str, Any]]) -> str:
    size, width, start = len(line["local"]), line["width"], line["start"]
    seconds = size * width
    across = (_WIDTH - _LEFT - 8) / seconds
    bottom = _HEIGHT - _BOTTOM
    totals = [sum(line[name][i] for name in ("local", "backup", "failed")) for i in range(size)]
    step = next(s for s in (5, 10, 20, 25, 50, 100, 200, 500, 10**9) if max(totals) / width / s <= 4)
    top = max(step, -(-max(totals) / width // step) * step)
    up = (bottom - _TOP) / top

    def x(at: float) -> float:
        return _LEFT + max(0.0, min(float(seconds), at - float(start))) * float(across)

    out = [f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="Answered requests per second over time">']
    for first, last in (("last_local", "first_backup"), ("last_backup", "first_home")):
        if report[first] is not None and report[last] is not None:
            left, right = x(report[first]), x(report[last])
            out.append(
                f'<rect class="gap" x="{left:.1f}" y="{_TOP:g}" width="{max(1.0, right - left):.1f}" '
                f'height="{bottom - _TOP:.1f}"><title>{report[last] - report[first]:.2f} s</title></rect>'
            )
    for tick in range(0, int(top) + 1, int(step)):
        y = bottom - tick * up
        out.append(f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - 8:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{_LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    every = next(s for s in (5, 10, 20, 30, 60, 120, 300, 600, 10**9) if seconds / s <= 14)
    for tick in range(0, int(seconds) + 1, every):
        out.append(f'<text x="{_LEFT + tick * across:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{tick} s</text>')
    for i in range(size):
        y = bottom
        for name in ("local", "backup", "failed"):
            if line[name][i]:
                height = line[name][i] / width * up
                y -= height
                out.append(
                    f'<rect class="{name}" x="{_LEFT + i * width * across:.1f}" y="{y:.1f}" '
                    f'width="{max(0.6, width * across - 0.6):.2f}" height="{height:.1f}"/>'
                )
    out += _marks(events, x, bottom)
    out.append(f'<text x="{_LEFT - 36:g}" y="{_TOP - 28:g}">requests/s</text></svg>')
    return "".join(out)


def _marks(events: list[Mapping[str, Any]], x: Any, bottom: float) -> Iterator[str]:
    """Numbered flags; they step aside where they are too close to each other."""
    free = _LEFT + 30
    for number, event in enumerate(events, start=1):
        at = x(event["at"])
        place = min(max(at, free), _WIDTH - 16)
        free = place + 22
        yield f'<path class="mark" d="M{place:.1f} {_TOP - 18:g}L{at:.1f} {_TOP - 2:g}V{bottom:.1f}"/>'
        yield f'<circle class="flag" cx="{place:.1f}" cy="{_TOP - 24:g}" r="9"/>'
        yield f'<text class="flag" x="{place:.1f}" y="{_TOP - 20:g}" text-anchor="middle">{number}</text>'


def _checks(report: Report) -> Iterator[str]:
    yield '<section class="panel"><h2>What had to be true</h2><table class="checks">'
    for check in report["checks"]:
        sign = '<td class="sign yes">✓</td>' if check["ok"] else '<td class="sign no">✗</td>'
        yield f'<tr>{sign}<td>{_t(check["text"])}</td><td class="detail">{_t(check["detail"])}</td></tr>'
    yield "</table></section>"


def _steps(report: Report) -> Iterator[str]:
    steps = report["steps"]
    if not steps:
        return
    longest = max((step["seconds"] or 0 for step in steps), default=0) or 1
    yield '<section class="panel"><h2>The steps</h2><table class="steps">'
    yield '<tr><th></th><th>Step</th><th>Start</th><th class="number">Seconds</th><th class="wide"></th></tr>'
    for step in steps:
        good = step["result"] == "ok"
        sign = '<td class="sign yes">✓</td>' if good else '<td class="sign no">✗</td>'
        clock = datetime.fromisoformat(step["start"]).astimezone(UTC).strftime("%H:%M:%S") if step["start"] else ""
        seconds = step["seconds"]
        bar = f'<i style="width:{100 * (seconds or 0) / longest:.1f}%"></i>'
        yield (
            f'<tr>{sign}<td>{_t(step["name"])}</td><td class="clock">{clock}</td>'
            f'<td class="number">{"" if seconds is None else f"{seconds:.1f}"}</td><td class="wide">{bar}</td></tr>'
        )
    yield "</table></section>"


def _evidence(report: Report) -> Iterator[str]:
    yield '<section class="panel"><h2>Evidence</h2><dl>'
    for name, value in _facts(report):
        if value:
            yield f"<dt>{_t(name)}</dt><dd>{value}</dd>"
    yield "</dl>"
    for title, lines in (
        ("Writes that were lost", report["lost"]),
        ("Files that differ", report["differences"]),
        ("Packets that can be read", report["packet_examples"]),
        ("What the monitor said", report["transitions"]),
    ):
        if lines:
            text = "\n".join(map(str, lines))
            yield f"<details><summary>{title} ({len(lines)})</summary><pre>{_t(text)}</pre></details>"
    yield "</section>"


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    yield "Hosts", _list(report["hosts"])
    yield "Versions", _list(report["versions"])
    yield "Tunnel", _t(report["tunnel"] or "")
    yield "Cipher", f"<code>{_t(report['cipher'])}</code>" if report["cipher"] else ""
    epochs = report["epochs"] or {}
    words = (("before", "before the failure"), ("away", "on the backup server"), ("after", "after the return"))
    yield "Epochs", _t(", ".join(f"{epochs[key]} {text}" for key, text in words if key in epochs))
    if report["user_requests"]:
        documents = _many(report["user_documents"])
        unseen = report["user_writes_unobserved_at_switch"]
        unknown = f"; of {_many(unseen)} it is not known whether the switch lost them" if unseen else ""
        yield (
            "Users",
            f"{_many(report['user_requests'])} requests, {_many(report['user_requests_unanswered'])} not answered; "
            f"{documents} documents; writes before the failure {_many(report['user_writes_before'])}, "
            f"on the backup server {_many(report['user_writes_away'])}, "
            f"after the return {_many(report['user_writes_after'])}" + unknown,
        )
    if report["churn"]:
        churn = report["churn"]
        yield "Other changes", f"{_many(churn.get('changes'))} before the failure: {_list(churn.get('kinds'))}"
    if report["damage"]:
        yield (
            "Damage",
            f"{_many(report['damage'].get('deleted'))} files deleted and {_many(report['damage'].get('garbled'))} "
            f"garbled on {_t(report['local'])} before it came back",
        )
    if report["files_types"]:
        yield "Files", f"{_list(report['files_types'])}; {_size(report['files_bytes'])} in all"
    if report["packet_kinds"]:
        yield (
            "Packets",
            (
                f"{_list(report['packet_kinds'])}; {_size(report['internet_bytes'])}; "
                f"{_many(report['private_packets'])} with an address of the sites’ own networks; "
                f"{_many(report['user_packets'])} between users and the gateway, which are not part of this"
            ),
        )


def _list(values: object) -> str:
    if isinstance(values, Mapping):
        return ", ".join(_t(f"{_many(v)} {key}" if isinstance(v, int) else f"{key} {v}") for key, v in values.items())
    return _t(values) if values else ""
