"""For tests of the brake: a group of files in memory, and programs that change it as a source would tell."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator

from farshore.config import BrakeConfig
from farshore.dbm.messages import Copy, Link, MakeDir, Meta, Move, Operation, Patch, Put, Remove
from farshore.dbm.replica import change
from farshore.dbm.replica.brake import Brake, Hold, Verdict, Warn
from farshore.dbm.replica.contents import Content, Inline

META = Meta(0o644, 0, 0, 1, 1, [])
_WORDS = (b"the", b"of", b"and", b"server", b"backup", b"report", b"customer", b"invoice", b"total", b"name", b"street")


class Clock:
    """Time as the test wants it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Memory:
    """A ``Sight`` of one root whose files are ``files``; directories are the prefixes of their paths."""

    def __init__(self) -> None:
        self.files: dict[bytes, bytes] = {}
        self.directories: set[bytes] = set()
        #: Contents of Patch and Copy operations, by path.
        self.coming: dict[bytes, bytes] = {}
        self.contents_read = 0

    def look(self, root: int, path: bytes) -> os.stat_result | None:
        if path in self.files:
            return _status(stat.S_IFREG, len(self.files[path]))
        if path in self.directories or not path:
            return _status(stat.S_IFDIR, 0)
        return None

    def names(self, root: int) -> Iterator[bytes]:
        yield from {path.split(b"/")[0] for path in (*self.files, *self.directories)}

    def files_below(self, root: int, path: bytes) -> Iterator[tuple[bytes, int]]:
        for each, data in self.files.items():
            if not path or each.startswith(path + b"/"):
                yield each, len(data)

    def content(self, root: int, path: bytes) -> Content | None:
        self.contents_read += 1
        data = self.files.get(path)
        return None if data is None else Inline(data)

    def after(self, operation: Operation) -> Content | None:
        return Inline(b"" if isinstance(operation, Put) else self.coming[operation.path])

    def apply(self, operation: Operation) -> None:
        """What the replica would do."""
        match operation:
            case Put(path=path, data=data):
                self._remove(path)
                self.files[path] = data
            case Patch(path=path) | Copy(path=path):
                self._remove(path)
                self.files[path] = self.coming[path]
            case Link(path=path, to=to):
                data = self.files[to]
                self._remove(path)
                self.files[path] = data
            case MakeDir(path=path):
                if path not in self.directories:
                    self._remove(path)
                    self.directories.add(path)
            case Move(path=path, to=to):
                self._remove(to)
                for old in [n for n in self.files if n == path or n.startswith(path + b"/")]:
                    self.files[to + old[len(path) :]] = self.files.pop(old)
                for old in [n for n in self.directories if n == path or n.startswith(path + b"/")]:
                    self.directories.remove(old)
                    self.directories.add(to + old[len(path) :])
            case Remove(path=path):
                self._remove(path)

    def _remove(self, path: bytes) -> None:
        for old in [n for n in self.files if n == path or n.startswith(path + b"/")]:
            del self.files[old]
        self.directories -= {n for n in self.directories if n == path or n.startswith(path + b"/")}


def _status(kind: int, size: int) -> os.stat_result:
    return os.stat_result((kind | 0o644, 1, 1, 1, 0, 0, size, 0, 0, 0))


class Group:
    """A group with its brake: what is sent to it is judged and, if it may be, applied."""

    def __init__(self, **config: object) -> None:
        self.clock = Clock()
        self.memory = Memory()
        self.brake = Brake(BrakeConfig(**config), self.clock)  # type: ignore[arg-type]
        self.random = random.Random(5)
        self.warnings: list[str] = []

    def fill(self, count: int, size: int = 400) -> list[bytes]:
        """So many files of text that were always there; returns their paths."""
        paths = [b"d%02d/file %05d.txt" % (n % 40, n) for n in range(count)]
        for path in paths:
            self.memory.files[path] = self.text(size)
            self.memory.directories.add(path.split(b"/")[0])
        self.settle()
        return paths

    def settle(self) -> None:
        """What is there was there before anything is judged."""
        self.brake.note_total(len(self.memory.files), sum(map(len, self.memory.files.values())))

    def text(self, size: int) -> bytes:
        return b" ".join(self.random.choices(_WORDS, k=size // 3 + 1))[:size]

    def noise(self, size: int = 400) -> bytes:
        return self.random.randbytes(size)

    def send(self, *operations: Operation) -> Verdict:
        """One transaction."""
        verdict = self.brake.judge(change.describe(operations, self.memory, self.memory.after))
        if not isinstance(verdict, Hold):
            for operation in operations:
                self.memory.apply(operation)
        if isinstance(verdict, Warn):
            self.warnings.append(verdict.reason)
        return verdict

    @property
    def held(self) -> str:
        return self.brake.held

    def put(self, path: bytes, data: bytes) -> Put:
        return Put(0, path, META, data)
