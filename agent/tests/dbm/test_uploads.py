"""How many uploads are under way, and what waits for what."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import blake3
import pytest
from nodes import until

from farshore.dbm import uploads
from farshore.dbm.index import Known
from farshore.dbm.messages import MAX_UPLOADS, Chunk, FromSource, Partial
from farshore.dbm.messages import Upload as UploadFrame
from farshore.dbm.uploads import Uploads
from farshore.dbm.wire import Codec
from farshore.dbm.work import Job
from farshore.fmm.types import FileKind, Root
from farshore.fmm.view import Live

CODEC: Codec[FromSource] = Codec(FromSource)


class Line:
    """A connection whose other end says only what the test says."""

    def __init__(self) -> None:
        self.sent: list[FromSource] = []
        self.finished: list[Job] = []
        #: Whether transactions have to wait now.
        self.holding = False
        self.known: Known | None = None
        #: Pieces of this upload are not taken for now.
        self.blocked = 0

    @contextlib.asynccontextmanager
    async def between(self) -> AsyncIterator[None]:
        self.holding = True
        yield
        self.holding = False

    async def known_base(self, job: Job) -> Known | None:
        return self.known

    async def known_signature(self, job: Job) -> bytes | None:
        return None

    async def ask_signature(self, job: Job) -> bytes | None:
        raise AssertionError("there is no base")

    async def send(self, frames: list[bytes]) -> None:
        for message in [CODEC.decode(frame[4:], "test") for frame in frames]:
            if isinstance(message, Chunk):
                await until(lambda number=message.upload: number != self.blocked, "the pieces are taken")  # type: ignore[misc]
            self.sent.append(message)

    def piece(self) -> int:
        return 1 << 18

    async def done(self, job: Job) -> None:
        self.finished.append(job)

    @property
    def announced(self) -> list[UploadFrame]:
        """The uploads that were announced."""
        return [message for message in self.sent if isinstance(message, UploadFrame)]

    @property
    def told(self) -> list[int]:
        """Numbers of the uploads of which all was sent."""
        return [message.upload for message in self.sent if isinstance(message, Chunk) and message.last]


@contextlib.asynccontextmanager
async def running(tree: Path, partials: list[Partial] | None = None) -> AsyncIterator[tuple[Line, Uploads]]:
    """Uploads of the files below ``tree``, at work; ``partials`` is what an earlier connection left."""
    line = Line()
    under_test = Uploads(Live([Root(os.fsencode(tree))]), line, partials or [])
    task = asyncio.create_task(under_test.run())
    try:
        yield line, under_test
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def job(tree: Path, name: str, size: int) -> Job:
    (tree / name).write_bytes(os.urandom(size))
    path = os.fsencode(name)
    return Job(0, path, size, [], False, path)


def test_no_more_are_open_than_the_replica_takes(tmp_path: Path) -> None:
    """However long the transactions that put them into place have to wait."""

    async def run() -> None:
        async with running(tmp_path) as (line, under_test):
            most = MAX_UPLOADS - 2
            for number in range(2 * most):
                under_test.add(job(tmp_path, f"f{number}", 70_000))
            await until(lambda: len(line.finished) >= most, "as many are sent as may be")
            await asyncio.sleep(0.2)
            assert len(line.announced) <= MAX_UPLOADS
            for number in range(1, most + 1):
                under_test.ended([number])
            await until(lambda: len(line.finished) == 2 * most, "the others follow")

    asyncio.run(run())


def test_what_follows_a_large_file_waits_for_its_own_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replica writes them out in order: who comes behind one that takes long is put into place after it."""
    monkeypatch.setattr(uploads, "SMALL", 1 << 20)

    async def run() -> None:
        async with running(tmp_path) as (line, under_test):
            large, small = job(tmp_path, "large", 2 << 20), job(tmp_path, "small", 70_000)
            under_test.add(large)
            await until(lambda: line.told == [1], "the large one is sent")
            under_test.add(small)
            await until(lambda: line.told == [1, 2], "the small one is sent")
            await asyncio.sleep(0.05)
            assert not line.finished
            under_test.uploaded(1)
            await until(lambda: line.finished == [large], "the large one is done")
            assert small.content is None
            under_test.uploaded(2)
            await until(lambda: line.finished == [large, small], "the small one is done")
            under_test.add(job(tmp_path, "alone", 70_000))
            await until(lambda: len(line.finished) == 3, "the one that comes alone is done")

    asyncio.run(run())


def test_what_goes_beside_a_large_file_waits_for_the_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while more of the large one is to come: the replica may have much to do for what it has of it."""
    monkeypatch.setattr(uploads, "SMALL", 1 << 20)

    async def run() -> None:
        async with running(tmp_path) as (line, under_test):
            line.blocked = 1
            large, small = job(tmp_path, "large", 2 << 20), job(tmp_path, "small", 70_000)
            under_test.add(large)
            await until(lambda: len(line.announced) == 1, "the large one is announced")
            under_test.add(small)
            await until(lambda: line.told == [2], "the small one is sent")
            await asyncio.sleep(0.05)
            assert not line.finished
            under_test.uploaded(2)
            await until(lambda: line.finished == [small], "the small one is done")
            line.blocked = 0
            await until(lambda: line.told == [2, 1], "the large one is sent")
            under_test.uploaded(1)
            await until(lambda: line.finished == [small, large], "the large one is done")

    asyncio.run(run())


@pytest.mark.parametrize("changes", [False, True])
def test_transactions_go_on_while_what_is_there_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: bool
) -> None:
    """If the replica's file changes meanwhile, what was passed over is of no use."""
    resumed = job(tmp_path, "f", 3 << 20)
    delta = b"".join(
        iter(uploads._Reading(Live([Root(os.fsencode(tmp_path))]), resumed, None, threading.Event()).piece, None)
    )
    partial = Partial(0, b"f", False, 1 << 20, blake3.blake3(delta[: 1 << 20]).digest())
    skip = uploads._Reading.skip
    held: list[bool] = []

    async def run() -> None:
        async with running(tmp_path, [partial]) as (line, under_test):

            def noted(reading: uploads._Reading, received: int, digest: bytes) -> bool:
                held.append(line.holding)
                if changes:
                    line.known = known_file(b"f", 1 << 20)
                return skip(reading, received, digest)

            monkeypatch.setattr(uploads._Reading, "skip", noted)
            under_test.add(resumed)
            await until(lambda: len(line.finished) == 1, "it is sent")
            (announced,) = line.announced
            assert held == [False]
            assert announced.skip == (0 if changes else 1 << 20)
            sent = b"".join(message.data for message in line.sent if isinstance(message, Chunk))
            assert sent == delta[announced.skip :]

    asyncio.run(run())


def known_file(path: bytes, size: int) -> Known:
    return Known(0, path, FileKind.FILE, 0o644, 0, 0, size, 0, 0, 0, 0, 1, 0, None, (), bytes(32))
