"""``farshore metrics``: the state of this machine's daemons for Prometheus."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from farshore import durable
from farshore.cli import daemon
from farshore.control import api, client
from farshore.errors import FarshoreError, PeerUnreachable, StateError

_TIMEOUT = 10.0
_SOCKETS = {"monitor": client.MONITOR_SOCKET, "node": client.NODE_SOCKET}


class NotWritten(FarshoreError):
    """Cannot write {0}: {1}"""

    exit_code = 32


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "metrics",
        help="the state of this machine's daemons for Prometheus",
        description="Prints the state of the daemons on this machine in the Prometheus text format; docs/metrics.md "
        "has every metric. With --output, a file is replaced as a whole, for node_exporter's textfile collector. Exits "
        "with 10 when a daemon does not answer; what the others tell is written all the same, and farshore_up is 0.",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write FILE (mode 0644) instead of stdout")
    parser.add_argument(
        "--daemon",
        choices=tuple(_SOCKETS),
        action="append",
        default=[],
        help="a daemon that must be here; may be given twice (default: those whose socket is there)",
    )
    daemon.add_place(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print or write the metrics; raises PeerUnreachable when a daemon is missing, NotWritten."""
    # Nobody else needs it, and it takes a while to load.
    from farshore.control.metrics import Page

    where = daemon.directory(arguments)
    wanted = arguments.daemon or [name for name, socket in _SOCKETS.items() if (where / socket).exists()]
    if not wanted:
        raise PeerUnreachable(f"a daemon of this machine in {where}", "no socket there; is farshore running?")
    page = Page()
    failure: FarshoreError | None = None
    for name in dict.fromkeys(wanted):
        try:
            answer = asyncio.run(client.ask_socket(where / _SOCKETS[name], api.StatusRequest(), _TIMEOUT))
        except FarshoreError as error:
            failure = failure or error
            page.up(name, False)
            continue
        assert isinstance(answer, (api.NodeStatus, api.MonitorStatus))
        page.add(answer)
    _put(page.text(), arguments.output)
    if failure is not None:
        raise failure
    return 0


def _put(text: bytes, output: Path | None) -> None:
    if output is None:
        sys.stdout.buffer.write(text)
        return
    try:
        durable.write(output, text, 0o644)
    except StateError as error:
        raise NotWritten(output, error.args[1]) from error
