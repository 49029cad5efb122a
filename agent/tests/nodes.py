"""For tests: two nodes in this process, and a mirror as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farshore.cli.mirror import make_keys
from farshore.config import BrakeConfig, Endpoint, NodeConfig, NodeGroup, NodeRef, PathConfig, Tls
from farshore.daemons.node import Node

GENEROUS = 60.0


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, with a limit that only a fault exceeds."""
    async with asyncio.timeout(GENEROUS):
        while not condition():  # noqa: ASYNC110 - conditions of many kinds, none with an event
            await asyncio.sleep(0.01)
    assert condition(), what


@dataclass
class Pair:
    """A local and a remote node with one group, ``web``, and their trees."""

    base: Path
    local: Node
    remote: Node
    keys: Path

    @property
    def local_tree(self) -> Path:
        return self.base / "local-tree"

    @property
    def remote_tree(self) -> Path:
        return self.base / "remote-tree"

    async def own(self, owner: Any, epoch: int) -> None:
        """Announce the owner to both nodes, the coming replica first."""
        nodes = [self.remote, self.local] if owner == "local" else [self.local, self.remote]
        for node in nodes:
            await node.groups["web"].set_owner(owner, epoch, False)

    async def restart(self, side: str) -> None:
        """Stop one node and start it again on the same state and port."""
        node: Node = getattr(self, side)
        await node.stop()
        again = Node(node.config)
        await again.start(None)
        setattr(self, side, again)


@contextlib.asynccontextmanager
async def running_pair(base: Path, crl: bool = False) -> AsyncIterator[Pair]:
    """Both nodes run; nobody owns the group yet. With ``crl``, ``base/pki`` has keys and a list already."""
    keys = base / "pki"
    if not crl:
        make_keys(keys, ("local", "remote", "stranger", "gateway"))
    ports = dict(zip(("local", "remote"), free_ports(2), strict=True))

    def node(side: Any, other: str) -> Node:
        group = NodeGroup(
            side=side,
            peer=NodeRef(other, "127.0.0.1", ports[other]),
            paths=(PathConfig("/srv/www", str(base / f"{side}-tree"), exclude=("*.tmp",)),),
            # What changes in a test is most of a tree.
            brake=BrakeConfig("off"),
        )
        listed = keys / "ca.crl" if crl else None
        tls = Tls(keys / "ca.crt", keys / f"{side}.crt", keys / f"{side}.key", listed)
        return Node(
            NodeConfig(
                side,
                Endpoint("127.0.0.1", ports[side]),
                tls,
                {"web": group},
                gateways=("gateway",),
                state_dir=base / f"{side}-state",
            )
        )

    async with started(Pair(base, node("local", "remote"), node("remote", "local"), keys)) as made:
        yield made


@contextlib.asynccontextmanager
async def started(made: Pair) -> AsyncIterator[Pair]:
    """Both nodes of a pair run, with a local tree that is empty."""
    made.local_tree.mkdir()
    await made.local.start(None)
    await made.remote.start(None)
    try:
        yield made
    finally:
        await made.local.stop()
        await made.remote.stop()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on now."""
    import socket

    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Mirror:
    """``farshore mirror`` as a user runs it."""

    def __init__(self, base: Path, source: Path, *options: str) -> None:
        self.source = source
        self.destination = base / "dst"
        self.state = base / "state"
        self.options = options
        self.process: subprocess.Popen[str] | None = None

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "farshore.cli", *arguments]

    def start(self) -> None:
        """Start and wait for ``ready``."""
        arguments = ["mirror", "--state", str(self.state), *self.options]
        self.process = subprocess.Popen(
            self.command(*arguments, str(self.source), str(self.destination)), stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def flush(self) -> None:
        """``farshore flush``; what was changed before is on the other side after it."""
        subprocess.run(self.command("flush", "--state", str(self.state), "--timeout", "120"), check=True, timeout=150)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(GENEROUS)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(GENEROUS)
