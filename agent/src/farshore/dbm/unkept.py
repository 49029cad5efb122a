"""What of the files' metadata the replica could not keep: for each cause a number of files, and one of them by name.

A cause is over for a file when its metadata was set again without it, or the file is gone; for what is not seen to end,
the next full comparison tells, which tries everything that differs once more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from farshore import durable
from farshore.dbm.messages import Cause
from farshore.errors import StateError
from farshore.log import Log

_log = Log(__name__)
#: Causes that are told apart, at most; what comes then is counted under one.
MAX_CAUSES = 100
#: Files that are known by name, of all causes together; of more, it is only known that there are more.
MAX_PATHS = 10_000
_OTHERS = "other metadata cannot be kept"
_STORE_VERSION = 1
#: Characters of a cause that are shown; the other side may tell of any.
_LONGEST_TEXT = 500


class _Stored(msgspec.Struct, frozen=True, array_like=True):
    version: int
    causes: list[tuple[str, bool, list[bytes]]]


class Unkept:
    """The register of one group. Any thread may call; paths are absolute.

    With ``path``, it is kept there between runs: a replica that starts again still lacks what it lacked.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        #: By cause, the files that are known to have it, each with the round of comparison in which that was seen.
        self._causes: dict[str, dict[bytes, int]] = {}
        #: Causes that more files have, in the round in which that was seen.
        self._more: dict[str, int] = {}
        self._paths = 0
        self._round = 0
        #: Grows with each change.
        self.version = 0
        self._stored = 0
        if path is not None:
            self._load(path)

    def __bool__(self) -> bool:
        return bool(self._causes)

    def settle(self, path: bytes, causes: Iterable[str]) -> None:
        """``path`` was given its metadata: for these causes not all of it."""
        with self._lock:
            causes = list(causes)
            for cause in [cause for cause, paths in self._causes.items() if path in paths]:
                if cause not in causes:
                    self._forget(cause, path)
            for cause in causes:
                self._note(cause, path)

    def note(self, path: bytes, cause: str) -> None:
        """One more thing about ``path`` could not be kept."""
        with self._lock:
            self._note(cause, path)

    def gone(self, path: bytes, *, below: bool) -> None:
        """Nothing is at ``path`` any more; ``below``: it was a directory."""
        with self._lock:
            for cause, each in self._at(path, below):
                self._forget(cause, each)

    def moved(self, path: bytes, to: bytes, *, below: bool) -> None:
        """What was at ``path`` is at ``to``; ``below``: it is a directory."""
        with self._lock:
            for cause, each in self._at(to, True):
                self._forget(cause, each)
            for cause, each in self._at(path, below):
                paths = self._causes[cause]
                paths[to + each[len(path) :]] = paths.pop(each)
                self.version += 1

    def linked(self, path: bytes, to: bytes) -> None:
        """``path`` is another name of what is at ``to``, and lacks what that lacks."""
        with self._lock:
            for cause, paths in list(self._causes.items()):
                if to in paths:
                    self._note(cause, path)
                elif path in paths:
                    self._forget(cause, path)

    def begin_round(self) -> None:
        """A full comparison begins, in which all that is not kept is found out anew."""
        with self._lock:
            self._round += 1

    def end_round(self) -> None:
        """All was compared: what was not seen since it began is over."""
        with self._lock:
            for cause, paths in list(self._causes.items()):
                if self._more.get(cause, self._round) < self._round:
                    del self._more[cause]
                    self.version += 1
                    if not paths:
                        del self._causes[cause]
                for path in [path for path, seen in paths.items() if seen < self._round]:
                    self._forget(cause, path)

    def causes(self) -> list[Cause]:
        """All of them, in the order in which they came up."""
        with self._lock:
            return [
                Cause(cause, len(paths), next(iter(paths), b""), cause in self._more)
                for cause, paths in self._causes.items()
            ]

    def store(self) -> None:
        """Write it down where it is kept between runs, if it has changed; that it cannot be is no reason to stop."""
        if self._path is None:
            return
        with self._lock:
            if self._stored == self.version:
                return
            version = self.version
            causes = [(cause, cause in self._more, list(paths)) for cause, paths in self._causes.items()]
        try:
            durable.write(self._path, msgspec.msgpack.encode(_Stored(_STORE_VERSION, causes)))
        except StateError as error:
            _log.warning("what is not kept cannot be written down", reason=error)
            return
        self._stored = version

    # --- with the lock held

    def _note(self, cause: str, path: bytes) -> None:
        if cause not in self._causes:
            if len(self._causes) >= MAX_CAUSES:
                cause = _OTHERS
            if cause not in self._causes:
                self._causes[cause] = {}
                self.version += 1
                _log.warning("not kept", what=cause, path=path)
        paths = self._causes[cause]
        if path in paths:
            paths[path] = self._round
        elif self._paths < MAX_PATHS or not paths:
            paths[path] = self._round
            self._paths += 1
            self.version += 1
        else:
            if cause not in self._more:
                self.version += 1
            self._more[cause] = self._round

    def _forget(self, cause: str, path: bytes) -> None:
        paths = self._causes[cause]
        del paths[path]
        self._paths -= 1
        self.version += 1
        if not paths and cause not in self._more:
            del self._causes[cause]

    def _at(self, path: bytes, below: bool) -> list[tuple[str, bytes]]:
        if not below:
            return [(cause, path) for cause, paths in self._causes.items() if path in paths]
        prefix = path + b"/"
        return [
            (cause, each)
            for cause, paths in self._causes.items()
            for each in paths
            if each == path or each.startswith(prefix)
        ]

    def _load(self, path: Path) -> None:
        try:
            stored = msgspec.msgpack.decode(path.read_bytes(), type=_Stored)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError) as error:
            _log.warning("what was not kept is forgotten", file=path, reason=error)
            return
        for cause, more, paths in stored.causes if stored.version == _STORE_VERSION else []:
            self._causes[cause] = dict.fromkeys(paths, 0)
            self._paths += len(paths)
            if more:
                self._more[cause] = 0
            # There is something to tell of.
            self.version = self._stored = 1


def texts(causes: Sequence[Cause]) -> list[str]:
    """A line for each cause."""
    return [
        summary(_printable(cause.text[:_LONGEST_TEXT]), cause.count, cause.example, more=cause.more)
        for cause in causes[: MAX_CAUSES + 1]
    ]


def summary(text: str, count: int, example: bytes, *, more: bool = False) -> str:
    """``text (312 files, e.g. /srv/www/x)``; with ``more``, there are more than ``count``."""
    if not example:
        return f"{text} (many files)"
    if count == 1 and not more:
        return f"{text} ({shown(example)})"
    return f"{text} ({'more than ' if more else ''}{count} files, e.g. {shown(example)})"


def shown(path: bytes) -> str:
    """A path as text that any terminal and any encoding can take."""
    return _printable(path.decode("utf-8", "backslashreplace"))


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
