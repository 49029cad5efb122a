"""``farshore verify`` and what ``farshore status`` tells of it, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nodes import Mirror

from farshore.cli import build_parser, verify
from farshore.control.api import Drift, VerificationReport
from farshore.errors import FarshoreError


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    source = tmp_path / "src"
    source.mkdir()
    for number in range(20):
        (source / f"f{number}").write_text(str(number))
    made = Mirror(tmp_path, source)
    made.start()
    try:
        yield made
    finally:
        if made.process is not None and made.process.poll() is None:
            made.kill()


def ask(mirror: Mirror, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = mirror.command(*arguments, "--state", str(mirror.state))
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_what_differs_is_told_and_repaired(mirror: Mirror) -> None:
    asked = ask(mirror, "verify")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("mirror: no difference; 20 paths, 30 B read here and 30 B there, in ")
    (mirror.destination / "f7").unlink()
    (mirror.destination / "f8").chmod(0o600)
    asked = ask(mirror, "verify", "mirror", "--no-repair", "--rate", "10MB/s")
    assert asked.returncode == 34
    assert "3 paths differed, 3 not repaired" in asked.stdout
    assert f"{mirror.source}/f7: the replica had something else (missing); NOT REPAIRED" in asked.stdout
    assert "farshore: Group mirror: 3 paths differ still" in asked.stderr
    status = ask(mirror, "status").stdout
    assert "verified mirror: " in status and "3 paths differed, 3 not repaired" in status
    asked = ask(mirror, "verify", "--json")
    assert asked.returncode == 0, asked.stderr
    report = json.loads(asked.stdout)["mirror"]
    assert (report["result"], report["findings"], report["unrepaired"]) == ("repaired", {"replica": 3}, 0)
    assert (mirror.destination / "f7").read_text() == "7"
    last = json.loads(ask(mirror, "status", "--json").stdout)["groups"]["mirror"]["verification"]["last"]
    assert last == report


def verification(mirror: Mirror) -> dict[str, Any]:
    """What the status says of verifications."""
    found: dict[str, Any] = json.loads(ask(mirror, "status", "--json").stdout)["groups"]["mirror"]["verification"]
    return found


def test_a_daemon_that_was_killed_goes_on(mirror: Mirror) -> None:
    for number in range(40):
        (mirror.source / f"large{number}").write_bytes(os.urandom(100_000))
    mirror.flush()
    assert ask(mirror, "verify", "--no-wait", "--rate", "400kB/s").returncode == 0
    run = verification(mirror)["run"]
    # What was read is written down every few seconds.
    for _ in range(600):
        if verification(mirror)["read_source"] > 3_000_000:
            break
        time.sleep(0.1)
    mirror.kill()
    mirror.start()
    asked = ask(mirror, "verify", "--rate", "unlimited", "--json")
    assert asked.returncode == 0, asked.stderr
    report = json.loads(asked.stdout)["mirror"]
    assert (report["run"], report["result"]) == (run, "clean")
    # It was asked for once more, not begun once more; and what had been read was not counted by the one who died.
    assert 0 < report["read_source"] < 3_900_000


def test_it_need_not_be_waited_for(mirror: Mirror) -> None:
    asked = ask(mirror, "verify", "--no-wait", "--no-contents")
    assert asked.returncode == 0 and asked.stdout.startswith("verifying; 'farshore status' tells the result (")


def test_what_is_wrong_is_named(mirror: Mirror) -> None:
    for arguments, code, words in (
        (["nobody"], 2, "group 'nobody' is not known"),
        (["--rate", "5mb"], 2, "--rate: '5mb' is not allowed"),
        (["--no-repair", "--repair-from-source"], 2, "exclude each other"),
    ):
        asked = ask(mirror, "verify", *arguments)
        assert (asked.returncode, words in asked.stderr) == (code, True), asked.stderr


def test_without_a_daemon_there_is_nobody_to_ask(tmp_path: Path) -> None:
    arguments = build_parser().parse_args(["verify", "--runtime-dir", str(tmp_path)])
    with pytest.raises(FarshoreError) as caught:
        verify.run(arguments)
    assert caught.value.exit_code == 10


def report(result: str, reason: str = "", found: int = 0, unrepaired: int = 0) -> VerificationReport:
    drifts = [Drift(f"/srv/f{number}", "untraced", ["content"], number >= unrepaired) for number in range(found)]
    findings = {"untraced": found} if found else {}
    return VerificationReport(
        "r", False, True, 100.0, 7300.0, result, reason, 5, 2_500_000, 999, findings, unrepaired, 3, 1, drifts
    )


def test_a_report_in_words() -> None:
    lines = list(verify.describe("web", report("drift", found=30, unrepaired=2)))
    assert lines[0] == "web: 30 paths differed, 2 not repaired; 5 paths, 2.5 MB read here and 999 B there, in 2 h 0 min"
    assert lines[1] == "  3 paths could not be compared: they change all the time, or cannot be read here"
    assert lines[2] == "  1 paths cannot be replicated; 'farshore status' tells why"
    assert lines[3] == "  /srv/f0: its content changed here without a trace (content); NOT REPAIRED"
    assert lines[-1] == "  and 10 more"
    assert verify.verdict(report("failed", "no disk")) == "failed: no disk"
    assert verify.verdict(report("repaired", found=1)) == "1 path differed, all repaired"
