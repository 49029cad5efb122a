"""Watches a replica from outside: notes when which stamp appears in which file (row 7).

    python -m bench.observer DIRECTORY

prints ``ready``; at the end of stdin it prints one JSON list of [seconds, file, stamp]. Seconds are those of the
monotonic clock, which all processes of the machine share. A stamp is the number in a file's first 8 bytes.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import struct
import sys
import time

_LIBC = ctypes.CDLL(None, use_errno=True)
_IN_CLOSE_WRITE = 0x008
_IN_MOVED_TO = 0x080
_IN_CREATE = 0x100
_IN_Q_OVERFLOW = 0x4000
_IN_NONBLOCK = os.O_NONBLOCK
_EVENT = struct.Struct("iIII")


def read_stamp(path: str) -> int:
    """The stamp in a file; -1 when there is none to be read."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return -1
    try:
        content = os.pread(handle, 8, 0)
    finally:
        os.close(handle)
    return int.from_bytes(content, "big") if len(content) == 8 else -1


def main() -> int:
    """Run as a program."""
    root = sys.argv[1]
    queue = _LIBC.inotify_init1(_IN_NONBLOCK)
    names: dict[int, str] = {}
    for directory, _, _ in os.walk(root):
        watch = _LIBC.inotify_add_watch(queue, os.fsencode(directory), _IN_CLOSE_WRITE | _IN_MOVED_TO | _IN_CREATE)
        if watch < 0:
            print(f"inotify: {os.strerror(ctypes.get_errno())}", flush=True)
            return 1
        names[watch] = directory
    print("ready", flush=True)
    seen: list[tuple[float, str, int]] = []
    while True:
        readable, _, _ = select.select([queue, sys.stdin], [], [])
        if queue in readable:
            _take(os.read(queue, 1 << 18), names, seen)
        if sys.stdin in readable:
            json.dump(seen, sys.stdout)
            print(flush=True)
            return 0


def _take(events: bytes, names: dict[int, str], seen: list[tuple[float, str, int]]) -> None:
    at = 0
    while at < len(events):
        watch, mask, _, length = _EVENT.unpack_from(events, at)
        name = events[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0")
        at += _EVENT.size + length
        # A temporary file has a name of its own, which nobody has written a stamp under.
        if mask & _IN_Q_OVERFLOW or name.startswith(b"."):
            continue
        path = os.path.join(names[watch], os.fsdecode(name))
        stamp = read_stamp(path)
        if stamp >= 0:
            seen.append((time.monotonic(), os.fsdecode(name), stamp))


if __name__ == "__main__":
    sys.exit(main())
