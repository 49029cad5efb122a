"""The switch against a stand-in for the commands, and against a real kernel in network namespaces of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import pytest

from farshore import config
from farshore.config import MonitorConfig
from farshore.errors import HookFailed, NotInTime
from farshore.ssm import switch as switch_module
from farshore.ssm.switch import Output, Switch, remove_all, run_command

SETTINGS = config.parse(
    {
        "node": "ldrg",
        "gateway": {"public_address": "203.0.113.1", "lan_address": "10.1.0.1"},
        "tls": {"ca": "/ca", "certificate": "/c", "key": "/k"},
        "groups": {
            "web": {
                "local": {"node": "web1", "address": "10.1.0.5"},
                "backup": {"node": "bak1", "address": "10.2.0.5"},
                "services": [{"port": 80, "backend_port": 8080}],
            },
            "db": {
                "local": {"node": "db1", "address": "10.1.0.6"},
                "backup": {"node": "bak1", "address": "10.2.0.5"},
                "services": [{"port": 5432}],
            },
        },
    },
    MonitorConfig,
)


class Shell:
    """Records commands; answers conntrack, and passes the rest to another runner."""

    def __init__(self, run: switch_module.Runner) -> None:
        self.run = run
        self.forgotten: list[str] = []
        self.restores = 0
        self.conntrack = Output(1, "", "conntrack v1.4.7 (conntrack-tools): 0 flow entries have been deleted.\n")

    async def __call__(self, command: Sequence[str], stdin: str) -> Output:
        if command[0] == "conntrack":
            self.forgotten.append(" ".join(command[1:]))
            return self.conntrack
        self.restores += command[0] == "iptables-restore"
        return await self.run(command, stdin)


# --- without a kernel ------------------------------------------------------------------------------


async def test_commands_that_fail_say_why() -> None:
    async def run(command: Sequence[str], stdin: str) -> Output:
        return Output(4, "", "\nFatal: can't open lock file: Permission denied\n")

    switch = Switch(SETTINGS, run)
    with pytest.raises(HookFailed, match="iptables-save failed: Fatal: can't open lock"):
        await switch.ensure()
    assert not switch.in_place("web") and "can't open lock" in switch.problem
    with pytest.raises(HookFailed):
        await remove_all(run)


async def test_a_missing_command() -> None:
    with pytest.raises(HookFailed, match="farshore-no-such-command failed: No such file"):
        await run_command(["farshore-no-such-command"])


async def test_a_command_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch_module, "COMMAND_TIMEOUT", 0.05)
    with pytest.raises(NotInTime):
        await run_command(["sleep", "30"])


async def test_a_kernel_that_keeps_other_rules_is_noticed() -> None:
    async def run(command: Sequence[str], stdin: str) -> Output:
        return Output(0, "", "")

    with pytest.raises(HookFailed, match="other than wanted"):
        await Switch(SETTINGS, run).ensure()


# --- with one --------------------------------------------------------------------------------------


def _why_not() -> str:
    if os.geteuid() != 0:
        return "needs root"
    for command in ("ip", "iptables", "iptables-save", "iptables-restore"):
        if not shutil.which(command):
            return f"needs {command}"
    probe = subprocess.run(
        ["unshare", "--net", "iptables", "-w", "5", "-t", "nat", "-L"], capture_output=True, check=False
    )
    return "" if probe.returncode == 0 else "needs a kernel with network namespaces and NAT"


WHY_NOT = _why_not()
real = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def namespace(name: str) -> Iterator[str]:
    name = f"fst-{os.getpid()}-{name}"
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        ip("netns", "del", name)


def inside(name: str) -> switch_module.Runner:
    async def run(command: Sequence[str], stdin: str) -> Output:
        return await run_command(["ip", "netns", "exec", name, *command], stdin)

    return run


@pytest.fixture
def kernel() -> Iterator[str]:
    with namespace("rules") as name:
        yield name


def show(name: str) -> list[str]:
    text = subprocess.run(
        ["ip", "netns", "exec", name, "iptables-save"], check=True, capture_output=True, text=True
    ).stdout
    return [line for line in text.splitlines() if not line.startswith("#")]


def do(name: str, *command: str) -> None:
    subprocess.run(["ip", "netns", "exec", name, *command], check=True, capture_output=True)


@real
async def test_switch_repair_and_remove(kernel: str) -> None:
    do(kernel, "iptables", "-w", "5", "-t", "nat", "-N", "FARSHORE-PUBLISH")
    do(kernel, "iptables", "-w", "5", "-t", "nat", "-A", "PREROUTING", "-j", "FARSHORE-PUBLISH")
    before = show(kernel)
    shell = Shell(inside(kernel))
    switch = Switch(SETTINGS, shell)

    switch.want("web", True)
    repair = await switch.ensure()
    assert repair.changed == {"web"} and repair.chains == ("FARSHORE-DNAT", "FARSHORE-SNAT")
    assert switch.in_place("web")
    flow = "-D -p tcp --orig-dst 203.0.113.1 --orig-port-dst"
    # The group that changed altogether; of the other, at the first time, only what leads to the wrong side.
    assert shell.forgotten == [f"{flow} 80", f"{flow} 5432 --reply-src 10.2.0.5"]
    switched = show(kernel)
    jumps = [line for line in switched if line.startswith("-A PREROUTING")]
    assert jumps == ["-A PREROUTING -j FARSHORE-DNAT", "-A PREROUTING -j FARSHORE-PUBLISH"]
    assert any("--to-destination 10.2.0.5:8080" in line for line in switched)
    assert any("--to-source 10.1.0.1" in line for line in switched)

    shell.forgotten.clear()
    shell.restores = 0
    assert (await switch.ensure()).changed == frozenset()
    assert (shell.restores, shell.forgotten) == (0, []), "what is right is left alone"

    for harm in (
        ["iptables", "-w", "5", "-t", "nat", "-F"],
        ["iptables", "-w", "5", "-t", "nat", "-F", "FARSHORE-SNAT"],
        ["iptables", "-w", "5", "-t", "nat", "-D", "PREROUTING", "-j", "FARSHORE-DNAT"],
        ["iptables", "-w", "5", "-t", "nat", "-A", "FARSHORE-DNAT", "-j", "RETURN"],
        ["iptables", "-w", "5", "-t", "nat", "-I", "PREROUTING", "-j", "FARSHORE-PUBLISH"],
        ["iptables", "-w", "5", "-t", "nat", "-A", "PREROUTING", "-j", "FARSHORE-DNAT"],
        ["iptables", "-w", "5", "-t", "nat", "-R", "FARSHORE-DNAT", "1", "-p", "tcp", "-j", "ACCEPT"],
    ):
        do(kernel, *harm)
        await switch.ensure()
        now = show(kernel)
        assert next(line for line in now if line.startswith("-A PREROUTING")) == "-A PREROUTING -j FARSHORE-DNAT", harm
        for chain in ("FARSHORE-DNAT", "FARSHORE-SNAT"):
            mine = [line for line in switched if line.startswith(f"-A {chain}")]
            assert [line for line in now if line.startswith(f"-A {chain}")] == mine, harm
            assert sum(line.endswith(f"-j {chain}") for line in now) == 1, harm
    assert set(shell.forgotten) == {f"{flow} 80"}

    restarted = Shell(inside(kernel))
    again = Switch(SETTINGS, restarted)
    again.want("web", True)
    assert (await again.ensure()).chains == ()
    assert sorted(restarted.forgotten) == [
        f"{flow} 5432 --reply-src 10.2.0.5",
        f"{flow} 80 --reply-src 10.1.0.5",
    ], "a restart ends only connections that lead to the wrong side"

    switch.want("web", True, held=True)
    await switch.ensure()
    assert any(line.startswith("-A FARSHORE-HOLD") and line.endswith("-j DROP") for line in show(kernel))
    switch.want("web", False)
    await switch.ensure()
    assert not any("10.2.0.5" in line or "HOLD" in line for line in show(kernel))

    switch.want("web", True)
    await switch.ensure()
    do(kernel, "iptables", "-w", "5", "-t", "nat", "-F", "FARSHORE-PUBLISH")
    do(kernel, "iptables", "-w", "5", "-t", "nat", "-D", "PREROUTING", "-j", "FARSHORE-PUBLISH")
    do(kernel, "iptables", "-w", "5", "-t", "nat", "-A", "PREROUTING", "-j", "FARSHORE-PUBLISH")
    shell.forgotten.clear()
    assert await remove_all(shell) is True
    assert shell.forgotten == [f"{flow} 80"]
    left = [line for line in show(kernel) if "FARSHORE" in line]
    assert left == [line for line in before if "FARSHORE" in line]
    assert await remove_all(shell) is False


@real
async def test_connections_that_could_not_be_ended_are_tried_again(kernel: str) -> None:
    shell = Shell(inside(kernel))
    switch = Switch(SETTINGS, shell)
    await switch.ensure()
    shell.conntrack = Output(1, "", "conntrack v1.4.7 (conntrack-tools): Operation failed: sorry")
    switch.want("db", True)
    with pytest.raises(HookFailed, match="sorry"):
        await switch.ensure()
    assert not switch.in_place("db")
    shell.conntrack = Output(0, "", "conntrack v1.4.7 (conntrack-tools): 1 flow entries have been deleted.")
    shell.forgotten.clear()
    await switch.ensure()
    assert len(shell.forgotten) == 1 and switch.in_place("db")


@dataclass
class Site:
    """A user, a gateway with the switch, and a host that has the addresses of both servers."""

    user: str
    gateway: str
    servers: str


SERVER = """
import asyncio, sys
async def client(reader, writer):
    peer = writer.get_extra_info("peername")[0]
    while line := await reader.readline():
        writer.write(f"{writer.get_extra_info('sockname')[0]} {peer}\\n".encode())
        await writer.drain()
async def main():
    for address in sys.argv[1:]:
        await asyncio.start_server(client, address, 8080)
    print("ready", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""

USER = """
import socket, sys
sock = None
for line in sys.stdin:
    try:
        if line.strip() == "open":
            sock = socket.create_connection(("203.0.113.1", 80), timeout=5)
        sock.sendall(b"who\\n")
        answer = sock.recv(100)
        print(answer.decode().strip() or "closed", flush=True)
    except OSError as error:
        print("error", type(error).__name__, flush=True)
"""


@pytest.fixture
def site() -> Iterator[Site]:
    with namespace("user") as user, namespace("gw") as gateway, namespace("srv") as servers:
        for side, name, mine, addresses in (
            ("u", user, "203.0.113.9/24", ["203.0.113.1/24"]),
            ("s", servers, "10.1.0.5/24", ["10.1.0.1/24", "10.2.0.1/24"]),
        ):
            ip("link", "add", f"g{side}", "netns", gateway, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", name, "address", "add", mine, "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            for address in addresses:
                ip("-n", gateway, "address", "add", address, "dev", f"g{side}")
            ip("-n", gateway, "link", "set", f"g{side}", "up")
        ip("-n", servers, "address", "add", "10.2.0.5/24", "dev", "eth0")
        ip("-n", servers, "route", "add", "default", "via", "10.1.0.1")
        do(gateway, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        publish = ["-d", "203.0.113.1", "-p", "tcp", "--dport", "80", "-j", "DNAT", "--to-destination", "10.1.0.5:8080"]
        do(gateway, "iptables", "-w", "5", "-t", "nat", "-A", "PREROUTING", *publish)
        yield Site(user, gateway, servers)


@contextlib.asynccontextmanager
async def program(name: str, source: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *["ip", "netns", "exec", name, sys.executable, "-c", source, *arguments],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


@real
@pytest.mark.skipif(not shutil.which("conntrack"), reason="needs conntrack")
async def test_users_are_sent_to_the_backup_and_back(site: Site) -> None:
    switch = Switch(SETTINGS, inside(site.gateway))
    async with program(site.servers, SERVER, "10.1.0.5", "10.2.0.5") as server, program(site.user, USER) as user:
        assert server.stdout and user.stdin and user.stdout
        assert await server.stdout.readline() == b"ready\n"

        async def say(word: str) -> str:
            assert user.stdin and user.stdout
            user.stdin.write(word.encode() + b"\n")
            async with asyncio.timeout(20):
                return (await user.stdout.readline()).decode().strip()

        await switch.ensure()
        assert await say("open") == "10.1.0.5 203.0.113.9"
        await switch.ensure()
        assert await say("again") == "10.1.0.5 203.0.113.9", "looking at the rules disturbs nobody"

        switch.want("web", True)
        await switch.ensure()
        assert await say("again") in ("closed", "error ConnectionResetError"), "the old connection is cut"
        assert await say("open") == "10.2.0.5 10.1.0.1", "a new one goes to the backup, which sees the gateway"

        restarted = Switch(SETTINGS, inside(site.gateway))
        restarted.want("web", True)
        await restarted.ensure()
        assert await say("again") == "10.2.0.5 10.1.0.1", "a restart disturbs nobody"

        restarted.want("web", False)
        await restarted.ensure()
        assert await say("again") in ("closed", "error ConnectionResetError")
        assert await say("open") == "10.1.0.5 203.0.113.9"
