"""``farshore pause`` and ``farshore resume``: stop watching and sending for a while; nothing is missed."""

from __future__ import annotations

import argparse

from farshore.cli import daemon
from farshore.control import api

_TIMEOUT = 60.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both subcommands."""
    for name, text in (
        ("pause", "stop watching and sending; the replica stays as it is"),
        ("resume", "watch and send again; what changed meanwhile is found and sent"),
    ):
        parser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        parser.add_argument("group", nargs="?", default="", metavar="GROUP", help="default: all that this node owns")
        daemon.add_place(parser)
        parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry it out and print what was done."""
    kind = api.Pause if arguments.command == "pause" else api.Resume
    answer = daemon.ask_node(arguments, kind(arguments.group), _TIMEOUT)
    if isinstance(answer, api.Done):
        print(answer.detail)
    return 0
