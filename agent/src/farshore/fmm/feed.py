"""The thread in which a watcher lives: it turns hints into dirty paths until it is told to stop."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from farshore.errors import FarshoreError
from farshore.fmm.dirty import DirtySet
from farshore.fmm.types import Hint, Watcher
from farshore.log import Log

_log = Log(__name__)
_READ_SECONDS = 1.0
_RETRY_SECONDS = 2.0


class Feed:
    """Runs ``watcher`` in a thread of its own and marks what it reports in ``dirty``.

    ``on_marked`` is called in that thread whenever something was marked. Requests from other threads are answered
    through futures, so that the watcher sees one caller only.
    """

    def __init__(self, watcher: Watcher, dirty: DirtySet, on_marked: Callable[[], None]) -> None:
        self._watcher = watcher
        self._dirty = dirty
        self._on_marked = on_marked
        self._requests: queue.SimpleQueue[tuple[Callable[[], Sequence[Hint]], Future[int]]] = queue.SimpleQueue()
        self._stopping = False
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="fmm", daemon=True)

    def start(self) -> None:
        """Begin to watch, in the background; every root is marked for a scan when it is watched."""
        self._thread.start()

    def barrier(self) -> Future[int]:
        """When done, every change made before the call is marked, with a lower number than the result."""
        return self._request(self._watcher.drain)

    def pause(self) -> Future[int]:
        """Stop watching and give back the kernel's resources."""
        return self._request(self._pause)

    def resume(self) -> Future[int]:
        """Watch again; what changed in between is marked."""
        return self._request(self._watcher.resume)

    def close(self) -> None:
        """End the thread; returns when it has ended."""
        self._stopping = True
        self._watcher.wake()
        if self._thread.ident is not None:
            self._thread.join()

    def problems(self) -> list[str]:
        """What limits the view now."""
        return [self._problem] if self._problem else list(self._watcher.problems())

    def _request(self, action: Callable[[], Sequence[Hint]]) -> Future[int]:
        future: Future[int] = Future()
        self._requests.put((action, future))
        self._watcher.wake()
        return future

    def _pause(self) -> Sequence[Hint]:
        self._watcher.pause()
        return ()

    def _mark(self, hints: Sequence[Hint]) -> None:
        if hints:
            self._dirty.mark(hints, time.monotonic())
            self._on_marked()

    def _run(self) -> None:
        try:
            self._start()
            while not self._stopping:
                self._mark(self._watcher.read(_READ_SECONDS))
                self._serve()
        except Exception as error:
            self._problem = f"the watcher ended: {error}"
            _log.error("the watcher ended", error)
        finally:
            self._stopping = True
            self._serve()
            self._watcher.close()

    def _start(self) -> None:
        while not self._stopping:
            try:
                self._mark(self._watcher.start())
                self._problem = ""
                return
            except FarshoreError as error:
                if self._problem != str(error):
                    _log.warning("cannot watch yet", reason=error)
                self._problem = str(error)
                time.sleep(_RETRY_SECONDS)

    def _serve(self) -> None:
        while True:
            try:
                action, future = self._requests.get_nowait()
            except queue.Empty:
                return
            with contextlib.suppress(Exception):
                if self._stopping:
                    future.set_exception(FarshoreError("the watcher has ended"))
                    continue
                try:
                    self._mark(action())
                    future.set_result(self._dirty.next_mark())
                except Exception as error:
                    future.set_exception(error)
