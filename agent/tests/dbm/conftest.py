"""A pair of nodes, and a mirror."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from nodes import Mirror, Pair, running_pair
from replicas import Replica

from farshore.dbm.replica.paths import remove_tree


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """Both nodes run; nobody owns the group yet."""
    async with running_pair(tmp_path) as made:
        yield made


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    """A mirror of ``tmp_path/src`` that was not started yet."""
    source = tmp_path / "src"
    source.mkdir()
    made = Mirror(tmp_path, source)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Replica]:
    (tmp_path / "root").mkdir()
    made = Replica(tmp_path)
    yield made
    made.finish()
    # What was removed is in the history, and some of that is deeper than Python's own removal can go.
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        for name in (b"state", b"root"):
            if not os.path.islink(tmp_path / os.fsdecode(name)) and os.path.isdir(tmp_path / os.fsdecode(name)):
                remove_tree(directory, name)
    finally:
        os.close(directory)
