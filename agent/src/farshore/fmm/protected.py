"""What both engines know of a root, and what they have to report of it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Sequence

from farshore.fmm.errors import WatchError
from farshore.fmm.patterns import Filter
from farshore.fmm.types import Hint, Kind, Root

#: Seconds between looks at the roots, and between RESCANs of what cannot be watched.
ROOT_INTERVAL = 1.0
RESCAN_INTERVAL = 30.0

RESCAN: int = Kind.RESCAN.value
#: A directory whose entries changed has a new modification time.
PARENT: int = (Kind.MODIFIED | Kind.ATTRIBUTES).value
_NAMED: int = (Kind.CREATED | Kind.MOVED_TO | Kind.MODIFIED).value
_LEFT: int = (Kind.DELETED | Kind.MOVED_FROM).value
_CAME: int = (Kind.CREATED | Kind.MOVED_TO).value

GONE = "it is gone: deleted, moved away or unmounted; put it back"
# What is seen then, an empty mount point perhaps, may not be what is protected.
OTHER_FILESYSTEM = (
    "it lies on another filesystem than before; mount the right one, or restart the agent if this one is right"
)
REMEDIES = {
    errno.ENOMEM: "the kernel has no memory for more watches; give the machine more memory",
    errno.EMFILE: "too many open files; raise LimitNOFILE of the unit",
    errno.ENOENT: "it does not exist: deleted, moved away or not mounted; put it back",
    errno.EACCES: "permission denied; let the agent read it (CAP_DAC_READ_SEARCH)",
}


class Protected:
    """One root. ``marks`` are the kinds of what is to be reported, by path."""

    __slots__ = (
        "device",
        "filter",
        "identity",
        "index",
        "is_file",
        "marks",
        "name",
        "parent",
        "path",
        "plain",
        "problem",
        "rescan_at",
        "root",
    )

    def __init__(self, index: int, root: Root) -> None:
        if not root.path.startswith(b"/"):
            raise WatchError(root.path, "the path is not absolute")
        self.index = index
        self.root = root
        self.path = root.path.rstrip(b"/") or b"/"
        self.parent = os.path.dirname(self.path)
        self.name = os.path.basename(self.path)
        self.filter = Filter(root)
        self.plain = self.filter.plain
        #: A single file is watched through the directory that holds it: its inode changes.
        self.is_file = False
        self.identity = (0, 0)
        #: Of the filesystem it lay on when it was watched first.
        self.device = 0
        self.problem: str | None = None
        self.rescan_at = 0.0
        self.marks: dict[bytes, int] = {}

    @property
    def watched(self) -> bool:
        """Whether it is watched now, at least in part."""
        raise NotImplementedError

    def mark(self, path: bytes, bits: int) -> None:
        """Something happened at ``path``."""
        self.marks[path] = self.marks.get(path, 0) | bits

    def take(self) -> list[Hint]:
        """What is to be reported.

        Where something came is told before where something left: who looks in that order finds what was moved in its
        new place before it misses it in the old one.
        """
        marks, self.marks = self.marks, {}
        left = [(path, bits) for path, bits in marks.items() if bits & _LEFT and not bits & _CAME]
        if left:
            marks = {path: bits for path, bits in marks.items() if not bits & _LEFT or bits & _CAME}
        index = self.index
        hints = [Hint(index, path, kind_of(bits)) for path, bits in marks.items()]
        hints += [Hint(index, path, kind_of(bits)) for path, bits in left]
        return hints + self._links(marks)

    def _links(self, marks: dict[bytes, int]) -> list[Hint]:
        """Which of the names stand for files of more than one; told here, as later they may be gone."""
        found = []
        above = self.path + b"/"
        for path, bits in marks.items():
            if bits & _NAMED and not bits & RESCAN:
                try:
                    status = os.lstat(above + path)
                except OSError:
                    continue
                if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                    found.append(Hint(self.index, path, kind_of(bits), (status.st_dev, status.st_ino)))
        return found

    def in_place(self) -> bool:
        """True when what was watched last, ``identity``, is where it was."""
        try:
            status = os.stat(self.parent if self.is_file else self.path)
            if (status.st_dev, status.st_ino) != self.identity:
                return False
            if not self.is_file:
                return True
            with contextlib.suppress(OSError):
                return not stat.S_ISDIR(os.stat(self.path).st_mode)
            return True
        except OSError:
            return False


def check_overlaps(roots: Sequence[Protected]) -> None:
    """Raises WatchError when a root lies in another one."""
    paths = [(os.path.realpath(root.path) + b"/", root.index) for root in roots]
    for (above, _), (below, index) in itertools.pairwise(sorted(paths)):
        if below.startswith(above):
            raise WatchError(roots[index].path, f"it lies in {show(above[:-1])}, which is watched already")


_kinds: dict[int, Kind] = {}


def kind_of(bits: int) -> Kind:
    """The kinds of a hint."""
    kind = _kinds.get(bits)
    if kind is None:
        kind = _kinds[bits] = Kind(bits)
    return kind


def show(path: bytes) -> str:
    """How a message names a path."""
    return path.decode("utf-8", "backslashreplace")
