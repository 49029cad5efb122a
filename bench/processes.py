"""Run commands and daemons, with their CPU time; nothing that is started here outlives the harness."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNS = 0x00020000
_TICKS = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """Something that whoever runs the benchmarks should read; shown without a traceback."""


class TooSlow(BenchError):
    """A command was ended because it took too long."""


@dataclass(frozen=True)
class Finished:
    """A command that ended well: seconds of wall and of CPU (its children included), and what it printed."""

    seconds: float
    cpu: float
    output: str


def need(*programs: str) -> None:
    """Raise BenchError when a program is not installed."""
    missing = [p for p in programs if shutil.which(p) is None]
    if missing:
        raise BenchError(f"not installed: {', '.join(missing)}; run `make bench-deps`")


def run(
    words: Sequence[str], *, timeout: float = 600.0, log: Path | None = None, allowed: tuple[int, ...] = (0,)
) -> Finished:
    """Run a command to its end; raises BenchError with the end of its output, or TooSlow after `timeout` seconds."""
    with open(log or os.memfd_create("output"), "ab") as out:
        start = out.tell()
        began = time.monotonic()
        process = subprocess.Popen(
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        deadline = began + timeout
        pause = 0.0002
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                if time.monotonic() > deadline:
                    raise TooSlow(f"{words[0]}: no end after {timeout:g} s")
                # A poll, because wait4 is what tells the CPU time; short enough not to count.
                time.sleep(pause)
                pause = min(0.002, pause * 2)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        with open(f"/proc/self/fd/{out.fileno()}", "rb") as written:
            written.seek(start)
            text = written.read().decode("utf-8", "replace")
    if process.returncode not in allowed:
        raise BenchError(f"{' '.join(words)[:300]} ended with {process.returncode}:\n{text[-2000:]}")
    return Finished(seconds, usage.ru_utime + usage.ru_stime, text)


def die_with_parent() -> None:
    """In a child, before exec: be killed when the harness dies, whatever it dies of."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Daemon:
    """A process that runs beside the measurements; its output goes to a log file."""

    def __init__(
        self, words: Sequence[str], log: Path, *, control: bool = False, env: dict[str, str] | None = None
    ) -> None:
        self.words = list(words)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                self.words,
                stdin=subprocess.PIPE if control else subprocess.DEVNULL,
                stdout=subprocess.PIPE if control else out,
                stderr=out,
                text=True if control else None,
                env=None if env is None else os.environ | env,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    @property
    def pid(self) -> int:
        """Its process ID."""
        return self.process.pid

    def check(self) -> None:
        """Raise BenchError with the end of its log when it has ended."""
        if self.process.poll() is not None:
            raise BenchError(f"{Path(self.words[0]).name} ended with {self.process.returncode}:\n{tail(self.log)}")

    def cpu(self) -> float:
        """CPU seconds used so far by it and its descendants, those that have been waited for included."""
        return sum(map(cpu_of, descendants(self.pid)))

    def ask(self, line: str) -> str:
        """Send a line to a daemon that was started with ``control`` and return its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.check()
            raise
        return self.read()

    def read(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        text = str(self.process.stdout.readline())
        if not text:
            self.process.wait(5)
            self.check()
        return text.rstrip("\n")

    def stop(self, seconds: float = 20.0) -> None:
        """SIGTERM, and SIGKILL for it and its group when that doesn't help."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def cpu_of(pid: int) -> float:
    """CPU seconds (user and system) of a process, its threads, and the children it has waited for; 0 if it is gone."""
    try:
        # The clock of another process, as clock_getcpuclockid(3) makes it: nanoseconds, not ticks.
        own = time.clock_gettime((~pid << 3) | 2)
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return own + (int(fields[13]) + int(fields[14])) / _TICKS


def descendants(pid: int) -> list[int]:
    """A process and all that live of its children and theirs."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


def memory_of(pids: Sequence[int]) -> dict[str, float]:
    """MB (10**6 bytes) of processes now: ``rss`` and, with pages that are shared divided by their sharers, ``pss``.

    ``peak`` is the most that each one's ``rss`` has been. A process that is gone counts as nothing.
    """
    found = {"rss": 0.0, "pss": 0.0, "peak": 0.0}
    names = {"Rss:": "rss", "Pss:": "pss", "VmHWM:": "peak"}
    for pid in pids:
        with contextlib.suppress(OSError):
            for file in ("smaps_rollup", "status"):
                for line in Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8", errors="replace").splitlines():
                    words = line.split()
                    if words and words[0] in names:
                        found[names[words[0]]] += int(words[1]) * 1024 / 1e6
    return found


@contextlib.contextmanager
def sysctl(name: str, choose: Callable[[int], int]) -> Iterator[int]:
    """A kernel's number (``fs.inotify.max_user_watches``) is what `choose` makes of it, and is put back at the end."""
    path = Path("/proc/sys", *name.split("."))
    before = int(path.read_text(encoding="ascii"))
    wanted = choose(before)
    if wanted != before:
        path.write_text(f"{wanted}\n", encoding="ascii")
    try:
        yield wanted
    finally:
        if wanted != before:
            path.write_text(f"{before}\n", encoding="ascii")


def settle(cpu: Callable[[], float], *, most: float = 30.0, interval: float = 0.1, share: float = 0.05) -> None:
    """Wait until what `cpu` counts rests: what is done after an answer belongs to the one who gave it."""
    deadline = time.monotonic() + most
    before = cpu()
    while time.monotonic() < deadline:
        time.sleep(interval)
        now = cpu()
        if now - before <= share * interval:
            return
        before = now


def wait_until(condition: Callable[[], bool], what: str, *, timeout: float, interval: float = 0.05) -> None:
    """Poll a condition; raises TooSlow naming `what`."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TooSlow(f"waited {timeout:g} s in vain for {what}")
        time.sleep(interval)


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def syncfs(path: Path | str) -> None:
    """Make all of the file system that `path` lies on durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if _LIBC.syncfs(handle):
            raise OSError(ctypes.get_errno(), "syncfs", str(path))
    finally:
        os.close(handle)


def private_mounts() -> str:
    """Give this process its own view of mounts, which ends with it; returns a path to the view before, for nsenter."""
    before = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    if _LIBC.unshare(_CLONE_NEWNS):
        raise BenchError(f"unshare: {os.strerror(ctypes.get_errno())}; the benchmarks need root")
    run(["mount", "--make-rprivate", "/"])
    return f"/proc/{os.getpid()}/fd/{before}"


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return f"({path} can't be read)"
