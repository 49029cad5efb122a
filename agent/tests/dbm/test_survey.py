"""The replica's part of a verification: what it tells, when, and what a hostile source may not do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import blake3
import pytest
from replicas import DIRECTORY, FILE, Replica

from farshore.dbm.messages import (
    MAX_LOOK,
    MAX_QUESTIONS,
    Ack,
    Begin,
    Commit,
    Digests,
    EndSurvey,
    Look,
    MakeDir,
    Ping,
    Pong,
    Put,
    Seen,
    SetMeta,
    Survey,
    Surveyed,
    WantDigests,
)
from farshore.dbm.receiver import Applier
from farshore.dbm.verify import digests
from farshore.errors import ProtocolError

_M = TypeVar("_M")


def read(replica: Replica, kind: type[_M]) -> _M:
    """The next message of a kind."""
    while True:
        message = replica.source.read()
        assert message is not None, "the connection ended"
        if isinstance(message, kind) and not (isinstance(message, Surveyed) and not message.done):
            return message


def surveyed(replica: Replica, run: bytes = b"run", contents: bool = True, rate: float = 0.0) -> Surveyed:
    replica.source.put(Survey(run, contents, rate))
    return read(replica, Surveyed)


def fill(replica: Replica) -> None:
    answer = replica.send(
        MakeDir(0, b"", DIRECTORY),
        MakeDir(0, b"d", DIRECTORY),
        *(Put(0, b"d/f%d" % number, FILE, b"content %d" % number) for number in range(5)),
        Put(0, b"top", FILE, b"x"),
    )
    assert isinstance(answer, Ack)


def test_it_tells_the_digests_of_directories(replica: Replica) -> None:
    fill(replica)
    told = surveyed(replica)
    assert (told.run, told.paths, told.problem) == (b"run", 7, "")
    replica.source.put(WantDigests(1, 0, b"", -1), WantDigests(2, 0, b"d", -1), WantDigests(3, 0, b"nothing", -1))
    top, below, nothing = (read(replica, Digests) for _ in range(3))
    assert {item.name for item in top.items} == {b"d", b"top"}
    assert {item.name: item.below for item in top.items}[b"d"] == digests.directory_digest(below.items)
    assert digests.directory_digest(top.items) == told.roots[0]
    own = digests.own_digest(digests.FileKind.FILE, FILE, 9, 0, None, blake3.blake3(b"content 3").digest())
    assert {item.name: item.own for item in below.items}[b"f3"] == own
    assert (nothing.number, nothing.items, nothing.last) == (3, [], True)


def test_each_root_has_its_digest(tmp_path: Path) -> None:
    replica = Replica(tmp_path, ("one", "two"))
    try:
        for root in (0, 1):
            replica.send(MakeDir(root, b"", DIRECTORY), Put(root, b"f", FILE, b"%d" % root))
        first, second = surveyed(replica).roots
        replica.source.put(WantDigests(1, 1, b"", -1), Look(2, 1, [b"f"]))
        assert digests.directory_digest(read(replica, Digests).items) == second != first
        assert [(entry.root, entry.digest) for entry in read(replica, Seen).entries] == [
            (1, blake3.blake3(b"1").digest())
        ]
    finally:
        replica.finish()


def test_large_directories_are_told_of_in_buckets(replica: Replica) -> None:
    replica.send(MakeDir(0, b"", DIRECTORY), *(Put(0, b"f%d" % number, FILE, b"x") for number in range(200)))
    surveyed(replica)
    replica.source.put(WantDigests(1, 0, b"", -1))
    told = read(replica, Digests)
    assert told.buckets and len(told.items) <= 200
    names: set[bytes] = set()
    for number, bucket in enumerate(told.items):
        replica.source.put(WantDigests(2 + number, 0, b"", bucket.name[0]))
        held = read(replica, Digests)
        assert not held.buckets
        assert digests.directory_digest(held.items) == bucket.own
        names |= {item.name for item in held.items}
    assert names == {b"f%d" % number for number in range(200)}


def test_excluded_files_sockets_and_access_times_are_not_seen(replica: Replica) -> None:
    fill(replica)
    before = surveyed(replica, b"one")
    directory = (replica.root / "d").stat()
    (replica.root / "d" / "x.tmp").write_text("excluded")
    os.utime(replica.root / "d", ns=(directory.st_atime_ns, directory.st_mtime_ns))
    os.utime(replica.root / "top", ns=(12345, (replica.root / "top").stat().st_mtime_ns))
    assert surveyed(replica, b"two").roots == before.roots
    (replica.root / "top").chmod(0o600)
    assert surveyed(replica, b"three").roots != before.roots


def test_a_look_sees_what_all_transactions_before_it_made(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(replica)
    surveyed(replica)
    gate = threading.Event()
    work = Applier.work

    def late(self: Applier) -> None:
        gate.wait(60)
        work(self)

    monkeypatch.setattr(Applier, "work", late)
    seq = replica.begin()
    replica.source.put(
        *(Begin(1, seq), Put(0, b"top", FILE, b"new"), SetMeta(0, b"d", FILE), Commit(seq)),
        Look(7, 0, [b"top", b"d/f0", b"missing"]),
    )
    again = replica.begin()
    replica.source.put(Begin(1, again), Put(0, b"top", FILE, b"newer"), Commit(again))
    gate.set()
    seen = read(replica, Seen)
    assert seen.number == 7 and seen.last
    entries = {entry.path: entry for entry in seen.entries}
    assert set(entries) == {b"top", b"d/f0"}
    assert entries[b"top"].digest == blake3.blake3(b"new").digest()
    assert entries[b"d/f0"].digest == blake3.blake3(b"content 0").digest()
    replica.source.until_acked(again)
    assert (replica.root / "top").read_bytes() == b"newer"


def test_what_was_opened_stays_what_it_was(replica: Replica) -> None:
    """A Look at a file that is replaced before it is read tells of the file that was there."""
    old = os.urandom(2_000_000)
    replica.send(MakeDir(0, b"", DIRECTORY), Put(0, b"small", FILE, b"x"))
    (replica.root / "big").write_bytes(old)
    surveyed(replica, contents=False, rate=1e6)
    replica.source.put(Look(1, 0, [b"small", b"big"]))
    replica.send(Put(0, b"big", FILE, b"replaced"))
    entries = {entry.path: entry for entry in read(replica, Seen).entries}
    assert entries[b"big"].digest == blake3.blake3(old).digest()


def test_transactions_do_not_wait_for_a_survey(replica: Replica) -> None:
    replica.send(MakeDir(0, b"", DIRECTORY))
    (replica.root / "big").write_bytes(os.urandom(3_000_000))
    replica.source.put(Survey(b"run", True, 1000.0))
    started = time.monotonic()
    for number in range(50):
        assert isinstance(replica.send(Put(0, b"f%d" % number, FILE, b"x")), Ack)
    assert time.monotonic() - started < 60  # The survey takes most of an hour.


def test_another_survey_ends_the_one_before_and_the_end_all(replica: Replica) -> None:
    replica.send(MakeDir(0, b"", DIRECTORY))
    (replica.root / "big").write_bytes(os.urandom(3_000_000))
    replica.source.put(Survey(b"slow", True, 1000.0))
    assert surveyed(replica, b"fast").run == b"fast"
    assert (replica.state / "survey.db").exists()
    replica.source.put(EndSurvey())
    wait_for(lambda: not (replica.state / "survey.db").exists())
    replica.source.put(Survey(b"slow", True, 1000.0))
    replica.source.put(Ping())
    read(replica, Pong)
    assert replica.disconnect() is None
    wait_for(lambda: not any(thread.name.startswith("survey") for thread in threading.enumerate()))


def test_a_survey_goes_on_where_it_was_cut_off(replica: Replica) -> None:
    replica.send(MakeDir(0, b"", DIRECTORY))
    for number in range(20):
        (replica.root / f"f{number}").write_bytes(os.urandom(100_000))
    first = surveyed(replica)
    assert first.read == 2_000_000
    replica.disconnect()
    again = surveyed(replica)
    assert (again.read, again.roots) == (0, first.roots)
    assert surveyed(replica, b"other").read == 2_000_000


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.02)
    raise AssertionError("it did not happen")


def test_what_cannot_be_looked_at_ends_the_verification_only(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(replica)
    surveyed(replica)

    def broken(*arguments: object) -> NoReturn:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as disk:
        disk.setattr("farshore.dbm.replica.survey.scanner.observe", broken)
        replica.source.put(Look(1, 0, [b"top"]))
        told = read(replica, Surveyed)
    assert (told.run, told.problem) == (b"run", "'top': Input/output error")
    assert isinstance(replica.send(Put(0, b"later", FILE, b"x")), Ack)


OUTSIDE: list[list[object]] = [
    [Look(1, 0, [b"../out"])],
    [Look(1, 0, [b"/etc/passwd"])],
    [Look(1, 0, [b"a\0b"])],
    [Look(1, 0, [b".farshore-stage"])],
    [Look(1, 5, [b"a"])],
    [Look(1, -1, [b"a"])],
    [Look(1, 0, [b"f"] * (MAX_LOOK + 1))],
    [WantDigests(1, 0, b"..", -1)],
    [WantDigests(1, 9, b"", -1)],
    [WantDigests(1, 0, b"", 256)],
    [WantDigests(1, 0, b"", -2)],
    [Survey(b"", True, 0.0)],
    [Survey(b"x" * 65, True, 0.0)],
    [Survey(b"run", True, -1.0)],
    [Survey(b"run", True, float("nan"))],
    [Survey(b"run%d" % number, True, 0.0) for number in range(2000)],
    [Survey(b"slow", True, 1.0), *(WantDigests(number, 0, b"", -1) for number in range(MAX_QUESTIONS + 1))],
]


@pytest.mark.parametrize("messages", OUTSIDE, ids=lambda messages: str(messages[0])[:60])
def test_what_does_not_belong_there_ends_the_connection(replica: Replica, messages: list[object]) -> None:
    replica.send(MakeDir(0, b"", DIRECTORY))
    (replica.root / "big").write_bytes(os.urandom(100_000))
    if not isinstance(messages[0], Survey):
        surveyed(replica)
    replica.source.put(*messages)
    while replica.source.read() is not None:
        pass
    assert isinstance(replica.ended(), ProtocolError)


def test_a_question_without_a_survey_ends_the_connection(replica: Replica) -> None:
    fill(replica)
    replica.source.put(WantDigests(1, 0, b"", -1))
    while replica.source.read() is not None:
        pass
    assert isinstance(replica.ended(), ProtocolError)


def test_no_symbolic_link_is_followed(replica: Replica, tmp_path: Path) -> None:
    fill(replica)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (replica.root / "door").symlink_to(outside)
    assert surveyed(replica).paths == 8
    replica.source.put(Look(1, 0, [b"door", b"door/secret"]), WantDigests(2, 0, b"door", -1))
    seen, told = read(replica, Seen), read(replica, Digests)
    assert [(entry.path, entry.target) for entry in seen.entries] == [(b"door", os.fsencode(outside))]
    assert told.items == []
