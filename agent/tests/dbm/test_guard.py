"""The brake on real trees: what it is told by transactions, and that a hold outlives the process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from brakes import META, Clock

from farshore.config import BrakeConfig
from farshore.dbm.messages import Operation, Put, Remove
from farshore.dbm.replica.brake import Hold, Pass, Verdict, Warn
from farshore.dbm.replica.contents import Content
from farshore.dbm.replica.guard import Guard, Held, load
from farshore.errors import StateError


def nothing(operation: Operation) -> Content | None:
    return None


class Replica:
    """A root with 200 files, and a guard that may be started anew."""

    def __init__(self, base: Path, **config: object) -> None:
        self.root = base / "root"
        self.state = base / "state"
        self.config = BrakeConfig(**config)  # type: ignore[arg-type]
        self.clock = Clock()
        self.seq = 0
        self.state.mkdir()
        for number in range(200):
            (self.root / f"d{number % 5}").mkdir(parents=True, exist_ok=True)
            (self.root / f"d{number % 5}/{number}").write_bytes(b"these are words. " * 40)
        self.start()

    def start(self, armed: bool = True) -> None:
        roots = [os.fsencode(self.root)]
        self.guard = Guard(
            "web", self.config, roots, self.state, armed=armed, clock=self.clock, wall=lambda: 1_700_000_000.0
        )

    def judge(self, *operations: Operation) -> Verdict:
        self.seq += 1
        return self.guard.judge(self.seq, operations, nothing)


WAVE = tuple(Remove(0, b"d%d" % number) for number in range(3))


def test_a_wave_is_held_across_restarts_until_it_is_approved(tmp_path: Path) -> None:
    replica = Replica(tmp_path)
    assert replica.judge(Put(0, b"new", META, b"1")) == Pass()
    verdict = replica.judge(*WAVE)
    assert verdict == Hold("120 of 200 files (60%) were rewritten or removed within 60 s; allowed are 20%")
    assert replica.guard.held == Held(verdict.reason, 1_700_000_000.0, 2)
    assert isinstance(replica.judge(Put(0, b"later", META, b"1")), Hold) and replica.guard.waiting == 2
    replica.start()
    assert replica.guard.held == Held(verdict.reason, 1_700_000_000.0, 2) and replica.guard.held.state == "held"
    assert isinstance(replica.judge(), Hold)
    assert replica.guard.approve() == Held(verdict.reason, 1_700_000_000.0, 2)
    replica.guard.note(WAVE, nothing)
    assert replica.judge(*(Remove(0, b"d3/%d" % number) for number in range(3, 70, 5))) == Pass()
    replica.start()
    assert replica.guard.held is None and replica.guard.approve() is None


def test_what_was_rejected_stays_so_across_restarts(tmp_path: Path) -> None:
    replica = Replica(tmp_path)
    assert replica.guard.reject() is None
    replica.judge(*WAVE)
    for _ in range(2):
        held = replica.guard.reject()
        assert held is not None and held.rejected and held.state == "rejected"
        replica.start()
    assert isinstance(replica.judge(), Hold)
    held = replica.guard.approve()
    assert held is not None and held.rejected
    assert replica.judge(Put(0, b"new", META, b"1")) == Pass()


def test_another_owner_starts_anew(tmp_path: Path) -> None:
    replica = Replica(tmp_path)
    replica.judge(*WAVE)
    replica.guard.forget()
    assert replica.guard.held is None and load(replica.state / "held.json") is None


def test_filling_is_not_judged(tmp_path: Path) -> None:
    replica = Replica(tmp_path)
    replica.start(armed=False)
    assert replica.judge(*WAVE) == Pass()
    replica.guard.in_step()
    assert isinstance(replica.judge(Remove(0, b"d3")), Hold)


def test_a_warning_lets_it_pass(tmp_path: Path) -> None:
    replica = Replica(tmp_path, mode="warn")
    assert isinstance(replica.judge(*WAVE), Warn)
    assert replica.guard.warning.startswith("120 of 200 files") and replica.guard.held is None


def test_when_it_is_off_nothing_is_looked_at(tmp_path: Path) -> None:
    replica = Replica(tmp_path, mode="off")
    assert replica.judge(*WAVE) == Pass() and not replica.guard._counted


def test_handles_are_given_back(tmp_path: Path) -> None:
    replica = Replica(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        replica.judge(Put(0, b"d1/1", META, b"words " * 50), Remove(0, b"d2/%d" % number))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"version": 2}', b'{"version": 1, "why": 1}'])
def test_a_damaged_memory_is_an_error_not_a_release(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "held.json").write_bytes(data)
    with pytest.raises(StateError, match=r"held\.json"):
        load(tmp_path / "held.json")
