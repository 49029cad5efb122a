"""The replica's part of a verification: it tells what its tree is, by digests, without holding up the stream.

All that reads contents or many names is done by a thread of its own, which waits for the disk until nobody else does.
Only a Look is part of the stream's order: what it names is opened at once, behind all transactions before it, and read
afterwards; as files of a replica are replaced and never written to, what was opened stays what it was.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from farshore.dbm.messages import (
    MAX_LOOK,
    MAX_QUESTIONS,
    Digests,
    EndSurvey,
    Entry,
    Item,
    Look,
    Seen,
    Survey,
    Surveyed,
    WantDigests,
)
from farshore.dbm.owners import Leaving
from farshore.dbm.replica import paths
from farshore.dbm.replica.commit import Applier
from farshore.dbm.replica.intake import Interrupted
from farshore.dbm.verify import digests
from farshore.dbm.verify.reading import Budget, ContentReader, Store, be_idle, forget, open_to_read
from farshore.dbm.verify.survey import Disk, Surveyor
from farshore.errors import ProtocolError, UnsafePath
from farshore.fmm import scanner
from farshore.fmm.types import FileKind, Observed
from farshore.log import Log

_log = Log(__name__)
_TELL_SECONDS = 2.0
_MAX_RUN = 64
#: Bytes of items or entries in one frame, about.
_PART_BYTES = 256 << 10
#: Name of the store below the group's state directory.
STORE = "survey.db"
#: What was found at a path, open for reading when it is a file that may be read.
_Opened = tuple[Observed, io.FileIO | None]


class Surveys:
    """Answers one connection's questions. Its methods are the event loop's, but for ``look``.

    ``reply`` sends a message to the source, ``fail`` ends the connection with an error; any thread may call both.
    """

    def __init__(
        self, applier: Applier, reply: Callable[[object], None], fail: Callable[[BaseException], None]
    ) -> None:
        self._reply = reply
        self._fail = fail
        self._roots = [replace(root, path=tree.root) for tree, root in zip(applier.trees, applier.roots, strict=True)]
        self._owners = applier.owners
        self._place = applier.place
        # In the thread: whom the source was told of.
        self._leaving = Leaving(applier.owners)
        self._path: Path = applier.state / STORE
        self._pool: ThreadPoolExecutor | None = None
        #: Ends the survey that is under way; all of them, with ``_ended``.
        self._stopped = threading.Event()
        self._ended = False
        self._lock = threading.Lock()
        self._asked = 0
        # In the thread.
        self._run_name = b""
        self._store: Store | None = None
        self._surveyor: Surveyor | None = None
        self._reader: ContentReader | None = None

    def take(self, message: Survey | EndSurvey | WantDigests) -> None:
        """A question that is answered in no order with the stream; raises ProtocolError."""
        if isinstance(message, WantDigests):
            if not 0 <= message.root < len(self._roots):
                raise ProtocolError("the source", f"root {message.root} of {len(self._roots)}")
            if not -1 <= message.bucket < 256:
                raise ProtocolError("the source", f"bucket {message.bucket} of 256")
            self._submit(self._digests, message)
            return
        if isinstance(message, Survey) and not (0 < len(message.run) <= _MAX_RUN and message.rate >= 0):
            raise ProtocolError("the source", f"a survey for {message.run!r} at {message.rate} bytes/s")
        self._stopped.set()
        self._stopped = threading.Event()
        if isinstance(message, Survey):
            self._submit(self._survey, message, self._stopped)
        else:
            self._submit(self._forget)

    def look(self, message: Look) -> Callable[[], None]:
        """What is there at this moment; returns what sends the answer, to be called in the event loop.

        For the applier's thread. Raises ProtocolError.
        """
        if len(message.paths) > MAX_LOOK or not 0 <= message.root < len(self._roots):
            raise ProtocolError("the source", f"a Look at {len(message.paths)} paths of root {message.root}")
        opened: list[_Opened] = []
        try:
            for path in message.paths:
                found = self._open(message.root, path)
                if found is not None:
                    opened.append(found)
        except OSError as error:
            _close(opened)
            problem = f"{os.fsdecode(path)!r}: {error.strerror or error}".encode("utf-8", "backslashreplace").decode()
            return lambda: self.give_up(problem)
        except BaseException:
            _close(opened)
            raise

        def answer() -> None:
            try:
                self._submit(self._seen, message.number, opened)
            except BaseException:
                _close(opened)
                raise

        return answer

    def end(self) -> None:
        """The connection has ended; what is under way ends at its next step."""
        self._ended = True
        self._stopped.set()
        if self._pool is not None:
            self._pool.submit(self._close)
            self._pool.shutdown(wait=False)

    def give_up(self, problem: str) -> None:
        self._reply(Surveyed(self._run_name, 0, 0, True, [], problem))

    def _open(self, root: int, path: bytes) -> _Opened | None:
        try:
            paths.check(path)
            seen = scanner.observe(self._roots[root].path, root, path)
        except UnsafePath as error:
            raise ProtocolError("the source", str(error)) from None
        if seen is None or seen.kind is FileKind.SOCKET:
            return None
        if seen.kind is FileKind.FILE:
            with contextlib.suppress(OSError):
                return seen, open_to_read(self._roots[root], path)
        return seen, None

    def _submit(self, call: Callable[..., None], *arguments: object) -> None:
        with self._lock:
            self._asked += 1
            if self._asked > MAX_QUESTIONS:
                raise ProtocolError("the source", f"more than {MAX_QUESTIONS} questions at once")
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="survey", initializer=be_idle)
        self._pool.submit(self._run, call, *arguments)

    # --- the thread

    def _run(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            call(*arguments)
        except Interrupted:
            return
        except ProtocolError as error:
            self._fail(error)
        except Exception as error:
            # Whatever it is, replication must go on.
            _log.error("the survey failed", error)
            self.give_up(str(error) or type(error).__name__)
        finally:
            with self._lock:
                self._asked -= 1

    def _survey(self, message: Survey, stopped: threading.Event) -> None:
        self._close()
        self._run_name = message.run
        budget = Budget(message.rate, stopped)
        budget.check()
        store = self._store = Store(self._path, message.run)
        reader = self._reader = ContentReader(self._roots, store, budget, spare_cache=False)
        told = time.monotonic()

        def check() -> None:
            nonlocal told
            budget.check()
            if time.monotonic() - told >= _TELL_SECONDS:
                told = time.monotonic()
                self._reply(Surveyed(message.run, surveyor.paths, reader.read, False, [], ""))

        reader.on_step = check
        disk = Disk(self._roots, reader, message.contents, self._owners)
        surveyor = self._surveyor = Surveyor(disk, len(self._roots), store, digests.UNKNOWN_THERE, check)
        roots = surveyor.survey()
        reader.on_step = budget.check
        self._reply(Surveyed(message.run, surveyor.paths, reader.read, True, roots, ""))

    def _forget(self) -> None:
        self._close()
        forget(self._path)

    def _close(self) -> None:
        store, self._store = self._store, None
        self._surveyor = self._reader = None
        if store is not None:
            store.close()

    def _digests(self, message: WantDigests) -> None:
        if self._ended:
            return
        if self._surveyor is None:
            raise ProtocolError("the source", "a question for digests without a survey")
        try:
            paths.check(message.path)
        except UnsafePath as error:
            raise ProtocolError("the source", str(error)) from None
        items = self._surveyor.items(message.root, message.path, message.bucket)
        in_buckets = message.bucket < 0 and len(items) > digests.FEW_NAMES
        if in_buckets:
            items = digests.buckets(items)
        part: list[Item] = []
        size = 0
        for item in items:
            if size > _PART_BYTES:
                self._reply(Digests(message.number, in_buckets, part, False))
                part, size = [], 0
            part.append(item)
            size += len(item.name) + 3 * digests.SIZE
        self._reply(Digests(message.number, in_buckets, part, True))

    def _seen(self, number: int, opened: list[_Opened]) -> None:
        part: list[Entry] = []
        size = 0
        try:
            while opened:
                if self._ended:
                    return
                entry = self._entry(*opened.pop())
                cost = len(entry.path) + sum(len(name) + len(value) for name, value in entry.meta.xattrs) + 200
                if part and size + cost > _PART_BYTES:
                    self._tell_seen(number, part, False)
                    part, size = [], 0
                part.append(entry)
                size += cost
        finally:
            _close(opened)
        self._tell_seen(number, part, True)

    def _tell_seen(self, number: int, part: list[Entry], last: bool) -> None:
        for names in self._leaving.listed(part, self._place):
            self._reply(names)
        self._reply(Seen(number, part, self._read(), last))

    def _read(self) -> int:
        return self._reader.read if self._reader is not None else 0

    def _entry(self, seen: Observed, file: io.FileIO | None) -> Entry:
        digest = None
        if file is not None:
            if self._reader is None:
                file.close()
                raise ProtocolError("the source", "a Look without a survey")
            with contextlib.suppress(OSError):
                digest = self._reader.digest(seen, file)
        meta = digests.meta_of(seen)
        return Entry(seen.root, seen.path, int(seen.kind), meta, seen.size, seen.nlink, seen.rdev, seen.target, digest)


def _close(opened: list[_Opened]) -> None:
    for _, file in opened:
        if file is not None:
            file.close()
    opened.clear()
