"""A kernel that refuses to watch some directories."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

import pytest

from farshore.fmm.descent import Descent, Found
from farshore.fmm.inotify import InotifyWatcher


def refuse(monkeypatch: pytest.MonkeyPatch, code: int, refused: Callable[[bytes], bool]) -> None:
    """Let the kernel answer with an error's number where it is to watch a directory at a path that is ``refused``."""
    add_watch, watch = InotifyWatcher._add_watch, Descent.watch

    def where(fd: int) -> bytes:
        return os.readlink(b"/proc/self/fd/%d" % fd)

    def add(self: InotifyWatcher, fd: int) -> int:
        if refused(where(fd)):
            self._exhausted = self._exhausted or code == errno.ENOSPC
            raise OSError(code, os.strerror(code))
        return add_watch(self, fd)

    def add_many(
        self: Descent, top: int, parents: Sequence[tuple[bytes, int, Sequence[bytes]]], device: int | None
    ) -> list[tuple[int, list[Found]]]:
        result = []
        for path, wd, names in parents:
            below = os.path.join(where(top), path)
            allowed = [name for name in names if not refused(os.path.join(below, name))]
            ((is_wd, found),) = watch(self, top, [(path, wd, allowed)], device) if allowed else ((wd, []),)
            by_name = dict(zip(allowed, found, strict=False))
            result.append((is_wd, [by_name.get(name, Found(-code, 0, [])) for name in names] if is_wd == wd else []))
        return result

    monkeypatch.setattr(InotifyWatcher, "_add_watch", add)
    monkeypatch.setattr(Descent, "watch", add_many)
