"""The thread in which a watcher lives: it turns hints into dirty paths until it is told to stop."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from farshore.errors import FarshoreError
from farshore.fmm.dirty import DirtySet
from farshore.fmm.mapped import Mapped
from farshore.fmm.types import Counts, Hint, Watcher
from farshore.log import Log

_log = Log(__name__)
_READ_SECONDS = 1.0
_RETRY_SECONDS = 2.0


class Feed:
    """Runs a watcher in a thread of its own and marks what it reports in ``dirty``.

    ``make`` gives a new watcher and is called in that thread; it is asked again when it or a watcher fails, and every
    start puts all roots in doubt. ``on_marked`` is called in that thread whenever something was marked. ``mapped`` is
    asked for what no watcher is told of. Requests from other threads are answered through futures, so that the watcher
    sees one caller only; none stays without an answer.
    """

    def __init__(
        self,
        make: Callable[[], Watcher],
        dirty: DirtySet,
        on_marked: Callable[[], None],
        mapped: Mapped | None = None,
    ) -> None:
        self._make = make
        self._mapped = mapped
        self._paused = False
        self._watcher: Watcher = _Starting()
        self._dirty = dirty
        self._on_marked = on_marked
        self._requests: queue.SimpleQueue[tuple[Callable[[], Sequence[Hint]], Future[int]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._ended = False
        self._problem = ""
        #: Overflows and events of watchers that failed.
        self._before = (0, 0)
        #: True while everything that can be watched is watched.
        self.watching = False
        #: Done when that was so for the first time, and every root is marked, or when it could not be.
        self.began: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="fmm", daemon=True)

    def start(self) -> None:
        """Begin to watch, in the background; every root is marked for a scan when it is watched."""
        self._thread.start()

    def barrier(self, *, with_mapped: bool = False) -> Future[int]:
        """When done, every change made before the call is marked, with a lower number than the result.

        ``with_mapped``: and every file that is mapped now, as it may have changed. The future holds a FarshoreError
        where nothing is watched.
        """
        return self._request(lambda: [*self._watcher.drain(), *self._look_at_mapped(all_now=with_mapped)])

    def pause(self) -> Future[int]:
        """Stop watching and give back the kernel's resources."""
        return self._request(self._pause)

    def resume(self) -> Future[int]:
        """Watch again; what changed in between is marked."""
        return self._request(self._resume)

    def close(self) -> None:
        """End the thread; returns when it has ended."""
        self._stop.set()
        self._watcher.wake()
        if self._thread.ident is not None:
            self._thread.join()

    def problems(self) -> list[str]:
        """What limits the view now."""
        if self._problem:
            return [self._problem]
        return [*self._watcher.problems(), *([self._mapped.problem] if self._mapped and self._mapped.problem else [])]

    @property
    def failed(self) -> bool:
        """True while nothing is watched, for the reason that ``problems`` tells."""
        return bool(self._problem)

    def counts(self) -> Counts:
        """How much is watched now; overflows and events since the feed was made, those of watchers that failed, too."""
        with self._lock:
            counts = self._watcher.counts()
            overflows, events = self._before
        return replace(counts, overflows=counts.overflows + overflows, events=counts.events + events)

    def _request(self, action: Callable[[], Sequence[Hint]]) -> Future[int]:
        future: Future[int] = Future()
        with self._lock:
            if self._ended:
                future.set_exception(FarshoreError("the watcher has ended"))
                return future
            self._requests.put((action, future))
        self._watcher.wake()
        return future

    def _pause(self) -> Sequence[Hint]:
        self._watcher.pause()
        self._paused = True
        return ()

    def _resume(self) -> Sequence[Hint]:
        self._paused = False
        return self._watcher.resume()

    def _look_at_mapped(self, *, all_now: bool = False) -> Sequence[Hint]:
        return () if self._mapped is None or self._paused else self._mapped.look(all_now=all_now)

    def _mark(self, hints: Sequence[Hint]) -> None:
        if hints:
            self._dirty.mark(hints, time.monotonic())
            self._on_marked()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    self._renew()
                    self._mark(self._watcher.start())
                    self._problem = ""
                    self.watching = True
                    self._begun()
                    # Whoever asked meanwhile could wake nobody.
                    self._serve()
                    while not self._stop.is_set():
                        self._mark(self._watcher.read(_READ_SECONDS))
                        self._mark(self._look_at_mapped())
                        self._serve()
                except Exception as error:
                    self._fail(error)
        finally:
            self.watching = False
            self._begun()
            with self._lock:
                self._ended = True
            self._refuse("the watcher has ended")
            self._watcher.close()

    def _begun(self) -> None:
        if not self.began.done():
            self.began.set_result(None)

    def _renew(self) -> None:
        # Here and not where the feed is made: it may count directories for long, and fail for want of descriptors.
        following, last = self._make(), self._watcher.counts()
        with self._lock:
            self._before = self._before[0] + last.overflows, self._before[1] + last.events
            self._watcher = following
        self._paused = False

    def _fail(self, error: Exception) -> None:
        """Say what is wrong, and wait a little."""
        self.watching = False
        self._begun()
        if self._problem != str(error):
            if isinstance(error, FarshoreError):
                _log.warning("cannot watch", reason=error)
            else:
                _log.error("the watcher failed", error)
        self._problem = str(error) or type(error).__name__
        self._refuse(self._problem)
        with contextlib.suppress(OSError):
            self._watcher.close()
        self._stop.wait(_RETRY_SECONDS)
        self._refuse(self._problem)

    def _serve(self) -> None:
        while (request := self._next()) is not None:
            action, future = request
            try:
                self._mark(action())
                result = self._dirty.next_mark()
            except BaseException as error:
                if not future.cancelled():
                    future.set_exception(error)
                raise
            if future.set_running_or_notify_cancel():
                future.set_result(result)

    def _refuse(self, reason: str) -> None:
        while (request := self._next()) is not None:
            if request[1].set_running_or_notify_cancel():
                request[1].set_exception(FarshoreError(reason))

    def _next(self) -> tuple[Callable[[], Sequence[Hint]], Future[int]] | None:
        try:
            return self._requests.get_nowait()
        except queue.Empty:
            return None


class _Starting:
    """Stands for the watcher that is not made yet."""

    def start(self) -> Sequence[Hint]:
        return ()

    def read(self, timeout: float) -> Sequence[Hint]:
        return ()

    def drain(self) -> Sequence[Hint]:
        return ()

    def pause(self) -> None:
        pass

    def resume(self) -> Sequence[Hint]:
        return ()

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass

    def problems(self) -> Sequence[str]:
        return ()

    def counts(self) -> Counts:
        return Counts("starting")
