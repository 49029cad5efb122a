"""Whatever happens in whatever order: no change goes unreported, and the map of watches ends up true.

Several operations happen between two reads, so the watcher always looks at a disk that has moved on since the
events that it works off. FARSHORE_FUZZ=20 in the environment tries 20 times as much.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farshore.fmm import Kind, Root
from farshore.fmm.fanotify import FanotifyWatcher
from farshore.fmm.inotify import InotifyWatcher

from .conftest import Clock, covered, directories, joined, map_of

EFFORT = int(os.environ.get("FARSHORE_FUZZ", "1"))
#: The engine is the same for all examples of a test.
FIXTURE = [HealthCheck.function_scoped_fixture]
NAMES = [b"a", b"b", b"\xff\n"]
OUTSIDE = b"../out"
libc = ctypes.CDLL(None, use_errno=True)

names = st.sampled_from(NAMES)
places = st.lists(names, min_size=1, max_size=4).map(b"/".join)
outside = names.map(lambda name: OUTSIDE + b"/" + name)
# Few paths of few names, so that operations hit each other; now and then one outside of the root.
anywhere = st.one_of(places, places, places, outside)
operations = st.one_of(
    st.tuples(st.just("mkdirs"), places),
    st.tuples(st.just("write"), places),
    st.tuples(st.just("chmod"), places),
    st.tuples(st.just("remove"), places),
    st.tuples(st.just("symlink"), places),
    st.tuples(st.just("rename"), anywhere, anywhere),
    st.tuples(st.just("rename"), anywhere, anywhere),
    st.tuples(st.just("exchange"), anywhere, anywhere),
    st.tuples(st.just("burst"), anywhere),
    st.tuples(st.just("read")),
    st.tuples(st.just("later")),
    st.tuples(st.just("check")),
    st.tuples(st.just("pause")),
)


@contextlib.contextmanager
def arena() -> Iterator[bytes]:
    base = os.fsencode(tempfile.mkdtemp(prefix="farshore-races-"))
    os.mkdir(base + b"/top")
    os.mkdir(base + b"/out")
    try:
        yield base + b"/top"
    finally:
        shutil.rmtree(base)


def apply(top: bytes, what: str, *paths: bytes) -> None:
    where = [os.path.join(top, path) for path in paths]
    with contextlib.suppress(OSError, shutil.Error):
        match what:
            case "mkdirs":
                os.makedirs(where[0])
            case "write":
                with open(where[0], "ab") as file:
                    file.write(b"x")
            case "chmod":
                os.chmod(where[0], stat.S_IMODE(os.lstat(where[0]).st_mode) ^ 0o050)
            case "remove":
                if stat.S_ISDIR(os.lstat(where[0]).st_mode):
                    shutil.rmtree(where[0])
                else:
                    os.unlink(where[0])
            case "symlink":
                os.symlink(os.path.join(top, b"..", b"out"), where[0])
            case "rename":
                os.rename(where[0], where[1])
            case "exchange":
                libc.renameat2(-100, where[0], -100, where[1], 2)
            case "burst":
                os.makedirs(where[0] + b"/a/b")
                with open(where[0] + b"/a/b/x", "wb") as file:
                    file.write(b"x")


def picture(top: bytes) -> dict[bytes, tuple[int, ...]]:
    found: dict[bytes, tuple[int, ...]] = {}
    for at, dirs, files in os.walk(top):
        for name in [b"", *dirs, *files]:
            path = os.path.join(at, name).rstrip(b"/")
            status = os.lstat(path)
            found[os.path.relpath(path, top) if path != top else b""] = (
                status.st_mode,
                status.st_ino,
                status.st_size if not stat.S_ISDIR(status.st_mode) else 0,
                status.st_mtime_ns,
                status.st_uid,
            )
    return found


class Witness:
    """Compares what changed with what was reported."""

    def __init__(self, engine: str, top: bytes, root: Root) -> None:
        self.top = top
        self.clock = Clock()
        kind = FanotifyWatcher if engine == "fanotify" else InotifyWatcher
        self.watcher: FanotifyWatcher | InotifyWatcher = kind([root], clock=self.clock)
        self.filter = self.watcher._roots[0].filter
        self.watcher.start()
        self.before = picture(top)
        self.seen: dict[bytes, Kind] = {}

    def note(self, seen: dict[bytes, Kind]) -> None:
        for path, kind in seen.items():
            self.seen[path] = self.seen.get(path, Kind(0)) | kind

    def check(self) -> None:
        self.note(joined(self.watcher.drain()))
        after = picture(self.top)
        for path in self.before.keys() | after.keys():
            old, new = self.before.get(path), after.get(path)
            protected = self.filter.allows(path, stat.S_ISDIR((new or old or (0,))[0]))
            if old != new and protected:
                assert covered(path, self.seen), (path, old, new, self.seen)
        for path in self.seen:
            assert self.filter.allows(path, True) or self.filter.allows(path, False), path
        assert map_of(self.watcher) == {
            path for path in directories(self.top) if not path or self.filter.allows(path, True)
        }
        if isinstance(self.watcher, InotifyWatcher):
            assert not [node for node in self.watcher._unsure if self.watcher._locate(node) is not None]
        assert self.watcher.problems() == ()
        self.before, self.seen = after, {}

    def finish(self) -> None:
        self.check()
        # What left the tree is not watched for ever.
        self.clock.now += 2
        self.watcher.read(0)
        if isinstance(self.watcher, InotifyWatcher):
            assert len(self.watcher._nodes) == len(map_of(self.watcher))
            assert not self.watcher._orphans
            assert not self.watcher._unsure
        self.check()
        self.watcher.close()


def play(engine: str, root: Root, steps: list[tuple[str, ...]], top: bytes) -> None:
    witness = Witness(engine, top, root)
    try:
        for what, *paths in steps:
            match what:
                case "read":
                    witness.note(joined(witness.watcher.read(0)))
                case "later":
                    witness.clock.now += 1.5
                    witness.note(joined(witness.watcher.read(0)))
                case "check":
                    witness.check()
                case "pause":
                    witness.watcher.pause()
                    witness.note(joined(witness.watcher.resume()))
                case _:
                    apply(top, what, *paths)  # type: ignore[arg-type]
        witness.finish()
    finally:
        witness.watcher.close()


@settings(max_examples=120 * EFFORT, deadline=None, suppress_health_check=FIXTURE)
@given(st.lists(operations, max_size=40))
def test_every_change_is_covered(engine: str, steps: list[tuple[str, ...]]) -> None:
    with arena() as top:
        play(engine, Root(top), steps, top)


@settings(max_examples=60 * EFFORT, deadline=None, suppress_health_check=FIXTURE)
@given(st.lists(operations, max_size=40))
def test_every_protected_change_is_covered(engine: str, steps: list[tuple[str, ...]]) -> None:
    with arena() as top:
        play(engine, Root(top, include=("b/a/b/",), exclude=("b/a", "/a/b/")), steps, top)


@pytest.mark.parametrize("seed", range(4 * EFFORT))
def test_changes_while_the_watcher_is_at_work(engine: str, seed: int) -> None:
    rng = random.Random(seed)
    with arena() as top:
        witness = Witness(engine, top, Root(top))
        kinds = ["mkdirs", "write", "chmod", "remove", "rename", "rename", "exchange", "burst", "burst"]

        def change() -> None:
            for _ in range(1500):
                paths = [b"/".join(rng.choices(NAMES, k=rng.randint(1, 4))) for _ in range(2)]
                if rng.random() < 0.1:
                    paths[rng.randint(0, 1)] = OUTSIDE + b"/" + rng.choice(NAMES)
                apply(top, rng.choice(kinds), *paths)

        changer = threading.Thread(target=change)
        changer.start()
        while changer.is_alive():
            witness.note(joined(witness.watcher.read(0.001)))
        changer.join()
        witness.finish()


@pytest.mark.parametrize("seed", range(6 * EFFORT))
def test_a_large_tree_that_moves_while_it_begins_to_be_watched(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is watched in many parts, by several threads, each of which finds its directories by their paths."""
    monkeypatch.setattr("farshore.fmm.inotify.MOST", 16)
    rng = random.Random(seed)
    with arena() as top:
        for n in range(1200):
            os.makedirs(top + b"/d%d/e%d/f%d" % (n % 12, n % 7, n))
        stop = threading.Event()

        def change() -> None:
            while not stop.is_set():
                paths = [top + b"/d%d" % rng.randrange(12) for _ in range(2)]
                if rng.random() < 0.7:
                    paths = [path + b"/e%d" % rng.randrange(7) for path in paths]
                if rng.random() < 0.3:
                    paths[1] = os.path.join(top, OUTSIDE, b"x")
                # Exchanged (RENAME_EXCHANGE), or one moved to where nothing is.
                libc.renameat2(-100, paths[0], -100, paths[1], rng.choice([0, 2]))

        changer = threading.Thread(target=change)
        changer.start()
        clock = Clock()
        watcher = InotifyWatcher([Root(top)], clock=clock)
        try:
            watcher.start()
            for _ in range(rng.randrange(3)):
                watcher.read(0.001)
            stop.set()
            changer.join()
            there = directories(top)

            def is_seen(name: bytes) -> bool:
                for path in there:
                    os.close(os.open(os.path.join(top, path, name), os.O_CREAT | os.O_WRONLY, 0o644))
                seen = joined(watcher.drain())
                return all(covered(os.path.join(path, name), seen) for path in there)

            # Also where it is not settled yet what lies where.
            assert is_seen(b"new")
            for _ in range(5):
                clock.now += 10
                watcher.read(0)
            assert map_of(watcher) == there
            assert is_seen(b"newer")
            assert not watcher.problems()
        finally:
            stop.set()
            changer.join()
            watcher.close()
