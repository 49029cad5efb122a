"""The version of what a node keeps in its state directory, and the way from an older one.

A directory is brought to today's version before anything in it is used; one that a newer farshore has written is left
alone. Parts that can be made anew (indexes, registers) have versions of their own.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from farshore import durable
from farshore.dbm.replica.mark import Mark, Position
from farshore.errors import StateError
from farshore.log import Log

_log = Log(__name__)
#: 1: a replica wrote down which transaction it had begun. 2: it has a journal, and a mark in it.
VERSION = 2
_NAME = "version"
_NUMBER = struct.Struct(">Q")


def open_state(directory: Path) -> int:
    """Be the only user of a node's state directory, of today's version; returns what holds the lock while it is open.

    Raises StateError, and then nothing in it was changed, or the next call goes on where this one ended.
    """
    handle = durable.lock(directory, "another process uses it")
    try:
        _migrate(directory)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _migrate(directory: Path) -> None:
    version = _version(directory)
    if version > VERSION:
        raise StateError(
            directory,
            f"is of version {version}, which a newer farshore has written; this one reads versions up to {VERSION}. "
            "Install the newer one again, or give this one an empty directory: then all is compared anew",
        )
    if version < 2:
        for group in sorted(directory.glob("groups/*/")):
            _mark_what_was_begun(group)
    if version < VERSION:
        durable.write(directory / _NAME, b"%d\n" % VERSION)
        if version:
            _log.info("state brought up to date", directory=str(directory), version=VERSION, was=version)


def _version(directory: Path) -> int:
    """The version of a state directory; 0 when there is nothing in it."""
    path = directory / _NAME
    try:
        text = path.read_text("ascii")
    except FileNotFoundError:
        # Version 1 did not say so.
        return 1 if (directory / "groups").exists() else 0
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(path, f"is damaged: {error}") from error
    if not text.strip().isdecimal():
        raise StateError(path, f"is damaged: {text[:20]!r}; allowed: a number up to {VERSION}")
    return int(text)


def _mark_what_was_begun(group: Path) -> None:
    """The last transaction that was begun, in full or in part: the source compares what may be torn."""
    begun = group / "started"
    try:
        data = begun.read_bytes()
        if len(data) >= _NUMBER.size:
            mark = Mark(group / "applied")
            try:
                if mark.fresh:
                    mark.move(Position(int(_NUMBER.unpack(data[: _NUMBER.size])[0])))
            finally:
                mark.close()
        begun.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StateError(begun, error.strerror or str(error)) from error
