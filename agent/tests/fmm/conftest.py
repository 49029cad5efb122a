"""What the tests of the watcher share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from mirrored import Mirrored

from farshore.dbm.replica.paths import remove_tree
from farshore.fmm import Hint, Kind, Root, Watcher
from farshore.fmm.factory import ENGINES
from farshore.fmm.fanotify import FanotifyWatcher, why_not
from farshore.fmm.inotify import InotifyWatcher

Seen = dict[bytes, Kind]
#: What is told of a directory whose entries change.
PARENT = Kind.MODIFIED | Kind.ATTRIBUTES
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def touch(path: bytes, data: bytes = b"") -> None:
    with open(path, "ab") as file:
        file.write(data)


def joined(hints: Sequence[Hint], root: int = 0) -> Seen:
    """The kinds per path of one root."""
    seen: Seen = {}
    for hint in hints:
        if hint.root == root:
            seen[hint.path] = seen.get(hint.path, Kind(0)) | hint.kind
    return seen


def covered(path: bytes, seen: Seen) -> bool:
    """Whether ``path`` itself was reported, or everything below one of its ancestors."""
    if path in seen:
        return True
    while path:
        path = path.rpartition(b"/")[0]
        if Kind.RESCAN in seen.get(path, Kind(0)):
            return True
    return False


def until(watcher: Watcher, enough: Callable[[list[Hint]], bool]) -> list[Hint]:
    """Read until ``enough``; gives up after a generous time."""
    hints: list[Hint] = []
    deadline = time.monotonic() + 60
    while not enough(hints):
        assert time.monotonic() < deadline, hints
        hints += watcher.read(0.5)
    return hints


def map_of(watcher: Watcher, root: int = 0) -> set[bytes]:
    """The paths of all directories that are watched and in place; with fanotify, that are protected."""
    if isinstance(watcher, FanotifyWatcher):
        protected = watcher._roots[root]
        return {path for path in directories(protected.path) if protected.filter.allows(path, True)}
    assert isinstance(watcher, InotifyWatcher)
    paths = set()
    for node in watcher._nodes.values():
        owner = watcher._locate(node)
        if owner is not None and owner.index == root:
            paths.add(node.base[:-1])
    return paths


def directories(top: bytes) -> set[bytes]:
    return {os.path.relpath(at, top) if at != top else b"" for at, _, _ in os.walk(top)}


class Clock:
    """A clock that stands still unless told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def top(tmp_path: Path) -> bytes:
    path = os.fsencode(tmp_path) + b"/top"
    os.mkdir(path)
    return path


@pytest.fixture
def clock() -> Clock:
    return Clock()


Watch = Callable[..., InotifyWatcher]


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Make and start a watcher; its first RESCAN hints are checked and taken."""
    made = []

    def start(*roots: Root | bytes, **options: object) -> InotifyWatcher:
        given = [root if isinstance(root, Root) else Root(root) for root in roots]
        watcher = InotifyWatcher(given, **options)  # type: ignore[arg-type]
        made.append(watcher)
        assert list(watcher.start()) == [Hint(n, b"", Kind.RESCAN) for n in range(len(given))]
        return watcher

    yield start
    for watcher in made:
        watcher.close()


@pytest.fixture(params=[name for name in ENGINES if name != "auto"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each engine that can watch here."""
    name: str = request.param
    if name == "fanotify" and (reason := why_not([Root(os.fsencode(tmp_path))])):
        pytest.skip(reason)
    return name


@pytest.fixture
def watch_any(engine: str) -> Iterator[Callable[..., Watcher]]:
    """As ``watch``, with each engine."""
    made: list[Watcher] = []

    def start(*roots: Root | bytes, **options: Any) -> Watcher:
        given = [root if isinstance(root, Root) else Root(root) for root in roots]
        watcher = (FanotifyWatcher if engine == "fanotify" else InotifyWatcher)(given, **options)
        made.append(watcher)
        assert list(watcher.start()) == [Hint(n, b"", Kind.RESCAN) for n in range(len(given))]
        return watcher

    yield start
    for watcher in made:
        watcher.close()


@pytest.fixture
def mirror(engine: str, tmp_path: Path) -> Iterator[Callable[..., Mirrored]]:
    """Make a mirror whose source is watched by each engine."""
    made: list[Mirrored] = []

    def start(**options: Any) -> Mirrored:
        made.append(Mirrored(tmp_path / "mirror", engine, **options))
        return made[-1]

    yield start
    for mirrored in made:
        mirrored.close()
    # Some of it may be deeper than Python's own removal can go.
    if made:
        directory = os.open(tmp_path, os.O_RDONLY)
        try:
            remove_tree(directory, b"mirror")
        finally:
            os.close(directory)
