"""What a difference means."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from farshore.dbm.index import Known
from farshore.dbm.messages import Entry, Meta
from farshore.dbm.verify.judge import Facts, Finding, judge
from farshore.fmm.types import FileKind, Observed

GOOD, ROT, OTHER = b"g" * 32, b"r" * 32, b"o" * 32
KNOWN = Known(0, b"f", FileKind.FILE, 0o644, 1, 2, 3, 50, 60, 7, 8, 1, 0, None, (), GOOD)
SEEN = Observed(0, b"f", FileKind.FILE, 0o644, 1, 2, 3, 40, 50, 60, 7, 8, 1, 0, 8, None, ())
THERE = Entry(0, b"f", int(FileKind.FILE), Meta(0o644, 1, 2, 45, 50, []), 3, 1, 0, None, GOOD)


def facts(
    known: Known | None = KNOWN,
    there: Entry | None = THERE,
    here: Observed | None = SEEN,
    content: bytes | None = GOOD,
) -> Facts:
    return Facts(known, there, here, content)


def there(**changes: Any) -> Entry:
    return replace(THERE, meta=replace(THERE.meta, **changes))


@pytest.mark.parametrize(
    ("given", "finding", "differences"),
    [
        (facts(), Finding.SAME, ()),
        (facts(None, None, None, None), Finding.SAME, ()),
        # Links and access times never count; nor does an inode that was touched and is what it was.
        (facts(there=replace(there(atime_ns=1), nlink=5)), Finding.SAME, ()),
        (facts(here=replace(SEEN, ctime_ns=61, nlink=2)), Finding.SAME, ()),
        # The replica.
        (facts(there=None), Finding.REPLICA, ("missing",)),
        (facts(None, THERE, None, None), Finding.REPLICA, ("extra",)),
        (facts(there=replace(THERE, kind=int(FileKind.FIFO))), Finding.REPLICA, ("kind",)),
        (facts(there=there(mode=0o600, uid=0)), Finding.REPLICA, ("mode", "owner")),
        (facts(there=there(mtime_ns=51)), Finding.REPLICA, ("time",)),
        (facts(there=there(xattrs=[(b"user.a", b"")])), Finding.REPLICA, ("attributes",)),
        (facts(there=replace(THERE, digest=ROT)), Finding.REPLICA, ("content",)),
        (facts(there=replace(THERE, size=4, digest=None)), Finding.REPLICA, ("content",)),
        (facts(there=replace(THERE, digest=None)), Finding.REPLICA, ("unreadable",)),
        # The index.
        (facts(replace(KNOWN, digest=OTHER)), Finding.INDEX, ("content",)),
        (facts(replace(KNOWN, xattrs=((b"user.a", b""),))), Finding.INDEX, ("attributes",)),
        # The source, with a trace.
        (facts(here=None, content=None), Finding.UNSEEN, ("gone",)),
        (facts(None, None), Finding.UNSEEN, ("new",)),
        (facts(here=replace(SEEN, mtime_ns=51), content=OTHER), Finding.UNSEEN, ("time",)),
        (facts(here=replace(SEEN, ino=9, ctime_ns=61), content=OTHER), Finding.UNSEEN, ("inode", "touched")),
        (facts(here=replace(SEEN, xattrs=((b"user.a", b""),), ctime_ns=61)), Finding.UNSEEN, ("attributes",)),
        # The source, without one: what the replica has is never in question then.
        (facts(content=ROT), Finding.UNTRACED, ("content",)),
        (facts(replace(KNOWN, ctime_ns=0), content=ROT), Finding.UNTRACED, ("content",)),
        (facts(content=ROT, there=there(mode=0o600)), Finding.UNTRACED, ("mode", "content")),
        (facts(content=ROT, there=None), Finding.UNTRACED, ("missing", "content")),
        (facts(content=ROT, there=replace(THERE, digest=OTHER)), Finding.UNTRACED, ("content",)),
        # Content that nobody has read since it was listed: who is right is not known.
        (facts(replace(KNOWN, digest=None)), Finding.SAME, ()),
        (facts(replace(KNOWN, digest=None), content=OTHER), Finding.UNTRACED, ("content",)),
        # Nothing can be told.
        (facts(replace(KNOWN, mode=-1)), Finding.MOVING, ()),
        (facts(replace(KNOWN, kind=FileKind.SOCKET)), Finding.MOVING, ()),
        (facts(content=None, there=None), Finding.MOVING, ("missing",)),
        (facts(content=None), Finding.MOVING, ()),
    ],
)
def test_findings(given: Facts, finding: Finding, differences: tuple[str, ...]) -> None:
    verdict = judge(given)
    assert (verdict.finding, verdict.differences) == (finding, differences)


CONTENTS = st.sampled_from([None, GOOD, ROT, OTHER])


@given(CONTENTS, CONTENTS, CONTENTS, st.booleans(), st.sampled_from([60, 61, 0]))
def test_a_source_that_may_be_damaged_is_never_sent(
    index: bytes | None, replica: bytes | None, source: bytes | None, missing: bool, ctime: int
) -> None:
    """REPLICA and INDEX have the source's file sent: only what was acknowledged, or what is there already, may be."""
    given = facts(
        replace(KNOWN, digest=index, ctime_ns=ctime), None if missing else replace(THERE, digest=replica), SEEN, source
    )
    if judge(given).finding is Finding.REPLICA:
        assert source is not None and (source == index or index is None)
    if judge(given).finding is Finding.INDEX:
        assert source is not None and source == replica
