"""The command ``farshore``: one file per subcommand. Importing this package never imports numba."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from farshore import __version__, log
from farshore.errors import FarshoreError


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command, with a subparser for each subcommand."""
    from farshore.cli import (
        approve,
        delta,
        explain,
        flush,
        history,
        limits,
        metrics,
        mirror,
        pause,
        status,
        switch,
        verify,
    )

    parser = argparse.ArgumentParser(
        prog="farshore",
        description="Disaster recovery over the ordinary Internet.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 wrong configuration, 10 unreachable, "
        "11 refused, 13 stale epoch, 20 not done in time, 27 given up, 28 nothing is held, "
        "34 something differs still, 37 not protected. 'farshore COMMAND --help' tells more.",
    )
    parser.add_argument("--version", action="version", version=f"farshore {__version__}")
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="warning",
        help="how much to tell on stderr (default: %(default)s)",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (status, explain, metrics, flush, verify, pause, approve, history, mirror, delta, limits, switch):
        module.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the result is the process's exit code."""
    parsed = build_parser().parse_args(arguments)
    log.setup(parsed.log_level)
    try:
        return int(parsed.func(parsed))
    except FarshoreError as error:
        print(f"farshore: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has gone; stdout must not complain again while the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
