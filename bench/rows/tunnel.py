"""Row 13: one large file through the IPsec tunnel of two real sites, against iperf3 through the same."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench import data, limits
from bench.context import OURS, Context
from bench.model import Criterion, Limit, RowResult, Sample
from bench.peers import parse_rsync_stats, rsync_daemon
from bench.processes import BenchError, Daemon, cpu_of, need, run, syncfs, wait_until
from farshore.control import api, client
from farshore.errors import FarshoreError

ROOT = Path(__file__).resolve().parents[2]
SIZE = 512 << 20
IPERF = "iperf3"
RSYNC = "rsync daemon"
_LOCAL, _BACKUP = "web1", "bak1"
_BACKUP_ADDRESS = "10.2.0.10"
_TREE = "srv/www"
_MODULE = Path("/root/bench-rsync")
_LONGEST = 900.0


class Tunnel:
    """The collection is deployed to lab hosts as a user would; nothing is tuned for the measurement."""

    rows: ClassVar[Mapping[int, str]] = {13: "one large incompressible file through the tunnel, against iperf3"}

    def run(self, context: Context, wanted: Sequence[int]) -> list[RowResult]:
        """Bring up two sites, deploy, measure, and take the sites down."""
        need("iperf3", "rsync", "nsenter")
        row = RowResult(13, "bulk through the tunnel", self.rows[13])
        size = context.size(SIZE, 1 << 20)
        with _Sites.up(context) as sites:
            sites.prepare()
            seconds = max(2.0, min(10.0, 10.0 * context.scale))
            backup = sites.host(_BACKUP)
            module = backup.root / _MODULE.relative_to("/")
            module.mkdir()
            with rsync_daemon(
                _MODULE, context.logs, address=_BACKUP_ADDRESS, enter=backup.enter(), root=backup.root
            ) as port:
                row.runs = context.turns(
                    {
                        IPERF: lambda _: sites.iperf3(seconds),
                        OURS: lambda _: sites.farshore(size),
                        RSYNC: lambda _: sites.rsync(size, port, module),
                    }
                )
            row.limits += [limits.loopback(context.logs / "iperf3.log")]
        rates = {name: _rates(samples) for name, samples in row.runs.items()}
        for name, must, stretch in ((OURS, 0.85, 0.95), (RSYNC, None, None)):
            ratios = [a / b for a, b in zip(rates[name], rates[IPERF], strict=True) if a is not None and b]
            label = f"throughput of {name} / iperf3"
            row.criteria.append(Criterion(label, "×", tuple(ratios), must, stretch, "higher", binding=must is not None))
        known = [rate for rate in rates[IPERF] if rate is not None]
        row.limits.append(Limit("iperf3 through the tunnel", sorted(known)[len(known) // 2], "MB/s"))
        row.notes.append(
            f"A file of {size >> 20} MiB; MB/s counts its bytes, once they are durable on the backup server. "
            "All four hosts, and the encryption of both gateways, share this machine's cores."
        )
        return [row]


def _rates(samples: Sequence[Sample | None]) -> list[float | None]:
    return [None if s is None else s.extra["MB/s"] for s in samples]


@dataclass(frozen=True)
class _Host:
    leader: int

    @property
    def root(self) -> Path:
        """Its file system, seen from this machine."""
        return Path(f"/proc/{self.leader}/root")

    def enter_network(self) -> list[str]:
        """Words before a command of this machine that let it run in the host's network."""
        return ["nsenter", f"--net=/proc/{self.leader}/ns/net", "--"]

    def enter(self) -> list[str]:
        """Words before a command that let it run in the host altogether, with the host's own programs."""
        return ["nsenter", f"--target={self.leader}", "--mount", "--net", "--root", "--wd", "--"]


class _Sites:
    """A lab of two sites with Farshore deployed."""

    def __init__(self, context: Context, name: str) -> None:
        self._context = context
        self._name = name
        self._log = context.logs / "tunnel.log"
        self._hosts: dict[str, _Host] = {}
        self._number = 0

    @classmethod
    @contextlib.contextmanager
    def up(cls, context: Context) -> Iterator[_Sites]:
        """Hosts and deployment, removed at the end however it ends."""
        sites = cls(context, f"bench{os.getpid()}")
        sites._log.write_bytes(b"")
        try:
            context.say("    bringing up the lab (the first time, its base systems are built: some minutes)")
            sites._lab("deps")
            sites._lab("up", "--name", sites._name, "--topology", "molecule")
            context.say("    deploying")
            for playbook in ("tests/drill/service.yml", "playbooks/deploy.yml"):
                sites._playbook(playbook)
            yield sites
        finally:
            context.say("    taking the lab down")
            sites._lab("down", "--name", sites._name)

    def host(self, name: str) -> _Host:
        """A host that is up."""
        return self._hosts[name]

    def _outside(self, words: Sequence[str]) -> list[str]:
        # The lab lives where other commands see its namespaces, also when this harness has died.
        return (
            ["nsenter", f"--mount={self._context.outer_mounts}", "--", *words]
            if self._context.outer_mounts
            else [*words]
        )

    def _lab(self, *words: str) -> str:
        text = run(self._outside([sys.executable, str(ROOT / "tests/lab/lab"), *words]), timeout=1500).output
        with self._log.open("a", encoding="utf-8") as log:
            log.write(text)
        return text

    def _playbook(self, playbook: str) -> None:
        inventories = ["-i", "inventories/example", "-i", f"/run/farshore-lab/{self._name}/inventory.yml"]
        program = str(Path(sys.executable).with_name("ansible-playbook"))
        environment = [
            "env",
            f"ANSIBLE_CONFIG={ROOT}/ansible.cfg",
            f"ANSIBLE_COLLECTIONS_PATH={ROOT}/collections",
            "PIP_DISABLE_PIP_VERSION_CHECK=1",
            f"PATH={Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        ]
        words = ["sh", "-c", 'cd "$0" && exec "$@"', str(ROOT), *environment, program, *inventories, playbook]
        run(self._outside(words), timeout=1500, log=self._log)

    def prepare(self) -> None:
        """Find the hosts and wait until the group is in step."""
        labs = json.loads(self._lab("list", "--json"))["labs"]
        (lab,) = [each for each in labs if each["name"] == self._name]
        self._hosts = {name: _Host(int(host["leader"])) for name, host in lab["hosts"].items()}

        def in_step() -> bool:
            try:
                self._flush(30)
            except BenchError:
                return False
            return True

        wait_until(in_step, "the group to be in step", timeout=180, interval=1.0)

    def _flush(self, timeout: float) -> None:
        socket = self.host(_LOCAL).root / "run/farshore" / client.NODE_SOCKET
        try:
            asyncio.run(client.ask_socket(socket, api.Flush(timeout, "web"), timeout + 5))
        except FarshoreError as error:
            raise BenchError(f"{_LOCAL}: {error}") from error

    def _cpu(self, program: str) -> float:
        """CPU seconds of a program on all hosts of this lab."""
        total = 0.0
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if f"farshore-lab/{self._name}/" in (entry / "cgroup").read_text() and program in (
                        entry / "cmdline"
                    ).read_bytes().decode("utf-8", "replace"):
                        total += cpu_of(int(entry.name))
        return total

    def iperf3(self, seconds: float) -> Sample:
        """TCP from the local server to the backup server."""
        port = 5201
        server = Daemon([*self.host(_BACKUP).enter_network(), "iperf3", "-s", "-1", "-p", str(port)], self._log)
        try:
            time.sleep(0.5)
            server.check()
            charon = self._cpu("charon")
            words = ["iperf3", "-c", _BACKUP_ADDRESS, "-p", str(port), "-t", f"{seconds:g}", "-J"]
            done = run([*self.host(_LOCAL).enter_network(), *words], timeout=seconds + 60)
            charon = self._cpu("charon") - charon
        finally:
            server.stop(3)
        rate = limits.iperf3_rate(done.output) * 1e3
        return Sample(done.seconds, done.cpu, None, {"MB/s": rate, "tunnel's CPU s": charon})

    def farshore(self, size: int) -> Sample:
        """The file gets a name in the protected tree; the clock stops when the flush is answered."""
        root = self.host(_LOCAL).root
        self._number += 1
        prepared, name = root / "srv" / "bench-file", root / _TREE / f"bench-{self._number}"
        data.random_file(prepared, size)
        self._flush(60)
        charon, nodes = self._cpu("charon"), self._cpu("farshore-node")
        began = time.monotonic()
        os.rename(prepared, name)
        self._flush(_LONGEST)
        seconds = time.monotonic() - began
        sample = self._sample(size, seconds, self._cpu("farshore-node") - nodes, charon)
        there = self.host(_BACKUP).root / _TREE / name.name
        if not there.exists() or there.stat().st_size != size:
            raise BenchError(f"after the flush, {there} is not there or not whole")
        name.unlink()
        self._flush(60)
        return sample

    def _sample(self, size: int, seconds: float, cpu: float, charon: float) -> Sample:
        extra = {"MB/s": size / seconds / 1e6, "tunnel's CPU s": self._cpu("charon") - charon}
        return Sample(seconds, cpu, None, extra)

    def rsync(self, size: int, port: int, module: Path) -> Sample:
        """The same with an rsync daemon on the backup server, without its own encryption."""
        file = self.host(_LOCAL).root / "root/bench-rsync-file"
        data.random_file(file, size)
        charon = self._cpu("charon")
        words = ["rsync", "--stats", "--whole-file", str(file), f"rsync://{_BACKUP_ADDRESS}:{port}/m/"]
        began = time.monotonic()
        done = run([*self.host(_LOCAL).enter_network(), *words], timeout=_LONGEST)
        syncfs(module)
        seconds = time.monotonic() - began
        if parse_rsync_stats(done.output).get("Literal data") != size:
            raise BenchError(f"rsync has not sent the file:\n{done.output[-500:]}")
        sample = self._sample(size, seconds, done.cpu, charon)
        for each in (file, module / file.name):
            each.unlink()
        return sample
