"""The data that is measured with: incompressible, and of known change."""

from __future__ import annotations

import multiprocessing
import os
import random
from pathlib import Path

PAGE = 4096
_PIECE = 8 << 20


def random_file(path: Path, size: int) -> None:
    """Make a file of `size` random bytes, durable, in the page cache."""
    with open(path, "wb", buffering=0) as file:
        left = size
        while left:
            left -= file.write(os.urandom(min(left, _PIECE)))
        os.fsync(file.fileno())


def random_pages(size: int, share: float, chance: random.Random) -> list[tuple[int, bytes]]:
    """Offsets and new contents of a share of a file's pages, at least one; incompressible."""
    pages = size // PAGE
    chosen = chance.sample(range(pages), max(1, round(pages * share)))
    return [(page * PAGE, os.urandom(PAGE)) for page in chosen]


def write_pages(path: Path, pages: list[tuple[int, bytes]]) -> None:
    """Overwrite pages in place, as a database would."""
    handle = os.open(path, os.O_WRONLY)
    try:
        for offset, content in pages:
            os.pwrite(handle, content, offset)
    finally:
        os.close(handle)


def insert_front(path: Path, new: Path, content: bytes) -> None:
    """Make `new`: `content`, then what `path` holds; durable."""
    with open(path, "rb", buffering=0) as source, open(new, "wb", buffering=0) as target:
        target.write(content)
        while piece := source.read(_PIECE):
            target.write(piece)
        os.fsync(target.fileno())


def small_files(place: Path, files: int, directories: int, size: int) -> None:
    """Make a tree of `files` files of `size` random bytes in equal directories ``d000``, ``d001``, ..."""
    place.mkdir(parents=True)
    noise = os.urandom(_PIECE + size)
    for number in range(directories):
        below = place / f"d{number:03d}"
        below.mkdir()
        handle = os.open(below, os.O_PATH)
        try:
            for file in range(files * number // directories, files * (number + 1) // directories):
                at = file * 61 % _PIECE
                one = os.open(f"f{file:06d}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=handle)
                # Each file differs by its first bytes, and none compresses.
                os.write(one, file.to_bytes(4, "big") + noise[at : at + size - 4])
                os.close(one)
        finally:
            os.close(handle)


def count_files(place: Path) -> int:
    """Files in the directories of `place` whose names don't begin with a dot, as temporary ones do."""
    total = 0
    try:
        with os.scandir(place) as below:
            names = [entry.path for entry in below if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return 0
    for name in names:
        try:
            total += sum(1 for file in os.listdir(name) if not file.startswith("."))
        except FileNotFoundError:
            continue
    return total


class Counter:
    """Counts the files of a growing tree without looking twice at a directory that is complete."""

    def __init__(self, place: Path, files: int, directories: int) -> None:
        self._place = place
        self._wanted = {
            f"d{n:03d}": files * (n + 1) // directories - files * n // directories for n in range(directories)
        }

    def complete(self) -> bool:
        """Whether every directory has its files."""
        for name in list(self._wanted):
            try:
                there = sum(1 for file in os.listdir(self._place / name) if not file.startswith("."))
            except FileNotFoundError:
                return False
            if there < self._wanted[name]:
                return False
            del self._wanted[name]
        return True


#: Directories of a forest that lie in one, and files that lie in a directory.
BRANCH = 100
LEAVES = 10
#: Parts of a forest, ``p0`` to ``p9``, of equal size.
PARTS = 10


def forest(place: Path, files: int, size: int, workers: int = 2) -> None:
    """Make a tree of `files` small files, ten in each directory, as wide as it is deep; durable when synced.

    ``pN/mNNNN/dNN/fN``: the directories of a part are filled one after the other, by `workers` processes.
    """
    place.mkdir(parents=True)
    directories = max(PARTS, files // LEAVES)
    shares = [range(part, PARTS, workers) for part in range(workers)]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_grow, args=(place, each, directories, size), daemon=True) for each in shares]
    for child in children:
        child.start()
    for child in children:
        child.join()
    if failed := [child.exitcode for child in children if child.exitcode]:
        raise OSError(f"the tree {place} could not be made: {failed}")


def _grow(place: Path, parts: range, directories: int, size: int) -> None:
    noise = os.urandom(_PIECE + size)
    for part in parts:
        first, end = directories * part // PARTS, directories * (part + 1) // PARTS
        for number in range(end - first):
            branch, leaf = divmod(number, BRANCH)
            below = place / f"p{part}" / f"m{branch:04d}" / f"d{leaf:02d}"
            below.mkdir(parents=leaf == 0)
            handle = os.open(below, os.O_PATH)
            try:
                for file in range(LEAVES):
                    at = ((first + number) * LEAVES + file) * 61 % _PIECE
                    one = os.open(f"f{file}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=handle)
                    os.write(one, noise[at : at + size])
                    os.close(one)
            finally:
                os.close(handle)


def count_tree(place: Path) -> int:
    """Files of a tree of any depth."""
    total = 0
    for _, _, files in os.walk(place):
        total += len(files)
    return total
