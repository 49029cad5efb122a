"""``farshore-node`` with a thread that notes, some hundred times a second, where each of the others is.

    python -m bench.sampled SAMPLES.json --config node.yml

SIGUSR1 begins a new count; SIGUSR2 writes what was counted to SAMPLES.json. A stack is noted as its innermost frames
with their source lines, and whether its thread was running (as the kernel says) or waiting.
"""

from __future__ import annotations

import json
import linecache
import os
import signal
import sys
import threading
import time
from collections import Counter
from types import FrameType

_INTERVAL = 0.004
#: Innermost frames that tell what a thread is doing.
_DEPTH = 12

Stack = tuple[str, bool, tuple[str, ...]]


class Sampler:
    """Counts stacks of all threads but its own."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._counts: Counter[Stack] = Counter()
        self._rounds = 0
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._write = False
        self._reset = False

    def start(self) -> None:
        """Sample from now on; signals are taken by the main thread."""
        signal.signal(signal.SIGUSR1, lambda *_: setattr(self, "_reset", True))
        signal.signal(signal.SIGUSR2, lambda *_: setattr(self, "_write", True))
        self._thread.start()

    def _run(self) -> None:
        own = threading.get_ident()
        while True:
            time.sleep(_INTERVAL)
            if self._reset:
                self._reset = False
                self._counts.clear()
                self._rounds = 0
            if self._write:
                self._write = False
                self._store()
            self._rounds += 1
            names = {t.ident: (t.name, t.native_id) for t in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                if ident != own:
                    name, native = names.get(ident, ("?", None))
                    self._counts[name, _running(native), _stack(frame)] += 1

    def _store(self) -> None:
        stacks = [[name, running, list(stack), count] for (name, running, stack), count in self._counts.items()]
        temporary = self._path + ".new"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"rounds": self._rounds, "interval": _INTERVAL, "stacks": stacks}, file)
        os.replace(temporary, self._path)


def _running(native: int | None) -> bool:
    try:
        with open(f"/proc/self/task/{native}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] == "R"
    except OSError:
        return False


def _stack(frame: FrameType | None) -> tuple[str, ...]:
    """Innermost first: ``file:function:source line``."""
    found: list[str] = []
    while frame is not None and len(found) < _DEPTH:
        code = frame.f_code
        line = linecache.getline(code.co_filename, frame.f_lineno or 0).strip()
        found.append(f"{_short(code.co_filename)}:{code.co_name}:{line}")
        frame = frame.f_back
    return tuple(found)


def _short(name: str) -> str:
    for mark in ("/farshore/", "/site-packages/"):
        if mark in name:
            return name.rpartition(mark)[2]
    return name.rpartition("/lib/")[2] if "/lib/" in name else name


def main() -> int:
    """Run as a program."""
    path = sys.argv.pop(1)
    from farshore.daemons import node

    Sampler(path).start()
    return node.main()


if __name__ == "__main__":
    sys.exit(main())
