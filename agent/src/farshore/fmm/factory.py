"""Choose the engine that watches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from farshore.errors import UsageError
from farshore.fmm import kernel
from farshore.fmm.types import Root, Watcher
from farshore.log import Log

Engine = Literal["auto", "inotify", "fanotify"]
ENGINES: tuple[Engine, ...] = ("auto", "inotify", "fanotify")
#: With so many directories, a watch for each costs more than to be told of all that happens on the filesystem.
MANY_DIRECTORIES = 20_000

_log = Log(__name__)


def make_watcher(engine: str, roots: Sequence[Root], *, reads: bool = False, cookies: Path | None = None) -> Watcher:
    """A watcher for ``roots``, not started yet.

    ``engine`` is one of ``ENGINES``. ``auto`` takes inotify for a tree of up to MANY_DIRECTORIES directories; for a
    larger one, or one for which the kernel's limit on watches is too low, fanotify, where kernel, privileges and
    filesystems allow it. ``reads`` also reports files that were only read, whose access time may have changed.
    ``cookies``: where the watcher may make files of its own. Raises UsageError for another engine, WatchError for roots
    that cannot be watched together.
    """
    if engine not in ENGINES:
        raise UsageError(f"watch engine {engine!r} is not known; allowed: {', '.join(ENGINES)}")
    # Imported late: commands that never watch should not pay for it.
    if engine == "fanotify" or (engine == "auto" and _prefers_fanotify(roots)):
        from farshore.fmm.fanotify import FanotifyWatcher

        return FanotifyWatcher(roots, reads=reads, cookies=cookies)
    from farshore.fmm.inotify import InotifyWatcher

    return InotifyWatcher(roots, reads=reads, cookies=cookies)


def _prefers_fanotify(roots: Sequence[Root]) -> bool:
    from farshore.fmm.fanotify import why_not

    most = min(MANY_DIRECTORIES, kernel.most_watches() // 2)
    if kernel.count_all((root.path for root in roots), most) <= most:
        return False
    reason = why_not(roots)
    if reason:
        _log.info("a large tree is watched by inotify", reason=reason)
    return not reason
