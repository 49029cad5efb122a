"""Run other programs: always with a timeout, and with errors that show what they said."""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class LabError(Exception):
    """Something the lab's user should read; shown without a traceback."""


def run(
    argv: Sequence[str],
    *,
    timeout: float = 30,
    check: bool = True,
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return its result with captured output.

    Raises LabError, naming the command and the end of its output, when the program is missing, takes longer than
    `timeout` seconds, or (with `check`) exits with another code than 0.
    """
    try:
        done = subprocess.run(
            list(argv),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError as error:
        raise LabError(f"{argv[0]} is not installed: run `tests/lab/lab deps`") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"no end after {timeout:g} s: {shlex.join(argv)}") from error
    if check and done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise LabError(f"exit code {done.returncode}: {shlex.join(argv)}\n{said}")
    return done


def wait_for(condition: Callable[[], bool], what: str, *, timeout: float, interval: float = 0.05) -> None:
    """Poll `condition` until it holds; LabError naming `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout:g} s in vain for {what}")
        time.sleep(interval)


@contextmanager
def locked(path: Path, what: str, *, timeout: float) -> Iterator[None]:
    """Hold an exclusive lock between processes on `path`; LabError naming `what` after `timeout` seconds.

    The kernel drops the lock when the holder dies, so a stale file never blocks anybody.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    while True:
        with path.open("a", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                # The holder before may have removed the file: then this lock is on nothing that others would see.
                if _is_open_as(path, handle.fileno()):
                    yield
                    return
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout:g} s in vain for {what}: another lab command has locked {path}")
        time.sleep(0.05)


def _is_open_as(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def tail(path: Path, lines: int = 25) -> str:
    """The last lines of a log file, or a remark that there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return f"({path} does not exist)"
    return "\n".join(text.splitlines()[-lines:])
