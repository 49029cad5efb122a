"""The whole monitor against nodes and services on the loopback, with a stand-in for the kernel's rules; and its CLI."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from farshore import config
from farshore.cli import switch as cli
from farshore.config import MonitorConfig, NodeRef
from farshore.control import api
from farshore.control.client import RequestFailed, ask_socket
from farshore.control.state import StateStore
from farshore.daemons.monitor import MonitorDaemon
from farshore.errors import FarshoreError, NotInTime, PeerUnreachable, StateError
from farshore.ssm.switch import Output, Switch


class Kernel:
    """Just enough of iptables: chains of the nat table and their rules."""

    def __init__(self) -> None:
        self.chains: dict[str, list[str]] = {"PREROUTING": [], "POSTROUTING": []}
        self.forgotten = 0

    @property
    def target(self) -> str:
        rules = self.chains.get("FARSHORE-DNAT", [])
        return rules[0].rsplit(" ", 1)[1] if rules else ""

    async def run(self, command: Sequence[str], stdin: str) -> Output:
        if command[0] == "iptables-save":
            lines = ["*nat", *(f":{name} - [0:0]" for name in self.chains)]
            lines += [f"-A {name} {rule}" for name, rules in self.chains.items() for rule in rules]
            return Output(0, "\n".join([*lines, "COMMIT"]) + "\n", "")
        if command[0] == "iptables-restore":
            for line in stdin.splitlines():
                verb, _, rest = line.partition(" ")
                name, _, rule = rest.partition(" ")
                if verb.startswith(":"):
                    self.chains[verb[1:]] = []
                elif verb == "-I":
                    self.chains[name].insert(0, rule.removeprefix("1 "))
                elif verb == "-A":
                    self.chains[name].append(rule)
                elif verb == "-D":
                    self.chains[name].remove(rule)
        else:
            assert command[0] == "conntrack"
            self.forgotten += 1
        return Output(0, "", "")


class Node:
    """A node whose only unit is a server on its address."""

    def __init__(self, side: str, address: str, port: int) -> None:
        self.side, self.address, self.port = side, address, port
        self.epoch, self.owner, self.state = 0, "local", "unconfirmed"
        self.server: asyncio.Server | None = None
        self.up = True

    async def serve(self, on: bool) -> None:
        if on and not self.server:

            async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.read()
                writer.close()

            self.server = await asyncio.start_server(client, self.address, self.port)
        elif not on and self.server:
            self.server.close()
            self.server = None

    async def die(self) -> None:
        self.up = False
        self.state = "unconfirmed"
        await self.serve(False)

    async def ask(self, request: api.Request) -> api.Answer:
        match request:
            case api.SetOwner():
                assert request.epoch >= self.epoch
                self.epoch, self.owner = request.epoch, request.owner
                self.state = "replicating" if self.owner == self.side else "replica"
                await self.serve(self.owner == self.side)
            case api.Freeze():
                self.state = "frozen"
                await self.serve(False)
            case api.Thaw():
                self.state = "replicating"
                await self.serve(True)
            case api.StatusRequest():
                mine = self.owner == self.side and self.state != "unconfirmed"
                status = api.GroupStatus(
                    group="web",
                    side=self.side,  # type: ignore[arg-type]
                    owner=self.owner,  # type: ignore[arg-type]
                    epoch=self.epoch,
                    state=self.state,
                    reason="",
                    connected=True,
                    in_step=mine,
                    rpo=0.0 if mine else None,
                    backlog_paths=0,
                    seq=0,
                    sent_bytes=0,
                    units={"web.service": "active" if self.server else "inactive"},
                    problems=[],
                    synced_once=True,
                )
                return api.NodeStatus(self.side, "0", 1.0, {"web": status})
        return api.Done()


class Lab:
    """Two nodes, a kernel, and monitors that come and go."""

    def __init__(self, base: Path, failback: str) -> None:
        port = free_port()
        self.nodes = {"web1": Node("local", "127.0.0.1", port), "bak1": Node("remote", "127.0.0.2", port)}
        self.kernel = Kernel()
        self.settings = config.parse(
            {
                "node": "ldrg",
                "gateway": {"public_address": "203.0.113.1", "lan_address": "127.0.0.1"},
                "tls": {"ca": "/ca", "certificate": "/c", "key": "/k"},
                "state_dir": str(base / "state"),
                "runtime_dir": str(base / "run"),
                "groups": {
                    "web": {
                        "local": {"node": "web1", "address": "127.0.0.1"},
                        "backup": {"node": "bak1", "address": "127.0.0.2"},
                        "services": [
                            {"port": 80, "backend_port": port, "check": {"interval": 0.05, "rise": 2, "fall": 2}}
                        ],
                        "hold_down": 0.2,
                        "step_timeout": 10,
                        "failback": failback,
                    }
                },
            },
            MonitorConfig,
        )
        self.runtime = self.settings.runtime_dir

    async def ask(self, ref: NodeRef, request: api.Request, timeout: float) -> Any:
        node = self.nodes[ref.node]
        if not node.up:
            raise PeerUnreachable(ref.node, "no route to host")
        return await node.ask(request)

    @contextlib.asynccontextmanager
    async def monitor(self) -> AsyncIterator[MonitorDaemon]:
        async def look() -> str:
            return "up (net: 1 bytes in, 2 out)"

        daemon = MonitorDaemon(self.settings, self.ask, switch=Switch(self.settings, self.kernel.run), look=look)
        stop = asyncio.Event()
        task = asyncio.create_task(daemon.run(stop))
        try:
            yield daemon
        finally:
            stop.set()
            await task

    async def status(self) -> api.SwitchStatus:
        answer = await ask_socket(self.runtime / "monitor.sock", api.StatusRequest(), 5.0)
        assert isinstance(answer, api.MonitorStatus)
        return answer.groups["web"]

    async def until(self, condition: Callable[[api.SwitchStatus], bool]) -> api.SwitchStatus:
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(PeerUnreachable):
                    status = await self.status()
                    if condition(status):
                        return status
                await asyncio.sleep(0.02)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def healthy(status: api.SwitchStatus) -> bool:
    return status.phase == "normal" and status.health[0].healthy is True and status.backup is not None


async def farshore(lab: Lab, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args([*arguments, "--runtime-dir", str(lab.runtime)])
    return int(await asyncio.to_thread(args.func, args))


async def test_the_life_of_a_protected_server(tmp_path: Path) -> None:
    lab = Lab(tmp_path, "auto")
    target = f"127.0.0.2:{lab.nodes['bak1'].port}"
    async with lab.monitor() as daemon:
        status = await lab.until(healthy)
        assert (status.epoch, status.served_by, status.rules_in_place) == (1, "local", True)
        assert lab.kernel.chains["PREROUTING"] == ["-j FARSHORE-DNAT"]
        await lab.nodes["web1"].die()
        status = await lab.until(lambda s: s.phase == "failed_over" and s.rules_in_place)
        assert lab.kernel.target == target and status.served_by == "remote" and status.epoch == 2
        assert any("users are sent to bak1" in event for event in daemon.status().events)
        assert daemon.status().tunnel.startswith("up")

    assert lab.kernel.target == target, "the rules outlive the monitor"
    lab.kernel.chains = {"PREROUTING": [], "POSTROUTING": []}
    async with lab.monitor():
        await lab.until(lambda s: s.phase == "failed_over" and s.rules_in_place)
        assert lab.kernel.target == target, "and come back with it"
        lab.nodes["web1"].up = True
        status = await lab.until(lambda s: s.phase == "normal" and s.rules_in_place)
        assert lab.kernel.target == "" and status.epoch == 3
        await lab.until(healthy)
        assert lab.nodes["bak1"].state == "replica" and lab.nodes["bak1"].epoch == 3


async def test_the_operator_switches_and_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = Lab(tmp_path, "manual")
    async with lab.monitor():
        await lab.until(healthy)
        assert await farshore(lab, "wait", "web", "--phase", "normal", "--timeout", "5") == 0
        assert await farshore(lab, "failover", "web", "--wait", "20", "--json") == 0
        captured = capsys.readouterr()
        status = json.loads(captured.out)
        assert status["served_by"] == "remote" and status["epoch"] == 2
        assert "web [" in captured.err
        assert lab.kernel.target
        assert await farshore(lab, "recover", "web", "--wait", "20") == 0
        assert (await lab.status()).phase == "recovered" and lab.kernel.target
        assert await farshore(lab, "failback", "web", "--wait", "20") == 0
        assert (await lab.status()).phase == "normal" and not lab.kernel.target
        capsys.readouterr()
        assert await farshore(lab, "failover", "web", "--cancel") == 0
        assert "wishes: none" in capsys.readouterr().out
        with pytest.raises(NotInTime) as late:
            await farshore(lab, "wait", "web", "--phase", "verifying,promoting", "--timeout", "0.1")
        assert late.value.exit_code == 20
        with pytest.raises(FarshoreError, match="no group 'mail'; the groups here are: web"):
            await farshore(lab, "failover", "mail")
        with pytest.raises(SystemExit):
            await farshore(lab, "wait", "web", "--phase", "asleep", "--timeout", "1")
    with pytest.raises(PeerUnreachable):
        await farshore(lab, "failover", "web")


async def test_a_planned_switch_that_is_given_up_is_told_so(tmp_path: Path) -> None:
    lab = Lab(tmp_path, "manual")
    async with lab.monitor():
        await lab.until(healthy)
        asked = lab.nodes["web1"].ask

        async def ask(request: api.Request) -> api.Answer:
            if isinstance(request, api.Freeze):
                raise RequestFailed("web1", api.Failed("not durable in time", 20))
            return await asked(request)

        lab.nodes["web1"].ask = ask  # type: ignore[method-assign]
        with pytest.raises(cli.GivenUp, match="not durable in time"):
            await farshore(lab, "failover", "web", "--wait", "20")
        await lab.until(healthy)


async def test_what_is_not_for_the_monitor(tmp_path: Path) -> None:
    lab = Lab(tmp_path, "auto")
    async with lab.monitor():
        await lab.until(healthy)
        with pytest.raises(RequestFailed, match="Flush is not asked of the monitor"):
            await ask_socket(lab.runtime / "monitor.sock", api.Flush(1.0), 5.0)
        with pytest.raises(StateError, match="another farshore-monitor"):
            MonitorDaemon(lab.settings, lab.ask)


def test_the_daemon_starts_and_ends_as_a_service_does(tmp_path: Path) -> None:
    """As systemd runs it: READY after start, a watchdog, a status line, a clean end on SIGTERM; no node answers."""
    for name, args in (
        ("ca", ["-x509", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem"]),
        ("ldrg", ["-x509", "-subj", "/CN=ldrg", "-keyout", "ldrg.key", "-out", "ldrg.pem"]),
    ):
        made = subprocess.run(
            ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", *args],
            cwd=tmp_path,
            capture_output=True,
            check=False,
        )
        if made.returncode:
            pytest.skip(f"needs openssl for {name}: {made.stderr!r}")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("iptables-save", "iptables-restore", "conntrack"):
        (tools / tool).write_text("#!/bin/sh\nexit 1\n")
        (tools / tool).chmod(0o755)
    (tmp_path / "monitor.yml").write_text(
        json.dumps(
            {
                "node": "ldrg",
                "gateway": {"public_address": "203.0.113.1", "lan_address": "127.0.0.1"},
                "tls": {
                    "ca": str(tmp_path / "ca.pem"),
                    "certificate": str(tmp_path / "ldrg.pem"),
                    "key": str(tmp_path / "ldrg.key"),
                },
                "state_dir": str(tmp_path / "state"),
                "runtime_dir": str(tmp_path / "run"),
                "groups": {
                    "web": {
                        "local": {"node": "web1", "address": "127.0.0.1", "port": free_port()},
                        "backup": {"node": "bak1", "address": "127.0.0.2", "port": free_port()},
                        "services": [{"port": 80, "backend_port": free_port()}],
                    }
                },
            }
        )
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(60)
        process = subprocess.Popen(
            [sys.executable, "-m", "farshore.daemons.monitor", "--config", str(tmp_path / "monitor.yml")],
            env={
                **os.environ,
                "NOTIFY_SOCKET": str(tmp_path / "notify"),
                "WATCHDOG_USEC": "200000",
                "PATH": f"{tools}:{os.environ['PATH']}",
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            seen = ""
            while not all(word in seen for word in ("READY=1", "WATCHDOG=1", "web1 has failed")):
                seen += notify.recv(65536).decode() + "\n"
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        while "STOPPING=1" not in seen:
            seen += notify.recv(65536).decode() + "\n"
    assert process.returncode == 0, errors
    assert "Traceback" not in errors, errors
    assert not (tmp_path / "run" / "monitor.sock").exists()
    assert StateStore(tmp_path / "state").load("web").phase == "normal"


def test_gateways_never_need_the_engine() -> None:
    code = (
        "import sys, farshore.daemons.monitor, farshore.cli.switch;"
        "print([m for m in ('numba', 'numpy', 'blake3', 'pyinotify', 'vici') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
