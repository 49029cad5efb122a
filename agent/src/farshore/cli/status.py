"""``farshore status``: how protected are you, now?"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterable, Sequence

import msgspec

from farshore.cli import daemon, verify
from farshore.control import api, client
from farshore.errors import PeerUnreachable

_TIMEOUT = 15.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "status",
        help="how protected the groups are, now",
        description="Shows the groups of the daemons on this machine: on a server who owns each group, how old the "
        "oldest change is that is not yet on the other side (RPO), and what is on its way; on a gateway who "
        "serves the users, and why.",
    )
    parser.add_argument("--json", action="store_true", help="print the whole state as JSON")
    daemon.add_place(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the state of every daemon that runs here; raises PeerUnreachable when there is none."""
    where = daemon.directory(arguments)
    answers = []
    for name in (client.MONITOR_SOCKET, client.NODE_SOCKET):
        if (where / name).exists():
            answers.append(asyncio.run(client.ask_socket(where / name, api.StatusRequest(), _TIMEOUT)))
    if not answers:
        raise PeerUnreachable(f"a daemon of this machine in {where}", "no socket there; is farshore running?")
    if arguments.json:
        data = answers[0] if len(answers) == 1 else answers
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n")
        return 0
    for answer in answers:
        for line in _describe(answer):
            print(line)
    return 0


def _describe(answer: api.Answer) -> Iterable[str]:
    if isinstance(answer, api.NodeStatus):
        yield f"{answer.node}: farshore {answer.version}, up {_duration(answer.uptime)}"
        rows: list[tuple[str, ...]] = [("GROUP", "ROLE", "EPOCH", "STATE", "RPO", "BACKLOG", "UNITS", "")]
        for group in answer.groups.values():
            role = "owner" if group.owner == group.side and group.epoch else "replica"
            rpo = "-" if group.rpo is None else _duration(group.rpo)
            units = ", ".join(f"{unit.removesuffix('.service')} {state}" for unit, state in group.units.items())
            rows.append(
                (
                    group.group,
                    role,
                    str(group.epoch),
                    group.state,
                    rpo,
                    str(group.backlog_paths),
                    units or "-",
                    group.reason,
                )
            )
        yield from _table(rows)
        yield from _configuration(answer.config)
        for group in answer.groups.values():
            yield from _held(group, "")
            yield from _restored(group, "")
            yield from _watched(group)
            if group.verification is not None:
                yield f"  verified {group.group}: {_verification(group.verification)}"
            for problem in group.problems:
                yield f"  ! {group.group}: {problem}"
    elif isinstance(answer, api.MonitorStatus):
        yield f"{answer.node}: farshore {answer.version}, up {_duration(answer.uptime)}, tunnel {answer.tunnel}"
        rows = [("GROUP", "PHASE", "SERVED BY", "EPOCH", "SERVICES", "")]
        for switch in answer.groups.values():
            health = ", ".join(
                f"{each.service} {'?' if each.healthy is None else 'up' if each.healthy else 'down'}"
                for each in switch.health
            )
            rows.append((switch.group, switch.phase, switch.served_by, str(switch.epoch), health or "-", switch.reason))
        yield from _table(rows)
        for switch in answer.groups.values():
            for where, node in (("local", switch.local), ("backup", switch.backup)):
                if node is not None:
                    yield from _held(node, f" on the {where} server")
                    yield from _restored(node, f" on the {where} server")


def _held(group: api.GroupStatus, where: str) -> Iterable[str]:
    """What the administrator has to decide."""
    if not group.held:
        return
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(group.held_since))
    yield f"  HELD {group.group}{where}: {group.held}"
    yield f"       {group.held_transactions} transactions wait since {since}; they are durable there, not applied"
    choice = f"'farshore approve {group.group}' or 'farshore reject {group.group}'"
    if group.state == "rejected":
        choice = f"'farshore approve {group.group}', or a change of the owner"
    yield f"       {choice}{where} ends it; see docs/brake.md"


def _configuration(config: api.ConfigStatus | None) -> Iterable[str]:
    """What of the configuration's file is not in force."""
    if config is not None and config.failed:
        yield f"  ! {config.failed}"
    if config is not None and config.restart:
        keys = ", ".join(config.restart)
        yield f"  ! changed in the configuration, and not in force before 'systemctl restart farshore-node': {keys}"


def _watched(group: api.GroupStatus) -> Iterable[str]:
    """How the group is watched, where that is not all well; the problems name the remedies."""
    watch = group.watch
    if watch is None or (watch.state in ("watching", "starting", "paused") and not watch.overflows):
        return
    text = f"watched by {watch.engine}" + (f": {watch.directories:,} directories" if watch.directories else "")
    if watch.state == "failed":
        # No engine was chosen yet where even that fails.
        what = "that" if watch.engine == "starting" else watch.engine
        text = f"not watched, as {what} fails; it is tried again every few seconds"
    elif watch.unwatched:
        text += f"; {watch.unwatched:,} more are scanned instead"
    yield f"  {group.group} is {text}"
    if watch.overflows:
        times = "once" if watch.overflows == 1 else f"{watch.overflows:,} times"
        yield (
            f"  {group.group}: the kernel's queue of events overflowed {times}, and all was looked at again; a longer "
            f"one: sysctl -w fs.{watch.engine}.max_queued_events=N, or a higher node_{watch.engine}_queued_events; "
            "then farshore pause and farshore resume"
        )


def _restored(group: api.GroupStatus, where: str) -> Iterable[str]:
    """To what the next promotion goes back, and what was put in place."""
    if group.back_to is not None:
        since = ""
        if group.back_to_time:
            since = time.strftime(" of %Y-%m-%d %H:%M:%S", time.localtime(group.back_to_time))
        state = f"the state after transaction {group.back_to}{since}"
        yield f"  RESTORE {group.group}{where}: the next promotion takes {state}"
    if group.restored:
        yield f"  restored {group.group}{where}: {group.restored}"


def _verification(status: api.VerificationStatus) -> str:
    parts = []
    if status.run:
        parts.append(f"{status.phase} now, {status.paths} paths done")
    if status.last is not None:
        parts.append(f"{_duration(max(0.0, time.time() - status.last.ended))} ago, {verify.verdict(status.last)}")
    elif not status.run:
        parts.append("never")
    if status.due is not None and not status.run:
        parts.append(f"next in {_duration(max(0.0, status.due - time.time()))}")
    return "; ".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days"
