"""The rehearsal with PostgreSQL: it is killed under load with its node, and goes on from the replica's files.

Each round, pgbench works on the owner's side and a client inserts numbered rows, one transaction each, and writes down
every number that was acknowledged, with the moment. Then PostgreSQL and the node die by SIGKILL, the other side is
promoted, and PostgreSQL is started on the replica's files. It must come up, all checksums and pg_amcheck must be clean,
and every row must be there that was acknowledged before the moment of the death less the RPO that was told last. Then
the roles are exchanged. Both sides' data directories are on btrfs, and snapshots are sent.

    python agent/tests/rehearsal_postgres.py --failovers 20 --report build/postgres/report.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from disaster import Acknowledged, Disaster, Nodes, ended
from filesystems import CannotMount, filesystem
from nodes import free_ports

from farshore.config import Consistency
from farshore.errors import FarshoreError

_USERS = ("postgres", "nobody")
_INTERVAL = 1.0
_START_SECONDS = 120.0
_STOP_SECONDS = 120.0
#: Only what belongs to a running server, and would be wrong on another one.
EXCLUDE = ("postmaster.pid", "postmaster.opts")
_SETTINGS = """
listen_addresses = ''
unix_socket_directories = '{sockets}'
port = {port}
shared_buffers = 32MB
# Often enough that a round sees checkpoints, and segments of the log that are used again.
checkpoint_timeout = 30s
max_wal_size = 64MB
min_wal_size = 32MB
autovacuum_naptime = 5s
"""


class NoPostgres(Exception):
    """Why PostgreSQL cannot be run here."""


@dataclass
class Round:
    """One failover: what was told before it, and what was found after."""

    owner: str
    acknowledged: int
    rpo: float
    #: Rows that were acknowledged before the moment of the death less the RPO, and are missing.
    missing_within_promise: int
    #: Rows that are missing in all, and the age of the oldest of them when PostgreSQL died.
    missing: int
    oldest_missing_seconds: float
    recovery_seconds: float
    transactions: int
    problems: list[str] = field(default_factory=list)


def programs() -> Path:
    """Where PostgreSQL's programs are. Raises NoPostgres."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if not found:
        raise NoPostgres("PostgreSQL is not installed (packages postgresql and postgresql-contrib)")
    where = found[-1].parent
    for name in ("postgres", "pgbench", "psql", "pg_checksums", "pg_amcheck", "pg_ctl"):
        if not (where / name).exists():
            raise NoPostgres(f"{name} is not installed (packages postgresql and postgresql-contrib)")
    return where


def user() -> pwd.struct_passwd:
    """Whom PostgreSQL runs as, as it refuses to be root. Raises NoPostgres."""
    if os.geteuid() != 0:
        raise NoPostgres("only root can mount an image and start a server as another user")
    for name in _USERS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise NoPostgres(f"there is none of the users {', '.join(_USERS)}")


class Server:
    """PostgreSQL on one data directory."""

    def __init__(self, data: Path, sockets: Path, log_file: Path) -> None:
        self._bin = programs()
        self._user = user()
        self._data = data
        self._sockets = sockets
        self._log = log_file
        (self._port,) = free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        """A new data directory with checksums; its own directory exists."""
        shutil.chown(self._data, self._user.pw_uid, self._user.pw_gid)
        self._data.chmod(0o700)
        self._run("initdb", "-k", "-A", "trust", "-U", "app", "-D", str(self._data))

    def start(self) -> float:
        """Start it, with crash recovery if need be; returns the seconds that took. Raises Disaster."""
        began = time.monotonic()
        # It belongs to a process that was killed; systemd's unit and pg_ctlcluster find that out by themselves.
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        (self._data / "postgresql.auto.conf").write_text(_SETTINGS.format(sockets=self._sockets, port=self._port))
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", str(self._data)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd="/", start_new_session=True, **self._as(),
            )  # fmt: skip
        while time.monotonic() - began < _START_SECONDS:
            if self._process.poll() is not None:
                raise Disaster(f"PostgreSQL ended with {self._process.returncode}; see {self._log}")
            if self._call("psql", *self._where(), "-qAtXc", "SELECT 1", check=False).returncode == 0:
                return time.monotonic() - began
            time.sleep(0.05)
        raise Disaster(f"PostgreSQL does not answer after {_START_SECONDS:g} s; see {self._log}")

    def stop(self) -> None:
        """End it in good order."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(_STOP_SECONDS)
            self._process = None

    def kill(self) -> None:
        """SIGKILL for the server and all of its processes, and wait until they are gone."""
        process, self._process = self._process, None
        if process is None:
            return
        # Each backend makes a session of its own: they are found by their parent, which is stopped meanwhile.
        os.kill(process.pid, signal.SIGSTOP)
        victims = [process.pid, *_children(process.pid)]
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        process.wait(_STOP_SECONDS)
        deadline = time.monotonic() + _STOP_SECONDS
        while any(_is_running(victim) for victim in victims):
            if time.monotonic() > deadline:
                raise Disaster("PostgreSQL's processes do not end")
            time.sleep(0.01)

    def query(self, statement: str) -> list[str]:
        """The lines of an answer."""
        return self._run("psql", *self._where(), "-qAtXc", statement).stdout.split()

    def bench(self, *options: str) -> subprocess.Popen[bytes]:
        """pgbench, at work."""
        return subprocess.Popen(
            [self._bin / "pgbench", *self._where(for_bench=True), *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", **self._as(),
        )  # fmt: skip

    def insert(self, acknowledged: Acknowledged, first: int) -> Callable[[], None]:
        """Insert numbers from ``first`` on, one transaction each, until the server dies; returns how to wait for it."""
        session = subprocess.Popen(
            [self._bin / "psql", *self._where(), "-qAtX"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/", **self._as(),
        )  # fmt: skip

        def work() -> None:
            assert session.stdin is not None and session.stdout is not None
            number = first
            with contextlib.suppress(BrokenPipeError):
                while True:
                    session.stdin.write(b"INSERT INTO told VALUES (%d) RETURNING number;\n" % number)
                    session.stdin.flush()
                    if session.stdout.readline().strip() != b"%d" % number:
                        break
                    acknowledged.add(number)
                    number += 1

        thread = threading.Thread(target=work)
        thread.start()

        def wait() -> None:
            thread.join(_STOP_SECONDS)
            session.kill()
            session.wait()
            if thread.is_alive():
                raise Disaster("the client does not end")

        return wait

    def check(self) -> list[str]:
        """What the server's own tools find wrong with the files; it runs before, and not afterwards."""
        problems = []
        self.query("CREATE EXTENSION IF NOT EXISTS amcheck")
        databases = self._call(
            "pg_amcheck",
            *self._where(for_bench=True)[:-1],
            "--all",
            "--heapallindexed",
            "--install-missing",
            check=False,
        )
        if databases.returncode != 0 or databases.stdout.strip():
            problems.append(f"pg_amcheck: {databases.stdout}{databases.stderr}"[:500])
        self.stop()
        checksums = self._call("pg_checksums", "--check", "-D", str(self._data), check=False)
        if checksums.returncode != 0:
            problems.append(f"pg_checksums: {checksums.stdout}{checksums.stderr}"[:500])
        return problems

    def _where(self, for_bench: bool = False) -> list[str]:
        return [
            "-h",
            str(self._sockets),
            "-p",
            str(self._port),
            "-U",
            "app",
            *([] if for_bench else ["-d"]),
            "postgres",
        ]

    def _as(self) -> dict[str, Any]:
        return {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}

    def _run(self, program: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self._call(program, *options)

    def _call(self, program: str, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self._bin / program, *options],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd="/", timeout=600, **self._as(),
        )  # fmt: skip
        if check and done.returncode != 0:
            raise Disaster(f"{program} failed: {done.stderr[-500:]}")
        return done


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def _is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


class Rehearsal:
    """Both sites below ``base``, with ``disks`` for their data."""

    def __init__(self, base: Path, disks: dict[str, Path], seed: int, say: Callable[[str], None]) -> None:
        self._base = base
        self._say = say
        self._chance = random.Random(seed)
        self._sockets = base / "sockets"
        self._sockets.mkdir()
        self._sockets.chmod(0o777)
        self._trees = {side: disk / "data" for side, disk in disks.items()}
        self._servers = {
            side: Server(tree, self._sockets, base / f"postgres-{side}.log") for side, tree in self._trees.items()
        }
        for server in self._servers.values():
            server._log.touch()
        self.nodes = Nodes(base, self._trees, Consistency("snapshot", "btrfs", interval=_INTERVAL), EXCLUDE)
        self.rounds: list[Round] = []

    def run(self, failovers: int, seconds: tuple[float, float]) -> None:
        """So many rounds, each with a load of between so many seconds. Raises Disaster."""
        owner, other = "local", "remote"
        self._trees[owner].mkdir()
        server = self._servers[owner]
        server.create()
        server.start()
        server.query("CREATE TABLE told (number bigint PRIMARY KEY)")
        self._check_done(server.bench("-i", "-q", "-s", "5"))
        for side in (other, owner):
            self.nodes.start(side)
        self.nodes.take_over(owner, other, owner)
        next_number = 1
        try:
            for number in range(failovers):
                self.nodes.flush(owner)
                result, next_number = self._round(owner, other, next_number, self._chance.uniform(*seconds))
                self.rounds.append(result)
                self._say(
                    f"failover {number + 1} of {failovers}: {result.acknowledged} acknowledged, "
                    f"RPO {result.rpo:.2f} s, {result.missing} missing "
                    f"({result.missing_within_promise} of them promised), oldest "
                    f"{result.oldest_missing_seconds:.2f} s; recovery {result.recovery_seconds:.1f} s; "
                    + ("; ".join(result.problems) or "clean")
                )
                if result.problems or result.missing_within_promise:
                    raise Disaster(f"failover {number + 1}: {result}")
                if number + 1 == failovers:
                    break
                # The side that died comes back as the replica of the one that took over.
                self._servers[other].start()
                self.nodes.start(owner)
                self.nodes.own(other, owner)
                owner, other = other, owner
        finally:
            for each in self._servers.values():
                each.kill()

    def _round(self, owner: str, other: str, first: int, seconds: float) -> tuple[Round, int]:
        server = self._servers[owner]
        acknowledged = Acknowledged()
        seq = self.nodes.status(owner)[1].seq
        bench = server.bench("-c", "4", "-T", "3600", "-N")
        wait = server.insert(acknowledged, first)
        try:
            time.sleep(seconds)
            asked, status = self.nodes.status(owner)
            # The disaster. What is acknowledged from here on came after the RPO was told.
            died = time.monotonic()
            self.nodes.kill(owner)
            server.kill()
        finally:
            bench.kill()
            bench.wait()
            server.kill()
            wait()
        if status.rpo is None or not status.connected:
            raise Disaster(f"{owner} does not replicate: {status.state}, {status.reason}")
        self.nodes.take_over(other, other)
        recovery = self._servers[other].start()
        there = {int(line) for line in self._servers[other].query(f"SELECT number FROM told WHERE number >= {first}")}
        all_of_it = acknowledged.before(float("inf"))
        lost = sorted(all_of_it - there)
        result = Round(
            owner,
            len(all_of_it),
            status.rpo,
            len(acknowledged.before(asked - status.rpo) - there),
            len(lost),
            died - acknowledged.moments[lost[0]] if lost else 0.0,
            recovery,
            status.seq - seq,
        )
        result.problems += self._servers[other].check()
        # An insert that was on its way may be there without having been acknowledged.
        return result, max(all_of_it | there, default=first) + 2

    @staticmethod
    def _check_done(process: subprocess.Popen[bytes]) -> None:
        if process.wait(600) != 0:
            raise Disaster(f"pgbench ended with {process.returncode}")


@contextlib.contextmanager
def prepared(base: Path, seed: int, say: Callable[[str], None]) -> Iterator[Rehearsal]:
    """A rehearsal that has not begun. Raises NoPostgres or CannotMount."""
    programs()
    user()
    base.chmod(0o755)
    with contextlib.ExitStack() as stack:
        disks = {}
        for side in ("local", "remote"):
            place = base / f"{side}-disk"
            place.mkdir()
            disks[side] = stack.enter_context(filesystem("btrfs", place, 4096))
        made = Rehearsal(base, disks, seed, say)
        stack.enter_context(ended(made.nodes))
        yield made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 0 when every failover was clean, 77 when it cannot be tried here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--failovers", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, nargs=2, default=(5.0, 12.0), metavar="S", help="default: 5 to 12")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), metavar="N")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the figures there, as JSON")
    options = parser.parse_args(arguments)
    # Whoever ends us finds no mounts and no servers left.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    base = Path(tempfile.mkdtemp(prefix="farshore-postgres-"))
    failure, rounds = "", []
    print(f"seed {options.seed}", flush=True)
    try:
        with prepared(base, options.seed, lambda text: print(text, flush=True)) as rehearsal:
            rounds = rehearsal.rounds
            rehearsal.run(options.failovers, tuple(options.seconds))
    except (NoPostgres, CannotMount) as error:
        shutil.rmtree(base)
        print(f"cannot be tried here: {error}")
        return 77
    except (Disaster, FarshoreError, OSError, subprocess.SubprocessError) as error:
        failure = str(error) or type(error).__name__
    report = {
        "seed": options.seed,
        "failovers": len(rounds),
        "failure": failure,
        "acknowledged": sum(each.acknowledged for each in rounds),
        "missing_within_promise": sum(each.missing_within_promise for each in rounds),
        "rpo_seconds": [round(each.rpo, 3) for each in rounds],
        "oldest_missing_seconds": [round(each.oldest_missing_seconds, 3) for each in rounds],
        "recovery_seconds": [round(each.recovery_seconds, 3) for each in rounds],
        "rounds": [asdict(each) for each in rounds],
    }
    text = json.dumps(report, indent=2)
    if options.report is not None:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(text + "\n")
    print(text)
    if failure:
        print(f"what is left of it is in {base}")
    else:
        shutil.rmtree(base)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
