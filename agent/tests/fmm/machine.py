"""The state machine: whatever is done to a tree, in whatever order, the replica's is the same after each flush.

Random changes of all kinds hit a few names of two protected roots and of a directory outside, while the watcher is at
work, or is held so that it looks at a disk that has moved on, or the sender is held so that what is marked waits under
names that change; in between the group is paused, the source stopped, the watcher fails, the kernel's queue overflows,
the connection is cut, a root goes away and comes back. Hypothesis chooses, and shrinks what fails.

    python agent/tests/fmm/machine.py --minutes 60 --engine inotify --report build/soak/inotify.json
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import faulthandler
import functools
import io
import logging
import mmap
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from mirrored import Mirrored, can_lower, lowered
from reports import tell

from farshore.fmm import Root
from farshore.fmm.factory import ENGINES
from farshore.fmm.patterns import Filter

_libc = ctypes.CDLL(None, use_errno=True)
_NAMES = [b"a", b"b", b"c", b"\xff\n", b"x" * 255, b"y.tmp"]
_EXCLUDE = ("*.tmp",)
#: Small ones go into transactions, those over 64 KiB beside them.
_SIZES = [0, 10, 10, 3000, 66_000, 150_000]
#: Bounds of the trees.
_MOST_ENTRIES = 120
_LONGEST = 3000
_TINY = 4


class Mapper:
    """A process that writes files through mappings: those of the watcher's own process it takes no notice of."""

    _PROGRAM = """
import mmap, os, sys
mapped = {}
for line in sys.stdin:
    what, number, *rest = line.split()
    try:
        if what == "map":
            handle = os.open(bytes.fromhex(rest[0]), os.O_RDWR)
            try:
                mapped[number] = mmap.mmap(handle, 0)
            finally:
                os.close(handle)
        elif what == "unmap":
            mapped.pop(number).close()
        elif (size := min(mapped[number].size(), len(mapped[number]))):
            # Beyond the end of a file that was truncated, a touch would be a signal.
            mapped[number][int(rest[0]) % size] ^= int(rest[1])
        print("done", flush=True)
    except (OSError, ValueError) as error:
        print(error, flush=True)
"""

    def __init__(self) -> None:
        command = [sys.executable, "-S", "-E", "-c", self._PROGRAM]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._last = 0

    def map(self, path: bytes) -> int:
        """Map a file; its number. Raises ValueError when that cannot be done."""
        self._last += 1
        self._say("map", self._last, path.hex())
        return self._last

    def touch(self, number: int, at: int, change: int) -> None:
        """Change one byte."""
        self._say("touch", number, at, change)

    def unmap(self, number: int) -> None:
        """Give it up, which closes the file."""
        self._say("unmap", number)

    def _say(self, *words: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(*words, file=self._process.stdin, flush=True)
        if (answer := self._process.stdout.readline()) != "done\n":
            raise ValueError(answer)

    def close(self) -> None:
        """End the process, and with it all mappings."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


class Changes:
    """Changes to trees, each told by a few small numbers; one that does not apply to what it hits is no change."""

    def __init__(self, tops: list[bytes], outside: bytes, exclude: tuple[str, ...]) -> None:
        self._protected = tops
        self._outside = outside
        self._filters = {top: Filter(Root(top, exclude=exclude)) for top in tops}
        self._mapper = Mapper()
        #: Each mapping by its number, with a descriptor that tells where the name is by which it was made.
        self.mapped: list[tuple[int, int]] = []
        self.handles: list[int] = []
        #: Of files that were written through a mapping, which changes their times only now and then.
        self.silent: list[int] = []
        self._count = 0
        #: Something changed through a name that is not watched, which a scan finds only.
        self.unseen = False

    def do(self, what: str, a: int, b: int, c: int) -> bool:
        """One change; false when it does not apply."""
        change: Callable[[int, int, int], None] = getattr(self, f"_{what}")
        try:
            change(a, b, c)
        except (OSError, ValueError, shutil.Error):
            return False
        return True

    def unmap(self) -> None:
        """Give up all mappings."""
        while self.mapped:
            self._unmap(0, 0, 0)

    def close(self) -> None:
        """Give up mappings and handles."""
        self.unmap()
        for handle in [*self.handles, *self.silent]:
            os.close(handle)
        self.handles.clear()
        self.silent.clear()
        self._mapper.close()

    def give_new_times(self) -> None:
        """What was written through mappings shows, as it does sooner or later, when the kernel has written it back."""
        for handle in self.silent:
            os.utime(handle)

    def forget_silent(self) -> None:
        """What was written through mappings was found."""
        for handle in self.silent:
            os.close(handle)
        self.silent.clear()

    # --- what there is

    def _all(self, tops: list[bytes] | None = None) -> list[tuple[bytes, int]]:
        """Everything with its mode, in the order of the names."""
        found = []
        for top in tops or [*self._protected, self._outside]:
            for at, directories, files in os.walk(top):
                directories.sort()
                for name in sorted(directories + files):
                    path = at + b"/" + name
                    found.append((path, os.lstat(path).st_mode))
        return found

    def _pick(self, number: int, wanted: Callable[[int], bool] = lambda mode: True) -> bytes:
        found = [path for path, mode in self._all() if wanted(mode)]
        if not found:
            raise ValueError
        return found[number % len(found)]

    def _file(self, number: int) -> bytes:
        return self._pick(number, stat.S_ISREG)

    def _directory(self, number: int) -> bytes:
        return self._pick(number, stat.S_ISDIR)

    def _new(self, number: int, name: int) -> bytes:
        everything = self._all()
        if len(everything) > _MOST_ENTRIES:
            raise ValueError
        tops = [top for top in [*self._protected, *self._protected, self._outside] if os.path.isdir(top)]
        places = tops + [path for path, mode in everything if stat.S_ISDIR(mode)]
        place = places[number % len(places)]
        if len(place) > _LONGEST:
            raise ValueError
        return place + b"/" + _NAMES[name % len(_NAMES)]

    def _bytes(self, size: int) -> bytes:
        self._count += 1
        return random.Random(self._count).randbytes(size)

    def _is_watched(self, path: bytes) -> bool:
        for top, filter in self._filters.items():
            if path.startswith(top + b"/"):
                return filter.allows(path[len(top) + 1 :], False)
        return False

    def _through(self, path: bytes) -> None:
        """Something is done to what is at ``path``, without its being renamed: other names of it are not told of."""
        with contextlib.suppress(OSError):
            if not self._is_watched(path) and os.lstat(path).st_nlink > 1:
                self.unseen = True

    def _through_handle(self, handle: int) -> None:
        """As ``_through``, through the name with which ``handle`` was opened, wherever that is now."""
        name = os.readlink(b"/proc/self/fd/%d" % handle)
        if os.fstat(handle).st_nlink and (name.endswith(b" (deleted)") or not self._is_watched(name)):
            self.unseen = True

    # --- files

    def _put(self, path: bytes, data: bytes) -> None:
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            # It would be followed, or waited for.
            raise ValueError
        self._through(path)
        with open(path, "wb") as file:
            file.write(data)

    def _create(self, a: int, b: int, c: int) -> None:
        self._put(self._new(a, b), self._bytes(_SIZES[c % len(_SIZES)]))

    def _overwrite(self, a: int, b: int, c: int) -> None:
        path = self._file(a)
        self._through(path)
        with open(path, "r+b") as file:
            file.seek(b * 1000 % (os.path.getsize(path) + 1))
            file.write(self._bytes(c % 64 + 1))

    def _append(self, a: int, b: int, c: int) -> None:
        path = self._file(a)
        self._through(path)
        with open(path, "ab") as file:
            file.write(self._bytes(_SIZES[c % len(_SIZES)] + 1))

    def _truncate(self, a: int, b: int, c: int) -> None:
        path = self._file(a)
        self._through(path)
        os.truncate(path, [0, 5, 66_000, os.path.getsize(path) // 2][c % 4])

    def _edit_unseen(self, a: int, b: int, c: int) -> None:
        """The same size, and the same modification time."""
        path = self._file(a)
        status = os.stat(path)
        self._through(path)
        with open(path, "r+b") as file:
            file.seek(b * 1000 % max(1, status.st_size))
            file.write(self._bytes(min(4, status.st_size)))
        if c % 2:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _write_mapped(self, a: int, b: int, c: int) -> None:
        path = self._file(a)
        self._through(path)
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            file.close()
            mapped[b % len(mapped)] ^= 1 + c % 255

    def _map(self, a: int, b: int, c: int) -> None:
        path = self._file(a)
        if len(self.mapped) > 5:
            raise ValueError
        number = self._mapper.map(path)
        self.mapped.append((number, os.open(path, os.O_RDONLY)))
        self._touch_mapped(len(self.mapped) - 1, b, c)

    def _touch_mapped(self, a: int, b: int, c: int) -> None:
        if not self.mapped:
            raise ValueError
        number, handle = self.mapped[a % len(self.mapped)]
        self._through_handle(handle)
        self.silent.append(os.dup(handle))
        self._mapper.touch(number, b * 1000, 1 + c % 255)

    def _unmap(self, a: int, b: int, c: int) -> None:
        if not self.mapped:
            raise ValueError
        number, handle = self.mapped.pop(a % len(self.mapped))
        # What was written is told of now.
        self._through_handle(handle)
        self._mapper.unmap(number)
        os.close(handle)

    def _hold(self, a: int, b: int, c: int) -> None:
        if len(self.handles) > 5:
            raise ValueError
        self.handles.append(os.open(self._file(a), os.O_RDWR))

    def _write_held(self, a: int, b: int, c: int) -> None:
        if not self.handles:
            raise ValueError
        handle = self.handles[a % len(self.handles)]
        self._through_handle(handle)
        os.lseek(handle, 0, os.SEEK_END if c % 2 else os.SEEK_SET)
        os.write(handle, self._bytes(b % 64 + 1))

    def _let_go(self, a: int, b: int, c: int) -> None:
        if not self.handles:
            raise ValueError
        os.close(self.handles.pop(a % len(self.handles)))

    def _save(self, a: int, b: int, c: int) -> None:
        """As editors do: a new file, excluded perhaps, in the place of the old one."""
        path = self._file(a)
        aside = os.path.dirname(path) + [b"/y.tmp", b"/.new"][b % 2]
        self._put(aside, self._bytes(_SIZES[c % len(_SIZES)]))
        os.rename(aside, path)

    # --- names

    def _rename(self, a: int, b: int, c: int) -> None:
        self._move(self._pick(a), self._new(b, c))

    def _rename_directory(self, a: int, b: int, c: int) -> None:
        self._move(self._directory(a), self._new(b, c))

    def _rename_over(self, a: int, b: int, c: int) -> None:
        self._move(self._pick(a), self._pick(b))

    def _move(self, old: bytes, new: bytes) -> None:
        longest = max((len(path) for path, _ in self._all([old])), default=len(old))
        if longest - len(old) + len(new) > _LONGEST:
            raise ValueError
        os.rename(old, new)

    def _rename_pending(self, a: int, b: int, c: int) -> None:
        """A directory that holds what was written just now."""
        directory = self._directory(a)
        self._put(directory + b"/p", self._bytes(_SIZES[c % len(_SIZES)]))
        self._move(directory, self._new(b, c))

    def _rename_twice(self, a: int, b: int, c: int) -> None:
        directory, first = self._directory(a), self._new(b, c)
        self._move(directory, first)
        self._put(first + b"/p", self._bytes(10))
        self._move(first, self._new(a + b, c + 1))

    def _move_out(self, a: int, b: int, c: int) -> None:
        self._move(self._pick(a), self._outside + b"/" + _NAMES[c % len(_NAMES)])

    def _move_in(self, a: int, b: int, c: int) -> None:
        found = [path for path, _ in self._all([self._outside])]
        if not found:
            raise ValueError
        self._move(found[a % len(found)], self._new(b, c))

    def _exchange(self, a: int, b: int, c: int) -> None:
        one, other = self._pick(a), self._pick(b)
        longest = max(len(path) for path, _ in self._all())
        if longest + max(len(one), len(other)) > _LONGEST:
            raise ValueError
        if _libc.renameat2(-100, one, -100, other, 2):
            raise OSError(ctypes.get_errno(), "exchange")

    def _link(self, a: int, b: int, c: int) -> None:
        os.link(self._pick(a, lambda mode: not stat.S_ISDIR(mode)), self._new(b, c), follow_symlinks=False)

    def _link_from_outside(self, a: int, b: int, c: int) -> None:
        found = [path for path, mode in self._all([self._outside]) if stat.S_ISREG(mode)]
        if not found:
            raise ValueError
        os.link(found[a % len(found)], self._new(b, c))

    def _write_outside(self, a: int, b: int, c: int) -> None:
        found = [path for path, mode in self._all([self._outside]) if stat.S_ISREG(mode)]
        if not found:
            raise ValueError
        self._put(found[a % len(found)], self._bytes(_SIZES[c % len(_SIZES)]))

    def _symlink(self, a: int, b: int, c: int) -> None:
        os.symlink([b"nowhere", b"..", self._outside, b"a"][c % 4], self._new(a, b))

    def _fifo(self, a: int, b: int, c: int) -> None:
        os.mkfifo(self._new(a, b))

    def _unlink(self, a: int, b: int, c: int) -> None:
        os.unlink(self._pick(a, lambda mode: not stat.S_ISDIR(mode)))

    def _rmdir(self, a: int, b: int, c: int) -> None:
        os.rmdir(self._directory(a))

    def _remove_tree(self, a: int, b: int, c: int) -> None:
        shutil.rmtree(self._directory(a))

    def _make_tree(self, a: int, b: int, c: int) -> None:
        path = self._new(a, b)
        for depth in range(1 + c % 4):
            os.mkdir(path)
            self._put(path + b"/f", self._bytes(10))
            path += b"/" + _NAMES[(b + depth) % 4]

    def _recreate_file(self, a: int, b: int, c: int) -> None:
        path = self._file(a)
        os.unlink(path)
        self._put(path, self._bytes(_SIZES[c % len(_SIZES)]))

    def _recreate_directory(self, a: int, b: int, c: int) -> None:
        path = self._directory(a)
        shutil.rmtree(path)
        os.mkdir(path)
        self._put(path + b"/" + _NAMES[b % len(_NAMES)], self._bytes(10))

    def _rename_and_recreate(self, a: int, b: int, c: int) -> None:
        path = self._pick(a)
        was_directory = stat.S_ISDIR(os.lstat(path).st_mode)
        self._move(path, self._new(b, c))
        if was_directory:
            os.mkdir(path)
            path += b"/a"
        self._put(path, self._bytes(10))

    # --- metadata

    def _chmod(self, a: int, b: int, c: int) -> None:
        path = self._pick(a, lambda mode: not stat.S_ISLNK(mode))
        self._through(path)
        os.chmod(path, [0o600, 0o644, 0o755, 0o1777, 0o4711][c % 5] | (0o700 if os.path.isdir(path) else 0))

    def _chown(self, a: int, b: int, c: int) -> None:
        path = self._pick(a)
        self._through(path)
        os.chown(path, b % 100, c % 100, follow_symlinks=False)

    def _setxattr(self, a: int, b: int, c: int) -> None:
        path = self._pick(a, lambda mode: stat.S_ISREG(mode) or stat.S_ISDIR(mode))
        self._through(path)
        if c % 4:
            os.setxattr(path, b"user.%d" % (b % 3), self._bytes(c % 30))
        else:
            os.removexattr(path, b"user.%d" % (b % 3))

    def _utime(self, a: int, b: int, c: int) -> None:
        path = self._pick(a)
        self._through(path)
        os.utime(path, ns=(1, b * 1_000_000_007 + c), follow_symlinks=False)


#: What is done, the more frequent the more often it stands here.
OPERATIONS = [
    *["create", "create", "make_tree", "make_tree", "overwrite", "append", "truncate", "edit_unseen", "save", "save"],
    *["write_mapped", "map", "touch_mapped", "unmap", "hold", "write_held", "write_held", "let_go"],
    *["rename", "rename", "rename_directory", "rename_directory", "rename_over", "rename_pending", "rename_twice"],
    *["move_out", "move_in", "exchange", "link", "link_from_outside", "write_outside", "symlink", "fifo"],
    *["unlink", "rmdir", "remove_tree", "recreate_file", "recreate_directory", "rename_and_recreate"],
    *["chmod", "chown", "setxattr", "utime"],
]
Step = tuple[str, dict[str, Any]]
_number = st.integers(0, 255)
_change = st.tuples(st.sampled_from(OPERATIONS), _number, _number, _number)


def _step(method: Callable[..., None]) -> Callable[..., None]:
    """Note a step of the machine with its arguments, but not what it consists of."""

    @functools.wraps(method)
    def noted(self: Machine, **arguments: Any) -> None:
        inner, self.in_step = self.in_step, True
        if not inner:
            self.steps.append((method.__name__, arguments))
        try:
            method(self, **arguments)
        finally:
            self.in_step = inner

    return noted


class Machine(RuleBasedStateMachine):
    """What may be done to a mirror. ``engine`` watches it; ``counts`` tells what was done."""

    engine: ClassVar[str] = "inotify"
    counts: ClassVar[Counter[str]] = Counter()
    #: The steps that led to the last failure, for ``replay``.
    failed: ClassVar[list[Step]] = []
    #: And its traceback.
    reasons: ClassVar[list[str]] = []

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.in_step = False
        #: Events were lost since the last check, and so only what lstat tells was seen.
        self.lost = False
        self.base = Path(tempfile.mkdtemp(prefix="farshore-machine-", dir=os.environ.get("FARSHORE_SOAK_DIR")))
        self.mirrored: Mirrored | None = None
        self.paused = False
        self.away: set[int] = set()

    @initialize(excludes=st.booleans(), changes=st.lists(_change, max_size=20))
    @_step
    def begin(self, excludes: bool, changes: list[tuple[str, int, int, int]]) -> None:
        """A mirror of what is there already."""
        (self.base / "outside").mkdir()
        self.mirrored = Mirrored(self.base, self.engine, 2, _EXCLUDE if excludes else ())
        tops = [os.fsencode(top) for top in self.mirrored.sources]
        self.changes = Changes(tops, os.fsencode(self.base / "outside"), self.mirrored.exclude)
        self.burst(changes)

    @property
    def is_on(self) -> bool:
        """Whether the source runs."""
        return self.mirrored is not None and self.mirrored.local is not None

    def burst(self, changes: list[tuple[str, int, int, int]]) -> None:
        """Changes in quick succession."""
        for what, *numbers in changes:
            done = self.changes.do(what, *numbers)
            self.counts["steps"] += 1
            self.counts[what] += done

    # Rules are chosen alike; most of what happens are changes.

    @rule(changes=st.lists(_change, min_size=1, max_size=1))
    @_step
    def change(self, changes: list[tuple[str, int, int, int]]) -> None:
        """One change, while the watcher may be at work."""
        self.burst(changes)

    @rule(changes=st.lists(_change, min_size=2, max_size=8))
    @_step
    def some_changes(self, changes: list[tuple[str, int, int, int]]) -> None:
        """A few."""
        self.burst(changes)

    @rule(changes=st.lists(_change, min_size=4, max_size=20))
    @_step
    def many_changes(self, changes: list[tuple[str, int, int, int]]) -> None:
        """More."""
        self.burst(changes)

    @rule(changes=st.lists(_change, min_size=2, max_size=8))
    @_step
    def changes_behind_their_backs(self, changes: list[tuple[str, int, int, int]]) -> None:
        """While neither the watcher nor the sender looks."""
        if self.is_on and not self.paused and not self.away:
            self.hold_sender()
            self.hold_watcher()
        self.burst(changes)

    @rule(changes=st.lists(_change, min_size=2, max_size=8))
    @_step
    def changes_and_check(self, changes: list[tuple[str, int, int, int]]) -> None:
        """With a look at the outcome."""
        self.burst(changes)
        self.check()

    @precondition(lambda self: self.is_on and not self.paused and not self.away)
    @rule()
    @_step
    def hold_watcher(self) -> None:
        """What changes from now on is looked at later."""
        assert self.mirrored is not None
        self.mirrored.hold_watcher()

    @precondition(lambda self: self.is_on)
    @rule()
    @_step
    def hold_sender(self) -> None:
        """What is marked from now on is sent later."""
        assert self.mirrored is not None
        self.mirrored.hold_sender()

    @precondition(lambda self: self.is_on)
    @rule()
    @_step
    def release_watcher(self) -> None:
        """The watcher looks at what was queued."""
        assert self.mirrored is not None
        self.mirrored.release_watcher()

    @precondition(lambda self: self.is_on and not self.paused and not self.away)
    @rule()
    @_step
    def pause(self) -> None:
        """As the administrator does."""
        assert self.mirrored is not None
        self.mirrored.pause()
        self.paused = True
        self.lost = True
        self.counts["pauses"] += 1

    @precondition(lambda self: self.is_on and self.paused and not self.away)
    @rule()
    @_step
    def resume(self) -> None:
        """As the administrator does."""
        assert self.mirrored is not None
        self.mirrored.resume()
        self.paused = False

    @precondition(lambda self: self.is_on)
    @rule()
    @_step
    def stop(self) -> None:
        """The source ends."""
        assert self.mirrored is not None
        self.mirrored.stop()
        self.paused = False
        self.lost = True
        self.counts["restarts"] += 1

    @precondition(lambda self: not self.is_on)
    @rule()
    @_step
    def start(self) -> None:
        """The source begins again."""
        assert self.mirrored is not None
        self.mirrored.start()

    @precondition(lambda self: self.is_on and not self.paused and not self.away)
    @rule()
    @_step
    def fail(self) -> None:
        """The watcher fails, and another takes its place."""
        assert self.mirrored is not None
        self.mirrored.fail()
        self.lost = True
        self.counts["failures"] += 1

    @precondition(lambda self: self.is_on)
    @rule()
    @_step
    def cut(self) -> None:
        """The connection ends, and another is made."""
        assert self.mirrored is not None
        self.mirrored.cut()
        self.counts["cuts"] += 1

    @precondition(lambda self: self.is_on and not self.paused and not self.away and can_lower(self.engine))
    @rule(changes=st.lists(_change, min_size=5, max_size=20))
    @_step
    def overflow(self, changes: list[tuple[str, int, int, int]]) -> None:
        """The kernel's queue is short, and more changes than it can hold."""
        assert self.mirrored is not None
        self.lost = True
        self.mirrored.pause()
        with lowered(self.engine, "max_queued_events", _TINY):
            self.mirrored.resume()
        self.mirrored.hold_watcher()
        self.burst(changes)
        self.counts["overflows"] += 1

    @rule(number=st.integers(0, 1))
    @_step
    def root_away(self, number: int) -> None:
        """A root is not there for a while."""
        assert self.mirrored is not None
        if number not in self.away:
            self.mirrored.sources[number].rename(self.base / f"away{number}")
            self.away.add(number)
            self.lost = True
            self.counts["roots away"] += 1

    @precondition(lambda self: self.away)
    @rule(same=st.booleans())
    @_step
    def root_back(self, same: bool) -> None:
        """It is there again, or another is."""
        assert self.mirrored is not None
        number = self.away.pop()
        old, root = self.base / f"away{number}", self.mirrored.sources[number]
        if same:
            old.rename(root)
        else:
            root.mkdir()
            (root / "other").write_bytes(b"another root")
            shutil.rmtree(old)

    @rule(unmaps=st.booleans())
    @_step
    def check(self, unmaps: bool = True) -> None:
        """After a flush the trees are identical, also when files stay mapped."""
        mirrored = self.mirrored
        assert mirrored is not None
        mirrored.release()
        while self.away:
            self.root_back(same=True)
        if not self.is_on:
            self.start()
        if unmaps:
            self.changes.unmap()
        if (self.lost or self.changes.unseen) and self.changes.silent:
            self.changes.give_new_times()
            self.changes.unseen = True
        self.lost = False
        if self.changes.unseen:
            self.changes.unseen = False
            if not self.paused:
                mirrored.pause()
            mirrored.resume()
            self.counts["scans"] += 1
        elif self.paused:
            mirrored.resume()
        self.paused = False
        mirrored.flush()
        found = mirrored.differences()
        self.changes.forget_silent()
        self.counts["flushes"] += 1
        if found:
            raise AssertionError("\n".join(found))

    def teardown(self) -> None:
        """What was done last must arrive, too; and nothing is left."""
        try:
            try:
                if self.mirrored is not None and sys.exception() is None:
                    self.check()
            finally:
                self._note(sys.exception())
                if self.mirrored is not None:
                    self.changes.close()
                    self.mirrored.close()
                shutil.rmtree(self.base)
        except Exception as error:
            self._note(error)
            raise

    def _note(self, error: BaseException | None) -> None:
        """The first failure counts: Hypothesis ends examples by errors of its own, and repeats one that failed."""
        if isinstance(error, Exception) and not isinstance(error, HypothesisException) and not self.reasons:
            self.failed[:] = self.steps
            self.reasons[:] = traceback.format_exception(error)


def run(engine: str, examples: int, steps: int, *, seed: int | None = None) -> None:
    """Examples of the machine; without ``seed`` always the same ones. Raises what fails, with the steps to it."""
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=seed is None,
        database=None,
        # A failure that comes and goes is not for Hypothesis to shrink.
        phases=[Phase.generate],
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    Machine.failed.clear()
    Machine.reasons.clear()
    machine: type[Machine] = type(f"Machine_{engine}", (Machine,), {"engine": engine})
    run_state_machine_as_test(machine if seed is None else seeded(seed)(machine), settings=chosen)


def replay(engine: str, steps: list[Step]) -> None:
    """Do the steps of a machine that failed. Raises what fails."""
    machine = type(f"Machine_{engine}", (Machine,), {"engine": engine})()
    conditions = {each.function.__name__: each.preconditions for each in machine.rules}
    try:
        for name, arguments in steps:
            if all(condition(machine) for condition in conditions.get(name, ())):
                getattr(machine, name)(**arguments)
    finally:
        machine.teardown()


def reduced(engine: str, steps: list[Step], tries: int) -> list[Step]:
    """Those of the steps, and of the changes in them, without which nothing fails in so many ``tries``.

    Hypothesis gives up where one of two equal runs fails, as when a watcher is at work meanwhile.
    """

    def fails(chosen: list[Step]) -> bool:
        for _ in range(tries):
            try:
                replay(engine, chosen)
            except Exception:
                return True
        return False

    def variants(chosen: list[Step]) -> Iterator[list[Step]]:
        size = len(chosen) // 2
        while size:
            yield from (chosen[:at] + chosen[at + size :] for at in range(1, len(chosen), size))
            size //= 2
        for at, (name, arguments) in enumerate(chosen):
            changes = arguments.get("changes", [])
            for left_out in range(len(changes)):
                fewer = arguments | {"changes": changes[:left_out] + changes[left_out + 1 :]}
                yield [*chosen[:at], (name, fewer), *chosen[at + 1 :]]

    while (fewer := next(filter(fails, variants(steps)), None)) is not None:
        steps = fewer
        print(len(steps), sum(len(arguments.get("changes", [])) for _, arguments in steps), flush=True)
    return steps


def soak(engine: str, minutes: float, seed: int, base: Path) -> dict[str, Any]:
    """Rounds of random seeds for ``minutes``; returns the report."""
    started = time.monotonic()
    os.environ["FARSHORE_SOAK_DIR"] = str(base)
    report: dict[str, Any] = {"engine": engine, "seed": seed, "rounds": 0, "failures": []}
    Machine.counts.clear()
    while time.monotonic() < started + minutes * 60:
        report["rounds"] += 1
        number = seed + report["rounds"]
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                run(engine, 20, 60, seed=number)
        except Exception as error:
            whole = "".join(traceback.format_exception(error))
            told = f"{whole[-4000:]}\n{''.join(Machine.reasons)[-4000:]}"
            report["failures"].append({"seed": number, "error": told, "steps": repr(Machine.failed)})
            print(f"{told}\nsteps: {Machine.failed!r}", flush=True)
        for left in base.iterdir():
            shutil.rmtree(left, ignore_errors=True)
        print(
            f"round {report['rounds']}: {Machine.counts['steps']} steps, {len(report['failures'])} failed", flush=True
        )
    report["done"] = dict(sorted(Machine.counts.items()))
    report["seconds"] = round(time.monotonic() - started)
    return report


def main() -> int:
    """The command line; the exit code is 0 when nothing failed."""
    faulthandler.register(signal.SIGUSR1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, metavar="N", help="default: %(default)g")
    parser.add_argument("--engine", choices=[name for name in ENGINES if name != "auto"], default="inotify")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), metavar="N")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the figures there, as JSON")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="do the steps of a failure in FILE, as it is told")
    parser.add_argument("--reduce", type=int, metavar="TRIES", help="and find those that it takes, in so many tries")
    options = parser.parse_args()
    logging.getLogger("farshore").setLevel(logging.CRITICAL)
    if options.replay is not None:
        steps = ast.literal_eval(options.replay.read_text())
        if options.reduce is not None:
            steps = reduced(options.engine, steps, options.reduce)
            print(*steps, sep="\n")
        replay(options.engine, steps)
        return 0
    print(f"seed {options.seed}", flush=True)
    base = Path(tempfile.mkdtemp(prefix="farshore-soak-"))
    try:
        report = soak(options.engine, options.minutes, options.seed, base)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return tell(report, options.report)


if __name__ == "__main__":
    sys.exit(main())
