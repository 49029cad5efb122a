"""Reach a path below a root without trusting it: by directory handles, never through a symbolic link."""

from __future__ import annotations

import os
from collections import OrderedDict

from farshore.errors import UnsafePath

_MAX_PATH = 4096
_MAX_NAME = 255
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CACHED_HANDLES = 64


def check(path: bytes) -> bytes:
    """Return ``path`` if it is relative and plain; raises UnsafePath otherwise. b"" is the root itself."""
    if not path:
        return path
    if len(path) > _MAX_PATH:
        raise UnsafePath(path[:80] + b"...", f"{len(path)} bytes; allowed are {_MAX_PATH}")
    if b"\0" in path:
        raise UnsafePath(path, "it holds a NUL byte")
    for name in path.split(b"/"):
        if name in (b"", b".", b".."):
            raise UnsafePath(path, "it is absolute, or has an empty, . or .. component")
        if len(name) > _MAX_NAME:
            raise UnsafePath(path, f"a component has {len(name)} bytes; allowed are {_MAX_NAME}")
    return path


class Handles:
    """Directory handles below one root, opened component by component and cached while nothing moves.

    A directory that is missing raises FileNotFoundError, one that is a symbolic link or a file
    NotADirectoryError: nothing outside the root is ever reached.
    """

    def __init__(self, root: bytes) -> None:
        self._root = root
        self._cache: OrderedDict[bytes, int] = OrderedDict()

    def parent(self, path: bytes) -> tuple[int, bytes]:
        """Handle of the directory that holds ``path``, and the name in it. The handle stays ours."""
        if not path:
            return self.directory(None), os.path.basename(self._root)
        head, _, name = path.rpartition(b"/")
        return self.directory(head), name

    def directory(self, path: bytes | None) -> int:
        """Handle of a directory; b"" is the root, None the directory that holds the root."""
        key = b"//" if path is None else path
        handle = self._cache.get(key)
        if handle is None:
            handle = self._open(path)
            while len(self._cache) >= _CACHED_HANDLES:
                os.close(self._cache.popitem(last=False)[1])
            self._cache[key] = handle
        else:
            self._cache.move_to_end(key)
        return handle

    def _open(self, path: bytes | None) -> int:
        # The root and what is above it are the administrator's; below it nothing is trusted.
        if path is None:
            return os.open(os.path.dirname(self._root), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if not path:
            return os.open(os.path.basename(self._root), _OPEN_DIRECTORY, dir_fd=self.directory(None))
        handle = os.dup(self.directory(b""))
        try:
            for name in check(path).split(b"/"):
                below = os.open(name, _OPEN_DIRECTORY, dir_fd=handle)
                os.close(handle)
                handle = below
        except BaseException:
            os.close(handle)
            raise
        return handle

    def forget(self) -> None:
        """Close all handles: after a directory was moved or removed, and at the end of a transaction."""
        while self._cache:
            os.close(self._cache.popitem()[1])
