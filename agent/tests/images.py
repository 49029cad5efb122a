"""For tests: filesystems on images, where root may mount them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

#: How a filesystem is made, and the Debian package of the program.
_MAKERS = {
    "btrfs": (["mkfs.btrfs", "-q"], "btrfs-progs"),
    "xfs": (["mkfs.xfs", "-q", "-m", "reflink=1"], "xfsprogs"),
    "ext4": (["mkfs.ext4", "-q", "-F"], "e2fsprogs"),
}


class CannotMount(Exception):
    """Why there is no such filesystem here."""


@contextlib.contextmanager
def filesystem(kind: str, base: Path, megabytes: int = 512, options: str = "loop") -> Iterator[Path]:
    """A new filesystem, mounted at ``base/KIND``; gone afterwards. Raises CannotMount."""
    maker, package = _MAKERS[kind]
    if shutil.which(maker[0]) is None:
        raise CannotMount(f"{maker[0]} is not installed (package {package})")
    if os.geteuid() != 0:
        raise CannotMount("only root can mount an image")
    image, where = base / f"{kind}.image", base / kind
    where.mkdir()
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    subprocess.run([*maker, str(image)], check=True, capture_output=True)
    mounted = subprocess.run(["mount", "-o", options, str(image), str(where)], capture_output=True, text=True)
    if mounted.returncode != 0:
        raise CannotMount(f"no {kind} on a loop device can be had: {mounted.stderr.strip()}")
    try:
        yield where
    finally:
        _unmount(where)
        image.unlink()


@contextlib.contextmanager
def filesystem_or_skip(kind: str, base: Path, megabytes: int = 512) -> Iterator[Path]:
    """As ``filesystem``; where there can be none, the test is skipped with the reason."""
    import pytest

    with contextlib.ExitStack() as stack:
        try:
            where = stack.enter_context(filesystem(kind, base, megabytes))
        except CannotMount as error:
            pytest.skip(str(error))
        yield where


def _unmount(where: Path) -> None:
    """What still looks at it has a moment to end; after that it is unmounted all the same."""
    for _ in range(50):
        if subprocess.run(["umount", str(where)], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "--lazy", str(where)], check=True)
