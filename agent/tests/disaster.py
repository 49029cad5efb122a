"""For tests: a local and a remote node as processes, one of which dies in a disaster; and who wrote what until then."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crash import Process
from nodes import free_ports

from farshore import log
from farshore.cli.mirror import make_keys
from farshore.config import Consistency, Endpoint, NodeConfig, NodeGroup, NodeRef, PathConfig, Tls
from farshore.control import api, client
from farshore.daemons import node
from farshore.errors import FarshoreError

GROUP = "app"
SIDES = ("local", "remote")
_READY_SECONDS = 60.0
_ASK_SECONDS = 30.0


class Disaster(Exception):
    """What should not have happened."""


@dataclass
class Acknowledged:
    """Numbers that an application has acknowledged, each with the moment, by the monotonic clock."""

    moments: dict[int, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, number: int) -> None:
        """Just now."""
        now = time.monotonic()
        with self.lock:
            self.moments[number] = now

    def before(self, moment: float) -> set[int]:
        """Those that were acknowledged before a moment."""
        with self.lock:
            return {number for number, when in self.moments.items() if when < moment}


class Nodes:
    """Both nodes of a group. ``trees`` says where each side has its files."""

    def __init__(
        self, base: Path, trees: dict[str, Path], consistency: Consistency, exclude: tuple[str, ...] = ()
    ) -> None:
        self.base = base
        self.epoch = 0
        self._trees = trees
        self._consistency = consistency
        self._exclude = exclude
        self._keys = base / "pki"
        make_keys(self._keys, SIDES)
        self._ports = dict(zip(SIDES, free_ports(2), strict=True))
        self._running: dict[str, Process] = {}

    def start(self, side: str) -> None:
        """Start a node and wait until it answers."""
        config = self._config(side)

        def work() -> None:
            log.setup("info", False)
            asyncio.run(node.run(config))

        process = self._running[side] = Process(work, self._log(side))
        deadline = time.monotonic() + _READY_SECONDS
        while process.alive and time.monotonic() < deadline:
            with contextlib.suppress(FarshoreError):
                self.ask(side, api.StatusRequest(), 5.0)
                return
            time.sleep(0.02)
        raise Disaster(f"node {side} did not start; see {self._log(side)}")

    def own(self, owner: str, *sides: str) -> None:
        """Name the owner to nodes, at the epoch at hand."""
        for side in sides:
            self.ask(side, api.SetOwner(GROUP, owner, self.epoch, False))  # type: ignore[arg-type]

    def take_over(self, owner: str, *sides: str) -> None:
        """As ``own``, at the next epoch."""
        self.epoch += 1
        self.own(owner, *sides)

    def flush(self, side: str, seconds: float = 300.0) -> None:
        """Wait until the other side has everything."""
        self.ask(side, api.Flush(seconds, GROUP), seconds + 5)

    def status(self, side: str) -> tuple[float, api.GroupStatus]:
        """What a node tells of the group, and when it was asked."""
        asked = time.monotonic()
        answer: Any = self.ask(side, api.StatusRequest())
        return asked, answer.groups[GROUP]

    def kill(self, side: str) -> None:
        """SIGKILL."""
        if not self._running[side].end():
            raise Disaster(f"node {side} had ended by itself; see {self._log(side)}")

    def ask(self, side: str, request: api.Request, timeout: float = _ASK_SECONDS) -> api.Answer:
        """Have a request answered. Raises FarshoreError."""
        socket = self._config(side).runtime_dir / client.NODE_SOCKET
        return asyncio.run(client.ask_socket(socket, request, timeout))

    def end(self) -> None:
        """Kill what still runs."""
        for process in self._running.values():
            process.end()

    def _log(self, side: str) -> Path:
        return self.base / f"{side}.log"

    def _config(self, side: Any) -> NodeConfig:
        (peer,) = set(SIDES) - {side}
        keys = self._keys
        group = NodeGroup(
            side=side,
            peer=NodeRef(peer, "127.0.0.1", self._ports[peer]),
            paths=(PathConfig("/app", str(self._trees[side]), exclude=self._exclude),),
            consistency=self._consistency,
        )
        return NodeConfig(
            side,
            Endpoint("127.0.0.1", self._ports[side]),
            Tls(keys / "ca.crt", keys / f"{side}.crt", keys / f"{side}.key"),
            {GROUP: group},
            state_dir=self.base / side / "state",
            runtime_dir=self.base / side / "run",
        )


@contextlib.contextmanager
def ended(nodes: Nodes) -> Iterator[Nodes]:
    """The nodes, which have ended afterwards."""
    try:
        yield nodes
    finally:
        nodes.end()
