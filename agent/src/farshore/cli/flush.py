"""``farshore flush``: wait until all changes made so far are on the other side."""

from __future__ import annotations

import argparse

from farshore.cli import daemon
from farshore.control import api


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "flush",
        help="wait until all changes are on the other side",
        description="Returns when the other side's tree has all changes made before the call. "
        "Exits with 20 and the reason when that did not happen in time.",
    )
    parser.add_argument("group", nargs="?", default="", metavar="GROUP", help="default: all that this node owns")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="default: %(default)g")
    parser.add_argument(
        "--durable", action="store_true", help="return as soon as they are durable in the other side's journal"
    )
    daemon.add_place(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry it out."""
    daemon.ask_node(arguments, api.Flush(arguments.timeout, arguments.group, arguments.durable), arguments.timeout + 5)
    return 0
