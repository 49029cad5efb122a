"""What the subcommands that ask a daemon share: finding its socket, and asking."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from farshore.control import api, client

DEFAULT_RUNTIME = Path("/run/farshore")


def add_place(parser: argparse.ArgumentParser) -> None:
    """Options that say which daemon is meant."""
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--runtime-dir", type=Path, default=DEFAULT_RUNTIME, help="where the daemon's socket is (%(default)s)"
    )
    place.add_argument("--state", type=Path, help="the state directory of a running 'farshore mirror'")


def directory(arguments: argparse.Namespace) -> Path:
    """The directory that the daemon's socket is in."""
    chosen: Path = arguments.state or arguments.runtime_dir
    return chosen


def ask_node(arguments: argparse.Namespace, request: api.Request, timeout: float) -> client.Answer:
    """Ask ``farshore-node`` (or a mirror); raises as ``client.ask_socket``."""
    return asyncio.run(client.ask_socket(directory(arguments) / client.NODE_SOCKET, request, timeout))
