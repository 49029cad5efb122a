"""The crash campaign: two nodes are killed again and again while files change, and nothing may be lost or torn.

Each round, a workload changes a tree at random; one node, or both, die by SIGKILL: at a random moment, or just before
or after one of the labelled STEPS. Meanwhile an observer reads the replica's files, each of which proves by itself
whether it is whole. After the kill, what was acknowledged before must be on the replica's disk; after restart and
flush, both trees must be identical in content and metadata.

SIGKILL ends a process and spares the kernel: what is in the page cache survives. ``powerloss.py`` takes that as well.

With ``--snapshots``, the source's tree is on btrfs, whole states are sent, and two more things are looked at: that
nobody stays frozen, and that no snapshot is left behind. As the workload never syncs, and its files must be whole, the
filesystem is mounted with flushoncommit.

    python agent/tests/crash.py --kills 1000 --minutes 40 --report build/crash/report.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blake3
from filesystems import CannotMount, filesystem
from nodes import free_ports
from reports import tell
from trees import Mutator, differences

from farshore import log
from farshore.cli.mirror import make_keys
from farshore.config import BrakeConfig, Consistency, Endpoint, NodeConfig, NodeGroup, NodeRef, PathConfig, Tls
from farshore.control import api, client
from farshore.daemons import node
from farshore.dbm import blocks
from farshore.dbm.index import Index
from farshore.dbm.planner import Planner
from farshore.dbm.replica.build import Building
from farshore.dbm.replica.commit import Applier
from farshore.dbm.replica.history import History
from farshore.dbm.replica.journal import Journal
from farshore.dbm.replica.mark import Mark
from farshore.dbm.replica.operator import Operator
from farshore.dbm.replica.progress import Progress
from farshore.dbm.replica.staging import Stager
from farshore.dbm.replica.tree import Tree
from farshore.dbm.replica.upload import Upload
from farshore.dbm.sender import Sender, _Pending
from farshore.dbm.snapshots import Snapshots
from farshore.dbm.work import Batch
from farshore.errors import FarshoreError
from farshore.fmm.dirty import DirtySet

GROUP = "crash"
ROOTS = ("random", "whole")
SIDES = ("source", "replica")
#: Where a node can be told to die, by the side that gets there: before or after these calls.
STEPS: dict[str, dict[str, tuple[type, str]]] = {
    "source": {
        "a transaction is planned": (Planner, "transaction"),
        "a transaction is written down": (_Pending, "add"),
        "the index is committed": (Index, "commit"),
        "a number is committed": (Sender, "_commit_index"),
        "paths are in doubt": (Planner, "doubt"),
        "a job is delivered": (Planner, "deliver"),
        "a snapshot is taken": (Snapshots, "take"),
        "writers are woken": (Snapshots, "_thaw"),
        "a snapshot is dropped": (Snapshots, "drop"),
        "a cycle begins": (Batch, "of"),
        "a state is completed": (Planner, "end_of_state"),
        "a state is settled": (DirtySet, "settle"),
    },
    "replica": {
        "a transaction is complete": (Stager, "_commit"),
        "an operation is staged": (Stager, "_stage"),
        "a group is handed over": (Stager, "_hand_over"),
        "a group is accepted": (Applier, "accept"),
        "the journal is written": (Journal, "append"),
        "what was found is noted": (History, "note"),
        "an operation is applied": (Applier, "_apply_one"),
        "something is kept": (Tree, "keep"),
        "a file is placed": (Tree, "put"),
        "something is moved": (Tree, "move"),
        "a transaction is applied": (Applier, "_finished"),
        "the trees are synced": (Tree, "sync"),
        "the mark is moved": (Mark, "move"),
        "the journal is dropped": (Journal, "drop"),
        "an operation is carried out": (Operator, "carry_out"),
        "progress is told": (Progress, "tell"),
        "a new process has recovered": (Applier, "_recover"),
        "the trees are at rest": (Applier, "checkpoint"),
        "an upload is opened": (Upload, "open"),
        "an upload is fed": (Upload, "feed"),
        "an upload is finished": (Building, "finish"),
        "an upload is synced": (Building, "sync"),
    },
}
#: The steps of them that are reached with snapshots only.
_WITH_SNAPSHOTS = frozenset(
    {"a snapshot is taken", "writers are woken", "a snapshot is dropped", "a state is completed"}
)
_READY_SECONDS = 60.0
_FLUSH_SECONDS = 120.0
#: How long a round waits for the step at which a node is to die.
_STEP_SECONDS = 2.0
_MOST_FILES = 300
_DIGEST = 32
_PR_SET_PDEATHSIG = 1


class Failed(Exception):
    """What must never happen."""


@dataclass
class Result:
    """What a campaign did, and what went wrong."""

    seed: int
    rounds: int = 0
    kills: int = 0
    seconds: float = 0.0
    #: Kills by where they hit.
    where: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0
    observed: int = 0
    failures: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return {**self.__dict__, "where": dict(sorted(self.where.items())), "seconds": round(self.seconds, 1)}


class Process:
    """A child that was forked to do something; it dies with this process."""

    def __init__(self, work: Callable[[], None], log_file: Path) -> None:
        sys.stdout.flush()
        self.pid = os.fork()
        self._status: int | None = None
        if self.pid:
            return
        code = 70
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            out = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(out, 1)
            os.dup2(out, 2)
            # A fork has none of the threads that the pool of its parent counts on.
            blocks._THREADS = ThreadPoolExecutor(2, "zstd")
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = status
        return self._status is None

    def terminate(self) -> None:
        """SIGTERM, and wait; raises Failed when it ends otherwise than by itself."""
        os.kill(self.pid, signal.SIGTERM)
        self._status = os.waitpid(self.pid, 0)[1]
        if self._status != 0:
            raise Failed(f"process {self.pid} did not end well: {self._status}")

    def send(self, number: signal.Signals) -> bool:
        """Send it a signal; returns False when it has ended."""
        if not self.alive:
            return False
        os.kill(self.pid, number)
        return True

    def end(self) -> bool:
        """Kill it and wait; returns False when it had ended already."""
        if not self.send(signal.SIGKILL):
            return False
        self._status = os.waitpid(self.pid, 0)[1]
        return True


class Campaign:
    """Two nodes below ``base``, a workload, an observer, and the one who kills."""

    #: What is counted.
    unit = "kills"
    #: Whether whole files are written so that a power cut leaves them whole.
    syncs = False

    def __init__(self, base: Path, result: Result, say: Callable[[str], None], disk: Path | None = None) -> None:
        """With ``disk``, a btrfs, the source's tree lies there and is sent by snapshots."""
        self.base = base
        self._disk = disk
        self.result = result
        self._say = say
        self._chance = random.Random(result.seed)
        self._keys = base / "pki"
        make_keys(self._keys, SIDES)
        self._ports = dict(zip(SIDES, free_ports(2), strict=True))
        self._nodes: dict[str, Process] = {}
        self._observer: Process | None = None
        for name in ROOTS:
            (self.tree("source") / name).mkdir(parents=True)
        self._acknowledged = 0
        self._counter = 0

    def tree(self, side: str) -> Path:
        """Where the protected paths of a side are."""
        where = self._disk if self._disk is not None and side == "source" else self.base
        return where / f"{side}-tree"

    @property
    def _frozen(self) -> Path:
        return self.base / "frozen"

    def _consistency(self) -> Consistency:
        if self._disk is None:
            return Consistency()
        return Consistency("snapshot", interval=0.1, freeze=f"touch {self._frozen}", thaw=f"rm -f {self._frozen}")

    def state(self, side: str) -> Path:
        """Where a side's node keeps what it must remember."""
        return self.base / side / "state"

    def run(self, kills: int, seconds: float) -> Result:
        """Kill until there were so many kills, or so many seconds have passed, or something went wrong."""
        began = time.monotonic()
        told = 0
        try:
            for side in reversed(SIDES):
                self._start(side)
            for side in reversed(SIDES):
                self._ask(side, api.SetOwner(GROUP, "local", 1, False))
            self._flush()
            self._start_observer()
            while self.result.kills < kills and time.monotonic() - began < seconds:
                self._round()
                self.result.seconds = time.monotonic() - began
                if self.result.kills - told >= 25:
                    told = self.result.kills
                    self._say(
                        f"{self.result.seconds:6.0f} s  {told} of {kills} {self.unit}, {self.result.rounds} rounds"
                    )
            self._check_leftovers()
            self._check_snapshots()
            self._end_observer()
        except (Failed, FarshoreError, OSError) as error:
            self.result.failures.append(f"round {self.result.rounds}: {error or type(error).__name__}")
        finally:
            self._stop()
        return self.result

    # --- a round

    def _round(self) -> None:
        result = self.result
        result.rounds += 1
        self._tidy()
        victims = self._chance.choice([["source"], ["replica"], ["replica"], ["source", "replica"]])
        label = ""
        if len(victims) == 1 and self._chance.random() < 0.6:
            (victim,) = victims
            step = self._chance.choice(sorted(set(STEPS[victim]) - (set() if self._disk else _WITH_SNAPSHOTS)))
            when = self._chance.choice(["before", "after"])
            label = f"{victim}: {when} {step}"
            self._kill(victim, f"{victim}: at rest")
            self._start(victim, (step, when, self._chance.choice([1, 1, 2, 3, 5, 10, 20])))
        seed = self._chance.getrandbits(32)
        workload = Process(lambda: change(self.tree("source"), seed), self._log("workload"))
        try:
            if not label or self._chance.random() < 0.5:
                self._acknowledge(bool(label))
            if label:
                deadline = time.monotonic() + _STEP_SECONDS
                while self._nodes[victims[0]].alive and time.monotonic() < deadline:
                    time.sleep(0.002)
            else:
                time.sleep(self._chance.random() * self._chance.choice([0.02, 0.2, 0.6]))
            for victim in victims:
                if label and not self._nodes[victim].alive:
                    self._count(label)
                else:
                    self._kill(victim, f"{victim}: at any moment")
        finally:
            workload.end()
        self._check_acknowledged("after the kill")
        for victim in reversed(victims):
            self._start(victim)
        self._check_acknowledged("after the restart")
        self._flush()
        self._check_trees(f"after {label or victims}")
        self._check_observer()

    def _acknowledge(self, may_fail: bool) -> None:
        """Have a count acknowledged: from now on it must be on the replica's disk, or a later one."""
        self._write_count()
        self._await_acknowledgement(may_fail)

    def _write_count(self) -> None:
        self._counter += 1
        write_whole(self.tree("source") / "whole" / "count", b"%d" % self._counter, self.syncs)

    def _await_acknowledgement(self, may_fail: bool) -> None:
        try:
            self._flush(20.0 if not may_fail else _STEP_SECONDS)
        except FarshoreError:
            if not may_fail:
                raise
        else:
            self._acknowledged = self._counter
            self.result.acknowledged += 1

    def _check_acknowledged(self, when: str) -> None:
        if not self._acknowledged:
            return
        path = self.tree("replica") / "whole" / "count"
        body = read_whole(path)
        if body is None or int(body) < self._acknowledged:
            raise Failed(f"{when}, {path} holds {body!r}, but {self._acknowledged} was acknowledged")

    def _check_trees(self, when: str) -> None:
        for name in ROOTS:
            found = differences(self.tree("source") / name, self.tree("replica") / name)
            if found:
                raise Failed(f"{when}, {name} differs: {'; '.join(found[:5])}")

    def _start_observer(self) -> None:
        watched = self.tree("replica") / "whole"
        self._observer = Process(lambda: observe(watched, self._torn), self._log("observer"))

    def _end_observer(self) -> None:
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.end()
            counted = self._log("observer").with_suffix(".count")
            self.result.observed += int(counted.read_text()) if counted.exists() else 0
            counted.unlink(missing_ok=True)

    def _check_observer(self) -> None:
        if self._observer is None or not self._observer.alive:
            raise Failed(f"the observer ended; see {self._log('observer')}")
        torn = self._torn.read_text() if self._torn.exists() else ""
        if torn:
            raise Failed(f"torn files were seen: {torn[:500]}")

    def _check_leftovers(self) -> None:
        """Nothing of ours but the history stays in the trees once all is at rest."""
        deadline = time.monotonic() + _FLUSH_SECONDS
        while left := [path for path in self.tree("replica").rglob(".farshore*") if not _is_history(path)]:
            if time.monotonic() > deadline:
                raise Failed(f"{left[0]} was left behind, and has {sorted(left[0].glob('*'))[:5]}")
            time.sleep(0.1)

    def _check_snapshots(self) -> None:
        """When the source has ended in good order, nothing tells of snapshots any more."""
        if self._disk is None:
            return
        self._nodes["source"].terminate()
        left = [*self._disk.glob(".farshore*"), *self.tree("source").glob(".farshore*")]
        if left or self._frozen.exists():
            raise Failed(f"{left} are left behind, and writers are {'frozen' if self._frozen.exists() else 'awake'}")

    def _tidy(self) -> None:
        """Keep the tree small enough that a round is short."""
        tree = self.tree("source") / "random"
        if sum(len(files) for _, _, files in os.walk(tree)) > _MOST_FILES:
            for path in tree.iterdir():
                if self._chance.random() < 0.7:
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink()

    # --- nodes

    def _config(self, side: str) -> NodeConfig:
        (peer,) = set(SIDES) - {side}
        keys = self._keys
        group = NodeGroup(
            side="local" if side == "source" else "remote",
            peer=NodeRef(peer, "127.0.0.1", self._ports[peer]),
            paths=tuple(PathConfig(f"/{name}", str(self.tree(side) / name)) for name in ROOTS),
            # What changes here all the time is most of the tree.
            brake=BrakeConfig("off"),
            consistency=self._consistency(),
        )
        return NodeConfig(
            side,
            Endpoint("127.0.0.1", self._ports[side]),
            Tls(keys / "ca.crt", keys / f"{side}.crt", keys / f"{side}.key"),
            {GROUP: group},
            state_dir=self.state(side),
            runtime_dir=self.base / side / "run",
        )

    def _start(self, side: str, step: tuple[str, str, int] | None = None) -> None:
        """Start a node, with a ``step`` to die at: its label, before or after, the how-manieth time."""
        config = self._config(side)

        def work() -> None:
            self._before_node(side)
            if step is not None:
                label, when, count = step
                die_at(*STEPS[side][label], when == "before", count)
            log.setup("info", False)
            asyncio.run(node.run(config))

        self._nodes[side] = process = Process(work, self._log(side))
        deadline = time.monotonic() + _READY_SECONDS
        while process.alive and self._has_power(side):
            with contextlib.suppress(FarshoreError):
                self._ask(side, api.StatusRequest(), 5.0)
                return
            if time.monotonic() > deadline:
                raise Failed(f"node {side} is not ready after {_READY_SECONDS:g} s; see {self._log(side)}")
            time.sleep(0.01)
        if step is None and self._has_power(side):
            raise Failed(f"node {side} ended by itself; see {self._log(side)}")

    def _has_power(self, side: str) -> bool:
        return True

    def _before_node(self, side: str) -> None:
        """What a node's process does before it becomes one."""

    def _kill(self, side: str, label: str) -> None:
        if not self._nodes[side].end():
            raise Failed(f"node {side} had ended by itself; see {self._log(side)}")
        self._count(label)

    def _count(self, label: str) -> None:
        self.result.kills += 1
        self.result.where[label] += 1

    def _ask(self, side: str, request: api.Request, timeout: float = 30.0) -> None:
        socket = self._config(side).runtime_dir / client.NODE_SOCKET
        asyncio.run(client.ask_socket(socket, request, timeout))

    def _flush(self, seconds: float = _FLUSH_SECONDS) -> None:
        self._ask("source", api.Flush(seconds, GROUP), seconds + 5)

    def _stop(self) -> None:
        self._end_observer()
        for process in self._nodes.values():
            process.end()

    @property
    def _torn(self) -> Path:
        return self.base / "torn"

    def _log(self, name: str) -> Path:
        return self.base / f"{name}.log"


def _is_history(path: Path) -> bool:
    """Whether a stage has nothing but what the history keeps, in folders of it."""
    with contextlib.suppress(FileNotFoundError):
        return path.name.startswith(".farshore-stage") and all(name[:1] == "h" for name in os.listdir(path))
    return True


# --- what the children do


def die_at(kind: type, name: str, before: bool, count: int) -> None:
    """Let this process die by SIGKILL before, or after, the ``count``-th call of a method."""
    call = getattr(kind, name)
    calls = 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= count and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*arguments, **named)
        if calls >= count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(kind, name, counted)


def change(tree: Path, seed: int, sync: bool = False) -> None:
    """Change the trees at random for ever; ``sync`` as for ``write_whole``."""
    chance = random.Random(seed)
    mutator = Mutator(tree / "random", seed)
    names = [tree / "whole" / f"w{number}" for number in range(8)]
    while True:
        mutator.step()
        if chance.random() < 0.4:
            path = chance.choice(names)
            body = bytearray(read_whole(path) or b"")
            if not body or chance.random() < 0.2:
                body = bytearray(chance.randbytes(chance.choice([10, 5000, 70_000, 300_000, 3_000_000])))
            for _ in range(chance.randrange(4)):
                at = chance.randrange(len(body))
                body[at : at + 4096] = chance.randbytes(chance.choice([1, 4096]))
            write_whole(path, bytes(body), sync)
        time.sleep(chance.choice([0.0, 0.0, 0.005]))


def observe(tree: Path, torn: Path) -> None:
    """Read the files below ``tree`` for ever; note those that are not whole."""
    seen = 0
    counted = torn.with_name("observer.count")
    counting = counted.with_suffix(".new")
    while True:
        names: list[os.DirEntry[str]] = []
        with contextlib.suppress(FileNotFoundError):
            names = [each for each in os.scandir(tree) if not each.name.startswith(".")]
        for each in names:
            try:
                data = Path(each.path).read_bytes()
            except FileNotFoundError:
                continue
            seen += 1
            if not is_whole(data):
                with torn.open("a") as file:
                    file.write(f"{each.path}: {len(data)} bytes\n")
        counting.write_text(str(seen))
        counting.replace(counted)
        time.sleep(0.01)


def is_whole(data: bytes) -> bool:
    """Whether these are all bytes of a file that ``write_whole`` made."""
    return blake3.blake3(data[_DIGEST:]).digest() == data[:_DIGEST]


def write_whole(path: Path, body: bytes, sync: bool = False) -> None:
    """Replace a file by one that proves that it is whole; with ``sync``, after a power cut too."""
    temporary = path.with_name(".new-" + path.name)
    with temporary.open("wb") as file:
        file.write(blake3.blake3(body).digest() + body)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


def read_whole(path: Path) -> bytes | None:
    """The body of such a file; None when there is none. Raises Failed when it is not whole."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if not is_whole(data):
        raise Failed(f"{path} is torn: {len(data)} bytes")
    return data[_DIGEST:]


def main() -> int:
    """The command line; the exit code is 0 when nothing was lost or torn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--minutes", type=float, default=40.0, metavar="M", help="at most so long; default: %(default)g"
    )
    parser.add_argument("--snapshots", action="store_true", help="send snapshots of a btrfs")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), metavar="N")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="work there, and leave it (default: a temporary one)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the figures there, as JSON")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    base = options.dir or Path(tempfile.mkdtemp(prefix="farshore-crash-"))
    result = Result(options.seed)
    base.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            disk = (
                stack.enter_context(filesystem("btrfs", base, 2048, "loop,flushoncommit"))
                if options.snapshots
                else None
            )
        except CannotMount as error:
            print(f"cannot be tried here: {error}")
            return 77
        campaign = Campaign(base, result, lambda text: print(text, flush=True), disk)
        campaign.run(options.kills, options.minutes * 60)
    if result.failures:
        print(f"what is left of it is in {base}")
    elif options.dir is None:
        shutil.rmtree(base)
    return tell(result.as_json(), options.report)


if __name__ == "__main__":
    sys.exit(main())
