"""Which paths below a root are protected."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import takewhile

from pathspec import GitIgnoreSpec

from farshore.fmm.errors import WatchError
from farshore.fmm.types import Root

#: Names of our own staging files begin with this; they are never protected.
STAGING = b".farshore-"

_GLOB = frozenset("*?[\\")
_CACHE_LIMIT = 65536


class Filter:
    """Decides for one root, by its gitignore patterns, which paths are protected.

    - A path is protected when no ``exclude`` matches it or an ``include`` does.
    - Below an excluded directory everything is excluded, but for what an include matches. So an
      excluded directory below which an include could match counts as protected itself: it is
      entered, and it exists on the other side to hold what is included. A pattern without a slash
      (``*.keep``) could match anywhere; one with a slash (``cache/keep/*.db``) only below its
      literal beginning (``cache/keep``).
    - A ``!`` inside ``exclude`` works as in a .gitignore: it takes back an earlier pattern, and
      cannot reach into an excluded directory (that is what ``include`` is for).
    - A name that begins with ``.farshore-``, at any depth, is never protected.
    - The root itself always is.

    Names may hold any bytes: they are compared as UTF-8, undecodable bytes as single characters.
    Raises WatchError for a pattern that gitignore syntax does not allow.
    """

    def __init__(self, root: Root) -> None:
        self._excluded = _matcher(root, root.exclude)
        self._included = _matcher(root, root.include)
        self._reaches = [_literal_beginning(p) for p in root.include if not p.startswith(("!", "#")) and p.strip()]
        self._directories: dict[bytes, bool] = {}
        #: No pattern can exclude anything; only our own staging names are left out.
        self.plain = not root.exclude

    def allows(self, path: bytes, is_dir: bool) -> bool:
        """True when ``path`` (relative to the root, b"" for the root) is protected."""
        if path.startswith(STAGING) or b"/" + STAGING in path:
            return False
        if self.plain or not path:
            return True
        if is_dir:
            return self._enters(path)
        parent, _, _ = path.rpartition(b"/")
        return self._enters(parent) and self._protected(_text(path))

    def _enters(self, path: bytes) -> bool:
        verdicts = self._directories
        if not path:
            return True
        known = verdicts.get(path)
        if known is not None:
            return known
        if len(verdicts) > _CACHE_LIMIT:
            verdicts.clear()
        entered = True
        # From the top down, in a loop: a path may be deeper than Python's stack.
        end = path.find(b"/")
        while True:
            directory = path if end < 0 else path[:end]
            known = verdicts.get(directory)
            if known is None:
                known = entered and self._enters_here(_text(directory))
                verdicts[directory] = known
            entered = known
            if end < 0:
                return entered
            end = path.find(b"/", end + 1)

    def _enters_here(self, directory: str) -> bool:
        if self._protected(directory + "/"):
            return True
        parts = directory.split("/")
        return any(all(a == b for a, b in zip(parts, reach, strict=False)) for reach in self._reaches)

    def _protected(self, path: str) -> bool:
        return not self._excluded(path) or self._included(path)


def _text(path: bytes) -> str:
    # pathspec's expressions treat a newline as the end of a line ("$", "."); no name holds a NUL.
    return path.decode("utf-8", "surrogateescape").replace("\n", "\0")


def _matcher(root: Root, patterns: Sequence[str]) -> Callable[[str], bool]:
    try:
        # The other backends cannot take undecodable bytes.
        spec = GitIgnoreSpec.from_lines([p.replace("\n", "\0") for p in patterns], backend="simple")
    except (ValueError, re.error) as error:
        raise WatchError(root.path, f"patterns {', '.join(patterns)}: {error}") from error
    return spec.match_file


def _literal_beginning(pattern: str) -> list[str]:
    """The directories that must lie above whatever ``pattern`` matches; [] when it may be anywhere."""
    pattern = pattern.rstrip()
    if "/" not in pattern.rstrip("/"):
        return []
    return list(takewhile(lambda part: not _GLOB & set(part), pattern.strip("/").split("/")))
