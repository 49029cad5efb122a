"""What the source has to do: dirty paths that were taken, what they led to, and large files to be read."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass, field, replace

from farshore.fmm.dirty import Dirty
from farshore.fmm.types import Inode, Kind


class Work:
    """A dirty path that was taken, with all that looking at it led to.

    It is settled when nothing of it is ``left`` and transaction ``seq``, the last that may hold some of it, is durable.
    """

    __slots__ = ("item", "left", "seq")

    def __init__(self, item: Dirty) -> None:
        self.item = item
        self.left = 0
        self.seq = 0

    def remember(self, inodes: set[Inode]) -> None:
        """Files whose other names are to be looked at belong to this: whoever begins it anew looks at them as well."""
        if inodes - self.item.inodes:
            self.item = replace(self.item, inodes=self.item.inodes | inodes)


@dataclass(frozen=True, slots=True)
class Content:
    """What was read of a large file, at one go: ``started_ns`` is the wall clock before the first byte.

    ``before`` and ``after`` are what fstat told of it around the reading; ``signature`` is None when it was only
    hashed.
    """

    before: os.stat_result
    after: os.stat_result
    started_ns: int
    length: int
    digest: bytes
    signature: bytes | None

    @property
    def is_settled(self) -> bool:
        """True when the file did not change while it was read."""
        return _moment(self.before) == _moment(self.after)


def _moment(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class Depth(enum.Enum):
    """How much of a directory is looked at."""

    #: What it holds, and nothing below.
    SHALLOW = enum.auto()
    #: All below; of a large part of the tree only what the index does not know as it is.
    DEEP = enum.auto()
    #: All below, one by one.
    THOROUGH = enum.auto()


@dataclass(eq=False)
class Job:
    """A large file to be read: to be hashed only, when its content may be on the replica already, or to be sent.

    The works wait for it. ``base`` is the path whose content on the replica the delta refers to; ``base_works`` wait to
    tell that it is gone. ``number`` is the upload's on the wire, ``problem`` why it could not be read.
    """

    root: int
    path: bytes
    size: int
    works: list[Work]
    hash_only: bool
    base: bytes
    base_works: list[Work] = field(default_factory=list)
    number: int = 0
    content: Content | None = None
    problem: OSError | None = None
    #: Seconds of one monotonic clock: when it may be read, as a file that never rests is read again only after a
    #: while, and since when it waits.
    not_before: float = 0.0
    since: float = 0.0


@dataclass
class Batch:
    """Dirty paths taken together, and what is left to do for them."""

    works: list[Work]
    #: Stacks: the last is next, so parents stay before their children.
    walks: list[tuple[int, bytes, Work, Depth]] = field(default_factory=list)
    todo: list[tuple[int, bytes, Kind, Work]] = field(default_factory=list)
    vanished: list[tuple[int, bytes, Work, bool]] = field(default_factory=list)
    #: Root, inode and ctime of the files with several names that were read for it: each of them need not be read anew.
    read: set[tuple[int, int, int, int]] = field(default_factory=set)

    @classmethod
    def of(cls, items: list[Dirty]) -> Batch:
        """A batch of what was taken from the dirty set."""
        batch = cls([Work(item) for item in items])
        for work in reversed(batch.works):
            batch.look(work.item.root, work.item.path, work.item.kind, work)
        return batch

    @property
    def finished(self) -> bool:
        """True when nothing is left to do."""
        return not (self.walks or self.todo or self.vanished)

    def look(self, root: int, path: bytes, kind: Kind, work: Work) -> None:
        """Look at ``path`` next."""
        work.left += 1
        self.todo.append((root, path, kind, work))

    def walk(self, root: int, path: bytes, work: Work, depth: Depth = Depth.DEEP) -> None:
        """Look at everything in the directory ``path``, once, when all that is to be looked at was.

        Whoever asks first says how deep: that it is new is known before that it is in doubt.
        """
        if not self.walks or self.walks[-1][:3] != (root, path, work):
            work.left += 1
            self.walks.append((root, path, work, depth))

    def vanish(self, root: int, path: bytes, work: Work, *, surely: bool = False) -> None:
        """Nothing was at ``path``: if that is still so when all else was looked at, it is gone.

        ``surely``: and was not moved, as all that changed before was looked at.
        """
        work.left += 1
        self.vanished.append((root, path, work, surely))
