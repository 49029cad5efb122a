"""The replica's end of the stream: pipelined transactions, uploads, what outlives a connection, hostile frames."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blake3
import pytest
from replicas import DIRECTORY, FILE, Gate, Replica, Source, chunks, put_whole, serve, stream, upload

from farshore import delta
from farshore.dbm import receiver
from farshore.dbm.messages import (
    Ack,
    Applied,
    Begin,
    Chunk,
    Commit,
    Copy,
    Drop,
    Entries,
    Hello,
    InStep,
    Link,
    ListTree,
    MakeDir,
    MakeNode,
    Meta,
    Move,
    Nak,
    NoSignature,
    Operation,
    Patch,
    Ping,
    Pong,
    Put,
    Refused,
    Remove,
    SetMeta,
    SignaturePart,
    Unkept,
    Upload,
    Uploaded,
    WantSignature,
)
from farshore.dbm.receiver import Applier
from farshore.dbm.replica import build, staging
from farshore.dbm.replica.stage import Stage
from farshore.dbm.replica.upload import Upload as Taken
from farshore.delta import format as layout
from farshore.errors import ProtocolError, StaleEpoch
from farshore.fmm.types import Root

BIG = 3_000_000


def staged(replica: Replica) -> list[str]:
    """The temporary files that are left once the trees are synced; what is kept is in folders."""
    replica.work(replica.applier.checkpoint)
    stage = replica.state / "0" / "stage"
    return sorted(path.name for path in stage.iterdir() if not path.is_dir()) if stage.exists() else []


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.02)
    raise AssertionError("it did not happen")


def hold_commits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing that is accepted is applied until the event that is returned is set."""
    gate = threading.Event()
    work = Applier.work

    def late(self: Applier) -> None:
        gate.wait(60)
        work(self)

    monkeypatch.setattr(Applier, "work", late)
    return gate


# --- transactions


def test_transactions_follow_each_other(replica: Replica) -> None:
    for number in range(300):
        replica.source.put(*replica.transaction(Put(0, b"f%d" % number, FILE, b"%d" % number)))
    replica.source.until_acked(replica.seq)
    assert {int(p.read_text()) for p in replica.root.iterdir()} == set(range(300))
    assert replica.applier.started == replica.seq
    assert staged(replica) == []


def test_a_group_is_acknowledged_once(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    accept = Applier.accept

    def late(self: Applier, transactions: Any) -> None:
        gate.wait(60)
        accept(self, transactions)

    monkeypatch.setattr(Applier, "accept", late)
    for number in range(20):
        replica.source.put(*replica.transaction(Put(0, b"f%d" % number, FILE, b"x")))
    replica.source.put(Ping())
    assert isinstance(replica.source.read(), Pong)
    gate.set()
    acks = []
    while not acks or acks[-1] < replica.seq:
        answer = replica.source.read()
        if isinstance(answer, Ack):
            acks.append(answer.seq)
    assert len(acks) <= 3


def test_what_is_durable_is_acknowledged_before_it_is_applied(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = hold_commits(monkeypatch)
    replica.source.put(*replica.transaction(Put(0, b"f", FILE, b"x")))
    assert replica.source.read() == Ack(1)
    assert os.listdir(replica.root) == []
    gate.set()
    assert replica.source.read() == Applied(1, "")
    assert os.listdir(replica.root) == ["f"]


def test_what_does_not_fit_into_the_tree_is_in_doubt(replica: Replica) -> None:
    """It is left out, and told, now and to the next connection, until the source is in step."""
    frames: list[object] = []
    for path in (b"a", b"b", b"missing/c", b"d", b"e"):
        frames += replica.transaction(Put(0, path, FILE, b"x"))
    replica.source.put(*frames, Ping())
    seen = [replica.source.read()]
    while not isinstance(seen[-1], Nak):
        seen.append(replica.source.read())
    nak = seen[-1]
    assert isinstance(nak, Nak)
    assert (nak.seq, nak.path, nak.unknown_base) == (3, b"missing/c", True)
    wait_for(lambda: replica.applier.applied == 5)
    replica.source.put(*replica.transaction(Put(0, b"f", FILE, b"x")), ListTree(False), Ping())
    wait_for(lambda: isinstance(replica.source.read(), Pong))
    assert replica.disconnect() is None
    assert sorted(os.listdir(replica.root)) == ["a", "b", "d", "e"]
    assert replica.applier.started == 5
    assert staged(replica) == []
    replica.close()
    replica.open()
    assert replica.applier.doubts == [(0, b"missing/c")]
    replica.seq = 10
    assert isinstance(replica.send(MakeDir(0, b"missing", DIRECTORY), Put(0, b"missing/c", FILE, b"x")), Ack)
    replica.source.put(InStep())
    wait_for(lambda: replica.gate.in_steps == 1)
    assert replica.applier.doubts == []


def test_questions_are_answered_after_what_came_before(replica: Replica) -> None:
    old = os.urandom(200_000)
    replica.source.put(
        *replica.transaction(Put(0, b"small", FILE, b"x")),
        *put_whole(1, b"big", old)[:-1],
        *replica.transaction(Patch(0, b"big", FILE, 1)),
        WantSignature(0, b"big"),
        ListTree(True),
        WantSignature(0, b"none"),
        InStep(),
        Ping(),
    )
    seen: list[Any] = []
    while not isinstance(seen[-1] if seen else None, Pong):
        seen.append(replica.source.read())
    blob = b"".join(part.data for part in seen if isinstance(part, SignaturePart))
    assert delta.Signature.from_bytes(blob).length == len(old)
    entries = {entry.path: entry for part in seen if isinstance(part, Entries) for entry in part.entries}
    assert set(entries) == {b"", b"small", b"big"}
    assert entries[b"big"].digest == blake3.blake3(old).digest()
    assert any(isinstance(part, NoSignature) for part in seen)
    wait_for(lambda: replica.gate.in_steps == 1)


def test_what_is_not_kept_is_told(replica: Replica) -> None:
    strange = Meta(0o644, os.getuid(), os.getgid(), 1, 1, [(b"strange.x", b"v")])
    assert isinstance(replica.send(Put(0, b"f", strange, b"x"), Put(0, b"g", strange, b"x")), Ack)
    (cause,) = replica.source.unkept
    assert cause.text.startswith("xattr strange.* cannot be kept")
    assert (cause.count, cause.example, cause.more) == (2, os.fsencode(replica.root / "f"), False)
    assert isinstance(replica.send(Remove(0, b"f"), SetMeta(0, b"g", FILE)), Ack)
    assert replica.source.unkept == []


def test_what_is_not_kept_is_known_after_a_restart(replica: Replica) -> None:
    strange = Meta(0o644, os.getuid(), os.getgid(), 1, 1, [(b"strange.x", b"v")])
    replica.unkept_path = replica.state / "unkept"
    replica.close()
    replica.open()
    assert isinstance(replica.send(Put(0, b"f", strange, b"x")), Ack)
    replica.close()
    replica.open()
    message = replica.source.read()
    assert isinstance(message, Unkept)
    assert [cause.example for cause in message.causes] == [os.fsencode(replica.root / "f")]
    # A full comparison finds what is still so; this one is told of nothing that differs.
    replica.source.put(ListTree(False), InStep())
    while not isinstance(message, Unkept) or message.causes:
        message = replica.source.read()
        assert message is not None


@pytest.mark.parametrize("mode", [0, 0o400, 0o600, 0o644, 0o777, 0o4755, 0o2711, 0o1666])
@pytest.mark.parametrize("large", [False, True])
def test_metadata_is_what_was_sent(replica: Replica, mode: int, large: bool) -> None:
    ids = (1234, 4321) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    meta = Meta(mode, *ids, 10**18 + 1, 10**18 + 2, [(b"user.a", b"1"), (b"user.b", b"2")])
    if large:
        replica.source.put(*upload(1, b"f", stream(b"x" * 100_000)))
        assert isinstance(replica.send(Patch(0, b"f", meta, 1)), Ack)
    else:
        assert isinstance(replica.send(Put(0, b"f", meta, b"x")), Ack)
    status = (replica.root / "f").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (mode, *ids)
    assert (status.st_atime_ns, status.st_mtime_ns) == (10**18 + 1, 10**18 + 2)
    assert sorted(os.listxattr(replica.root / "f")) == ["user.a", "user.b"]
    again = Meta(mode ^ 0o111, *ids, 5, 6, [(b"user.b", b"3")])
    assert isinstance(replica.send(SetMeta(0, b"f", again)), Ack)
    assert (replica.root / "f").stat().st_mode & 0o7777 == mode ^ 0o111
    assert os.getxattr(replica.root / "f", "user.b") == b"3"
    assert os.listxattr(replica.root / "f") == ["user.b"]


# --- uploads


@pytest.mark.parametrize("sparse", [False, True])
def test_an_upload_becomes_a_file(replica: Replica, sparse: bool) -> None:
    old = os.urandom(BIG)
    replica.source.put(*put_whole(1, b"f", old, sparse=sparse)[:-1])
    assert isinstance(replica.send(Patch(0, b"f", FILE, 1)), Ack)
    assert (replica.root / "f").read_bytes() == old
    new = old[:500_000] + b"inserted" + old[500_000:2_000_000] + bytes(400_000) + old[2_100_000:]
    frames = put_whole(2, b"f", new, old, sparse)
    replica.source.put(*frames[:-1])
    assert isinstance(replica.send(frames[-1]), Ack)
    assert (replica.root / "f").read_bytes() == new
    assert staged(replica) == []


def test_uploads_and_transactions_are_interleaved(replica: Replica) -> None:
    streams = [stream(os.urandom(400_000)) for _ in range(4)]
    parts = [chunks(n, each, 10_000) for n, each in enumerate(streams)]
    replica.source.put(*[Upload(n, 0, b"big%d" % n, False, False, 0) for n in range(4)])
    for number in range(max(map(len, parts))):
        begin, *rest = replica.transaction(Put(0, b"small%d" % number, FILE, b"s"))
        replica.source.put(begin, *[part[number] for part in parts if number < len(part)], *rest)
    replica.source.put(*replica.transaction(*[Patch(0, b"big%d" % n, FILE, n) for n in range(4)]))
    replica.source.until_acked(replica.seq)
    assert [(replica.root / f"big{n}").stat().st_size for n in range(4)] == [400_000] * 4


def test_a_source_that_waits_for_an_upload_is_not_held_up(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    sync = build.Building.sync

    def held(self: build.Building) -> None:
        assert gate.wait(60)
        sync(self)

    monkeypatch.setattr(build.Building, "sync", held)
    *frames, patch = put_whole(7, b"large", bytes(1 << 20))
    replica.source.put(*frames)
    for number in range(3):
        assert isinstance(replica.send(Put(0, b"small%d" % number, FILE, b"s")), Ack)
    assert replica.source.uploaded == []
    gate.set()
    assert replica.source.read() == Uploaded(7)
    assert isinstance(replica.send(patch), Ack)
    assert (replica.root / "large").stat().st_size == 1 << 20


def test_a_base_is_what_the_transactions_before_made(replica: Replica) -> None:
    one, two = os.urandom(100_000), os.urandom(100_000)
    first = put_whole(1, b"d/f", one)
    replica.source.put(*first[:-1])
    replica.source.put(*replica.transaction(MakeDir(0, b"d", DIRECTORY), first[-1]))
    second = put_whole(2, b"d/f", one + two, one)
    replica.source.put(*second[:-1], *replica.transaction(second[-1]), *replica.transaction(Move(0, b"d", b"e")))
    third = put_whole(3, b"e/f", two + one, one + two)
    replica.source.put(*third[:-1], *replica.transaction(third[-1]))
    replica.source.until_acked(replica.seq)
    assert (replica.root / "e" / "f").read_bytes() == two + one


def test_an_upload_waits_for_nothing_that_does_not_touch_it(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    old = os.urandom(100_000)
    first = put_whole(1, b"f", old)
    replica.source.put(*first[:-1])
    assert isinstance(replica.send(first[-1]), Ack)
    gate = hold_commits(monkeypatch)
    opened = threading.Event()
    take = staging.Stager._open_upload

    def noted(self: staging.Stager, each: Any) -> None:
        take(self, each)
        opened.set()

    monkeypatch.setattr(staging.Stager, "_open_upload", noted)
    second = put_whole(2, b"f", old + b"more", old)
    replica.source.put(*replica.transaction(Put(0, b"other", FILE, b"x"), SetMeta(0, b"f", FILE)), *second[:-1])
    assert opened.wait(60)
    assert not (replica.root / "other").exists()
    gate.set()
    replica.source.put(*replica.transaction(second[-1]))
    replica.source.until_acked(replica.seq)
    assert (replica.root / "f").read_bytes() == old + b"more"


@pytest.mark.parametrize("what", ["no base", "another base", "another length", "corrupt", "cut short"])
def test_an_upload_that_cannot_be_built_is_refused(replica: Replica, what: str) -> None:
    old, new = os.urandom(100_000), os.urandom(90_000)
    if what != "no base":
        there = {"another base": os.urandom(100_000), "another length": old + b"x"}.get(what, old)
        first = put_whole(1, b"f", there)
        replica.source.put(*first[:-1])
        assert isinstance(replica.send(first[-1]), Ack)
    data = stream(old[:50_000] + new, old)
    data = {"corrupt": data[:-3] + b"???", "cut short": data[:-3]}.get(what, data)
    replica.source.put(*upload(2, b"f", data, based=True), *replica.transaction(Patch(0, b"f", FILE, 2)))
    answer = replica.source.verdict()
    assert isinstance(answer, Nak)
    assert (answer.seq, answer.path, answer.unknown_base) == (0, b"f", True)
    replica.disconnect()
    assert replica.partials() == []
    assert staged(replica) == []


def test_a_full_disk_is_not_an_unknown_base(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite

    def full(handle: int, data: Any, at: int) -> int:
        if len(data) > 1000:
            raise OSError(28, "No space left on device")
        return write(handle, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    replica.source.put(*upload(1, b"f", stream(os.urandom(100_000))))
    answer = replica.source.verdict()
    assert isinstance(answer, Nak)
    assert (answer.seq, answer.unknown_base) == (0, False)
    assert "No space left" in answer.reason


def test_what_is_dropped_leaves_nothing(replica: Replica) -> None:
    data = stream(os.urandom(300_000))
    replica.source.put(Upload(1, 0, b"a", False, False, 0), *chunks(1, data)[:2], Drop(1))
    replica.source.put(*upload(2, b"b", data), Drop(2), Upload(1, 0, b"c", False, False, 0), Drop(1))
    assert isinstance(replica.send(Put(0, b"f", FILE, b"x")), Ack)
    wait_for(lambda: staged(replica) == [])
    replica.disconnect()
    assert replica.partials() == []


# --- what outlives a connection


def cut_off(replica: Replica, number: int, path: bytes, data: bytes, based: bool = False) -> int:
    """Send half of an upload and cut the connection; returns how much the replica has."""
    replica.source.put(Upload(number, 0, path, based, False, 0), *chunks(number, data, 20_000)[: len(data) // 40_000])
    wanted = len(data) // 40_000 * 20_000
    wait_for(lambda: [u.received for u in uploads_of(replica) if u.path == path] == [wanted])
    replica.disconnect()
    return wanted


def uploads_of(replica: Replica) -> list[Any]:
    return [each for each in gc.get_objects() if isinstance(each, Taken) and not each.closed]


def test_a_broken_upload_is_gone_on_with(replica: Replica) -> None:
    old = os.urandom(1_000_000)
    first = put_whole(1, b"f", old)
    replica.source.put(*first[:-1])
    assert isinstance(replica.send(first[-1]), Ack)
    new = os.urandom(700_000) + old[200_000:]
    data = stream(new, old)
    has = cut_off(replica, 7, b"f", data, based=True)
    (partial,) = replica.partials()
    assert (partial.root, partial.path, partial.based, partial.received) == (0, b"f", True, has)
    assert partial.digest == blake3.blake3(data[:has]).digest()
    # What the base's place holds meanwhile does not matter: the base itself is kept.
    assert isinstance(replica.send(Put(0, b"f", FILE, b"other")), Ack)
    replica.source.put(Upload(1, 0, b"f", True, False, has), *chunks(1, data[has:]))
    assert isinstance(replica.send(Patch(0, b"f", FILE, 1)), Ack)
    assert (replica.root / "f").read_bytes() == new
    assert staged(replica) == []


def test_a_complete_upload_outlives_the_connection_too(replica: Replica) -> None:
    new = os.urandom(200_000)
    data = stream(new)
    replica.source.put(*upload(1, b"f", data))
    wait_for(lambda: [u.complete for u in uploads_of(replica)] == [True])
    replica.disconnect()
    replica.source.put(Upload(1, 0, b"f", False, False, len(data)), Chunk(1, b"", True))
    # Refused for another reason, the content is still there.
    assert isinstance(replica.send(Patch(0, b"f", FILE, 1), Remove(0, b""), Put(0, b"x", FILE, b"")), Nak)
    if replica.partials():
        replica.source.put(Upload(1, 0, b"f", False, False, len(data)), Chunk(1, b"", True))
        assert isinstance(replica.send(Patch(0, b"f", FILE, 1)), Ack)
    assert (replica.root / "f").read_bytes() == new
    assert staged(replica) == []


def test_an_upload_of_a_transaction_that_never_came_is_kept(replica: Replica) -> None:
    data = stream(os.urandom(200_000))
    replica.source.put(*upload(1, b"f", data), Begin(1, 1), Patch(0, b"f", FILE, 1), Ping())
    wait_for(lambda: isinstance(replica.source.read(), Pong))
    wait_for(lambda: [u.complete for u in uploads_of(replica)] == [True])
    replica.disconnect()
    (partial,) = replica.partials()
    assert partial.received == len(data)
    assert len(staged(replica)) == 1


def test_an_upload_begun_anew_replaces_the_old(replica: Replica) -> None:
    data = stream(os.urandom(400_000))
    cut_off(replica, 1, b"f", data)
    assert len(staged(replica)) == 1
    new = os.urandom(300_000)
    frames = put_whole(2, b"f", new)
    replica.source.put(*frames[:-1])
    assert isinstance(replica.send(frames[-1]), Ack)
    assert (replica.root / "f").read_bytes() == new
    wait_for(lambda: staged(replica) == [])
    assert replica.partials() == []


def test_partials_go_when_in_step(replica: Replica) -> None:
    cut_off(replica, 1, b"f", stream(os.urandom(400_000)))
    assert len(replica.partials()) == 1
    replica.source.put(InStep())
    wait_for(lambda: replica.gate.in_steps == 1)
    assert replica.partials() == []
    assert staged(replica) == []


def test_few_partials_are_kept(replica: Replica) -> None:
    data = stream(os.urandom(100_000))
    for number in range(3):
        for each in range(10):
            replica.source.put(
                Upload(each, 0, b"f%d-%d" % (number, each), False, False, 0), Chunk(each, data[:100], False)
            )
        wait_for(lambda n=number: sum(u.received == 100 for u in uploads_of(replica)) == min(16, n * 10) + 10)  # type: ignore[misc]
        replica.disconnect()
    assert len(replica.partials()) == 16
    assert len(staged(replica)) == 16
    before = len(os.listdir("/proc/self/fd"))
    replica.work(replica.applier.drop_suspended)
    assert staged(replica) == []
    assert len(os.listdir("/proc/self/fd")) == before - 16


# --- copies


def test_a_copy_of_another_file(replica: Replica) -> None:
    content = os.urandom(2_000_000)
    frames = put_whole(1, b"a", content)
    replica.source.put(*frames[:-1])
    digest = blake3.blake3(content).digest()
    # Of a file of the transaction before, and of one of the same transaction.
    replica.source.put(*replica.transaction(frames[-1]), *replica.transaction(Copy(0, b"b", FILE, 0, b"a", digest)))
    replica.source.until_acked(replica.seq)
    small = blake3.blake3(b"small").digest()
    answer = replica.send(Put(0, b"c", FILE, b"small"), Copy(0, b"d", FILE, 0, b"c", small))
    assert isinstance(answer, Ack)
    assert (replica.root / "b").read_bytes() == content
    assert (replica.root / "d").read_bytes() == b"small"
    assert (replica.root / "b").stat().st_ino != (replica.root / "a").stat().st_ino


def copy(path: bytes, source: bytes, content: bytes) -> Copy:
    return Copy(0, path, FILE, 0, source, blake3.blake3(content).digest())


def put(path: bytes, content: bytes) -> Put:
    return Put(0, path, FILE, content)


@pytest.mark.parametrize(
    ("operations", "source", "content"),
    [
        ([put(b"f", b"new"), Link(0, b"g", b"f")], b"g", b"new"),
        ([put(b"f", b"new"), Link(0, b"g", b"f"), put(b"f", b"newer")], b"g", b"new"),
        ([put(b"g", b"new"), Link(0, b"g", b"f")], b"g", b"old f"),
        ([Link(0, b"g", b"d/f"), Link(0, b"h", b"g")], b"h", b"old d/f"),
        ([put(b"f", b"new"), Move(0, b"f", b"g")], b"g", b"new"),
        ([put(b"g", b"new"), Move(0, b"f", b"g")], b"g", b"old f"),
        ([Move(0, b"f", b"h"), put(b"f", b"new")], b"h", b"old f"),
        ([Move(0, b"f", b"h"), Move(0, b"g", b"f"), Move(0, b"h", b"g")], b"g", b"old f"),
        ([put(b"d/f", b"new"), Move(0, b"d", b"e")], b"e/f", b"new"),
        ([Move(0, b"d", b"e")], b"e/f", b"old d/f"),
        ([Link(0, b"d/g", b"f"), Move(0, b"d", b"e"), put(b"f", b"new")], b"e/g", b"old f"),
        ([Remove(0, b"d"), MakeDir(0, b"e", DIRECTORY), put(b"e/f", b"new"), Move(0, b"e", b"d")], b"d/f", b"new"),
        ([put(b"d/f", b"new"), Remove(0, b"d"), Move(0, b"f", b"d")], b"d", b"old f"),
        ([copy(b"h", b"f", b"old f"), Remove(0, b"f"), Move(0, b"h", b"f")], b"f", b"old f"),
    ],
)
def test_a_copy_of_what_the_same_transaction_has_named(
    replica: Replica, operations: list[Operation], source: bytes, content: bytes
) -> None:
    before = [put(b"f", b"old f"), put(b"g", b"old g"), MakeDir(0, b"d", DIRECTORY), put(b"d/f", b"old d/f")]
    assert isinstance(replica.send(*before), Ack)
    answer = replica.send(*operations, copy(b"copy", source, content))
    assert isinstance(answer, Ack), answer
    for path in (source, b"copy"):
        assert (replica.root / os.fsdecode(path)).read_bytes() == content
    assert replica.applier.doubts == []


def test_a_copy_of_a_linked_name_has_the_content_that_is_told(replica: Replica) -> None:
    assert isinstance(replica.send(put(b"f", b"old f"), put(b"g", b"old g")), Ack)
    answer = replica.send(Link(0, b"g", b"f"), copy(b"copy", b"g", b"old g"))
    assert isinstance(answer, Nak)
    assert (answer.path, answer.unknown_base) == (b"g", True)
    assert (replica.root / "g").read_bytes() == b"old g"


@pytest.mark.parametrize("there", [None, b"another", "link"])
def test_a_copy_of_what_is_not_there(replica: Replica, there: bytes | str | None, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"wanted")
    if isinstance(there, bytes):
        (replica.root / "a").write_bytes(there)
    elif there:
        (replica.root / "a").symlink_to(tmp_path / "secret")
    answer = replica.send(Copy(0, b"b", FILE, 0, b"a", blake3.blake3(b"wanted").digest()))
    assert isinstance(answer, Nak)
    assert (answer.path, answer.unknown_base) == (b"a", True)
    assert not (replica.root / "b").exists()
    assert staged(replica) == []


# --- hostile frames and changes of owner


@pytest.mark.parametrize(
    ("frames", "what"),
    [
        ([Put(0, b"f", FILE, b"")], "outside of a transaction"),
        ([Begin(1, 1), Begin(1, 2)], "within a transaction"),
        ([Begin(1, 1), Commit(2)], "does not end"),
        ([Commit(1)], "does not end"),
        ([Begin(1, 5), Commit(5), Begin(1, 5)], "after 5"),
        ([Begin(1, 0)], "after 0"),
        ([Begin(1, 1 << 63)], "after 0"),
        ([Begin(1, 1), Put(3, b"f", FILE, b"")], "root 3"),
        ([Begin(1, 1), MakeNode(0, b"f", FILE, 99, 0)], "no kind of node"),
        ([Begin(1, 1), MakeDir(0, b"f", Meta(1 << 40, 0, 0, 1, 1, [])), Commit(1)], "out of range"),
        ([Begin(1, 1), Put(0, b"f", Meta(0o644, 1 << 60, 0, 1, 1, []), b""), Commit(1)], "out of range"),
        ([Begin(1, 1), Put(0, b"f", Meta(0o644, 0, 0, 1 << 62, 1 << 62, []), b""), Commit(1)], ""),
        ([Hello(2, "g", 1, [])], "Hello"),
        ([Chunk(1, b"x", False)], "not open"),
        ([Drop(1)], "not open"),
        (
            [Upload(1, 0, b"f", False, False, 0), Chunk(1, b"", False), Begin(1, 1), Patch(0, b"f", FILE, 1)],
            "not complete",
        ),
        ([Begin(1, 1), Patch(0, b"f", FILE, 1)], "not complete"),
        ([*upload(1, b"f", stream(b"x")), Chunk(1, b"", True)], "not open"),
        ([Upload(1, 0, b"f", False, False, 0), Upload(1, 0, b"g", False, False, 0)], "begins again"),
        ([Upload(1, 9, b"f", False, False, 0)], "root 9"),
        ([Upload(1, -1, b"f", False, False, 0)], "root -1"),
        ([Upload(1, 0, b"f", False, False, 7)], "there are no 7 bytes"),
        ([Upload(n, 0, b"f%d" % n, False, False, 0) for n in range(17)], "more than 16"),
    ],
)
def test_frames_that_do_not_belong_there(replica: Replica, frames: list[object], what: str) -> None:
    replica.source.put(*frames)
    if not what:
        # Either the system takes it, or it is refused: it ends nothing but itself.
        replica.source.read()
        return
    error = replica.ended()
    assert isinstance(error, ProtocolError)
    assert what in str(error)
    assert os.listdir(replica.root) in ([], ["f"])
    assert replica.partials() == []
    assert len(staged(replica)) == 0
    replica.seq = 10
    assert isinstance(replica.send(Put(0, b"after", FILE, b"")), Ack)


def test_a_wrong_skip_is_refused(replica: Replica) -> None:
    has = cut_off(replica, 1, b"f", stream(os.urandom(400_000)))
    replica.source.put(Upload(1, 0, b"f", False, False, has - 1))
    error = replica.ended()
    assert isinstance(error, ProtocolError)
    replica.source.put(Upload(1, 0, b"f", True, False, has))
    error = replica.ended()
    assert isinstance(error, ProtocolError)


@pytest.mark.parametrize("path", [b"../x", b"/etc/passwd", b"link/secret", b"a//b", b".farshore-x"])
def test_no_upload_reaches_out_of_the_root(replica: Replica, path: bytes, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("x")
    (replica.root / "link").symlink_to(tmp_path / "outside")
    replica.source.put(Upload(1, 0, path, True, False, 0), Chunk(1, b"", False))
    answer = replica.source.verdict()
    assert isinstance(answer, Nak)
    assert answer.unknown_base
    replica.disconnect()
    replica.source.put(*upload(1, path, stream(b"evil")))
    assert isinstance(replica.send(Patch(0, path, FILE, 1)), Nak)
    assert isinstance(replica.send(Copy(0, b"f", FILE, 0, path, blake3.blake3(b"x").digest())), Nak)
    assert sorted(os.listdir(tmp_path)) == ["outside", "root", "state"]
    assert (tmp_path / "outside" / "secret").read_text() == "x"


def test_an_upload_that_would_fill_the_disk_is_refused(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farshore.dbm.replica.upload.room", lambda *_: 50_000)
    replica.source.put(*upload(1, b"f", stream(os.urandom(100_000))))
    answer = replica.source.verdict()
    assert isinstance(answer, Nak)
    assert "more than 50000 bytes" in answer.reason


def test_the_owner_changes_in_the_middle(replica: Replica) -> None:
    """Neither what is staged nor what comes after is applied."""
    old = threading.Event()

    def check(epoch: int) -> None:
        if old.is_set() or epoch != 1:
            raise StaleEpoch("g", epoch, 2)

    replica.gate.checks = check
    assert isinstance(replica.send(Put(0, b"a", FILE, b"x")), Ack)
    replica.source.put(Begin(1, replica.begin()), Put(0, b"b", FILE, b"x"), Ping())
    wait_for(lambda: isinstance(replica.source.read(), Pong))
    old.set()
    replica.source.put(Commit(replica.seq), *replica.transaction(Put(0, b"c", FILE, b"x")))
    answer = replica.source.read()
    while isinstance(answer, (Applied, Pong)):
        answer = replica.source.read()
    assert isinstance(answer, Refused)
    assert answer.stale
    assert replica.ended() is None
    assert os.listdir(replica.root) == ["a"]
    assert staged(replica) == []


def test_another_epoch_is_refused(replica: Replica) -> None:
    def check(epoch: int) -> None:
        if epoch != 1:
            raise StaleEpoch("g", epoch, 1)

    replica.gate.checks = check
    replica.source.put(Begin(2, 1), Put(0, b"f", FILE, b"x"), Commit(1))
    assert isinstance(replica.source.read(), Refused)
    assert os.listdir(replica.root) == []


def test_an_interrupt_ends_what_takes_long(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    """A delta that copies without end, and a listing, end with the connection."""
    base = os.urandom(1 << 20)
    frames = put_whole(1, b"f", base)
    replica.source.put(*frames[:-1])
    assert isinstance(replica.send(frames[-1]), Ack)
    data = stream(base, base)
    one = layout.copy(0, 1 << 20)
    head = data[: data.index(one)]
    monkeypatch.setattr("farshore.dbm.replica.upload.room", lambda *_: 1 << 60)
    monkeypatch.setattr("farshore.dbm.replica.build.Building._write", lambda *_: None)
    others = set(map(id, uploads_of(replica)))
    replica.source.put(Upload(2, 0, b"f", True, False, 0), Chunk(2, head + one * 100_000, False))
    # Not merely opened: in the middle of what takes long.
    wait_for(lambda: any(each._broken for each in uploads_of(replica) if id(each) not in others))
    replica.applier.interrupt()
    assert replica.disconnect() is None
    assert replica.partials() == []


def test_a_source_that_reads_nothing_is_not_read_either(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits in memory is bounded."""
    hold = threading.Event()
    operation = staging.Stager._operation

    def late(self: staging.Stager, *arguments: Any) -> None:
        hold.wait(60)
        operation(self, *arguments)

    monkeypatch.setattr(staging.Stager, "_operation", late)
    source = replica.source
    source.sock.settimeout(3)
    sent = 0
    source.put(Begin(1, replica.begin()))
    with pytest.raises(TimeoutError):
        for number in range(2000):
            source.put(Put(0, b"f%d" % number, FILE, bytes(60_000)))
            sent += 60_000
    assert sent < receiver.QUEUE_BYTES + (16 << 20)
    hold.set()
    replica.disconnect()


# --- crashes

_STEPS = ("open", "write", "pwrite", "fsync", "fdatasync", "rename", "ftruncate", "utime", "mkdir", "unlink")


def _killed_at(step: int) -> None:
    """Let this process die at the ``step``-th of the calls that change something."""
    count = 0

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return counted

    for name in _STEPS:
        setattr(os, name, wrap(getattr(os, name)))


def _dying_replica(base: Path, sock: socket.socket, step: int) -> None:
    async def run() -> None:
        worker = ThreadPoolExecutor(1)
        applier = Applier([("root", Root(os.fsencode(base / "root")))], base / "state")
        _killed_at(step)
        await serve(sock, applier, Gate(), worker)

    asyncio.run(run())


@pytest.mark.parametrize("step", range(1, 75, 2))
def test_a_kill_at_any_moment_leaves_whole_files(tmp_path: Path, step: int) -> None:
    """Every file is wholly old or wholly new, and what was acknowledged is there."""
    (tmp_path / "root").mkdir()
    (tmp_path / "state").mkdir()
    old, new = b"old" * 40_000, b"new" * 50_000
    root = tmp_path / "root"
    for name in ("f0", "f1", "f2", "big"):
        (root / name).write_bytes(old)
    frames: list[object] = []
    for seq in (1, 2, 3):
        if seq == 2:
            frames += upload(1, b"big", stream(new, old), based=True)
        frames += [Begin(1, seq), Put(0, b"f%d" % (seq - 1), FILE, b"n" * 5000)]
        frames += [Patch(0, b"big", FILE, 1)] if seq == 2 else [MakeDir(0, b"d%d" % seq, DIRECTORY)]
        frames += [Put(0, b"n%d" % seq, FILE, b"n" * 5000), Link(0, b"l%d" % seq, b"n%d" % seq), Commit(seq)]
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        try:
            _dying_replica(tmp_path, theirs, step)
        finally:
            os._exit(0)
    theirs.close()
    source = Source(ours)
    acked = 0
    try:
        source.put(*frames)
        while acked < 3 and (answer := source.read()) is not None:
            assert isinstance(answer, (Ack, Applied, Uploaded))
            if isinstance(answer, Ack):
                acked = answer.seq
    except (BrokenPipeError, ConnectionError):
        pass
    ours.close()
    os.waitpid(child, 0)
    names = set(os.listdir(root))
    for name in {name for name in names if not name.startswith(".")} - {"d1", "d3"}:
        content = (root / name).read_bytes()
        assert content in (old, new, b"n" * 5000), name
    again = Replica(tmp_path)
    try:
        applied = [seq for seq in (1, 2, 3) if f"l{seq}" in names or (root / f"f{seq - 1}").stat().st_size == 5000]
        assert max([acked, *applied]) <= again.applier.started <= 3
        again.work(again.applier.drain)
        for seq in range(1, again.applier.started + 1):
            assert (root / f"f{seq - 1}").read_bytes() == b"n" * 5000
            assert (root / f"l{seq}").read_bytes() == b"n" * 5000
            assert (root / f"l{seq}").stat().st_ino == (root / f"n{seq}").stat().st_ino
        if again.applier.started >= 2:
            assert (root / "big").read_bytes() == new
        assert again.applier.doubts == []
        assert staged(again) == []
        assert not any(name.startswith(".") for name in os.listdir(root))
        again.seq = 10
        assert isinstance(again.send(Put(0, b"after", FILE, b"x")), Ack)
    finally:
        again.finish()


def test_a_full_disk_stops_the_applying_and_loses_nothing(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Stage, "create", full)
    replica.source.put(*replica.transaction(MakeDir(0, b"d", DIRECTORY), Put(0, b"f", FILE, b"x")))
    assert replica.source.read() == Ack(1)
    told = replica.source.read()
    assert isinstance(told, Applied)
    assert told.seq == 0
    assert "No space left" in told.stalled
    assert not (replica.root / "f").exists()
    monkeypatch.undo()
    replica.work(replica.applier.tend)
    assert replica.source.read() == Applied(1, "")
    assert (replica.root / "f").read_text() == "x"


def test_a_full_disk_refuses_what_it_cannot_make_durable(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farshore.dbm.replica.history.RESERVE_BYTES", 1 << 60)
    monkeypatch.setattr("farshore.dbm.replica.history.RESERVE_SHARE", 1)
    monkeypatch.setattr("farshore.dbm.replica.commit._SMALL_BYTES", 0)
    answer = replica.send(Put(0, b"f", FILE, b"x"))
    assert isinstance(answer, Nak)
    assert (answer.seq, answer.unknown_base) == (1, False)
    assert "No space left" in answer.reason
    monkeypatch.undo()
    assert isinstance(replica.send(Put(0, b"f", FILE, b"x")), Ack)
