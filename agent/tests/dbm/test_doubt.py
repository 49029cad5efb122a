"""Connections that end before what was sent is acknowledged, one after the other: nothing stays that should not."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.dbm import planner as planning
from farshore.dbm.index import Index
from farshore.dbm.messages import Begin, Commit, FromSource, Link, MakeDir, MakeSymlink, Move, Put, Remove, SetMeta
from farshore.dbm.planner import Planner
from farshore.dbm.wire import Codec
from farshore.dbm.work import Batch
from farshore.fmm.dirty import Dirty
from farshore.fmm.types import Kind, Root

CODEC = Codec(FromSource)
PATHS = (b"d", b"d/a", b"d/e", b"d/e/a", b"d/e/b", b"f", b"g")
#: What is at a path: a directory, a link's target, or a file's content.
Thing = bytes | None


class Replica:
    """What the messages make of a tree, as the replica's does: what stands in the way goes."""

    def __init__(self) -> None:
        self.things: dict[bytes, Thing] = {}

    def take(self, message: object) -> None:
        """Do what a message says."""
        match message:
            case MakeDir(path=b""):
                pass
            case MakeDir(path=path):
                if self.things.get(path, b"") is not None:
                    self._put(path, None)
            case Put(path=path, data=data):
                self._put(path, b"file " + bytes(data))
            case MakeSymlink(path=path, target=target):
                self._put(path, b"link " + target)
            case Link(path=path, target=target):
                self._put(path, self.things[target])
            case Remove(path=path):
                self._remove(path)
            case Move(path=path, to=to):
                moved = {to + each[len(path) :]: what for each, what in self.things.items() if _lies_in(each, path)}
                self._remove(path)
                self._remove(to)
                self.things |= moved
            case SetMeta() | Begin() | Commit():
                pass
            case _:
                raise AssertionError(message)

    def _put(self, path: bytes, what: Thing) -> None:
        self._remove(path)
        parent = path.rpartition(b"/")[0]
        assert not parent or self.things[parent] is None, path
        self.things[path] = what

    def _remove(self, path: bytes) -> None:
        self.things = {each: what for each, what in self.things.items() if not _lies_in(each, path)}


def _lies_in(path: bytes, above: bytes) -> bool:
    return path == above or path.startswith(above + b"/")


class Source:
    """A tree, an index, and a planner for each connection."""

    def __init__(self, base: Path) -> None:
        self.base = os.fsencode(base)
        self.tree = self.base + b"/tree"
        os.mkdir(self.tree)
        self.index = Index(base / "index.db")
        self.replica = Replica()
        self.seq = 0

    def change(self, path: bytes, what: str, number: int) -> None:
        """Put something at a path, or nothing, whatever was there and above it; or move it to another path."""
        full = self._room_for(path)
        if what == "move":
            to = PATHS[number % len(PATHS)]
            if os.path.lexists(full) and not _lies_in(to, path) and not _lies_in(path, to):
                there = self._room_for(to)
                _clear(there)
                # To make room for it may have been its end.
                if os.path.lexists(full):
                    os.rename(full, there)
            return
        if what != "write" or os.path.isdir(full) or os.path.islink(full):
            _clear(full)
        if what == "directory":
            os.mkdir(full)
        elif what == "link":
            os.symlink(b"to %d" % number, full)
        elif what == "write":
            with open(full, "wb") as file:
                file.write(b"%d" % number)

    def _room_for(self, path: bytes) -> bytes:
        """Have directories above a path; where it is."""
        here = self.tree
        for name in path.split(b"/")[:-1]:
            here += b"/" + name
            if os.path.islink(here) or os.path.isfile(here):
                os.unlink(here)
            os.makedirs(here, exist_ok=True)
        return self.tree + b"/" + path

    def connect(self, sizes: list[int], arrived: int | None) -> None:
        """Send what differs, in transactions of ``sizes`` operations; with ``arrived``, so many of them come through.

        Of those, the acknowledgements are lost. Before a drastic one ends, nothing else is sent.
        """
        planner = Planner(self.index, [Root(self.tree)], 1)
        batch = Batch.of([Dirty(0, b"", Kind.RESCAN, 0, 0, frozenset())])
        lost: list[tuple[int, bytes]] = []
        count = 0
        self.index.begin()
        while not batch.finished:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(planning, "MAX_OPERATIONS", sizes[count % len(sizes)])
                plan = planner.transaction(batch, self.seq + 1)
            self.seq += bool(plan.frames)
            if plan.drastic or arrived is None:
                self._take(plan.frames)
                self.index.commit()
                self.index.begin()
                lost.clear()
            elif count < arrived:
                self._take(plan.frames)
                lost += plan.changed
            else:
                break
            count += 1
        self.index.rollback()
        if lost:
            self.index.begin()
            Planner(self.index, [Root(self.tree)], 1).doubt(set(lost))
            self.index.commit()

    def _take(self, frames: list[bytes]) -> None:
        for frame in frames:
            self.replica.take(CODEC.decode(frame[4:], "test"))

    def here(self) -> dict[bytes, Thing]:
        """What the replica should have."""
        found: dict[bytes, Thing] = {}
        for place, directories, files in os.walk(self.tree):
            for name in directories + files:
                full = place + b"/" + name
                path = full[len(self.tree) + 1 :]
                if os.path.islink(full):
                    found[path] = b"link " + os.readlink(full)
                elif os.path.isdir(full):
                    found[path] = None
                else:
                    with open(full, "rb") as file:
                        found[path] = b"file " + file.read()
        return found


def _clear(path: bytes) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


changes = st.tuples(
    st.sampled_from(PATHS),
    st.sampled_from(["write", "write", "directory", "link", "nothing", "move"]),
    st.integers(0, 99),
)
connections = st.tuples(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 5) | st.none())


@settings(max_examples=300)
@given(st.lists(st.tuples(st.lists(changes, max_size=8), connections), min_size=1, max_size=6))
def test_whatever_connections_end_the_trees_are_the_same_in_the_end(
    turns: list[tuple[list[tuple[bytes, str, int]], tuple[list[int], int | None]]],
) -> None:
    with tempfile.TemporaryDirectory() as made:
        source = Source(Path(made))
        try:
            for changed, (sizes, arrived) in turns:
                for path, what, number in changed:
                    source.change(path, what, number)
                source.connect(sizes, arrived)
            source.connect([1000], None)
            source.connect([1000], None)
            assert source.replica.things == source.here()
        finally:
            source.index.close()
