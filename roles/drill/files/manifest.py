#!/usr/bin/env python3
"""What is in a tree: one JSON object a line for each path, by content and metadata.

Depends on nothing of the agent's, so that it can bear witness to it. Access times, change times, inode numbers
and the sizes of directories are left out: they are each machine's own. Hard links show as the first name of their
set; names outside of the tree don't count. Names are given with surrogateescape, so that they can hold any bytes.
Of what the path's limits leave alone it is only said that they do.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

STAGING = ".farshore-"
TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
Matcher = Callable[[str], bool]
UNITS = {
    "": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400,
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
#: What has just become old enough may be on its way.
SLACK = 60.0


def matcher(patterns: list[str]) -> Matcher:
    """Whether a path matches patterns as in a .gitignore; without the package pathspec only plain name patterns."""
    if not patterns:
        return lambda path: False
    try:
        from pathspec import GitIgnoreSpec
    except ImportError:
        return lambda path: any(fnmatch.fnmatchcase(os.path.basename(path.rstrip("/")), p) for p in patterns)
    spec = GitIgnoreSpec.from_lines(patterns)
    return lambda path: bool(spec.match_file(path))


def number(text: str) -> int:
    """The bytes or seconds of a text such as 10GB or 30s."""
    digits = text.rstrip("BkMGTsmhd ")
    return int(digits) * UNITS[text[len(digits) :].strip()]


class Limits:
    """What of a protected path is left alone: files by size and age, and other filesystems."""

    def __init__(self, max_size: int = 0, min_age: int = 0, max_age: int = 0, one_filesystem: bool = False) -> None:
        self._size, self._least, self._most = max_size, min_age, max_age
        self._one_filesystem = one_filesystem
        self._now = time.time()

    def leave(self, status: os.stat_result, device: int) -> bool:
        """Whether something is left alone, in a tree that lies on ``device``."""
        if stat.S_ISDIR(status.st_mode):
            return self._one_filesystem and status.st_dev != device
        if not stat.S_ISREG(status.st_mode):
            return False
        age = max(0.0, self._now - status.st_mtime)
        return (
            0 < self._size < status.st_size
            or (self._least > 0 and age < self._least + SLACK)
            or (self._most > 0 and age > self._most)
        )


def entries(root: str, excluded: Matcher, included: Matcher, limits: Limits | None = None) -> Iterator[dict[str, Any]]:
    """The entries of ``root`` in order of their paths; the root itself is ``.``."""
    limits = limits or Limits()
    device = os.stat(root).st_dev if os.path.exists(root) else 0
    found: list[tuple[dict[str, Any], tuple[int, int]]] = []
    names: dict[tuple[int, int], list[str]] = {}
    pending = [""]
    while pending:
        path = pending.pop()
        full = os.path.join(root, path) if path else root
        try:
            status = os.lstat(full)
        except FileNotFoundError:
            continue
        if limits.leave(status, device):
            found.append(({"path": path or ".", "left_alone": True}, (0, 0)))
            continue
        entry, identity = describe(full, path or ".", status), (status.st_dev, status.st_ino)
        found.append((entry, identity))
        if entry["type"] != "directory" and status.st_nlink > 1:
            names.setdefault(identity, []).append(path)
        if stat.S_ISDIR(status.st_mode):
            below = [
                os.path.join(path, name) for name in sorted(os.listdir(full), reverse=True)
                if not name.startswith(STAGING)
            ]  # fmt: skip
            pending += [name for name in below if included(name) or not excluded(_shown(root, name))]
    for entry, identity in found:
        if len(names.get(identity, ())) > 1:
            entry["link"] = names[identity][0]
        yield entry


def _shown(root: str, path: str) -> str:
    return path + "/" if os.path.isdir(os.path.join(root, path)) else path


def describe(full: str, path: str, status: os.stat_result) -> dict[str, Any]:
    """One entry."""
    entry: dict[str, Any] = {
        "path": path,
        "type": TYPES.get(stat.S_IFMT(status.st_mode), "other"),
        "mode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "mtime_ns": status.st_mtime_ns,
    }
    if entry["type"] == "file":
        entry["size"] = status.st_size
        with open(full, "rb") as file:
            entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    elif entry["type"] == "symlink":
        entry["target"] = os.readlink(full)
    elif entry["type"] == "device":
        entry["device"] = [os.major(status.st_rdev), os.minor(status.st_rdev)]
    try:
        names = sorted(os.listxattr(full, follow_symlinks=False))
        entry["xattrs"] = {name: os.getxattr(full, name, follow_symlinks=False).hex() for name in names}
    except OSError:
        entry["xattrs"] = {}
    return entry


def main() -> None:
    """Print the manifest of a tree."""
    parser = argparse.ArgumentParser(description="List a tree by content and metadata.")
    parser.add_argument("root")
    parser.add_argument("--as", dest="name", default="", help="name of the tree in the list; default: its path")
    parser.add_argument("--exclude", action="append", default=[], help="pattern of paths to leave out")
    parser.add_argument("--include", action="append", default=[], help="pattern of paths to list all the same")
    parser.add_argument("--max-size", type=number, default=0, help="files that are larger are left alone")
    parser.add_argument("--min-age", type=number, default=0, help="files that are younger are left alone")
    parser.add_argument("--max-age", type=number, default=0, help="files that are older are left alone")
    parser.add_argument("--one-filesystem", action="store_true", help="what is mounted below is left alone")
    options = parser.parse_args()
    limits = Limits(options.max_size, options.min_age, options.max_age, options.one_filesystem)
    for entry in entries(options.root, matcher(options.exclude), matcher(options.include), limits):
        entry["root"] = options.name or options.root
        sys.stdout.write(json.dumps(entry, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
