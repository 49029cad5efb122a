"""Choose the engine that watches."""

from __future__ import annotations

from collections.abc import Sequence

from farshore.errors import UsageError
from farshore.fmm.types import Root, Watcher

ENGINES = ("auto", "inotify")


def make_watcher(engine: str, roots: Sequence[Root], *, reads: bool = False) -> Watcher:
    """A watcher for ``roots``, not started yet.

    ``engine`` is ``"inotify"``, or ``"auto"`` for the best one of this machine. ``reads`` also
    reports files that were only read, whose access time may have changed. Raises UsageError for
    another engine and WatchError for roots that cannot be watched together.
    """
    if engine not in ENGINES:
        raise UsageError(f"watch engine {engine!r} is not known; allowed: {', '.join(ENGINES)}")
    # Imported late: commands that never watch should not pay for it.
    from farshore.fmm.inotify import InotifyWatcher

    return InotifyWatcher(roots, reads=reads)
