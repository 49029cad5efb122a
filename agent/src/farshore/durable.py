"""Small state that must survive a crash: a file replaced as a whole, a directory with one writer."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from farshore.errors import StateError

#: Another value after each boot of the machine (random(4)).
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace ``path``: after a crash it holds either what it held or ``data``. Raises StateError."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(data)
            # What may read it does not depend on the umask, nor on what an earlier attempt has left.
            os.fchmod(fd, mode)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StateError(path, error.strerror or str(error)) from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable; raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def boot_id() -> str:
    """Names the time since this machine was started: what was not made durable before it may be lost."""
    return BOOT_ID.read_text().strip()


def lock(directory: Path, taken: str) -> int:
    """Make ``directory`` and be its only writer; returns the descriptor that holds the lock while it is open.

    Raises StateError, with ``taken`` as the reason when another process holds it.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(directory, error.strerror or str(error)) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise StateError(directory, taken) from None
    return handle
