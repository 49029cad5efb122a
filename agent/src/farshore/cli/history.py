"""``farshore history`` and ``farshore restore``: what a replica was, and bringing it back."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from datetime import datetime

import msgspec

from farshore.cli import daemon
from farshore.control import api, client
from farshore.errors import FarshoreError, UsageError

_TIMEOUT = 60.0
#: A restore takes as long as it takes.
_RESTORE_TIMEOUT = 7 * 86_400.0
_STATUS_TIMEOUT = 15.0
_SECOND = 10**9
_WHEN = "a transaction's number, a local time such as '2026-11-25 14:30', or an age such as 90m, 2h or 3d"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both subcommands."""
    parser = subparsers.add_parser(
        "history",
        help="what a group's replica here can go back to",
        description="Shows from when to when this server remembers a group, or, with PATH, what changed there: each "
        "line is something that can be brought back with 'farshore restore --at', by the number in front of it.",
    )
    parser.add_argument("group", metavar="GROUP")
    parser.add_argument("path", nargs="?", default="", metavar="PATH", help="a file or directory, as it is here")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="at most so many changes (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    daemon.add_place(parser)
    parser.set_defaults(func=run_history)

    parser = subparsers.add_parser(
        "restore",
        help="bring back what a group's replica was",
        description="Brings back a file, a directory or a whole group as it was. With --to, copies are made; with "
        "--in-place, on the server that owns the group now, they take the place of what is there, which is kept. With "
        "--on-promotion, on the replica's server, that is done to the whole group when this server becomes its owner, "
        "before its services start.",
    )
    parser.add_argument("group", metavar="GROUP")
    parser.add_argument("path", nargs="?", default="", metavar="PATH", help="as it is here; default: the whole group")
    parser.add_argument("--at", metavar="TIME|SEQ", help=_WHEN)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--to", metavar="DIR", help="a directory apart from the group's; made if it is missing")
    place.add_argument("--in-place", action="store_true", help="only where the group's owner is")
    place.add_argument("--on-promotion", action="store_true", help="only where the group's replica is")
    parser.add_argument("--cancel", action="store_true", help="take back what --on-promotion has asked for")
    daemon.add_place(parser)
    parser.set_defaults(func=run_restore)


def parse_when(text: str, now: float) -> tuple[int | None, int | None]:
    """What a user calls a state: a transaction's number, or a time in ns; raises UsageError with what is allowed.

    ``now`` is in seconds since the Unix epoch.
    """
    text = text.strip()
    if text.isdigit():
        return int(text), None
    number, unit = text[:-1].strip(), _UNITS.get(text[-1:])
    if unit is not None and number.isdigit():
        return None, int((now - int(number) * unit) * _SECOND)
    try:
        return None, int(datetime.fromisoformat(text).timestamp() * _SECOND)
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"--at: {text!r} is not allowed; allowed: {_WHEN}") from None


def run_history(arguments: argparse.Namespace) -> int:
    """Print it."""
    path = os.path.abspath(arguments.path) if arguments.path else ""
    answer = daemon.ask_node(arguments, api.History(arguments.group, path, arguments.limit), _TIMEOUT)
    assert isinstance(answer, api.HistoryAnswer)
    if arguments.json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(answer), indent=2) + b"\n")
        return 0
    if path:
        if not answer.versions:
            print("no change is remembered")
        for version in answer.versions:
            print(f"{version.seq - 1:>10}  until {_clock(version.time)}  {_told(version)}")
        return 0
    if not answer.spans:
        print("nothing has changed yet that could be gone back to")
    for span in answer.spans:
        exact = "every transaction" if span.exact else "its beginning"
        numbers = f"{span.first - 1}..{span.last}"
        print(f"{_clock(span.begin)} to {_clock(span.end)}  {numbers:>17}  {exact}, {_size(span.size)} kept")
    return 0


def run_restore(arguments: argparse.Namespace) -> int:
    """Carry it out, telling how far it is."""
    if arguments.cancel and not arguments.on_promotion:
        raise UsageError("--cancel is allowed with --on-promotion only")
    if arguments.cancel and arguments.at is not None:
        raise UsageError("--at and --cancel exclude each other")
    if arguments.on_promotion and arguments.path:
        raise UsageError("--on-promotion is for the whole group; no PATH is allowed")
    if arguments.at is None and not arguments.cancel:
        raise UsageError(f"--at is needed; allowed: {_WHEN}")
    seq, time_ns = (None, None) if arguments.cancel else parse_when(arguments.at, time.time())
    if arguments.on_promotion:
        wish = api.RestoreOnPromotion(arguments.group, seq, time_ns, arguments.cancel)
        answer = daemon.ask_node(arguments, wish, _TIMEOUT)
        if isinstance(answer, api.Done):
            print(answer.detail)
        return 0
    path = os.path.abspath(arguments.path) if arguments.path else ""
    target = os.path.abspath(arguments.to) if arguments.to else ""
    request = api.Restore(arguments.group, path, seq, time_ns, target)
    done = asyncio.run(_ask(arguments, request))
    if isinstance(done, api.Done):
        print(done.detail)
    return 0


async def _ask(arguments: argparse.Namespace, request: api.Restore) -> object:
    socket = daemon.directory(arguments) / client.NODE_SOCKET
    asked = asyncio.ensure_future(client.ask_socket(socket, request, _RESTORE_TIMEOUT))
    shown = False
    while not (await asyncio.wait({asked}, timeout=1.0))[0]:
        try:
            status = await client.ask_socket(socket, api.StatusRequest(), _STATUS_TIMEOUT)
        except FarshoreError:
            continue
        if sys.stderr.isatty() and isinstance(status, api.NodeStatus) and arguments.group in status.groups:
            print(f"\r{status.groups[arguments.group].restoring}   ", end="", file=sys.stderr, flush=True)
            shown = True
    if shown:
        print(file=sys.stderr)
    return asked.result()


def _told(version: api.Version) -> str:
    match version.was:
        case "file":
            return f"a file of {_size(version.size)}, changed {_clock(version.mtime)}"
        case "nothing":
            return "nothing was there"
        case "metadata":
            return "other metadata"
        case "moved":
            return f"it was at {version.path}"
    return f"a {version.was}" if version.was != "other" else "a fifo or device"


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
