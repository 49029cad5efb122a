"""The command line: `tests/lab/lab COMMAND`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from . import base, capture, deps, fabric, manage, ssh
from . import host as machine
from .paths import LabPaths, known_labs
from .proc import LabError
from .topology import load

TOPOLOGIES = Path(__file__).with_name("topologies")
LINKS = "LINK is host:interface, such as ldrg:inet0, or `internet`: every gateway's Internet side."


class _Progress:
    """Prints lines with the seconds since the command began."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:6.1f} s] {text}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lab", description="Real Debian hosts on this machine, wired as two sites and an Internet."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, epilog: str = "", *, lab: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text + ".", epilog=epilog)
        if lab:
            command.add_argument("--name", default="drill", help="the lab's name (default: drill)")
        return command

    add("deps", "install what the lab needs on this machine", lab=False)

    command = add("base", "build the cached base trees that are missing", lab=False)
    command.add_argument("release", nargs="*", metavar="RELEASE", help="default: all of them")

    command = add("up", "make a lab; returns when its hosts run and answer SSH")
    command.add_argument(
        "--topology",
        default="drill",
        help="a topology file, or the name of one in tests/lab/topologies (default: drill)",
    )
    command.add_argument("--reuse", action="store_true", help="be content when this lab is up already")

    command = add("down", "remove a lab, or what a crash left of it")
    command.add_argument("--all", action="store_true", help="remove every lab on this machine")

    command = add("list", "show labs, hosts and cut links", lab=False)
    command.add_argument("--json", action="store_true", help="for programs")

    command = add(
        "shell",
        "open a shell on a host, or run a command there and exit with its code",
        "One word after -- is a shell command line; several are a command's words.",
    )
    command.add_argument("--direct", action="store_true", help="enter without SSH, also when that is broken")
    command.add_argument("host", metavar="HOST")
    command.add_argument("words", nargs="*", metavar="CMD", help="after --")

    command = add("cut", "let nothing through a link", LINKS)
    command.add_argument("--unplug", action="store_true", help="the host loses its carrier, too")
    command.add_argument("link", metavar="LINK")
    command = add("restore", "undo cut", LINKS)
    command.add_argument("link", metavar="LINK")

    for name, text in (
        ("kill", "pull a host's plug: no shutdown, not a packet more"),
        ("start", "boot a host that is off, from the disk as it was left"),
        ("reboot", "reboot a host the orderly way"),
    ):
        add(name, text).add_argument("host", metavar="HOST")

    command = add("capture", "record the frames on a link")
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    action = actions.add_parser("start", help="start recording", epilog=LINKS)
    action.add_argument("file", type=Path, metavar="FILE", help="a pcap file")
    action.add_argument("--link", default="internet", help="also a network's name, such as ldc (default: internet)")
    action = actions.add_parser("stop", help="stop recording: all captures, or the one into FILE")
    action.add_argument("file", type=Path, metavar="FILE", nargs="?")

    # How a lab starts a host's supervisor; not for people, hence without help.
    command = commands.add_parser("_supervise")
    command.add_argument("--name", required=True)
    command.add_argument("host")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        return _dispatch(arguments)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab: interrupted", file=sys.stderr)
        return 130


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Let an ending terminal or job clean up like Ctrl-C does."""
    raise KeyboardInterrupt


def _dispatch(arguments: argparse.Namespace) -> int:
    say = _Progress()
    match arguments.command:
        case "deps":
            deps.install(say)
        case "base":
            deps.check()
            for path in base.ensure(arguments.release or base.RELEASES, say).values():
                print(path)
        case "down" if arguments.all:
            deps.check()
            for name in known_labs():
                _down(name, say)
        case "down":
            deps.check()
            _down(arguments.name, say)
        case "list":
            _list(as_json=arguments.json)
        case "_supervise":
            paths = LabPaths(arguments.name)
            topology = load(paths.topology)
            return machine.supervise(paths, topology, topology.host(arguments.host))
        case "up":
            deps.check()
            _up(arguments, say)
        case "shell":
            return _shell(arguments)
        case _:
            _change(arguments, say)
    return 0


def _up(arguments: argparse.Namespace, say: _Progress) -> None:
    paths = LabPaths(arguments.name)
    file = Path(arguments.topology)
    if not file.suffix:
        file = TOPOLOGIES / f"{file.name}.yml"
    if arguments.reuse and paths.topology.exists():
        topology = manage.opened(paths)
        if all(machine.is_on(paths, host) for host in topology.hosts.values()):
            say(f"lab {paths.name} is up already")
            return
    manage.up(paths, file, say)
    say(f"lab {paths.name} is up: ssh -F {paths.ssh_config} HOST; ansible-playbook -i {paths.inventory}")


def _down(name: str, say: _Progress) -> None:
    removed = manage.down(LabPaths(name))
    say(f"lab {name} is gone" if removed else f"there is no lab {name}")


def _change(arguments: argparse.Namespace, say: _Progress) -> None:
    """Carry out a command that changes something in a lab that is up."""
    paths = LabPaths(arguments.name)
    with manage.holding(paths):
        topology = manage.opened(paths)
        match arguments.command:
            case "cut":
                for host, interface in topology.links(arguments.link):
                    fabric.cut(paths, host, interface, unplugged=arguments.unplug)
            case "restore":
                for host, interface in topology.links(arguments.link):
                    fabric.restore(paths, host, interface)
            case "kill":
                manage.kill(paths, topology, topology.host(arguments.host))
            case "start":
                manage.start(paths, topology.host(arguments.host), say)
            case "reboot":
                manage.reboot(paths, topology.host(arguments.host), say)
            case "capture" if arguments.action == "start":
                capture.start(paths, topology, arguments.file, arguments.link)
            case "capture":
                for file in capture.stop(paths, arguments.file):
                    print(file)


def _shell(arguments: argparse.Namespace) -> int:
    paths = LabPaths(arguments.name)
    host = manage.opened(paths).host(arguments.host)
    words = arguments.words
    line = words[0] if len(words) == 1 else shlex.join(words)
    if not arguments.direct:
        command = ssh.command(paths, host.name, [line] if words else [])
        os.execvp(command[0], command)
    leader = machine.leader(paths, host)
    if leader is None:
        raise LabError(f"{host.name} is off")
    enter = [
        "nsenter",
        f"--target={leader}",
        "--all",
        "--wdns=/",
        "env",
        "-i",
        f"TERM={os.environ.get('TERM', 'dumb')}",
    ]
    command = [*enter, "HOME=/root", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "bash", "-l"]
    if words:
        command += ["-c", line]
    os.execvp(command[0], command)


def _list(*, as_json: bool) -> None:
    labs = [manage.status(LabPaths(name)) for name in known_labs()]
    if as_json:
        print(json.dumps({"labs": labs}, indent=2))
        return
    for lab in labs:
        print(f"{lab['name']}" + ("  (broken: take it down)" if lab["broken"] else ""))
        for name, host in lab["hosts"].items():
            addresses = " ".join(f"{i}={a}" for i, a in host["addresses"].items())
            print(f"  {name:9} {host['state']:3} {host['release']:9} mgmt0={host['management']} {addresses}")
        for link in lab["cut"]:
            print(f"  cut: {link}")
        for running in lab["captures"]:
            print(f"  capture: {running['link']} into {running['file']}")
