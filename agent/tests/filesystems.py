"""For tests: filesystems in memory, on images, and bound ones, where root may mount them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

_Entered = TypeVar("_Entered")

#: How a filesystem is made, and the Debian package of the program.
_MAKERS = {
    "btrfs": (["mkfs.btrfs", "-q"], "btrfs-progs"),
    "xfs": (["mkfs.xfs", "-q", "-m", "reflink=1"], "xfsprogs"),
    "ext4": (["mkfs.ext4", "-q", "-F"], "e2fsprogs"),
}

#: What mount(8) says where a machine cannot have a filesystem; whatever else it says is the test's own fault.
_REASONS = ("permission denied", "not permitted", "superuser", "unknown filesystem type", "loop device")


class CannotMount(Exception):
    """Why there is no such filesystem here."""


@contextlib.contextmanager
def filesystem(kind: str, base: Path, megabytes: int = 512, options: str = "loop") -> Iterator[Path]:
    """A new filesystem, mounted at ``base/KIND``; gone afterwards. Raises CannotMount."""
    maker, package = _MAKERS[kind]
    if shutil.which(maker[0]) is None:
        raise CannotMount(f"{maker[0]} is not installed (package {package})")
    image, where = base / f"{kind}.image", base / kind
    where.mkdir()
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    subprocess.run([*maker, str(image)], check=True, capture_output=True)
    try:
        with _mounted(where, "-o", options, str(image)):
            yield where
    finally:
        image.unlink()


@contextlib.contextmanager
def filesystem_or_skip(kind: str, base: Path, megabytes: int = 512) -> Iterator[Path]:
    """As ``filesystem``; where there can be none, the test is skipped with the reason."""
    with _or_skip(filesystem(kind, base, megabytes)) as where:
        yield where


@contextlib.contextmanager
def mounted(at: Path | bytes, *arguments: str) -> Iterator[None]:
    """As ``mount ARGUMENTS AT``, without arguments one in memory; gone afterwards, if the test has left it there.

    The directory is made. Where nothing can be mounted, the test is skipped with the reason.
    """
    with _or_skip(_mounted(at, *(arguments or ("-t", "tmpfs", "none")))):
        yield


@contextlib.contextmanager
def _or_skip(wanted: contextlib.AbstractContextManager[_Entered]) -> Iterator[_Entered]:
    import pytest

    with contextlib.ExitStack() as stack:
        try:
            entered = stack.enter_context(wanted)
        except CannotMount as error:
            pytest.skip(str(error))
        yield entered


@contextlib.contextmanager
def _mounted(at: Path | bytes, *arguments: str) -> Iterator[None]:
    if os.geteuid() != 0:
        raise CannotMount("only root can mount")
    os.makedirs(at, exist_ok=True)
    done = _run("mount", *arguments, at)
    if done.returncode and any(reason in done.stderr for reason in _REASONS):
        raise CannotMount(f"nothing can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        _unmount(at)


def _unmount(at: Path | bytes) -> None:
    """What still looks at it has a moment to end; after that it is unmounted all the same."""
    for _ in range(10):
        done = _run("umount", at)
        if done.returncode == 0 or "not mounted" in done.stderr or not os.path.lexists(at):
            return
        time.sleep(0.1)
    subprocess.run(["umount", "--lazy", at], check=True)


def _run(*command: str | Path | bytes) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
