"""``farshore approve`` and ``farshore reject``: decide about changes that the brake holds on this replica."""

from __future__ import annotations

import argparse
import sys

import msgspec

from farshore.cli import daemon
from farshore.control import api

#: What was held is applied before the answer comes: as many changes as came meanwhile.
_TIMEOUT = 3600.0
_STATUS_TIMEOUT = 15.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both subcommands."""
    for name, text, more in (
        ("approve", "apply the changes of a group that the brake holds here", "They are applied in order."),
        (
            "reject",
            "set the changes of a group aside that the brake holds here",
            "The replica stays as it is, and what follows is held too, until 'farshore approve' or a change of the "
            "owner.",
        ),
    ):
        parser = subparsers.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. {more} 'farshore status' says why they are held. "
            "Exits with 28 when nothing is held. For the administrator of the server that has the replica.",
        )
        parser.add_argument("group", metavar="GROUP")
        parser.add_argument("--json", action="store_true", help="print the group's status as JSON at the end")
        daemon.add_place(parser)
        parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry it out and print what was done, or the group's status afterwards."""
    kind = api.Approve if arguments.command == "approve" else api.Reject
    answer = daemon.ask_node(arguments, kind(arguments.group), _TIMEOUT)
    if arguments.json:
        status = daemon.ask_node(arguments, api.StatusRequest(), _STATUS_TIMEOUT)
        if isinstance(status, api.NodeStatus):
            data = msgspec.json.encode(status.groups[arguments.group])
            sys.stdout.buffer.write(msgspec.json.format(data, indent=2) + b"\n")
    elif isinstance(answer, api.Done):
        print(answer.detail)
    return 0
