"""Our side of the comparison: two ``farshore-node`` processes, as on two hosts, over TLS on the loopback."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from bench.model import Sample
from bench.processes import BenchError, Daemon, free_port, run, settle, wait_until
from farshore.control import api, client
from farshore.errors import FarshoreError

GROUP = "bench"
_HOST = "127.0.0.1"
_LONGEST = 900.0


class WanRelay:
    """A relay process before a port of this machine."""

    def __init__(self, to_port: int, log: Path, delay: float = 0.0) -> None:
        self._daemon = Daemon(
            [sys.executable, "-m", "bench.relay", "--control", "--to", f"{_HOST}:{to_port}", "--delay", str(delay)],
            log,
            control=True,
        )
        self.port = int(self._daemon.read().removeprefix("port "))

    def set_delay(self, seconds: float) -> None:
        """The delay of one way, from now on."""
        self._daemon.ask(f"delay {seconds}")

    def bytes(self) -> int:
        """Bytes in both directions so far."""
        answer = json.loads(self._daemon.ask("stats"))
        return int(answer["there"]) + int(answer["back"])

    def stop(self) -> None:
        """End it."""
        self._daemon.stop()


class Pair:
    """A source and a replica in step. Use as a context manager; both are ended and awaited at its end.

    `wrapper`: words that start the node instead of ``farshore-node``; `samples`: with ``{}`` for the node's name, their
    first argument. `engine`: what the source watches with.
    """

    def __init__(
        self,
        source: Path,
        replica: Path,
        source_state: Path,
        replica_state: Path,
        logs: Path,
        *,
        relay: bool = False,
        wrapper: Sequence[str] = (),
        samples: str = "",
        engine: str = "auto",
    ) -> None:
        self.source = source
        self.replica = replica
        self._states = {"source": source_state, "replica": replica_state}
        self._logs = logs
        self._wrapper = list(wrapper) or [str(Path(sys.executable).with_name("farshore-node"))]
        self._samples = samples
        self._engine = engine
        self._with_relay = relay
        self.relay: WanRelay | None = None
        self.daemons: dict[str, Daemon] = {}
        self._ports: dict[str, int] = {}
        self._port = 0

    def __enter__(self) -> Pair:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        from farshore.cli.mirror import make_keys

        self.source.mkdir(parents=True, exist_ok=True)
        for state in self._states.values():
            state.mkdir(parents=True, exist_ok=True, mode=0o700)
        keys = self._states["source"] / "pki"
        make_keys(keys, ("source", "replica"))
        self._ports = {"source": free_port(), "replica": free_port()}
        self._port = self._ports["replica"]
        if self._with_relay:
            self.relay = WanRelay(self._port, self._logs / "relay.log")
            self._port = self.relay.port
        for name in ("replica", "source"):
            self._launch(name)
            wait_until(lambda name=name: self._ready(name), f"farshore-node {name}", timeout=120)  # type: ignore[misc]
        for name in ("replica", "source"):
            self._ask(name, api.SetOwner(GROUP, "local", 1, False), 60)
        self.flush()

    def _launch(self, name: str) -> None:
        """Start a node's process by a configuration that is written now."""
        file = self._states[name] / "node.yml"
        file.write_text(yaml.safe_dump(self._config(name)), encoding="utf-8")
        sampled = [self._samples.format(name)] if self._samples else []
        words = [*self._wrapper, *sampled, "--config", str(file)]
        self.daemons[name] = Daemon(words, self.log(name))

    def _config(self, name: str) -> dict[str, object]:
        source = name == "source"
        peer, tree = ("replica", self.source) if source else ("source", self.replica)
        keys, state = self._states["source"] / "pki", self._states[name]
        group: dict[str, object] = {
            "side": "local" if source else "remote",
            "peer": {"node": peer, "address": _HOST, "port": self._port if source else self._ports[peer]},
            "paths": [{"source": "/bench", "path": str(tree)}],
            # It judges, and costs what it costs, but what a row removes afterwards is not held.
            "brake": {"mode": "warn"},
        }
        if source and self._engine != "auto":
            group["watch"] = {"engine": self._engine}
        return {
            "node": name,
            "listen": {"address": _HOST, "port": self._ports[name]},
            "tls": {
                "ca": str(keys / "ca.crt"),
                "certificate": str(keys / f"{name}.crt"),
                "key": str(keys / f"{name}.key"),
            },
            "state_dir": str(state / "state"),
            "runtime_dir": str(state / "run"),
            "groups": {GROUP: group},
        }

    def log(self, name: str) -> Path:
        """Where what a node says is written."""
        return self._logs / f"{name}.log"

    def restart(self, engine: str, timeout: float = _LONGEST) -> Sample:
        """End the source in good order and start it again with that engine, until it is in step and has seen all.

        The clock starts with its process. CPU is that of both nodes.
        """
        self.daemons.pop("source").stop(60)
        self._engine = engine
        cpu = self.daemons["replica"].cpu()
        began = time.monotonic()
        self._launch("source")
        wait_until(lambda: self._ready("source"), "farshore-node source", timeout=120)
        self.flush(timeout)
        seconds = time.monotonic() - began
        return Sample(seconds, self.cpu() - cpu)

    def _ready(self, name: str) -> bool:
        self.daemons[name].check()
        try:
            self._ask(name, api.StatusRequest(), 5)
        except BenchError:
            return False
        return True

    def _ask(self, name: str, request: api.Request, timeout: float) -> api.Answer:
        try:
            return asyncio.run(client.ask_socket(self._socket(name), request, timeout))
        except FarshoreError as error:
            raise BenchError(f"farshore-node {name}: {error}") from error

    def _socket(self, name: str) -> Path:
        return self._states[name] / "run" / client.NODE_SOCKET

    def flush(self, timeout: float = _LONGEST, *, durable: bool = False) -> None:
        """Return when the replica's tree has every change made before, with ``durable`` when they are on its disk.

        Raises BenchError.
        """
        for daemon in self.daemons.values():
            daemon.check()
        self._ask("source", api.Flush(timeout, GROUP, durable), timeout + 5)

    def status(self) -> api.GroupStatus:
        """How the source is."""
        answer = self._ask("source", api.StatusRequest(), 10)
        assert isinstance(answer, api.NodeStatus)
        return answer.groups[GROUP]

    def cpu(self) -> float:
        """CPU seconds of both nodes so far."""
        return sum(daemon.cpu() for daemon in self.daemons.values())

    def wire(self) -> int:
        """Bytes that the source's connections have carried in both directions: TLS and all, without TCP's headers."""
        return sum(connection_bytes(self._port).values())

    def measure(self, change: Callable[[], None], timeout: float = _LONGEST) -> Sample:
        """Make a change and wait until it is durable on the replica. The clock starts before the change."""
        settle(self.cpu)
        cpu, wire = self.cpu(), connection_bytes(self._port)
        began = time.monotonic()
        change()
        self.flush(timeout, durable=True)
        seconds = time.monotonic() - began
        self.flush(timeout)
        applied = time.monotonic() - began
        carried = sum(count - wire.get(port, 0) for port, count in connection_bytes(self._port).items())
        # What is done after the acknowledgement is not waited for, but it is work all the same.
        settle(self.cpu)
        return Sample(seconds, self.cpu() - cpu, carried, {"s until in the tree": applied})

    def stop(self) -> None:
        """End both nodes, the source first, and the relay."""
        for name in ("source", "replica"):
            if name in self.daemons:
                self.daemons.pop(name).stop()
        if self.relay is not None:
            self.relay.stop()
            self.relay = None


def connection_bytes(port: int) -> dict[int, int]:
    """Bytes sent and received by each TCP connection of this machine to `port`, by its own port, says the kernel."""
    text = run(["ss", "-tinHO", "state", "established", f"( dport = :{port} )"]).output
    return parse_ss(text)


def parse_ss(text: str) -> dict[int, int]:
    """Own port to bytes sent plus received, from one-line records of ``ss -tinO``."""
    found: dict[int, int] = {}
    for line in text.splitlines():
        ends = re.findall(r"\S+:(\d+)(?=\s)", line)
        if len(ends) >= 2:
            counts = re.findall(r"\bbytes_(?:sent|received):(\d+)", line)
            found[int(ends[0])] = sum(map(int, counts))
    return found


def same_trees(a: Path, b: Path, *, seconds: float = 60.0) -> bool:
    """Whether two trees hold the same files with the same bytes; the replica may take some seconds to show them."""
    deadline = time.monotonic() + seconds
    while True:
        done = run(["diff", "-rq", "--no-dereference", str(a), str(b)], allowed=(0, 1, 2))
        if not done.output.strip():
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(1.0)


def check_same(pair: Pair) -> None:
    """Raise BenchError when the replica is not what the source is: a fast wrong result is no result."""
    pair.flush()
    if not same_trees(pair.source, pair.replica):
        raise BenchError(f"the replica {pair.replica} differs from {pair.source}")


def environment() -> dict[str, str]:
    """For child processes that import this package from anywhere."""
    root = str(Path(__file__).resolve().parents[1])
    return {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))}
