"""Changes files as fast as it goes (row 11).

    python -m bench.storm TREE SEED EVENTS NAME...

creates, renames, rewrites and deletes files in the directories NAME of TREE until the kernel must have told of so many
events, as inotify counts them, and prints how many there were.
"""

from __future__ import annotations

import os
import random
import sys

#: Files that a directory has at most.
_MOST = 40
_SIZES = (10, 100, 1000, 5000)
# As inotify tells them: create, modify, close; modify (truncated), modify, close; moved from, moved to; deleted.
_CREATED, _REWRITTEN, _RENAMED, _DELETED = 3, 3, 2, 1


class Storm:
    """One process's part of it."""

    def __init__(self, tree: str, seed: int, names: list[str]) -> None:
        self._chance = random.Random(seed)
        self._noise = self._chance.randbytes(1 << 16)
        self._seed = seed
        self._count = 0
        self._names = names
        self._handles = [os.open(os.path.join(tree, name), os.O_PATH | os.O_DIRECTORY) for name in names]
        self._files: list[list[str]] = [[] for _ in names]

    def step(self) -> int:
        """One change; returns how many events it makes."""
        chance = self._chance
        at = int(chance.random() * len(self._handles))
        handle, files = self._handles[at], self._files[at]
        what = chance.random()
        if not files or (what < 0.4 and len(files) < _MOST):
            files.append(name := self._new())
            self._write(name, handle, os.O_EXCL)
            return _CREATED
        place = int(chance.random() * len(files))
        if what < 0.6:
            self._write(files[place], handle, os.O_TRUNC)
            return _REWRITTEN
        if what < 0.8:
            return self._rename(at, place)
        os.unlink(files.pop(place), dir_fd=handle)
        return _DELETED

    def names(self) -> dict[str, list[str]]:
        """The files that each directory has now, sorted."""
        return {name: sorted(files) for name, files in zip(self._names, self._files, strict=True)}

    def _new(self) -> str:
        self._count += 1
        return f"s{self._seed}-{self._count}"

    def _write(self, name: str, directory: int, flags: int) -> None:
        size = self._chance.choice(_SIZES)
        at = int(self._chance.random() * (len(self._noise) - size))
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | flags, 0o644, dir_fd=directory)
        os.write(handle, self._noise[at : at + size])
        os.close(handle)

    def _rename(self, at: int, place: int) -> int:
        """To another directory, and now and then over a file that is there."""
        other = int(self._chance.random() * len(self._handles))
        name = self._files[at].pop(place)
        there = self._files[other]
        if there and self._chance.random() < 0.3:
            new = self._chance.choice(there)
        else:
            there.append(new := self._new())
        os.rename(name, new, src_dir_fd=self._handles[at], dst_dir_fd=self._handles[other])
        return _RENAMED


def main() -> int:
    """Run as a program."""
    tree, seed, events, *names = sys.argv[1:]
    storm = Storm(tree, int(seed), names)
    left = int(events)
    while left > 0:
        left -= storm.step()
    print(int(events) - left)
    return 0


if __name__ == "__main__":
    sys.exit(main())
