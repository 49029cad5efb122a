"""``farshore failover``, ``failback``, ``recover``, ``wait`` and ``rules remove``: asked of the gateway's monitor."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from farshore.control import api
from farshore.control.client import MONITOR_SOCKET, ask_socket
from farshore.control.state import PHASES, Wanted
from farshore.errors import FarshoreError, NotInTime, PeerUnreachable, ProtocolError, UsageError
from farshore.ssm.switch import remove_all

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

RUNTIME_DIR = Path("/run/farshore")
#: Seconds for one answer of the monitor, and between two questions while waiting.
ANSWER_TIMEOUT = 5.0
POLL = 0.1

#: Whether a status, and the texts of the events since the start, are what is waited for.
Reached = Callable[[api.SwitchStatus, list[str]], bool]


class GivenUp(FarshoreError):
    """{0}: given up: {1}"""

    exit_code = 27


_AWAY = ("failed_over", "recovering", "recovered")
_REACHED: dict[str, Callable[[api.SwitchStatus], bool]] = {
    "failover": lambda s: s.phase in _AWAY and s.served_by == "remote" and s.rules_in_place,
    "failback": lambda s: s.phase == "normal" and s.rules_in_place and s.wish == "none",
    "recover": lambda s: s.phase == "recovered" or (s.phase == "normal" and s.wish == "none"),
}
_HELP = {
    "failover": "have the backup server take a group over; it stays there until a failback",
    "failback": "bring a group's data home and have the local server serve it again",
    "recover": "bring a group's data home, and leave its users on the backup server",
}


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommands that switch users between the sites."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--runtime-dir", type=Path, default=RUNTIME_DIR, help="where the monitor's socket is (default: %(default)s)"
    )
    common.add_argument("--json", action="store_true", help="print the group's status as JSON at the end")
    for want, text in _HELP.items():
        parser = subparsers.add_parser(want, parents=[common], help=text, description=text.capitalize() + ".")
        parser.add_argument("group")
        parser.add_argument(
            "--wait", type=_seconds, metavar="SECONDS", help="return when it is done; fail when it takes longer"
        )
        parser.add_argument(
            "--cancel", action="store_true", help="take the wish back: the configured policy decides again"
        )
        parser.set_defaults(func=_wish, want=want)
    parser = subparsers.add_parser("wait", parents=[common], help="wait until a group reaches a phase")
    parser.add_argument("group")
    parser.add_argument(
        "--phase", type=_phases, required=True, metavar="PHASE[,PHASE...]", help=f"one of {', '.join(PHASES)}"
    )
    parser.add_argument("--timeout", type=_seconds, required=True, metavar="SECONDS")
    parser.set_defaults(func=_wait)
    rules = subparsers.add_parser("rules", help="the gateway's rules").add_subparsers(required=True, metavar="COMMAND")
    parser = rules.add_parser(
        "remove", help="delete Farshore's switching rules: users reach the local servers, whatever state these are in"
    )
    parser.set_defaults(func=_remove)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e6:
        raise ValueError(text)
    return value


def _phases(text: str) -> tuple[str, ...]:
    phases = tuple(text.split(","))
    for phase in phases:
        if phase not in PHASES:
            raise argparse.ArgumentTypeError(f"{phase!r} is not a phase; allowed: {', '.join(PHASES)}")
    return phases


def _wish(args: argparse.Namespace) -> int:
    want: Wanted = "none" if args.cancel else args.want
    return asyncio.run(_wish_and_wait(args, want))


async def _wish_and_wait(args: argparse.Namespace, want: Wanted) -> int:
    socket = args.runtime_dir / MONITOR_SOCKET
    _, events = await _status(socket, args.group)
    answer = await ask_socket(socket, api.Wish(args.group, want), ANSWER_TIMEOUT)
    if not isinstance(answer, api.Done):
        raise ProtocolError(str(socket), f"{type(answer).__name__} answers a wish")
    if args.wait is None or want == "none":
        if args.json:
            _print((await _status(socket, args.group))[0])
        else:
            print(answer.detail)
        return 0

    def reached(status: api.SwitchStatus, events: list[str]) -> bool:
        if want == "failover" and status.wish == "none" and status.phase == "normal":
            whys = [event for event in events if "given up" in event or "can't take over" in event]
            raise GivenUp(f"{want} of {args.group}", whys[-1] if whys else status.reason)
        return _REACHED[want](status)

    status = await _until(socket, args.group, reached, args.wait, f"{want} of {args.group}", events[-1:])
    if args.json:
        _print(status)
    return 0


def _wait(args: argparse.Namespace) -> int:
    status = asyncio.run(
        _until(
            args.runtime_dir / MONITOR_SOCKET,
            args.group,
            lambda status, _: status.phase in args.phase,
            args.timeout,
            f"{args.group} to be {' or '.join(args.phase)}",
        )
    )
    if args.json:
        _print(status)
    return 0


def _remove(args: argparse.Namespace) -> int:
    removed = asyncio.run(remove_all())
    print("rules removed" if removed else "there were no rules")
    return 0


async def _status(socket: Path, group: str) -> tuple[api.SwitchStatus, list[str]]:
    """The group's status, and its events, oldest first."""
    answer = await ask_socket(socket, api.StatusRequest(), ANSWER_TIMEOUT)
    if not isinstance(answer, api.MonitorStatus):
        raise ProtocolError(str(socket), f"{type(answer).__name__} answers a monitor's status request")
    if group not in answer.groups:
        raise UsageError(f"no group {group!r}; the groups here are: {', '.join(answer.groups) or 'none'}")
    return answer.groups[group], [line for line in answer.events if line.split(" ", 2)[1] == group]


async def _until(
    socket: Path, group: str, reached: Reached, timeout: float, what: str, seen: Sequence[str] = ()
) -> api.SwitchStatus:
    """Ask until ``reached``, showing on stderr what happens; raises NotInTime with the last reason.

    ``seen`` holds the last event that is none of this, if there was one.
    """
    end = time.monotonic() + timeout
    texts: list[str] = []
    last_event, last = (seen[-1] if seen else ""), ""
    while True:
        status = None
        try:
            status, events = await _status(socket, group)
        except (PeerUnreachable, NotInTime) as error:
            # The monitor may be restarting; it goes on from where it was.
            line = str(error)
        else:
            line = f"[{status.phase}] {status.reason}"
            known = events.index(last_event) + 1 if last_event in events else 0 if last_event else len(events)
            for event in events[known:]:
                text = event.split(" ", 2)[2]
                texts.append(text)
                if text != status.reason:
                    _progress(group, text)
            # Something to compare with, also when nothing has happened yet.
            last_event = events[-1] if events else "none"
        if line != last:
            _progress(group, line)
            last = line
        if status is not None and reached(status, texts):
            return status
        if time.monotonic() >= end:
            raise NotInTime(what, timeout, last)
        await asyncio.sleep(POLL)


def _progress(group: str, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {group} {text}", file=sys.stderr, flush=True)


def _print(status: Any) -> None:
    print(msgspec.json.encode(status).decode())
