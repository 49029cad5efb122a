"""Contents of large files, on their way into staged files beside the transactions.

An upload is a delta stream. When the connection breaks it is kept as it is, with its base, its staged file and the
state of the delta, and the next connection goes on with it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial

import blake3

from farshore import delta
from farshore.dbm.messages import Nak
from farshore.dbm.replica.build import Building, room
from farshore.dbm.replica.intake import Inbox, Interrupted, Switch
from farshore.dbm.replica.leaves import LeafStore
from farshore.dbm.replica.stage import Staged

__all__ = ["Interrupted", "Upload", "Uploader"]


class Upload:
    """One upload. It is opened by one thread, then fed by another; attributes say which may be read by all."""

    def __init__(self, root: int, path: bytes, based: bool, sparse: bool) -> None:
        self.root = root
        self.path = path
        self.based = based
        self.sparse = sparse
        #: Bytes of the delta that were taken in.
        self.received = 0
        #: It can be fed, or has failed. May be read by all, as can the rest.
        self.opened = False
        #: All of it is there, and durable.
        self.complete = False
        #: Why it cannot be had.
        self.failure: Nak | None = None
        #: Set from any thread, ends a step that takes long; nothing can be done with the upload after it.
        self.abandoned = False
        #: Its file is placed, or it was dropped.
        self.closed = False
        self._building: Building | None = None
        self._applier: delta.Applier | None = None
        self._known: delta.Leaves | None = None
        #: Has the store forget the leaves of the base: it is about to be replaced, or they were wrong.
        self.forget_base: Callable[[], None] = lambda: None
        self._notes: int | None = None
        self._leaves: delta.Leaves | None = None
        self._hasher = blake3.blake3()
        self._broken = False
        self._whole = False

    @property
    def staged(self) -> Staged | None:
        """Where its content is."""
        return None if self._building is None else self._building.staged

    @property
    def resumable(self) -> bool:
        """Whether another connection can go on with it."""
        return not (self.closed or self._broken or self.failure or self._building is None)

    def received_digest(self) -> bytes:
        """BLAKE3-256 of what was received of the delta."""
        return self._hasher.digest()

    def resume(self, sparse: bool) -> None:
        """Another connection goes on with it."""
        self.sparse = sparse
        if self._building is not None:
            self._building.sparse = sparse
        self.complete = False

    def open(self, staged: Staged, handle: int, base: int | None, store: LeafStore) -> None:
        """Take a new staged file and the base, both of which become the upload's; raises OSError."""
        try:
            build = Building(staged, handle, base, sparse=self.sparse, check=self._check)
            # Only now: a change of the base from here on is noticed when the building is finished.
            self._known = None if base is None else store.of(base)
            if base is not None and self._known is not None:
                self.forget_base = partial(store.forget, os.fstat(base))
        except BaseException:
            os.close(handle)
            if base is not None:
                os.close(base)
            raise
        self._building = build
        reader = None if base is None else delta.FdReader(base)
        self._applier = delta.Applier(
            reader,
            build.write,
            limit=room(handle, self.sparse),
            copy=build.copy,
            keep=build.keep,
            known=self._known,
            notes=self._make_notes(store),
        )

    def feed(self, data: bytes, last: bool) -> None:
        """Take the next piece of the delta; with the last one, make the content durable.

        Raises DeltaCorrupt, OSError, and Interrupted; each is final.
        """
        if self._building is None or self._applier is None:
            # The connection ended while it was opened.
            raise Interrupted
        self._broken = True
        try:
            if data:
                self._applier.feed(data)
                self._hasher.update(data)
                self.received += len(data)
                self._check_base(len(data))
            if last and not self._whole:
                self._building.finish(self._applier.finish().digest)
                self._building.sync()
                self._leaves = self._applier.leaves()
                self._whole = True
                if self._leaves is not None:
                    self._notes = None
        except (delta.DeltaCorrupt, OSError):
            # Were its leaves to blame, the next attempt would end alike.
            self.forget_base()
            raise
        self.complete = last
        self._broken = False

    def take_leaves(self) -> delta.Leaves | None:
        """The leaves of a complete upload, for the caller to close; None when they are not known."""
        leaves, self._leaves = self._leaves, None
        return leaves

    def content(self) -> tuple[Staged, int]:
        """The staged file of a complete upload, and a descriptor of it that the caller closes."""
        assert self._building is not None
        self._building.close()
        staged = self._building.staged
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        return staged, os.open(staged.name, flags, dir_fd=staged.directory)

    def close(self) -> Staged | None:
        """Give back the handles; returns the staged file, which the caller discards unless it was placed."""
        self.closed = True
        self._applier = None
        if self._notes is not None:
            os.close(self._notes)
            self._notes = None
        for leaves in (self._known, self.take_leaves()):
            if leaves is not None:
                leaves.close()
        building, self._building = self._building, None
        if building is None:
            return None
        building.close()
        return building.staged

    def _check(self) -> None:
        if self.abandoned:
            raise Interrupted

    def _make_notes(self, store: LeafStore) -> Callable[[], int | None]:
        def make() -> int | None:
            self._notes = store.new_file()
            return self._notes

        return make

    def _check_base(self, fed: int) -> None:
        """Once, when the delta's header is there: a base of another length is another base."""
        assert self._building is not None
        assert self._applier is not None
        header, base = self._applier.header, self._building.base
        if header is None or base is None or self.received > fed + _HEADER_BYTES:
            return
        size = os.fstat(base).st_size
        if header.base_length is not None and header.base_length != size:
            raise delta.DeltaCorrupt(f"it was made for a file of {header.base_length} bytes, there are {size}")


#: A delta's header is shorter.
_HEADER_BYTES = 64


class Uploader:
    """The thread that feeds the uploads of one connection, in the order in which their pieces came.

    ``refuse`` is called from it when one fails, ``complete`` when all of one is there, ``drop`` to give back what one
    holds.
    """

    def __init__(
        self,
        inbox: Inbox[tuple[Upload, bytes | None, bool]],
        switch: Switch,
        refuse: Callable[[Upload, Exception], None],
        complete: Callable[[Upload], None],
        drop: Callable[[Upload], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._inbox = inbox
        self._switch = switch
        self._refuse = refuse
        self._complete = complete
        self._drop = drop
        self._fail = fail
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self, timeout: float | None) -> bool:
        """Wait until it has ended, after the switch; returns whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while (batch := self._inbox.take()) is not None:
                for upload, data, last in batch:
                    self._switch.wait(lambda upload=upload: upload.opened)  # type: ignore[misc]
                    self._take(upload, data, last)
        except Interrupted:
            return
        except BaseException as error:
            self._fail(error)

    def _take(self, upload: Upload, data: bytes | None, last: bool) -> None:
        if data is None:
            self._drop(upload)
        elif upload.failure is None and not upload.closed:
            try:
                upload.feed(data, last)
            except Interrupted:
                raise
            except Exception as error:
                self._refuse(upload, error)
            if upload.complete:
                self._complete(upload)
            if last:
                self._switch.notify()
