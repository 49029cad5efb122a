"""The state machine with each engine: always the same thousands of steps; ``make soak`` tries others."""

from __future__ import annotations

import logging
import os

import pytest

from . import machine


def test_whatever_is_done_to_a_tree_the_replica_is_the_same(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "farshore")
    machine.Machine.counts.clear()
    try:
        machine.run(engine, 24, 50)
    except BaseException:
        print(f"steps, for {machine.__file__} --engine {engine} --replay FILE: {machine.Machine.failed!r}")
        raise
    counts = machine.Machine.counts
    assert counts["steps"] > 1000
    wanted = {*machine.OPERATIONS, "flushes", "pauses", "restarts", "failures", "cuts", "roots away", "scans"}
    if os.geteuid() == 0:
        wanted.add("overflows")
    assert not [name for name in wanted if not counts[name]]
