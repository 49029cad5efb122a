"""The soak: programs that work on files as hard as they can, below a protected path, while two nodes replicate it.

Each round, some of the WORKLOADS run in the source's tree, and the nodes are disturbed: paused and resumed, stopped
and started, killed. Then the programs are stopped where they stand, or killed; after a flush both trees must be
identical in content and metadata. The rounds take turns with the engines that watch.

    python agent/tests/soak.py --minutes 60 --report build/soak/report.json

``CAMPAIGNS`` has what is run, each for an equal part of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from nodes import free_ports
from reports import tell
from trees import differences
from workloads import NEEDED, WORKLOADS, Running

from farshore.cli.mirror import make_keys
from farshore.control import api, client
from farshore.errors import FarshoreError
from farshore.fmm.factory import ENGINES

GROUP = "soak"
SIDES = ("source", "replica")
_READY_SECONDS = 60.0
_FLUSH_SECONDS = 300.0
#: Seconds for which what is written through a mapping may differ yet.
_MAPPED_SECONDS = 60.0
#: What the tree may hold before it is emptied, so that a comparison does not take long.
_MOST_BYTES, _MOST_FILES = 200 << 20, 20_000
_NODE = "import sys; from farshore.daemons.node import main; sys.exit(main())"
_MACHINE = Path(__file__).resolve().parent / "fmm" / "machine.py"
_PR_SET_PDEATHSIG = 1


class Failed(Exception):
    """What must never happen."""


@dataclass
class Result:
    """What was done, and what went wrong."""

    seed: int
    rounds: int = 0
    seconds: float = 0.0
    #: Rounds by engine, by workload, and what was done to the nodes.
    engines: Counter[str] = field(default_factory=Counter)
    workloads: Counter[str] = field(default_factory=Counter)
    disturbed: Counter[str] = field(default_factory=Counter)
    #: Paths that were compared, all rounds together.
    compared: int = 0
    differences: int = 0
    problems: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return {**self.__dict__, "seconds": round(self.seconds, 1)}


class Nodes:
    """A source and a replica as processes. Every part of the source's names is as long as the replica's."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._keys = base / "pki"
        make_keys(self._keys, SIDES)
        self._ports = dict(zip(SIDES, free_ports(2), strict=True))
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def tree(self, side: str) -> Path:
        """The protected path of a side."""
        # Names that are as long as names can be on one side must be possible on the other.
        return self.base / {"source": "a", "replica": "b"}[side] / "tree"

    def start(self, side: str, engine: str = "auto") -> None:
        """Start a node and wait until it answers. Raises Failed."""
        place = self.base / side
        place.mkdir(exist_ok=True)
        (place / "node.yml").write_text(yaml.safe_dump(self._config(side, engine)))
        with self._log(side).open("ab") as out:
            process = self._running[side] = subprocess.Popen(
                [sys.executable, "-c", _NODE, "--config", str(place / "node.yml")],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                preexec_fn=_die_with_parent,
            )
        deadline = time.monotonic() + _READY_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FarshoreError):
                self.ask(side, api.StatusRequest(), 5.0)
                return
            time.sleep(0.02)
        raise Failed(f"node {side} did not start; see {self._log(side)}")

    def end(self, side: str, number: signal.Signals) -> None:
        """End a node by a signal. Raises Failed when it had ended before, or ends badly by SIGTERM."""
        process = self._running.pop(side)
        if process.poll() is not None:
            raise Failed(f"node {side} had ended by itself; see {self._log(side)}")
        process.send_signal(number)
        try:
            code = process.wait(_READY_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise Failed(f"node {side} did not end within {_READY_SECONDS:g} s; see {self._log(side)}") from None
        if number == signal.SIGTERM and code != 0:
            raise Failed(f"node {side} ended with {code}; see {self._log(side)}")

    def own(self) -> None:
        """The source becomes the owner."""
        for side in reversed(SIDES):
            self.ask(side, api.SetOwner(GROUP, "local", 1, False))

    def ask(self, side: str, request: api.Request, timeout: float = 30.0) -> api.Answer:
        """Have a request answered. Raises FarshoreError."""
        socket = self.base / side / "run" / client.NODE_SOCKET
        return asyncio.run(client.ask_socket(socket, request, timeout))

    def flush(self) -> None:
        """Wait until the replica's tree has every change. Raises FarshoreError."""
        self.ask("source", api.Flush(_FLUSH_SECONDS, GROUP), _FLUSH_SECONDS + 5)

    def status(self) -> api.GroupStatus:
        """How the source is."""
        answer = self.ask("source", api.StatusRequest())
        assert isinstance(answer, api.NodeStatus)
        return answer.groups[GROUP]

    def kill(self) -> None:
        """End what still runs."""
        for process in self._running.values():
            process.kill()
            process.wait()
        self._running.clear()

    def _log(self, side: str) -> Path:
        return self.base / f"{side}.log"

    def _config(self, side: str, engine: str) -> dict[str, Any]:
        (peer,) = set(SIDES) - {side}
        group: dict[str, Any] = {
            "side": "local" if side == "source" else "remote",
            "peer": {"node": peer, "address": "127.0.0.1", "port": self._ports[peer]},
            "paths": [{"source": "/soak", "path": str(self.tree(side))}],
            # What changes here all the time is most of the tree.
            "brake": {"mode": "off"},
        }
        if engine != "auto":
            group["watch"] = {"engine": engine}
        keys = {"ca": "ca.crt", "certificate": f"{side}.crt", "key": f"{side}.key"}
        return {
            "node": side,
            "listen": {"address": "127.0.0.1", "port": self._ports[side]},
            "tls": {name: str(self._keys / file) for name, file in keys.items()},
            "state_dir": str(self.base / side / "state"),
            "runtime_dir": str(self.base / side / "run"),
            "groups": {GROUP: group},
        }


class Soak:
    """The campaign "workloads": rounds below ``base``, each repeatable by its seed as far as programs are."""

    def __init__(
        self, base: Path, result: Result, say: Callable[[str], None], names: list[str], engines: list[str]
    ) -> None:
        self.base = base
        self.result = result
        self._say = say
        self._names = names
        self._engines = engines
        self._engine = engines[0]
        self._nodes = Nodes(base)
        self._elsewhere = base / "elsewhere"
        self._elsewhere.mkdir()
        self._running: list[Running] = []
        self._chance = random.Random(result.seed)
        self._left: list[str] = []

    def run(self, rounds: int, seconds: float, each: float) -> Result:
        """So many rounds of about ``each`` seconds, as fit into ``seconds``, or until something went wrong."""
        began = time.monotonic()
        self._nodes.tree("source").mkdir(parents=True)
        try:
            for side in reversed(SIDES):
                self._nodes.start(side, self._engine if side == "source" else "auto")
            self._nodes.own()
            self._nodes.flush()
            while self.result.rounds < rounds and time.monotonic() - began < seconds:
                self._round(each)
                self.result.seconds = time.monotonic() - began
            for side in SIDES:
                self._nodes.end(side, signal.SIGTERM)
        except (Failed, FarshoreError, OSError) as error:
            running = ", ".join(running.name for running in self._running)
            why = f"round {self.result.rounds} ({self._engine}; {running}): {error or type(error).__name__}"
            self.result.failures.append(why)
            self._say(f"failed: {why}")
        finally:
            for running in self._running:
                running.kill()
            self._nodes.kill()
            self.result.seconds = time.monotonic() - began
        return self.result

    def _round(self, seconds: float) -> None:
        result = self.result
        result.rounds += 1
        self._tidy()
        self._choose_engine(self._engines[result.rounds % len(self._engines)])
        names = self._pick()
        for name in names:
            directory = self._nodes.tree("source") / f"{name} {result.rounds % 4}"
            log = self.base / "workloads.log"
            self._running.append(Running(name, directory, self._chance.getrandbits(31), self._elsewhere, log))
        ends = time.monotonic() + seconds * self._chance.uniform(0.5, 1.5)
        done: list[str] = []
        while (left := ends - time.monotonic()) > 0:
            time.sleep(min(left, self._chance.uniform(0.1, seconds / 2)))
            if time.monotonic() < ends:
                done.append(self._disturb())
        for running in self._running:
            if running.ended:
                raise Failed(f"{running.name} ended by itself with {running.ended}; see {running.log}")
        held = self._chance.random() < 0.5
        for running in self._running:
            if held:
                running.hold()
            else:
                running.kill()
        self._nodes.flush()
        self.compare(patient=held and any(WORKLOADS[name].maps for name in names))
        for running in self._running:
            running.kill()
        self._running.clear()
        result.engines[self._engine] += 1
        result.workloads.update(names)
        result.problems = self._nodes.status().problems
        what = f"{', '.join(names)}; {'held' if held else 'killed'}; {', '.join(done) or 'undisturbed'}"
        self._say(f"round {result.rounds}, {self._engine}: {what}")

    def _pick(self) -> list[str]:
        """One to three of the workloads; all of them come before one comes again."""
        count = self._chance.choice([1, 2, 2, 3])
        while len(self._left) < count:
            self._left += self._chance.sample(self._names, len(self._names))
        picked = list(dict.fromkeys(self._left[:count]))
        del self._left[:count]
        return picked

    def _choose_engine(self, engine: str) -> None:
        if engine != self._engine:
            self._nodes.end("source", signal.SIGTERM)
            self._engine = engine
            self._nodes.start("source", engine)

    def _disturb(self) -> str:
        """Do something to the nodes; returns what."""
        what = self._chance.choice(
            ["nothing", "pause", "flush", "stop source", "kill source", "stop replica", "kill replica"]
        )
        verb, _, side = what.partition(" ")
        if verb == "pause":
            self._nodes.ask("source", api.Pause(GROUP))
            time.sleep(self._chance.uniform(0.0, 1.0))
            self._nodes.ask("source", api.Resume(GROUP))
        elif verb == "flush":
            # Whether it comes to an end while everything changes is not asked for.
            with contextlib.suppress(FarshoreError):
                self._nodes.ask("source", api.Flush(1.0, GROUP), 6.0)
        elif side:
            self._nodes.end(side, signal.SIGTERM if verb == "stop" else signal.SIGKILL)
            self._nodes.start(side, self._engine if side == "source" else "auto")
        self.result.disturbed[what] += 1
        return what

    def trees(self) -> tuple[Path, Path]:
        """The protected path of the source, and of the replica."""
        return self._nodes.tree("source"), self._nodes.tree("replica")

    def compare(self, *, patient: bool) -> None:
        """Raise Failed when the trees differ; with ``patient``, only if they still do after a while."""
        source, replica = self.trees()
        deadline = time.monotonic() + (_MAPPED_SECONDS if patient else 0.0)
        while found := differences(source, replica):
            if time.monotonic() > deadline:
                self.result.differences += len(found)
                raise Failed(f"{len(found)} differences: {'; '.join(found[:8])}")
            time.sleep(1.0)
            self._nodes.flush()
        self.result.compared += sum(len(names) + len(files) for _, names, files in os.walk(source))

    def _tidy(self) -> None:
        """Remove what earlier rounds left, some of it, or all when it is too much."""
        tree = self._nodes.tree("source")
        size = files = 0
        for place, _, names in os.walk(tree):
            files += len(names)
            with contextlib.suppress(OSError):
                size += sum(os.lstat(os.path.join(place, name)).st_blocks * 512 for name in names)
        full = size > _MOST_BYTES or files > _MOST_FILES
        for path in tree.iterdir():
            if full or self._chance.random() < 0.4:
                subprocess.run(["rm", "-rf", str(path)], check=True)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def engines() -> list[str]:
    """Those that can be tried here."""
    return [name for name in ENGINES if name != "auto" and (name != "fanotify" or os.geteuid() == 0)]


def workloads(options: argparse.Namespace, seconds: float, seed: int, base: Path) -> dict[str, Any]:
    """The campaign of that name."""
    if missing := [package for program, package in NEEDED.items() if shutil.which(program) is None]:
        return {"failures": [f"not installed: {', '.join(missing)}"]}
    names = options.only or list(WORKLOADS)
    soak = Soak(base, Result(seed), lambda text: print(text, flush=True), names, options.engine or engines())
    return soak.run(options.rounds, seconds, options.seconds).as_json()


def machine(options: argparse.Namespace, seconds: float, seed: int, base: Path) -> dict[str, Any]:
    """The campaign of that name: random operations that Hypothesis chooses, with each engine in turn."""
    chosen = options.engine or engines()
    report: dict[str, Any] = {"failures": []}
    for engine in chosen:
        file = base / f"{engine}.json"
        words = ["--engine", engine, "--minutes", f"{seconds / 60 / len(chosen):.3f}", "--seed", str(seed)]
        command = [sys.executable, str(_MACHINE), *words, "--report", str(file)]
        code = subprocess.run(command, check=False, preexec_fn=_die_with_parent).returncode
        if not file.exists():
            report["failures"].append(f"{engine}: it ended with {code}")
            continue
        report[engine] = found = json.loads(file.read_text())
        report["failures"] += [f"{engine}: {failure}" for failure in found["failures"]]
    return report


#: Takes the options, the seconds that it has, a seed, and a directory of its own, in which it leaves nothing but what
#: helps to look into a failure; returns its report, whose ``failures`` must be empty.
Campaign = Callable[[argparse.Namespace, float, int, Path], dict[str, Any]]

CAMPAIGNS: dict[str, Campaign] = {"workloads": workloads, "machine": machine}


def main() -> int:
    """The command line; the exit code is 0 when nothing differed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=60.0, metavar="M", help="for all campaigns together; default: %(default)g"
    )
    parser.add_argument(
        "--campaign", action="append", choices=CAMPAIGNS, help="this one, may be repeated (default: all)"
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), metavar="N")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="work there, and leave it (default: a temporary one)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the figures there, as JSON")
    allowed = [name for name in ENGINES if name != "auto"]
    parser.add_argument("--engine", action="append", choices=allowed, help="may be repeated (default: all)")
    group = parser.add_argument_group("of the campaign workloads")
    group.add_argument("--rounds", type=int, default=10**9, metavar="N", help="at most so many")
    group.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of a round; default: %(default)g")
    group.add_argument(
        "--only", action="append", choices=WORKLOADS, help="this program, may be repeated (default: all)"
    )
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    base = options.dir or Path(tempfile.mkdtemp(prefix="farshore-soak-"))
    chosen = options.campaign or list(CAMPAIGNS)
    report: dict[str, Any] = {"seed": options.seed, "campaigns": {}, "failures": []}
    for name in chosen:
        place = base / name
        place.mkdir(parents=True)
        found = CAMPAIGNS[name](options, options.minutes * 60 / len(chosen), options.seed, place)
        report["campaigns"][name] = found
        report["failures"] += [f"{name}: {failure}" for failure in found["failures"]]
    if report["failures"]:
        print(f"what is left of it is in {base}")
    elif options.dir is None:
        shutil.rmtree(base)
    return tell(report, options.report)


if __name__ == "__main__":
    sys.exit(main())
