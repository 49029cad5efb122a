"""Holds a file open and changes it when told (row 8).

    python -m bench.held append|mapped FILE

Each line on stdin is a number that was not given before; the change with that number is made, and the moment before it
is printed, by the monotonic clock, which all processes of the machine share. The file stays open, and what is mapped
stays mapped, until stdin ends.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from pathlib import Path

#: Bytes of a line of the log.
LINE = 200
PAGE = 4096
#: Bytes of the file that is mapped.
MAPPED = 64 << 20
_STAMP = 8


def offset_of(kind: str, number: int, size: int) -> int:
    """Where in the file of `size` bytes (before the first change) the change with a number is."""
    if kind == "append":
        return size + number * LINE
    # No page is hit twice, and neighbours are far apart.
    return (number * 7919) % (size // PAGE) * PAGE


def arrived(path: Path, offset: int, number: int) -> bool:
    """Whether a change is in the file that has this name now."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.pread(handle, _STAMP, offset) == _stamp(number)
    finally:
        os.close(handle)


def _stamp(number: int) -> bytes:
    return b"%08d" % number


def main() -> int:
    """Run as a program."""
    kind, path = sys.argv[1:]
    size = os.path.getsize(path)
    flags = os.O_WRONLY | os.O_APPEND if kind == "append" else os.O_RDWR
    handle = os.open(path, flags)
    mapped = mmap.mmap(handle, size) if kind == "mapped" else None
    print("ready", flush=True)
    for line in sys.stdin:
        number = int(line)
        when = time.monotonic()
        if mapped is None:
            os.write(handle, _stamp(number).ljust(LINE - 1, b".") + b"\n")
        else:
            at = offset_of(kind, number, size)
            mapped[at : at + _STAMP] = _stamp(number)
        print(when, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
