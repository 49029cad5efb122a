"""How many uploads are under way, and what waits for what."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nodes import until

from farshore.dbm import uploads
from farshore.dbm.index import Known
from farshore.dbm.messages import MAX_UPLOADS, Chunk, FromSource
from farshore.dbm.messages import Upload as UploadFrame
from farshore.dbm.uploads import Uploads
from farshore.dbm.wire import Codec
from farshore.dbm.work import Job
from farshore.fmm.types import Root

CODEC: Codec[FromSource] = Codec(FromSource)


class Line:
    """A connection whose other end says only what the test says."""

    def __init__(self) -> None:
        self.sent: list[FromSource] = []
        self.finished: list[Job] = []

    @contextlib.asynccontextmanager
    async def between(self) -> AsyncIterator[None]:
        yield

    async def what_is_known(self, job: Job) -> tuple[Known | None, bytes | None]:
        return None, None

    async def ask_signature(self, job: Job) -> bytes | None:
        raise AssertionError("there is no base")

    async def send(self, frames: list[bytes]) -> None:
        self.sent += [CODEC.decode(frame[4:], "test") for frame in frames]

    def piece(self) -> int:
        return 1 << 18

    async def done(self, job: Job) -> None:
        self.finished.append(job)

    @property
    def opened(self) -> list[int]:
        """Numbers of the uploads that were announced."""
        return [message.upload for message in self.sent if isinstance(message, UploadFrame)]

    @property
    def told(self) -> list[int]:
        """Numbers of the uploads of which all was sent."""
        return [message.upload for message in self.sent if isinstance(message, Chunk) and message.last]


@contextlib.asynccontextmanager
async def running(tree: Path) -> AsyncIterator[tuple[Line, Uploads]]:
    """Uploads of the files below ``tree``, at work."""
    line = Line()
    under_test = Uploads([Root(os.fsencode(tree))], line, [])
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
            assert len(line.opened) <= MAX_UPLOADS
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
