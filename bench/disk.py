"""File systems to measure on: XFS with reflink whose device lies in memory, so that no disk's mood is measured."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.processes import BenchError, need, run

#: mkfs.xfs wants no less.
_LEAST = 512 << 20


@contextlib.contextmanager
def xfs(name: str, size: int, block: int = 4096) -> Iterator[Path]:
    """A fresh XFS of `size` bytes, in blocks of `block` bytes, mounted where only this process and its children see it.

    The image's name is gone as soon as it is mounted, and the mount with the last process: whatever the harness dies
    of, nothing stays.
    """
    need("mkfs.xfs", "mount", "losetup")
    if os.geteuid() != 0:
        raise BenchError("only root can mount the file system to measure on")
    size = max(size, _LEAST)
    free = shutil.disk_usage("/dev/shm").free
    if free < size // 2:
        raise BenchError(f"/dev/shm has {free >> 20} MiB left; {name} may need {size >> 20}; try a smaller --scale")
    handle, image = tempfile.mkstemp(prefix="farshore-bench-", suffix=".img", dir="/dev/shm")
    place = Path(tempfile.mkdtemp(prefix=f"farshore-bench-{name}-"))
    try:
        os.truncate(handle, size)
        run(["mkfs.xfs", "-q", "-m", "reflink=1,crc=1", "-b", f"size={block}", image])
        run(["mount", "-o", "loop", image, str(place)])
    except BaseException:
        place.rmdir()
        raise
    finally:
        os.close(handle)
        os.unlink(image)
    try:
        yield place
    finally:
        run(["umount", str(place)], allowed=(0, 32))
        with contextlib.suppress(OSError):
            if os.path.ismount(place):
                run(["umount", "-l", str(place)])
            place.rmdir()


@contextlib.contextmanager
def directory(parent: Path) -> Iterator[Path]:
    """A fresh directory on the machine's own disk."""
    place = Path(tempfile.mkdtemp(prefix="farshore-bench-", dir=parent))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def trim(place: Path) -> None:
    """Give freed blocks of an image back to memory."""
    with contextlib.suppress(BenchError):
        run(["fstrim", str(place)])


def kind(place: Path) -> str:
    """The type of the file system that a path lies on."""
    with contextlib.suppress(BenchError):
        return run(["findmnt", "-n", "-o", "FSTYPE", "-T", str(place)]).output.strip()
    return "unknown"
