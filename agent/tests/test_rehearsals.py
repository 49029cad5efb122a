"""Databases under load whose server and node die: what is on the other side is whole, and is what was promised."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rehearsal_postgres
from disaster import Acknowledged, Nodes, ended
from filesystems import filesystem_or_skip

from farshore.config import Consistency

_WRITERS = 3
#: Several writers, each with a row of its own and a table that all share; a number is told when its commit is done.
_WRITER = """
import sqlite3, sys, random
database, writer = sys.argv[1], int(sys.argv[2])
connection = sqlite3.connect(database, timeout=60, isolation_level=None)
connection.execute("PRAGMA journal_mode=WAL")
connection.execute("PRAGMA synchronous=FULL")
connection.execute("PRAGMA wal_autocheckpoint=200")
(number,) = connection.execute("SELECT count FROM counters WHERE writer=?", (writer,)).fetchone()
while True:
    number += 1
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE counters SET count=? WHERE writer=?", (number, writer))
    body = random.randbytes(random.choice([9, 900, 9000]))
    connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (writer, number, body))
    if number % 50 == 0:
        connection.execute("DELETE FROM entries WHERE writer=? AND number<?", (writer, number - 100))
    connection.execute("COMMIT")
    print(number, flush=True)
"""


class Application:
    """An SQLite database with several writers."""

    def __init__(self, database: Path, pids: Path) -> None:
        self.database = database
        self.pids = pids
        self.acknowledged = [Acknowledged() for _ in range(_WRITERS)]
        self._processes: list[subprocess.Popen[str]] = []
        self._threads: list[threading.Thread] = []

    def create(self) -> None:
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("CREATE TABLE counters (writer INTEGER PRIMARY KEY, count INTEGER)")
            connection.execute("CREATE TABLE entries (writer INTEGER, number INTEGER, body BLOB)")
            connection.execute("CREATE INDEX by_body ON entries (body)")
            connection.executemany("INSERT INTO counters VALUES (?, 0)", [(writer,) for writer in range(_WRITERS)])
            connection.commit()

    def start(self) -> None:
        for writer, acknowledged in enumerate(self.acknowledged):
            process = subprocess.Popen(
                [sys.executable, "-c", _WRITER, str(self.database), str(writer)], stdout=subprocess.PIPE, text=True
            )
            thread = threading.Thread(target=self._listen, args=(process, acknowledged))
            thread.start()
            self._processes.append(process)
            self._threads.append(thread)
        self.pids.write_text(" ".join(str(process.pid) for process in self._processes))

    def kill(self) -> None:
        self.pids.write_text("")
        for process in self._processes:
            process.kill()
        for process, thread in zip(self._processes, self._threads, strict=True):
            process.wait()
            thread.join()
        self._processes.clear()
        self._threads.clear()

    @staticmethod
    def _listen(process: subprocess.Popen[str], acknowledged: Acknowledged) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            acknowledged.add(int(line))

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while any(len(each.moments) < count for each in self.acknowledged):
            assert time.monotonic() < deadline, "the writers do not get on"
            time.sleep(0.01)


def counts(database: Path) -> list[int]:
    """What the database holds, which must be sound."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        found = [count for (count,) in connection.execute("SELECT count FROM counters ORDER BY writer")]
        for writer, count in enumerate(found):
            # Each entry came in one transaction with its counter.
            (highest,) = connection.execute("SELECT max(number) FROM entries WHERE writer=?", (writer,)).fetchone()
            assert (highest or 0) == count
    return found


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with filesystem_or_skip(request.param, tmp_path, 1024) as where:
        yield where


def freezing(pids: Path) -> dict[str, Any]:
    """Hooks that stop the writers where they stand, as ``systemctl freeze`` does; a stop is not instant."""
    every = f"for pid in $(cat {pids}); do"
    runs = "grep -qs '^State:.[^TZX]' /proc/$pid/status"
    return {
        "freeze": f"{every} kill -STOP $pid; done; {every} while {runs}; do sleep 0.01; done; done",
        "thaw": f"{every} kill -CONT $pid; done; true",
    }


@pytest.mark.parametrize(("disk", "how"), [("btrfs", "btrfs"), ("xfs", "reflink")], indirect=["disk"])
def test_sqlite_under_load_goes_on_from_the_replica(disk: Path, tmp_path: Path, how: Any) -> None:
    """btrfs needs no hooks: a snapshot is what a power cut would have left. Copies by reference need still writers."""
    trees = {"local": disk / "local", "remote": disk / "remote"}
    for tree in trees.values():
        tree.mkdir()
    pids = tmp_path / "pids"
    application = Application(trees["local"] / "data.db", pids)
    application.create()
    pids.touch()
    hooks = freezing(pids) if how == "reflink" else {}
    nodes = Nodes(tmp_path, trees, Consistency("snapshot", how, interval=0.3, **hooks))
    owner, other = "local", "remote"
    with ended(nodes), contextlib.ExitStack() as stack:
        for side in (other, owner):
            nodes.start(side)
        nodes.take_over(owner, other, owner)
        for _ in range(3):
            nodes.flush(owner)
            application = Application(trees[owner] / "data.db", pids)
            stack.callback(application.kill)
            before = counts(application.database)
            application.start()
            application.wait_for(150)
            # What a flush returned after is there, whatever comes.
            flushed = [max(each.moments) for each in application.acknowledged]
            nodes.flush(owner)
            application.wait_for(300)
            asked, status = nodes.status(owner)
            assert status.connected and status.rpo is not None, status
            nodes.kill(owner)
            application.kill()
            nodes.take_over(other, other)
            found = counts(trees[other] / "data.db")
            for each, count, least, old in zip(application.acknowledged, found, flushed, before, strict=True):
                promised = max(each.before(asked - status.rpo), default=old)
                assert count >= max(promised, least)
                assert count <= max(each.moments) + 1
            nodes.start(owner)
            nodes.own(other, owner)
            owner, other = other, owner


def test_postgresql_under_load_goes_on_from_the_replica(tmp_path: Path) -> None:
    """A short rehearsal; `make postgres-rehearsal` does a long one."""
    # In a process of its own: the rehearsal forks, and a fork has none of the threads that other tests left behind.
    report = tmp_path / "report.json"
    command = [sys.executable, rehearsal_postgres.__file__, "--failovers", "2", "--seconds", "3", "4"]
    done = subprocess.run([*command, "--report", str(report)], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    result = json.loads(report.read_text())
    assert (result["failure"], result["failovers"], result["missing_within_promise"]) == ("", 2, 0)
    assert result["acknowledged"] > 0
    assert done.returncode == 0


def test_who_is_stopped_is_seen_as_such(tmp_path: Path) -> None:
    """The hooks of this file do what they say."""
    process = subprocess.Popen(["sleep", "100"])
    try:
        (tmp_path / "pids").write_text(str(process.pid))
        hooks = freezing(tmp_path / "pids")
        subprocess.run(["/bin/sh", "-c", hooks["freeze"]], check=True)
        assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG) is not None
        subprocess.run(["/bin/sh", "-c", hooks["thaw"]], check=True)
        assert os.waitid(os.P_PID, process.pid, os.WCONTINUED) is not None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
