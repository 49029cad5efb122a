"""The report of good drills, of bad ones, and of those that never came far."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from farshore_drill import page, report

from .test_pcap import between, udp, write

RUN = {
    "group": "web",
    "local": "web1",
    "backup": "bak1",
    "marker": "farshore-marker",
    "sites": {
        "ldc": {"network": "10.1.0.0/24", "public_address": "203.0.113.1"},
        "rbc": {"network": "10.2.0.0/24", "public_address": "198.51.100.1"},
    },
    "hosts": {"local server": "web1"},
    "versions": {"Farshore": "0.1.0"},
    "epochs": {"before": 1, "away": 2, "after": 3},
    "steps": [{"name": "Make the <local> server fail", "start": "1000.5", "seconds": 2, "result": "ok"}],
    "events": [{"at": 1010, "what": "web1 fails"}, {"at": 1012, "what": "Users are sent to bak1"}],
    "transitions": ["[failed_over] & so on"],
    "expects": {"user": True, "writes": True, "capture": True, "files": 3},
}


def evidence(directory: Path, **changes: Any) -> Path:
    """A drill in which all went well."""
    (directory / "run.json").write_text(
        json.dumps(RUN | {"capture_file": str(directory / "internet.pcap")} | changes), encoding="utf-8"
    )
    lines: list[dict[str, Any]] = [{"k": "meta", "mono": 0, "w": 1000, "marker": "farshore-marker", "writes": True}]

    def add(kind: str, at: float, doc: int, by: str, why: str = "") -> None:
        entry = {"k": kind, "d": doc, "v": 1, "s": 200, "by": by, "t0": at, "t1": at, "w": 1000 + at, "sha": str(doc)}
        lines.append(entry | ({"why": why} if why else {}))

    for doc in range(1, 10):
        add("put", doc, doc, "web1")
    for doc in range(1, 10):
        add("get", 12 + doc / 10, doc, "bak1", "audit")
    for doc in range(10, 20):
        add("put", 5 + doc, doc, "bak1" if doc < 15 else "web1")
    for doc in range(1, 20):
        add("get", 40, doc, "web1", "verify")
    lines.append({"k": "end", "mono": 41, "w": 1041})
    (directory / "history.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="ascii")
    for name in ("local", "backup"):
        entries = [{"root": "/srv", "path": f"{i}", "type": "file", "size": 7, "sha256": "x"} for i in range(5)]
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)), encoding="ascii")
    write(directory / "internet.pcap", [between(udp(4500, 4500, b"\x01\x02\x03\x04cipher"))] * 3)
    return directory


def unfulfilled(found: report.Report) -> list[str]:
    return [check["text"] for check in found["checks"] if not check["ok"]]


def test_a_good_drill_passes_with_all_its_figures(tmp_path: Path) -> None:
    found = report.build(evidence(tmp_path))
    assert unfulfilled(found) == []
    assert found["passed"] is True
    assert found["rto_seconds"] == pytest.approx(3.1)
    assert found["rpo_seconds"] == 0
    assert (found["user_writes_acknowledged"], found["user_writes_lost_after_failback"]) == (19, 0)
    assert (found["files_compared"], found["files_differing"]) == (5, 0)
    assert (found["internet_packets"], found["plaintext_packets"]) == (3, 0)
    assert found["steps"] == [
        {"name": "Make the <local> server fail", "start": "1970-01-01T00:16:40.500+00:00", "seconds": 2, "result": "ok"}
    ]
    json.dumps(found)


def test_a_packet_that_can_be_read_fails_the_drill(tmp_path: Path) -> None:
    evidence(tmp_path)
    write(tmp_path / "internet.pcap", [between(udp(4500, 4500, b"\x01\x02\x03\x04farshore-marker"))])
    found = report.build(tmp_path)
    assert (found["passed"], found["plaintext_packets"]) == (False, 1)


def test_a_file_that_differs_fails_the_drill(tmp_path: Path) -> None:
    evidence(tmp_path)
    with open(tmp_path / "backup.jsonl", "a", encoding="ascii") as file:
        file.write('\n{"root": "/srv", "path": "more", "type": "file"}')
    found = report.build(tmp_path)
    assert (found["passed"], found["files_differing"]) == (False, 1)


@pytest.mark.parametrize("missing", ["history.jsonl", "local.jsonl", "internet.pcap"])
def test_evidence_that_is_missing_fails_the_drill(tmp_path: Path, missing: str) -> None:
    (evidence(tmp_path) / missing).unlink()
    assert report.build(tmp_path)["passed"] is False


def test_too_few_files_fail_the_drill(tmp_path: Path) -> None:
    evidence(tmp_path, expects={"files": 5})
    assert report.build(tmp_path)["passed"] is False


def test_what_is_not_expected_is_not_missed(tmp_path: Path) -> None:
    evidence(tmp_path, expects={"user": False, "writes": False, "capture": False, "files": 0})
    for name in ("history.jsonl", "internet.pcap"):
        (tmp_path / name).unlink()
    found = report.build(tmp_path)
    assert found["passed"] is True
    assert found["plaintext_packets"] is None


def test_a_step_that_failed_is_named_with_its_reason(tmp_path: Path) -> None:
    failure = {"step": "Bring the local server back", "reason": "it <never> came"}
    found = report.build(evidence(tmp_path, failure=failure))
    assert found["passed"] is False
    text = page.render(found)
    assert "it &lt;never&gt; came" in text
    assert any("it <never> came" in line for line in report.summary(found))


def test_there_is_a_report_even_of_nothing(tmp_path: Path) -> None:
    found = report.build(tmp_path, "Deploy", "no host answered")
    assert found["passed"] is False
    assert found["failure"] == {"step": "Deploy", "reason": "no host answered"}
    assert found["steps"][0]["result"] == "failed"
    assert "no host answered" in page.render(found)
    assert list(report.summary(found))


class Checker(HTMLParser):
    """Notes which elements are open, and what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open and closed at once."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    text = page.render(report.build(evidence(tmp_path)))
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.fetched == []
    assert not re.search(r"https?://|url\(|@import", text)
    assert "The drill has passed" in text
    assert "Make the &lt;local&gt; server fail" in text
    assert "prefers-color-scheme:dark" in text
