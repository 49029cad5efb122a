"""Control groups: what belongs to a host is what is in its group, so killing it misses nothing."""

from __future__ import annotations

import os
import shlex
from contextlib import AbstractContextManager
from pathlib import Path

from .paths import RUN_ROOT
from .proc import locked, run, wait_for

_OWN_MOUNT = RUN_ROOT / ".cgroup2"


def _mount_point() -> Path:
    """Where the machine has cgroup2 mounted; mounted by the lab itself where it is nowhere."""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    _OWN_MOUNT.mkdir(parents=True, exist_ok=True)
    run(["mount", "-t", "cgroup2", "cgroup2", str(_OWN_MOUNT)])
    return _OWN_MOUNT


def group(lab: str, host: str | None = None) -> Path:
    """The directory of a lab's or a host's group, which need not exist."""
    path = _mount_point() / "farshore-lab" / lab
    return path / host if host else path


def enter_command(lab: str, host: str, part: str) -> str:
    """Shell words that move the shell into a part of the host's group, made for it."""
    directory = group(lab, host) / part
    with _changing_top():
        directory.mkdir(parents=True, exist_ok=True)
    return f"echo $$ > {shlex.quote(str(directory / 'cgroup.procs'))}"


def pids(directory: Path) -> list[int]:
    """All processes in a group and below."""
    found: list[int] = []
    for path, _, _ in os.walk(directory):
        try:
            text = (Path(path) / "cgroup.procs").read_text(encoding="ascii")
        except OSError:  # removed meanwhile, or of a kind that can't be read
            continue
        found += [int(word) for word in text.split()]
    return found


def kill(directory: Path) -> None:
    """End every process of the group at once, with SIGKILL, and remove the group."""
    if not directory.is_dir():
        return
    (directory / "cgroup.kill").write_text("1", encoding="ascii")
    wait_for(lambda: not pids(directory), f"the processes of {directory} to end", timeout=20)
    remove(directory)


def remove(directory: Path) -> None:
    """Remove an empty group with what is below it; nothing happens where it is gone."""

    def removed() -> bool:
        for path, _, _ in os.walk(directory, topdown=False):
            try:
                os.rmdir(path)
            except FileNotFoundError:
                continue
            except OSError:  # a process that is just being reaped still counts
                return False
        return True

    wait_for(removed, f"the control group {directory} to become empty", timeout=10)


def tidy() -> None:
    """Remove what all labs share, once the last one is gone."""
    with _changing_top():
        try:
            (_mount_point() / "farshore-lab").rmdir()
        except FileNotFoundError:
            pass
        except OSError:  # another lab is there
            return
        if os.path.ismount(_OWN_MOUNT):
            run(["umount", str(_OWN_MOUNT)])


def _changing_top() -> AbstractContextManager[None]:
    """The lock that keeps a lab that comes from meeting the last one that goes."""
    return locked(RUN_ROOT / ".cgroup.lock", "permission to change control groups", timeout=60)
