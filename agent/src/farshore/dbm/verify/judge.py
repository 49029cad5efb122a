"""What a difference means: pure decisions from what source, index and replica each say of one path."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from farshore.dbm.index import Known, clamp_time
from farshore.dbm.messages import Entry
from farshore.fmm.types import FileKind, Observed

_DEVICES = (FileKind.CHARACTER_DEVICE, FileKind.BLOCK_DEVICE)
#: An inode's ctime may tell of a change that was taken back, or of another name.
_TOUCHED = "touched"


class Finding(enum.StrEnum):
    """What is the matter with a path.

    ``SAME``: nothing. ``MOVING``: it cannot be told now, as it is changing, unreadable here, or in doubt already.
    ``REPLICA``: the replica lost or changed what it had acknowledged. ``INDEX``: source and replica agree, the index is
    wrong. ``UNSEEN``: the source changed, as its times tell, and no event came. ``UNTRACED``: the source's content is
    not what was acknowledged, though nothing else of the file changed.
    """

    SAME = "same"
    MOVING = "moving"
    REPLICA = "replica"
    INDEX = "index"
    UNSEEN = "unseen"
    UNTRACED = "untraced"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one path: by the index, on the replica, on the source, all at about one moment.

    ``known`` and ``there`` are of exactly one moment: what the index said when the question was sent, and what was
    there behind all transactions before it. ``content`` is the digest of what is ``here``, None when it is no file or
    could not be read.
    """

    known: Known | None
    there: Entry | None
    here: Observed | None
    content: bytes | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The finding, and what differs, in words."""

    finding: Finding
    differences: tuple[str, ...] = ()


def judge(facts: Facts) -> Verdict:
    """What the facts mean for a path on which nothing is waiting or under way."""
    known, there, here, content = facts.known, facts.there, facts.here, facts.content
    if known is not None and in_doubt(known):
        return Verdict(Finding.MOVING)
    drift = replica_differs(known, there)
    change = source_differs(known, here)
    if change and change != (_TOUCHED,):
        return Verdict(Finding.UNSEEN, change)
    if here is not None and known is not None and here.kind is FileKind.FILE:
        if content is None:
            # Without knowing what is here, nothing can be said, and nothing may be sent over what is there.
            return Verdict(Finding.MOVING, drift)
        expected = known.digest
        if expected is None:
            # Nobody has read it since it was only listed: both sides have it, and who is right is not known.
            if there is not None and there.digest not in (None, content):
                return Verdict(Finding.UNTRACED, _with(drift, "content"))
        elif expected != content:
            if there is not None and there.digest == content:
                return Verdict(Finding.INDEX, _with(drift, "content"))
            return Verdict(Finding.UNTRACED, _with(drift, "content"))
    if change and known is not None and here is not None and known.xattrs != here.xattrs:
        return Verdict(Finding.UNSEEN, ("attributes",))
    if not drift:
        return Verdict(Finding.SAME)
    return Verdict(Finding.INDEX if _agree(there, here, content) else Finding.REPLICA, drift)


def in_doubt(known: Known) -> bool:
    """Whether the entry says itself that nothing is certain: it is being looked at, or will be."""
    return known.kind is FileKind.SOCKET or known.mode < 0


def replica_differs(known: Known | None, there: Entry | None) -> tuple[str, ...]:
    """What of the replica is not what the index says; a file that could not be read there differs from any."""
    if known is None or there is None:
        return () if known is None and there is None else ("extra",) if known is None else ("missing",)
    if int(known.kind) != there.kind:
        return ("kind",)
    meta = there.meta
    found = {
        "mode": known.mode != meta.mode,
        "owner": (known.uid, known.gid) != (meta.uid, meta.gid),
        "time": known.mtime_ns != clamp_time(meta.mtime_ns),
        "attributes": known.xattrs != tuple(meta.xattrs),
        "target": known.target != there.target,
        "device": known.kind in _DEVICES and known.rdev != there.rdev,
    }
    if known.kind is FileKind.FILE:
        both = known.digest is not None and there.digest is not None
        found["content"] = known.size != there.size or (both and known.digest != there.digest)
        found["unreadable"] = known.size == there.size and there.digest is None
    return tuple(name for name, differs in found.items() if differs)


def source_differs(known: Known | None, here: Observed | None) -> tuple[str, ...]:
    """What lstat tells of the source that is not what the index was made from."""
    if known is None or here is None:
        return () if known is None and here is None else ("new",) if known is None else ("gone",)
    if known.kind is not here.kind:
        return ("kind",)
    found = {
        "inode": (known.dev, known.ino) != (here.dev, here.ino),
        "mode": known.mode != here.mode,
        "owner": (known.uid, known.gid) != (here.uid, here.gid),
        "time": known.mtime_ns != clamp_time(here.mtime_ns),
        "size": known.kind is FileKind.FILE and known.size != here.size,
        "target": known.target != here.target,
        _TOUCHED: known.ctime_ns not in (0, clamp_time(here.ctime_ns)),
    }
    return tuple(name for name, differs in found.items() if differs)


def _agree(there: Entry | None, here: Observed | None, content: bytes | None) -> bool:
    """Whether source and replica are alike in all that is replicated."""
    if there is None or here is None:
        return there is None and here is None
    meta = there.meta
    return (
        there.kind == int(here.kind)
        and (meta.mode, meta.uid, meta.gid) == (here.mode, here.uid, here.gid)
        and clamp_time(meta.mtime_ns) == clamp_time(here.mtime_ns)
        and tuple(meta.xattrs) == here.xattrs
        and there.target == here.target
        and (here.kind is not FileKind.FILE or (there.size == here.size and there.digest == content))
        and (here.kind not in _DEVICES or there.rdev == here.rdev)
    )


def _with(drift: tuple[str, ...], what: str) -> tuple[str, ...]:
    return drift if what in drift else (*drift, what)
