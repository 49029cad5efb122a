"""All evidence of a drill, gathered into one report that says whether it has passed, and why not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import compare, history, pcap, timeline

#: What plain HTTP looks like; long enough never to occur in ciphertext by chance.
HTTP = (b"PUT /docs/", b"GET /docs/", b"GET /health", b"HTTP/1.1 20", b"X-Served-By: ")

Report = dict[str, Any]


def build(directory: Path, failed_step: str = "", reason: str = "") -> Report:
    """The report of the drill whose evidence lies in ``directory``; what is missing there is null in it.

    ``failed_step`` and ``reason`` tell of a failure that the drill itself could not write down.
    """
    run = _json(directory / "run.json")
    before = _json(directory / "before.json")
    failure = run.get("failure") or ({"step": failed_step, "reason": reason} if failed_step else None)
    expects = {"user": True, "writes": True, "capture": True, "files": 0} | run.get("expects", {})
    # Ansible gives numbers as texts where it can't tell.
    steps = [
        s | {k: float(s[k]) for k in ("start", "seconds")} for s in [*before.get("steps", []), *run.get("steps", [])]
    ]
    if failed_step and not any(step["result"] != "ok" for step in steps):
        steps.append({"name": failed_step, "start": None, "seconds": None, "result": "failed", "reason": reason})
    report: Report = {
        "passed": False,
        "group": run.get("group", ""),
        "local": run.get("local", ""),
        "backup": run.get("backup", ""),
        "started": _time(steps[0]["start"] if steps else run.get("started")),
        "seconds": _whole(steps),
        "failure": failure,
    }
    problems: list[str] = []
    report |= _users(directory, run, problems)
    report |= _files(directory, problems)
    report |= _capture(run, report.pop("marker"), problems)
    report["checks"] = list(_checks(report, expects, failure, problems))
    report["passed"] = all(check["ok"] for check in report["checks"])
    events = [event | {"at": float(event["at"])} for event in run.get("events", [])]
    if events and report["last_local"]:
        # What causes the failure takes its time; when it was there, the users know best.
        events[0] |= {"at": report["last_local"]}
    report["events"] = [event | {"time": _time(event["at"])} for event in events]
    report["steps"] = [step | {"start": _time(step["start"])} for step in steps]
    for key in ("hosts", "versions", "tunnel", "cipher", "epochs", "transitions", "churn", "damage", "sites"):
        report[key] = run.get(key)
    return report


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return loaded


def _time(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def _whole(steps: list[dict[str, Any]]) -> float | None:
    ends = [step["start"] + step["seconds"] for step in steps if step["start"] is not None]
    return round(max(ends) - min(s["start"] for s in steps if s["start"] is not None), 3) if ends else None


def _users(directory: Path, run: Mapping[str, Any], problems: list[str]) -> Report:
    figures, marker, line = history.Figures(), run.get("marker", ""), None
    path = directory / "history.jsonl"
    if path.exists():
        with open(path, encoding="ascii", errors="replace") as file:
            past = history.load(file)
        marker = marker or past.marker
        figures = history.measure(past, run.get("local", ""), run.get("backup", ""))
        line = timeline.bins(past, run.get("local", ""), run.get("backup", ""))
        if not past.complete:
            problems.append("the users' history has no end: they were stopped before they had verified everything")
    measured = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(figures).items()}
    return measured | {"timeline": line, "marker": marker}


def _files(directory: Path, problems: list[str]) -> Report:
    found: compare.Comparison | None = None
    sides = [directory / "local.jsonl", directory / "backup.jsonl"]
    if all(side.exists() for side in sides):
        listed = []
        for side in sides:
            with open(side, encoding="ascii") as file:
                try:
                    listed.append(compare.load(file))
                except (ValueError, KeyError) as error:
                    problems.append(f"{side.name} is no manifest: {error}")
        if len(listed) == 2:
            found = compare.compare(*listed)
    if found is None:
        return dict.fromkeys(("files_compared", "files_differing", "files_bytes", "files_types", "differences"))
    return {
        "files_compared": found.compared,
        "files_differing": found.differing,
        "files_bytes": found.bytes,
        "files_types": found.types,
        "differences": found.differences,
    }


def _capture(run: Mapping[str, Any], marker: str, problems: list[str]) -> Report:
    names = [*pcap.Findings.__dataclass_fields__]
    nothing: Report = {("packet_" + n if n in ("kinds", "examples", "truncated") else n): None for n in names}
    sites, file = run.get("sites") or {}, run.get("capture_file")
    if not (file and sites and Path(file).exists()):
        return nothing
    needles = [text.encode() for text in (marker, *run.get("needles", [])) if text] + list(HTTP)
    try:
        found = pcap.search(
            Path(file),
            [site["public_address"] for site in sites.values()],
            [site["network"] for site in sites.values()],
            needles,
        )
    except (pcap.CaptureError, OSError, ValueError) as error:
        problems.append(f"the capture {file} can't be read: {error}")
        return nothing
    return {("packet_" + n if "packet_" + n in nothing else n): value for n, value in asdict(found).items()}


def _checks(
    report: Report, expects: Mapping[str, Any], failure: Mapping[str, str] | None, problems: list[str]
) -> Iterator[dict[str, Any]]:
    def check(text: str, ok: object, detail: str) -> dict[str, Any]:
        return {"text": text, "ok": bool(ok), "detail": detail}

    where = f"{failure['step']}: {failure['reason']}" if failure else ""
    yield check("Every step was carried out", not failure, where or "none failed")
    if expects["user"]:
        yield check(
            "Users were served by the backup server, and by the local server again",
            report["first_backup"] is not None and report["first_home"] is not None,
            _served(report),
        )
    if expects["writes"]:
        phases = [report[f"user_writes_{phase}"] for phase in ("before", "away", "after")]
        yield check(
            "Users wrote before the failure, during it and after it",
            all(phases),
            "{} writes before, {} during, {} after".format(*phases),
        )
        lost = report["user_writes_lost_after_failback"]
        yield check(
            "Nothing is lost of what users wrote since the failure, or of what had reached the backup server",
            report["user_documents_verified"] and not lost,
            f"{report['user_documents_verified']} documents read back, {lost} acknowledged writes missing",
        )
    compared, differing = report["files_compared"], report["files_differing"]
    yield check(
        f"Both servers hold the same, compared over more than {expects['files']} files",
        compared is not None and compared > int(expects["files"]) and differing == 0,
        "not compared" if compared is None else f"{compared} compared, {differing} differ",
    )
    if expects["capture"]:
        packets, plain = report["internet_packets"], report["plaintext_packets"]
        yield check(
            "Nothing between the sites could be read on the Internet",
            packets and plain == 0,
            "not captured" if packets is None else f"{packets} packets captured, {plain} readable",
        )
    for problem in problems:
        yield check("The evidence is complete", False, problem)


def _served(report: Report) -> str:
    if report["first_backup"] is None:
        return "the backup server never answered them"
    return "both did" if report["first_home"] is not None else "the local server never answered them again"


def summary(report: Report) -> Iterator[str]:
    """The report in a few lines for a terminal."""

    def seconds(key: str) -> str:
        return "not measured" if report[key] is None else f"{report[key]:.2f} s"

    yield f"{'PASSED' if report['passed'] else 'FAILED'}: disaster drill of {report['group'] or 'nothing'}"
    yield f"  users without service at the failure (RTO)   {seconds('rto_seconds')}"
    yield f"  acknowledged writes lost at the failure (RPO) {seconds('rpo_seconds')}, " + (
        f"{report['user_writes_lost_at_switch']} of {report['user_writes_before']} writes"
    )
    yield f"  users' pause at the switch back              {seconds('failback_pause_seconds')}"
    yield f"  writes acknowledged                          {report['user_writes_acknowledged']}, " + (
        f"{report['user_writes_lost_after_failback']} lost after the failback"
    )
    files = f"{report['files_compared']}, {report['files_differing']} differ"
    yield f"  files compared                               {files}"
    yield (
        f"  packets between the sites                    {report['internet_packets']}, "
        f"{report['plaintext_packets']} readable"
    )
    for check in report["checks"]:
        # After a failed step hardly anything can be fulfilled; the failure alone says why.
        if not check["ok"] and (not report["failure"] or check is report["checks"][0]):
            yield f"  not fulfilled: {check['text']}: {check['detail']}"
