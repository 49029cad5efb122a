"""FMM, the file monitoring module: says which protected paths may have changed.

A ``Watcher`` yields hints, a ``DirtySet`` collects and ages them, and ``scanner`` tells what a
path looks like now. Hints are never trusted; the state on disk is the truth.
"""

from farshore.fmm.dirty import Dirty, DirtySet
from farshore.fmm.errors import WatchError
from farshore.fmm.factory import make_watcher
from farshore.fmm.types import Counts, FileKind, Hint, Kind, Observed, Root, Watcher

__all__ = [
    "Counts",
    "Dirty",
    "DirtySet",
    "FileKind",
    "Hint",
    "Kind",
    "Observed",
    "Root",
    "WatchError",
    "Watcher",
    "make_watcher",
]
