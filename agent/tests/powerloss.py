"""The power-loss campaign: machines lose power again and again while files change, and nothing may be lost or torn.

Two nodes replicate as in ``crash.py``, but each side's tree and state lie on a real filesystem whose disk is ours
(``disks.py``). Each round, the power of one machine, or of both at once, is cut: at a random moment, just before or
after one of the labelled steps of a node, or just before a certain write or flush reaches the disk; sometimes again
while the filesystem, or the node, recovers. All processes of that machine die in the same moment, its page cache is
gone, and of what the disk had not been told to flush, a random part survives: nothing, all, the oldest part, any
writes, or any sectors of any writes. Then the filesystem recovers by its own journal, and the node starts again.

What must hold:

- What was acknowledged (a flush had returned) is on the replica after its restart, before the source says a word; and
  so is everything that was identical on both sides before, unless it was changed since.
- After a flush, both trees are identical in content and metadata.
- From the moment the replica's node is ready again, no reader sees a file that is not whole.
- The nodes start again by themselves.

Covered: lost, reordered and sector-torn writes below ext4 and XFS; their journals' recovery, also cut off; state and
tree on one filesystem or on two; other programs on the machine that sync whenever they like. Not covered: a disk that
lies about flushes or damages what it has flushed, memory that fails, a clock that goes back with the power, other
filesystems, and networks that fail other than by their machines. What a program on the source had not synced may be
lost there: the source's own disk decides what is true, and the replica must follow it back.

    python agent/tests/powerloss.py --cuts 200 --minutes 30 --report build/powerloss/report.json

``--break-sync replica`` makes fsync, fdatasync, syncfs and their like of that node do nothing: a campaign that does not
fail then would prove nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import random
import shutil
import signal
import stat
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crash import ROOTS, SIDES, STEPS, Campaign, Failed, Process, Result, change, read_whole
from disks import FILESYSTEMS, Machine, Survived, Unavailable, enter_namespace, why_not
from reports import tell
from trees import describe

from farshore import durable

#: What a campaign runs on: a filesystem, and whether state and tree have one each.
PLANS = ("ext4", "ext4-strict:apart", "xfs", "xfs:apart")
#: How long a round waits for the write, flush or step at which the power is to go.
_TRIGGER_SECONDS = 2.0
#: How long a source has before it is stopped to look at what changed last: what is done through a second name of a file
#: that is gone before anybody looked at it is not seen before the next scan (docs/architecture.md).
_LOOK_SECONDS = 0.3
#: How long a replica that was started may take to have what was acknowledged.
_REPLAY_SECONDS = 20.0
#: The exit code when this machine cannot have such disks.
CANNOT = 77
_MODE, _MTIME, _LINKS = 0, 4, 7
_SYNC_CALLS = {
    # sync, fsync, fdatasync, msync, sync_file_range, syncfs
    "x86_64": (162, 74, 75, 26, 277, 306),
    "aarch64": (81, 82, 83, 227, 84, 267),
}
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 22, 38, 2
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class PowerResult(Result):
    """What a campaign on one plan did."""

    plan: str = ""
    #: Cuts by what survived of the unflushed writes.
    lots: Counter[str] = field(default_factory=Counter)
    #: Cuts that found unflushed writes, and how many, and how many bytes, of which so many survived.
    with_unflushed: int = 0
    unflushed_writes: int = 0
    unflushed_bytes: int = 0
    survived_bytes: int = 0
    torn_writes: int = 0
    #: How many paths were found as they had been acknowledged, each time before the source was heard.
    paths_checked: int = 0

    def add(self, survived: Survived) -> None:
        """Count a machine's cut."""
        self.lots[survived.lot] += 1
        self.with_unflushed += survived.writes > 0
        self.unflushed_writes += survived.writes
        self.unflushed_bytes += survived.bytes
        self.survived_bytes += survived.kept_bytes
        self.torn_writes += survived.torn

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        found = super().as_json()
        return {"plan": found.pop("plan"), "cuts": found.pop("kills"), **found, "lots": dict(sorted(self.lots.items()))}


class PowerCampaign(Campaign):
    """Two machines, each with one disk or two; ``broken`` names the sides whose syncs do nothing."""

    unit = "cuts"
    syncs = True

    def __init__(
        self, base: Path, result: PowerResult, say: Callable[[str], None], broken: frozenset[str] = frozenset()
    ) -> None:
        self.result: PowerResult = result
        filesystem, _, apart = result.plan.partition(":")
        self._broken = broken
        self._workload: Process | None = None
        self._neighbours: dict[str, Process] = {}
        self.machines: dict[str, Machine] = {}
        try:
            for side in SIDES:
                self.machines[side] = Machine(base / side, FILESYSTEMS[filesystem], 2 if apart else 1)
            super().__init__(base, result, say)
            for side in SIDES:
                self._begin_boot(side)
                self.machines[side].sync()
                self._start_neighbour(side)
        except BaseException:
            self._give_back()
            raise

    def tree(self, side: str) -> Path:
        """Where the protected paths of a side are."""
        return self.machines[side].mounts[0] / "tree"

    def state(self, side: str) -> Path:
        """Where a side's node keeps what it must remember."""
        return self.machines[side].mounts[-1] / "state"

    # --- a round

    def _round(self) -> None:
        result, chance = self.result, self._chance
        result.rounds += 1
        self._tidy()
        self._flush()
        victims = chance.choice([["source"], ["replica"], ["replica"], ["source", "replica"]])
        victim = chance.choice(victims)
        kind = chance.choice(["rest", "moment", "moment", "step", "step", "write", "write", "flush", "flush"])
        step: tuple[str, str, int] | None = None
        label = {"rest": "at rest", "moment": "at any moment"}.get(kind, f"before a {kind}")
        if kind == "step":
            step = chance.choice(sorted(STEPS[victim])), chance.choice(["before", "after"]), _few(chance)
            label = f"{step[1]} {step[0]}"
            self._nodes[victim].end()
            self._start(victim, step)
        before = {name: describe(self.tree("replica") / name) for name in ROOTS} if victims == ["replica"] else {}
        if kind != "rest":
            self._disturb(victim, kind, chance.random() < 0.6)
        self._cut(victims, label, may_be_dead=bool(step))
        self._recover(victims, label, before)

    def _disturb(self, victim: str, kind: str, acknowledges: bool) -> None:
        """Let files change until the moment has come."""
        chance, machine = self._chance, self.machines[victim]
        seed = chance.getrandbits(32)
        self._workload = Process(lambda: change(self.tree("source"), seed, sync=True), self._log("workload"))
        if acknowledges:
            self._write_count()
        # From here to the cut, this process must not touch a disk that may stop at any moment.
        if kind in ("write", "flush"):
            machine.freeze_at(kind, chance.randrange(1, chance.choice([3, 10, 30 if kind == "flush" else 300])))
        if acknowledges:
            self._await_acknowledgement(kind != "moment")
        if kind == "moment":
            time.sleep(chance.random() * chance.choice([0.02, 0.2, 0.6]))
            return
        deadline = time.monotonic() + _TRIGGER_SECONDS
        while self._nodes[victim].alive and not machine.frozen and time.monotonic() < deadline:
            time.sleep(0.001)

    def _recover(self, victims: list[str], label: str, before: dict[str, Any]) -> None:
        """Power on, and check."""
        where = f"{' and '.join(victims)} cut {label}"
        if "replica" in victims:
            source = self._nodes["source"]
            if self._workload is not None:
                time.sleep(self._chance.choice([0.0, 0.3]))
                self._end_workload()
                time.sleep(_LOOK_SECONDS)
            # What the replica has by itself is to be seen: nobody may send it again.
            source.send(signal.SIGSTOP)
            try:
                self._power_up("replica")
                self._check_kept(where, before)
            finally:
                source.send(signal.SIGCONT)
            self._start_observer()
        self._end_workload()
        if "source" in victims:
            self._mount("source")
            self._check_source()
            self._power_up("source", mounted=True)
        self._flush()
        self._check_trees(where)
        self._check_observer()

    def _end_workload(self) -> None:
        workload, self._workload = self._workload, None
        if workload is not None:
            workload.end()

    # --- the power

    def _cut(self, victims: list[str], label: str, may_be_dead: bool = False) -> None:
        """Cut the power of these machines, and decide what is left on their disks."""
        machines = [self.machines[side] for side in victims]
        for machine in machines:
            machine.freeze()
        if not may_be_dead:
            for side in victims:
                if side in self._nodes and not self._nodes[side].alive:
                    raise Failed(f"node {side} had ended by itself; see {self._log(side)}")
        dying = [process for side in victims for process in self._on(side)]
        for process in dying:
            process.send(signal.SIGKILL)
        for machine in machines:
            machine.fail()
        for process in dying:
            process.end()
        if "replica" in victims:
            self._end_observer()
        if "source" in victims:
            self._workload = None
        for side, machine in zip(victims, machines, strict=True):
            machine.unmount()
            survived = machine.restore(self._chance.getrandbits(64))
            self.result.add(survived)
            self._begin_boot(side)
            self._note(f"{side}: {survived}")
        self._count(f"{' and '.join(victims)}: {label}")

    def _mount(self, side: str) -> None:
        """Mount the disks; now and then the power goes while their filesystems recover."""
        machine = self.machines[side]
        while self._chance.random() < 0.1:
            machine.freeze_at(self._chance.choice(["write", "flush"]), _few(self._chance))
            if machine.mount() and not self._disarmed(machine):
                return
            self._cut([side], "while the filesystem recovers", may_be_dead=True)
        machine.mount()

    def _power_up(self, side: str, mounted: bool = False) -> None:
        """Mount, unless it is ``mounted``, and start the node; now and then the power goes meanwhile."""
        machine = self.machines[side]
        while True:
            if not mounted:
                self._mount(side)
            mounted = False
            again = self._chance.random() < 0.15
            if again:
                machine.freeze_at(self._chance.choice(["write", "flush"]), self._chance.choice([1, 2, 3]))
            self._start_neighbour(side)
            self._start(side)
            if not again or not self._disarmed(machine):
                break
            self._cut([side], "while the node starts", may_be_dead=True)

    @staticmethod
    def _disarmed(machine: Machine) -> bool:
        """The power is not to go any more; returns whether it has gone already."""
        machine.freeze_at("", 0)
        return machine.frozen

    def _on(self, side: str) -> list[Process]:
        """The processes of a machine."""
        found = [self._nodes.get(side), self._neighbours.get(side)]
        found.append(self._workload if side == "source" else self._observer)
        return [process for process in found if process is not None]

    def _start_neighbour(self, side: str) -> None:
        mounts, seed = self.machines[side].mounts, self._chance.getrandbits(32)
        self._neighbours[side] = Process(lambda: sync_now_and_then(mounts, seed), self._log("neighbour"))

    # --- what must hold

    def _check_source(self) -> None:
        """What the workload had synced is whole; what was lost on the source is not promised any more."""
        tree = self.tree("source") / "whole"
        for path in tree.iterdir():
            if not path.name.startswith("."):
                read_whole(path)
        body = read_whole(tree / "count")
        self._acknowledged = min(self._acknowledged, int(body or b"0"))

    def _check_kept(self, where: str, before: dict[str, Any]) -> None:
        """What the replica had promised to have, it has."""
        deadline = time.monotonic() + _REPLAY_SECONDS
        while lacking := self._lacking(before):
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            raise Failed(f"{where}; restarted, the replica lacks what was acknowledged: {'; '.join(lacking[:5])}")

    def _lacking(self, before: dict[str, Any]) -> list[str]:
        lacking = []
        checked = 0
        path = self.tree("replica") / "whole" / "count"
        body = read_whole(path)
        if self._acknowledged and (body is None or int(body) < self._acknowledged):
            lacking.append(f"{path} holds {body!r}, not {self._acknowledged}")
        for name, was in before.items():
            source = describe(self.tree("source") / name)
            try:
                replica = describe(self.tree("replica") / name)
            except FileNotFoundError as error:
                # It is on its way there.
                return [f"{name}: {error}"]
            for each, state in was.items():
                # What is on its way may be there or not, in part too.
                if _kept(source.get(each)) != _kept(state):
                    continue
                checked += 1
                if _kept(replica.get(each)) != _kept(state):
                    lacking.append(f"{name}/{each!r}")
        if not lacking:
            self.result.paths_checked += checked
        return lacking

    # --- nodes

    def _has_power(self, side: str) -> bool:
        return not self.machines[side].frozen

    def _before_node(self, side: str) -> None:
        durable.BOOT_ID = self._boot(side)
        if side in self._broken:
            sync_nothing()

    def _boot(self, side: str) -> Path:
        """What tells this machine's boots apart, as the kernel is not started anew."""
        return self.base / f"{side}.boot"

    def _begin_boot(self, side: str) -> None:
        self._boot(side).write_text(f"{self._chance.getrandbits(128):032x}\n")

    def _note(self, text: str) -> None:
        with self._log("cuts").open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} round {self.result.rounds}: {text}\n")

    def _stop(self) -> None:
        """End all; after a failure the disks' images stay, with all that was written to them."""
        try:
            processes = [process for side in SIDES for process in self._on(side)]
            for process in processes:
                process.send(signal.SIGKILL)
            for machine in self.machines.values():
                # A cut that was still to come would stop the disks while they are written back below, for good.
                if self._disarmed(machine):
                    machine.fail()
            super()._stop()
            for process in processes:
                process.end()
            if self.result.failures:
                for side, machine in self.machines.items():
                    machine.sync()
                    machine.save(self.base / side)
        finally:
            self._give_back()

    def _give_back(self) -> None:
        for process in self._neighbours.values():
            process.send(signal.SIGKILL)
        for machine in self.machines.values():
            machine.close()


def _few(chance: random.Random) -> int:
    return chance.choice([1, 1, 2, 3, 5, 10, 20])


def _kept(state: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """What must be kept of a path that was not changed: of a directory, not the time, as that comes last."""
    if state is None:
        return None
    left_out = {_LINKS, _MTIME} if state[_MODE] == stat.S_IFDIR else {_LINKS}
    return tuple(value for number, value in enumerate(state) if number not in left_out)


# --- what the children do


def sync_now_and_then(mounts: list[Path], seed: int) -> None:
    """Be another program on the machine: its syncs commit what the filesystem has of others too."""
    chance = random.Random(seed)
    while True:
        time.sleep(chance.random() * chance.choice([0.05, 0.5]))
        mount = chance.choice(mounts)
        with (mount / "neighbour").open("w") as file:
            file.write(str(chance.random()))
            file.flush()
            if chance.random() < 0.8:
                os.fsync(file.fileno())
            else:
                _libc.syncfs(file.fileno())


def sync_nothing() -> None:
    """From now on, this process's system calls that make something durable do nothing, and say that it is done."""
    calls = _SYNC_CALLS[platform.machine()]
    load_number, equal, answer = 0x20, 0x15, 0x06
    done, allow = 0x00050000, 0x7FFF0000
    code = [struct.pack("=HBBI", load_number, 0, 0, 0)]
    code += [struct.pack("=HBBI", equal, len(calls) - number, 0, call) for number, call in enumerate(calls)]
    code += [struct.pack("=HBBI", answer, 0, 0, allow), struct.pack("=HBBI", answer, 0, 0, done)]
    filters = ctypes.create_string_buffer(b"".join(code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(filters)))
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or _libc.prctl(_PR_SET_SECCOMP, _FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


# --- the command line


def run_plans(
    base: Path, plans: list[str], seed: int, cuts: int, seconds: float, broken: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Run a campaign on each plan, with its share of the cuts and of the time; returns the report."""
    until = time.monotonic() + seconds
    results: list[PowerResult] = []
    for number, plan in enumerate(plans):
        print(f"on {plan}", flush=True)
        result = PowerResult(seed + number, plan=plan)
        left = len(plans) - number
        share = -(-(cuts - sum(each.kills for each in results)) // left)
        try:
            place = base / plan.replace(":", "-")
            campaign = PowerCampaign(place, result, lambda text: print(text, flush=True), broken)
            campaign.run(share, (until - time.monotonic()) / left)
        except OSError as error:
            result.failures.append(f"before the first round: {error}")
        results.append(result)
    return {
        "seed": seed,
        "cuts": sum(each.kills for each in results),
        "seconds": round(sum(each.seconds for each in results), 1),
        "failures": [f"{each.plan}: {text}" for each in results for text in each.failures],
        "campaigns": [each.as_json() for each in results],
    }


def main() -> int:
    """The command line; the exit code is 0 when nothing was lost or torn, 77 when this machine cannot try it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--cuts", type=int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--minutes", type=float, default=30.0, metavar="M", help="at most so long; default: %(default)g"
    )
    parser.add_argument(
        "--on", action="append", choices=PLANS, help="may be repeated; default: all that this machine can have"
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), metavar="N")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="work there, and leave it (default: a temporary one)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the figures there, as JSON")
    parser.add_argument(
        "--break-sync", action="append", choices=SIDES, default=[], help="let that node's syncs do nothing: must fail"
    )
    options = parser.parse_args()
    kinds = {name: FILESYSTEMS[name.partition(":")[0]].kind for name in PLANS}
    plans = options.on or [name for name in PLANS if name.startswith("ext4") or not why_not(kinds[name])]
    for name in plans:
        if reason := why_not(kinds[name]):
            print(f"powerloss: {reason}", file=sys.stderr)
            return CANNOT
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    print(f"seed {options.seed}", flush=True)
    base = options.dir or Path(tempfile.mkdtemp(prefix="farshore-powerloss-"))
    keep = options.dir is not None
    try:
        enter_namespace()
        broken = frozenset(options.break_sync)
        report = run_plans(base, plans, options.seed, options.cuts, options.minutes * 60, broken)
        if report["failures"]:
            keep = True
            print(f"what is left of it is in {base}; the disks' images can be mounted: mount -o loop IMAGE DIR")
    except Unavailable as error:
        print(f"powerloss: {error}", file=sys.stderr)
        return CANNOT
    finally:
        if not keep:
            shutil.rmtree(base)
    return tell(report, options.report)


if __name__ == "__main__":
    sys.exit(main())
