"""Which paths below a root are protected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from pathspec import GitIgnoreSpec

from farshore.fmm.errors import WatchError
from farshore.fmm.types import Root

#: Names of our own staging files begin with this; they are never protected.
STAGING = b".farshore-"

_GLOB = frozenset("*?[\\")
_CACHE_LIMIT = 65536


@dataclass(frozen=True, slots=True)
class Decision:
    """The pattern that decides about a path: number ``index``, from 0, of the root's ``option``.

    ``at`` is where it matched: the path itself, or a directory above.
    """

    option: Literal["exclude", "include"]
    index: int
    pattern: str
    at: bytes


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
        self._root = root
        self._exclude = _spec(root, root.exclude)
        self._include = _spec(root, root.include)
        self._excluded = self._exclude.match_file
        self._included = self._include.match_file
        self._reaches = [
            (number, _literal_beginning(pattern))
            for number, pattern in enumerate(root.include)
            if not pattern.startswith(("!", "#")) and pattern.strip()
        ]
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

    def decision(self, path: bytes, is_dir: bool) -> Decision | None:
        """The exclude that leaves ``path`` out, or the include that takes it back; None when no pattern says anything.

        Of our own staging names nothing is said.
        """
        if self.plain or not path:
            return None
        end = path.find(b"/")
        while end >= 0:
            if not self._enters_here(_text(path[:end])):
                return self._excluding(path[:end], True)
            end = path.find(b"/", end + 1)
        text = _text(path) + ("/" if is_dir else "")
        if not self._excluded(text):
            return None
        if self._included(text):
            index = self._include.check_file(text).index
            return None if index is None else self._decision("include", index, path)
        reaching = self._reaching(_text(path)) if is_dir else None
        return self._excluding(path, is_dir) if reaching is None else self._decision("include", reaching, path)

    def _excluding(self, path: bytes, is_dir: bool) -> Decision | None:
        """The exclude that matches ``path``, or the topmost directory above that it matches."""
        index = self._exclude.check_file(_text(path) + ("/" if is_dir else "")).index
        if index is None:
            return None
        end = path.find(b"/")
        while end >= 0:
            if self._exclude.check_file(_text(path[:end]) + "/").index == index:
                return self._decision("exclude", index, path[:end])
            end = path.find(b"/", end + 1)
        return self._decision("exclude", index, path)

    def _decision(self, option: Literal["exclude", "include"], index: int, at: bytes) -> Decision:
        return Decision(option, index, getattr(self._root, option)[index], at)

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
        return self._reaching(directory) is not None

    def _reaching(self, directory: str) -> int | None:
        """The number of an include that could match below a directory."""
        parts = directory.split("/")
        for number, reach in self._reaches:
            if all(a == b for a, b in zip(parts, reach, strict=False)):
                return number
        return None

    def _protected(self, path: str) -> bool:
        return not self._excluded(path) or self._included(path)


def _text(path: bytes) -> str:
    # pathspec's expressions treat a newline as the end of a line ("$", "."); no name holds a NUL.
    return path.decode("utf-8", "surrogateescape").replace("\n", "\0")


def _spec(root: Root, patterns: Sequence[str]) -> GitIgnoreSpec:
    try:
        # An empty line would be left out, and those behind it be counted wrongly. The other backends cannot take
        # undecodable bytes.
        lines = [p.replace("\n", "\0") or "#" for p in patterns]
        return GitIgnoreSpec.from_lines(lines, backend="simple")
    except (ValueError, re.error) as error:
        raise WatchError(root.path, f"patterns {', '.join(patterns)}: {error}") from error


def _literal_beginning(pattern: str) -> list[str]:
    """The directories that must lie above whatever ``pattern`` matches; [] when it may be anywhere."""
    pattern = pattern.rstrip()
    if "/" not in pattern.rstrip("/"):
        return []
    return list(takewhile(lambda part: not _GLOB & set(part), pattern.strip("/").split("/")))
