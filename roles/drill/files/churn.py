#!/usr/bin/env python3
"""Files that change: what happens on a file server, in small, without an end.

``populate`` fills a directory with copies of the machine's own files and some large ones; ``run`` changes them until
SIGTERM, at a bounded rate, and keeps count in a file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

SMALL_LIMIT = 256 * 1024
STRANGE_NAMES = (b"not utf-8 \xff\xfe", "Überweisung März.txt".encode(), b"line\nbreak", b"  spaces  ", b"-rf")
PAGE = 4096


def sources(directories: list[Path]) -> Iterator[Path]:
    """Regular files below ``directories``, without the very large ones."""
    for directory in directories:
        for where, names, files in os.walk(directory):
            names.sort()
            for name in sorted(files):
                path = Path(where, name)
                with contextlib.suppress(OSError):
                    if path.is_symlink() or path.lstat().st_size <= SMALL_LIMIT:
                        yield path


def populate(options: argparse.Namespace) -> None:
    """Copy ``--files`` files with all their metadata, and make the large ones."""
    for count, source in enumerate(sources(options.source)):
        if count >= options.files:
            break
        target = options.directory / "tree" / source.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    notes = os.fsencode(options.directory / "notes")
    os.makedirs(notes, exist_ok=True)
    for name in STRANGE_NAMES:
        Path(os.fsdecode(os.path.join(notes, name))).write_bytes(f"{options.marker}\n".encode() * 40)
    large = options.directory / "large"
    large.mkdir(exist_ok=True)
    block = os.urandom(1 << 20)
    for number in range(options.large):
        with open(large / f"database-{number}.bin", "wb") as file:
            for piece in range(options.large_size):
                file.write(os.urandom(PAGE) + block[PAGE:] if piece % 8 else os.urandom(1 << 20))


class Churn:
    """One change at a time, of every kind that a file system knows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.directory: Path = options.directory
        self.marker: bytes = options.marker.encode()
        self.chance = random.Random(time.time_ns())
        self.files: list[Path] = [
            path for path in (self.directory / "tree").rglob("*") if path.is_file() and not path.is_symlink()
        ]
        self.large: list[Path] = sorted((self.directory / "large").iterdir())
        self.own = self.directory / "own"
        self.own.mkdir(exist_ok=True)
        self.made: list[Path] = []
        self.number = 0
        self.done: Counter[str] = Counter()
        self.bytes = 0
        self.kinds: list[Callable[[], None]] = [
            self.create, self.create, self.rewrite, self.rewrite, self.append, self.append, self.patch, self.patch,
            self.grow, self.replace, self.rename, self.remove, self.mode, self.owner, self.link, self.symlink,
            self.attribute, self.directory_moved,
        ]  # fmt: skip

    def step(self) -> None:
        """Make one change."""
        kind = self.chance.choice(self.kinds)
        with contextlib.suppress(OSError):
            kind()
            self.done[kind.__name__] += 1

    def _text(self, size: int) -> bytes:
        self.bytes += size
        return (self.marker + b" " + os.urandom(96).hex().encode() + b"\n") * (size // 220 + 1)

    def _any(self) -> Path:
        return self.files[self.chance.randrange(len(self.files))]

    def _fresh(self) -> Path:
        self.number += 1
        path: Path = self.own / f"{self.number % 40:02d}" / f"{self.number}.txt"
        path.parent.mkdir(exist_ok=True)
        return path

    def create(self) -> None:
        path = self._fresh()
        path.write_bytes(self._text(self.chance.randrange(200, 20000)))
        self.made.append(path)

    def rewrite(self) -> None:
        self._any().write_bytes(self._text(self.chance.randrange(100, 30000)))

    def append(self) -> None:
        with open(self._any(), "ab") as file:
            file.write(self._text(self.chance.randrange(100, 4000)))

    def patch(self) -> None:
        path = self.chance.choice(self.large)
        with open(path, "r+b") as file:
            for _ in range(self.chance.randrange(1, 9)):
                file.seek(self.chance.randrange(path.stat().st_size // PAGE) * PAGE)
                file.write(self._text(PAGE)[:PAGE])

    def grow(self) -> None:
        with open(self.chance.choice(self.large), "ab") as file:
            file.write(self._text(self.chance.randrange(1000, 100000)))

    def replace(self) -> None:
        path = self._any()
        beside = path.with_name(path.name + ".new")
        beside.write_bytes(self._text(self.chance.randrange(100, 30000)))
        beside.replace(path)

    def rename(self) -> None:
        if self.made:
            place = self.chance.randrange(len(self.made))
            target = self._fresh()
            self.made[place].rename(target)
            self.made[place] = target

    def remove(self) -> None:
        if len(self.made) > 10:
            self.made.pop(self.chance.randrange(len(self.made))).unlink()

    def mode(self) -> None:
        self._any().chmod(self.chance.choice((0o600, 0o640, 0o644, 0o755)))

    def owner(self) -> None:
        os.chown(self._any(), self.chance.choice((0, 33, 1000)), self.chance.choice((0, 33, 100)))

    def link(self) -> None:
        path = self._fresh()
        os.link(self._any(), path)
        self.made.append(path)

    def symlink(self) -> None:
        path = self._fresh()
        path.symlink_to(f"../{self.number}/nowhere")
        self.made.append(path)

    def attribute(self) -> None:
        os.setxattr(self._any(), "user.drill", os.urandom(8).hex().encode())

    def directory_moved(self) -> None:
        deep = self.own / "projects" / f"{self.number}" / "a" / "b"
        deep.mkdir(parents=True)
        (deep / "readme.txt").write_bytes(self._text(1000))
        (self.own / "projects" / f"{self.number}").rename(self.own / "projects" / f"done-{self.number}")
        self.number += 1

    def run(self, rate: float, count: Path) -> None:
        """Change files ``rate`` times a second until SIGTERM; ``count`` says how often, and stays behind."""
        ended: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda signum, _: ended.append(signum))
        due, saved = time.monotonic(), 0.0
        while not ended:
            self.step()
            if time.monotonic() - saved > 0.5:
                saved = time.monotonic()
                self._save(count)
            due = max(due + 1.0 / rate, time.monotonic() - 1.0)
            time.sleep(max(0.0, due - time.monotonic()))
        self._save(count)

    def _save(self, count: Path) -> None:
        beside = count.with_name(count.name + ".new")
        beside.write_text(
            json.dumps({"changes": self.done.total(), "bytes": self.bytes, "kinds": dict(sorted(self.done.items()))}),
            encoding="ascii",
        )
        beside.replace(count)


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description="Files that change all the time.")
    parser.add_argument("command", choices=("populate", "run"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--marker", required=True, help="text that is written into the files")
    parser.add_argument("--source", type=Path, action="append", default=[], help="where files are copied from")
    parser.add_argument("--files", type=int, default=3000, help="how many are copied")
    parser.add_argument("--large", type=int, default=2, help="how many large files")
    parser.add_argument("--large-size", type=int, default=32, help="their size in MiB")
    parser.add_argument("--rate", type=float, default=20.0, help="changes a second")
    parser.add_argument("--count", type=Path, help="file for the number of changes")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    if options.command == "populate":
        populate(options)
    else:
        Churn(options).run(options.rate, options.count)


if __name__ == "__main__":
    main()
