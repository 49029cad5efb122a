"""For tests: a source and a replica in this process, whose watcher and sender can be held, failed and listened to.

All methods are called from the test's thread and return when what they ask for is done; the nodes have a loop in a
thread of their own. While the watcher is held, what changes is only queued by the kernel; while the sender is held,
what the watcher tells is only marked. So a test decides what has happened before either of them looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from nodes import GENEROUS, free_ports
from trees import differences

from farshore.cli.mirror import make_keys
from farshore.config import BrakeConfig, Endpoint, NodeConfig, NodeGroup, NodeRef, PathConfig, Tls
from farshore.daemons.node import Node
from farshore.dbm import group as groups
from farshore.dbm import wire
from farshore.dbm.group import Group
from farshore.dbm.messages import FromSource, Ping
from farshore.dbm.sender import Sender
from farshore.fmm import Hint, Root, Watcher, feed, make_watcher
from farshore.fmm.patterns import Filter

T = TypeVar("T")
_MESSAGES: wire.Codec[FromSource] = wire.Codec(FromSource)


class Held:
    """A watcher that stops before its next look at the kernel's queue for as long as a test wants, or that fails."""

    def __init__(self, watcher: Watcher, mirrored: Mirrored) -> None:
        self.watcher = watcher
        self._mirrored = mirrored

    def read(self, timeout: float) -> Sequence[Hint]:
        """See Watcher."""
        mirrored = self._mirrored
        if not mirrored.watching.is_set():
            mirrored.parked.set()
            mirrored.watching.wait()
        if mirrored.fails:
            mirrored.fails = False
            raise OSError(errno.EIO, "the watcher fails, as a test wants it")
        return self._note(self.watcher.read(timeout))

    def drain(self) -> Sequence[Hint]:
        """See Watcher."""
        return self._note(self.watcher.drain())

    def _note(self, hints: Sequence[Hint]) -> Sequence[Hint]:
        self._mirrored.hints += hints
        return hints

    def __getattr__(self, name: str) -> Any:
        return getattr(self.watcher, name)


class Listening(Sender):
    """A sender that tells what it sends."""

    heard: Callable[[FromSource, int], None]

    async def send(self, frames: list[bytes]) -> None:
        """See Sender."""
        for frame in frames:
            message = _MESSAGES.decode(frame[4:], "test")
            if not isinstance(message, Ping):
                self.heard(message, len(frame))
        await super().send(frames)


class Mirrored:
    """Trees ``sources`` below ``base``, watched by ``engine``, and their ``replicas``.

    ``sent`` holds the messages of the source since ``flush`` ended last, ``hints`` those of the watcher.
    """

    def __init__(self, base: Path, engine: str, roots: int = 1, exclude: tuple[str, ...] = ()) -> None:
        self.base = base
        self.engine = engine
        self.exclude = exclude
        self.sources = [base / f"source{number}" for number in range(roots)]
        self.replicas = [base / f"replica{number}" for number in range(roots)]
        self.hints: list[Hint] = []
        self.sent: list[FromSource] = []
        self.sent_bytes = 0
        self.watching = threading.Event()
        self.watching.set()
        self.parked = threading.Event()
        self.fails = False
        self._sending: threading.Event | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mirrored", daemon=True)
        self._thread.start()
        self._patches = contextlib.ExitStack()
        patches = self._patches
        patches.enter_context(mock.patch.object(groups, "make_watcher", self._make_watcher))
        patches.enter_context(mock.patch.object(groups, "Sender", self._make_sender))
        patches.enter_context(mock.patch.object(groups, "_RETRY_SECONDS", 0.01))
        patches.enter_context(mock.patch.object(feed, "_RETRY_SECONDS", 0.01))
        for tree in self.sources:
            tree.mkdir(parents=True)
        make_keys(base / "pki", ("local", "remote"))
        ports = dict(zip(("local", "remote"), free_ports(2), strict=True))
        self._configs = {
            "local": self._config("local", "remote", ports, self.sources),
            "remote": self._config("remote", "local", ports, self.replicas),
        }
        self.local: Node | None = None
        self.remote = Node(self._configs["remote"])
        self.run(self.remote.start(None))
        self.start()
        self.run(self.remote.groups["web"].set_owner("local", 1, False))
        self.run(self.group.set_owner("local", 1, False))

    def _config(self, side: Any, other: str, ports: dict[str, int], trees: list[Path]) -> NodeConfig:
        keys = self.base / "pki"
        group = NodeGroup(
            side=side,
            peer=NodeRef(other, "127.0.0.1", ports[other]),
            paths=tuple(
                PathConfig(f"/srv/{number}", str(tree), exclude=self.exclude) for number, tree in enumerate(trees)
            ),
            # What changes in a test is most of a tree.
            brake=BrakeConfig("off"),
        )
        tls = Tls(keys / "ca.crt", keys / f"{side}.crt", keys / f"{side}.key")
        return NodeConfig(
            side, Endpoint("127.0.0.1", ports[side]), tls, {"web": group}, state_dir=self.base / f"{side}-state"
        )

    def _make_watcher(self, engine: str, roots: Sequence[Root], **options: Any) -> Any:
        return Held(make_watcher(self.engine, roots, **options), self)

    def _make_sender(self, *arguments: Any, **options: Any) -> Sender:
        made = Listening(*arguments, **options)
        made.heard = self._hear
        return made

    def _hear(self, message: FromSource, size: int) -> None:
        self.sent.append(message)
        self.sent_bytes += size

    # --- what a test has done

    @property
    def group(self) -> Group:
        """The source's group."""
        assert self.local is not None, "the source is off"
        return self.local.groups["web"]

    @property
    def sender(self) -> Sender:
        """The source's sender."""
        sender = self.group._sender
        assert sender is not None
        return sender

    @property
    def _feed(self) -> feed.Feed:
        found = self.group._feed
        assert found is not None
        return found

    def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the watcher's thread does at its next look."""
        deadline = time.monotonic() + GENEROUS
        while not condition():
            assert time.monotonic() < deadline, self._feed.problems()
            # The one that is woken may have failed meanwhile, and another come.
            self._feed._watcher.wake()
            time.sleep(0.002)

    def run(self, awaited: Coroutine[Any, Any, T]) -> T:
        """Have something done in the nodes' loop."""
        return asyncio.run_coroutine_threadsafe(awaited, self._loop).result(3 * GENEROUS)

    def start(self) -> None:
        """Start the source."""
        self.local = Node(self._configs["local"])
        self.run(self.local.start(None))

    def stop(self) -> None:
        """Stop the source, as SIGTERM does."""
        self.release()
        if self.local is not None:
            self.run(self.local.stop())
            self.local = None

    def pause(self) -> None:
        """As ``farshore pause``, once something is watched."""
        self.release()
        self._until(lambda: self._feed.watching)
        self.run(self.group.pause())

    def resume(self) -> None:
        """As ``farshore resume``."""
        self.run(self.group.resume())

    def hold_watcher(self) -> None:
        """Return when the watcher has stopped to look at what changes."""
        if not self.watching.is_set():
            return
        self.parked.clear()
        self.watching.clear()
        self._until(self.parked.is_set)

    def hold_sender(self) -> None:
        """Return when nothing more is planned."""
        if self._sending is None:
            held, self._sending = threading.Event(), threading.Event()
            free = self._sending

            def hold() -> None:
                held.set()
                free.wait()

            self.sender._worker.submit(hold)
            assert held.wait(GENEROUS)

    def release_watcher(self) -> None:
        """Let the watcher look."""
        self.watching.set()

    def release_sender(self) -> None:
        """Let what is marked be sent."""
        if self._sending is not None:
            self._sending.set()
            self._sending = None

    def release(self) -> None:
        """Let both go on."""
        self.watching.set()
        self.release_sender()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for what one of the nodes does."""
        deadline = time.monotonic() + GENEROUS
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def fail(self) -> None:
        """Let the watcher fail; returns when another one watches."""
        self.release()
        failing = self._feed._watcher
        self.fails = True
        self._until(lambda: self._feed.watching and self._feed._watcher is not failing)

    def cut(self) -> None:
        """Cut the connection; the source makes another."""
        self.release()
        self.run(self.remote.groups["web"]._end_session())

    def flush(self) -> None:
        """As ``farshore flush``: all that was changed before is in the replica's trees then."""
        self.release()
        self.run(self.group.flush(GENEROUS))

    def listen(self) -> None:
        """Forget what was sent and told until now."""
        self.hints.clear()
        self.sent.clear()
        self.sent_bytes = 0

    def differences(self) -> list[str]:
        """What differs between the trees; empty when they are identical."""
        found = []
        for source, replica in zip(self.sources, self.replicas, strict=True):
            allows = Filter(Root(os.fsencode(source), exclude=self.exclude)).allows
            found += [
                f"{source.name}: {line}" for line in differences(os.path.realpath(source), replica, allows=allows)
            ]
        return found

    def check(self) -> None:
        """After a flush, the trees must be identical."""
        self.flush()
        found = self.differences()
        assert not found, found

    def close(self) -> None:
        """End both nodes."""
        try:
            self.stop()
            self.run(self.remote.stop())
        finally:
            self._patches.close()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(GENEROUS)
            self._loop.close()


# --- the kernel's limits


def limits(engine: str) -> Path:
    """Where the kernel's limits for an engine are."""
    return Path("/proc/sys/fs", engine)


@contextlib.contextmanager
def lowered(engine: str, name: str, value: int) -> Iterator[None]:
    """Inside, one of the kernel's limits is ``value``; raises OSError when that may not be changed."""
    path = limits(engine) / name
    # Tests of several processes must not take each other's value for the true one.
    with open(Path(tempfile.gettempdir(), "farshore-limits.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = path.read_text()
        path.write_text(f"{value}\n")
        try:
            yield
        finally:
            path.write_text(before)


def can_lower(engine: str) -> bool:
    """Whether these limits may be changed here."""
    return os.geteuid() == 0 and os.access(limits(engine) / "max_queued_events", os.W_OK)
