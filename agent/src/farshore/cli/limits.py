"""``farshore limits``: how high the kernel's limits must be to watch a tree."""

from __future__ import annotations

import argparse
import json
import os

from farshore.fmm.kernel import count_all, watches_for


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "limits",
        help="how high the kernel's limits must be to watch a tree",
        description="Counts the directories at and below each PATH and tells what fs.inotify.max_user_watches should "
        "be: twice as many, rounded up to a power of two. A PATH that is not there counts nothing.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a directory or file that is to be watched")
    parser.add_argument("--json", action="store_true", help="print directories and watches as JSON")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry it out."""
    directories = count_all(map(os.fsencode, arguments.paths))
    watches = watches_for(directories)
    if arguments.json:
        print(json.dumps({"directories": directories, "watches": watches}))
    else:
        print(f"{directories:,} directories; fs.inotify.max_user_watches should be {watches} at least")
    return 0
