"""``farshore explain``: is this file protected, and if not, why?"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from datetime import datetime

import msgspec

from farshore.cli import daemon
from farshore.control import api

_TIMEOUT = 60.0
#: What the command ends with when the path is not protected.
NOT_PROTECTED = 37

_STATES = {
    "same": "the same as here",
    "waiting": "changed here, and not sent yet",
    "sending": "on its way",
    "missing": "not there yet",
    "different": "not as it is here",
    "young": "not sent yet",
    "kept": "an earlier state, which is kept as it is",
    "absent": "nothing",
    "unknown": "not known",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "explain",
        help="whether a file is protected, and why not",
        description="Tells of a path of this server which group it belongs to, whether it is protected and if not, "
        "what leaves it out, and how its copy on the other server is. Links in the directories above PATH are "
        "resolved; if PATH is a link itself, it is about the link.",
        epilog="Exit codes: 0 protected, and durable on the other server as it is; 1 protected, but not durable yet, "
        f"or that is not known here; {NOT_PROTECTED} not protected.",
    )
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    daemon.add_place(parser)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the answer."""
    path = os.path.join(os.getcwdb(), os.fsencode(arguments.path))
    answer = daemon.ask_node(arguments, api.Explain(path), _TIMEOUT)
    assert isinstance(answer, api.Explanation)
    if arguments.json:
        sys.stdout.buffer.write(
            msgspec.json.format(msgspec.json.encode(msgspec.structs.asdict(answer)), indent=2) + b"\n"
        )
    else:
        for line in describe(answer):
            print(line)
    if not answer.protected:
        return NOT_PROTECTED
    return 0 if answer.durable else 1


def describe(answer: api.Explanation) -> Iterator[str]:
    """The answer as lines for people."""
    yield answer.path
    if not answer.group:
        yield f"  protected: no, {answer.why}"
        yield f"  nearest:   {', '.join(answer.near) or 'this server protects nothing'}"
        return
    yield f"  group:     {answer.group}; protected path {answer.root}, the other server is {answer.peer}"
    verdict = "yes" if answer.protected else "no"
    yield f"  protected: {verdict}{', ' if answer.why else ''}{answer.why}"
    if answer.state == "replica":
        yield f"  copy:      this server has it; {answer.reason}"
        return
    if answer.state:
        since = f", for {_seconds(answer.waiting)}" if answer.waiting is not None else ""
        yield f"  copy:      {_STATES[answer.state]}{since}{'; ' if answer.reason else ''}{answer.reason}"
    if answer.durable_at is not None:
        when = datetime.fromtimestamp(answer.durable_at).isoformat(" ", "seconds")
        unchanged = ", and nothing has changed since" if answer.durable else ""
        yield f"  durable:   the last change, sent at {when}, is on {answer.peer}{unchanged}"
    elif answer.durable:
        yield f"  durable:   yes, on {answer.peer}, as it is here now"
    if answer.known_below is not None:
        yield f"  below it:  {answer.known_below} paths are known on {answer.peer}; {answer.waiting_below} wait"


def _seconds(count: float) -> str:
    return f"{count:.0f} s" if count < 300 else f"{count / 60:.0f} min" if count < 7200 else f"{count / 3600:.1f} h"
