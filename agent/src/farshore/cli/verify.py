"""``farshore verify``: do source, index and replica still say the same?"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from farshore.cli import daemon
from farshore.config import read_rate
from farshore.control import api, client
from farshore.errors import ConfigError, FarshoreError, NotInTime, PeerUnreachable, ProtocolError, UsageError

_TIMEOUT = 15.0
_POLL = 0.5
#: Seconds for which the daemon may be away: it may be restarting, and goes on from where it was.
_AWAY = 60.0
_SHOWN = 20


class DriftRemains(FarshoreError):
    """Group {0}: {1}"""

    exit_code = 34


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "verify",
        help="compare source, index and replica, and repair what differs",
        description="Compares what is here, what this side believes of the other, and what is there, by digests of all "
        "contents and metadata. What differs on the replica is sent anew. Works beside replication; what it "
        "reads in a second is limited by the configuration. Ends with 34 when something differs still.",
    )
    parser.add_argument("group", nargs="?", default="", metavar="GROUP", help="default: all that this node owns")
    parser.add_argument("--no-wait", action="store_true", help="return at once; 'farshore status' tells the result")
    parser.add_argument("--no-contents", action="store_true", help="compare only names, sizes and metadata")
    parser.add_argument("--no-repair", action="store_true", help="only tell what differs on the replica")
    parser.add_argument(
        "--repair-from-source",
        action="store_true",
        help="also send what changed here without a trace; without this, it is only told, as it may be damage",
    )
    parser.add_argument(
        "--rate", metavar="RATE", help="read no more than this in a second, such as 50MB/s or unlimited"
    )
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")
    daemon.add_place(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry it out; raises DriftRemains when something differs in the end."""
    if arguments.no_repair and arguments.repair_from_source:
        raise UsageError("--no-repair and --repair-from-source exclude each other")
    request = api.Verify(
        arguments.group,
        contents=not arguments.no_contents,
        repair=not arguments.no_repair,
        from_source=arguments.repair_from_source,
        rate=_rate(arguments.rate),
    )
    answer = daemon.ask_node(arguments, request, _TIMEOUT)
    if not isinstance(answer, api.Done):
        raise ProtocolError("the daemon", f"{type(answer).__name__} answers a verification")
    runs = set(answer.detail.split())
    if arguments.no_wait:
        print(f"verifying; 'farshore status' tells the result ({', '.join(sorted(runs))})")
        return 0
    reports = asyncio.run(_until_ended(daemon.directory(arguments) / client.NODE_SOCKET, runs))
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(reports), indent=2).decode())
    else:
        for group, report in reports.items():
            for line in describe(group, report):
                print(line)
    for group, report in reports.items():
        if report.result == "failed":
            raise FarshoreError(f"verification of group {group} failed: {report.reason}")
        if report.result == "drift":
            raise DriftRemains(group, report.reason or f"{report.unrepaired} paths differ still")
    return 0


def describe(group: str, report: api.VerificationReport) -> Iterable[str]:
    """The lines that tell of a report."""
    read = (
        "" if not report.contents else f", {size(report.read_source)} read here and {size(report.read_replica)} there"
    )
    yield f"{group}: {verdict(report)}; {report.paths} paths{read}, in {duration(report.ended - report.started)}"
    if report.busy:
        yield f"  {report.busy} paths could not be compared: they change all the time, or cannot be read here"
    if report.withheld:
        yield f"  {report.withheld} paths cannot be replicated; 'farshore status' tells why"
    for drift in report.drifts[:_SHOWN]:
        end = "repaired" if drift.repaired else "NOT REPAIRED"
        yield f"  {drift.path}: {_WORDS.get(drift.finding, drift.finding)} ({', '.join(drift.differences)}); {end}"
    more = sum(report.findings.values()) - min(len(report.drifts), _SHOWN)
    if more > 0:
        yield f"  and {more} more"


def verdict(report: api.VerificationReport) -> str:
    """What came out, in a few words."""
    differed = sum(report.findings.values())
    match report.result:
        case "clean":
            return "no difference"
        case "repaired":
            return f"{_count(differed)} differed, all repaired"
        case "drift":
            return f"{_count(differed)} differed, {report.unrepaired} not repaired"
    return f"failed: {report.reason}"


def size(count: float) -> str:
    """A number of bytes, in a unit that suits it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """A time, in units that suit it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


_WORDS = {
    "replica": "the replica had something else",
    "index": "both sides agreed, the index did not",
    "unseen": "changed here, and no event had told",
    "untraced": "its content changed here without a trace",
}


async def _until_ended(socket: Path, runs: set[str]) -> dict[str, api.VerificationReport]:
    """The reports by group, when all runs have ended; what happens is shown on stderr meanwhile."""
    reports: dict[str, api.VerificationReport] = {}
    heard = time.monotonic()
    shown = ""
    while True:
        try:
            status = await client.ask_socket(socket, api.StatusRequest(), _TIMEOUT)
        except (PeerUnreachable, NotInTime):
            if time.monotonic() - heard > _AWAY:
                raise
            await asyncio.sleep(_POLL)
            continue
        if not isinstance(status, api.NodeStatus):
            raise ProtocolError(str(socket), f"{type(status).__name__} answers a node's status request")
        heard = time.monotonic()
        under_way = {}
        for name, group in status.groups.items():
            verification = group.verification
            if verification is None:
                continue
            if verification.last is not None and verification.last.run in runs:
                reports[name] = verification.last
            elif verification.run in runs:
                under_way[name] = verification
        if not under_way:
            missing = len(runs) - len(reports)
            if missing:
                _clear(shown)
                raise FarshoreError("the verification was given up: this node does not own the group any more")
            _clear(shown)
            return reports
        shown = _show(under_way, shown)
        await asyncio.sleep(_POLL)


def _show(under_way: dict[str, api.VerificationStatus], before: str) -> str:
    """Say how far it is: over the line before on a terminal, otherwise when the phase changes."""
    if sys.stderr.isatty():
        text = "; ".join(
            f"{name}: {each.phase}, {each.paths} paths, {size(each.read_source)} here, {size(each.read_replica)} there"
            for name, each in under_way.items()
        )
        print(f"\r{text.ljust(len(before))}", end="", file=sys.stderr, flush=True)
        return text
    text = "; ".join(f"{name}: {each.phase}" for name, each in under_way.items())
    if text != before:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
    return text


def _clear(shown: str) -> None:
    if shown and sys.stderr.isatty():
        print("\r" + " " * len(shown) + "\r", end="", file=sys.stderr, flush=True)


def _rate(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        rate = read_rate("--rate", text)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    return 0.0 if math.isinf(rate) else rate


def _count(paths: int) -> str:
    return "1 path" if paths == 1 else f"{paths} paths"
