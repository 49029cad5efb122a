"""The brake of one replica: asked before each transaction is applied, it looks, judges, and remembers a hold."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from farshore import durable
from farshore.config import BrakeConfig
from farshore.dbm.messages import Operation
from farshore.dbm.replica.brake import Brake, Hold, Pass, Verdict, Warn
from farshore.dbm.replica.change import After, TreeSight, count, describe
from farshore.errors import StateError
from farshore.log import Log

_log = Log(__name__)
_FILE = "held.json"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Held:
    """Why changes are held, since when (seconds since the Unix epoch), and from which transaction on.

    ``rejected``: the administrator does not want them.
    """

    reason: str
    since: float
    first: int
    rejected: bool = False

    @property
    def state(self) -> str:
        """As GroupStatus has it."""
        return "rejected" if self.rejected else "held"


class Guard:
    """Guards the trees of ``group`` below ``roots``, with its memory of a hold in the directory ``state``.

    One thread at a time; ``held``, ``waiting`` and ``warning`` may be read from any. ``armed`` is what Brake takes:
    whether the tree has been filled. ``wall`` tells seconds since the Unix epoch. Raises StateError.
    """

    def __init__(
        self,
        group: str,
        config: BrakeConfig,
        roots: Sequence[bytes],
        state: Path,
        *,
        armed: bool,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._group = group
        self._config = config
        self._roots = list(roots)
        self._sight = TreeSight(roots)
        self._path = state / _FILE
        self._wall = wall
        #: What is held, None when nothing is.
        self.held = load(self._path)
        #: Transactions that were judged while it is so, since the start of this process.
        self.waiting = 0
        self._brake = Brake(config, clock, armed=armed, held=self.held.reason if self.held else "")
        self._counted = False

    @property
    def warning(self) -> str:
        """What of late was more than is allowed, where that is only warned of; "" otherwise."""
        return self._brake.warning

    def judge(self, seq: int, operations: Sequence[Operation], after: After) -> Verdict:
        """Whether transaction ``seq`` may be applied; asked once for each, in their order, before it is.

        A hold is durable before it is told. Raises StateError when it cannot be made so.
        """
        if self.held is not None:
            self.waiting += 1
            return Hold(self.held.reason)
        if self._config.mode == "off" or not operations:
            return Pass()
        self._count()
        try:
            change = describe(operations, self._sight, after)
        finally:
            self._sight.end()
        verdict = self._brake.judge(change)
        if isinstance(verdict, Hold):
            held = Held(verdict.reason, self._wall(), seq)
            store(self._path, held)
            self.held, self.waiting = held, 1
            _log.error("changes are held until the administrator decides", group=self._group, reason=held.reason)
        elif isinstance(verdict, Warn):
            _log.warning("an unusual change", group=self._group, reason=verdict.reason)
        return verdict

    def note(self, operations: Sequence[Operation], after: After) -> None:
        """These are going to be applied without being judged: they were approved, or are replayed after a crash."""
        if self._config.mode == "off" or not operations:
            return
        self._count()
        try:
            self._brake.note(describe(operations, self._sight, after))
        finally:
            self._sight.end()

    def in_step(self) -> None:
        """The tree has been filled."""
        self._brake.in_step()

    def approve(self) -> Held | None:
        """Hold nothing any more; returns what was held.

        If that was not rejected, the caller applies it, telling it by ``note``. If it was, the caller drops it and has
        the source compare everything, which is judged.
        """
        held = self.held
        if held is not None:
            store(self._path, None)
            self._brake.approve()
            self.held, self.waiting = None, 0
            _log.info("held changes are " + ("dropped" if held.rejected else "approved"), group=self._group)
        return held

    def reject(self) -> Held | None:
        """Set aside what is held, and hold on; returns it."""
        if self.held is not None and not self.held.rejected:
            rejected = replace(self.held, rejected=True)
            store(self._path, rejected)
            self.held = rejected
            _log.warning("held changes are rejected", group=self._group)
        return self.held

    def forget(self) -> None:
        """The owner has changed: what was held was another one's."""
        if self.held is not None:
            store(self._path, None)
            self._brake.approve()
            self.held, self.waiting = None, 0

    def _count(self) -> None:
        if not self._counted:
            try:
                self._brake.note_total(*count(self._sight, len(self._roots)))
            finally:
                self._sight.end()
            self._counted = True


def load(path: Path) -> Held | None:
    """What is held; None when nothing is. Raises StateError when the file is damaged."""
    try:
        data = json.loads(path.read_bytes())
        if data.pop("version") != _VERSION:
            raise StateError(str(path), f"is not of version {_VERSION}")
        return Held(**data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise StateError(str(path), f"is damaged: {error}") from error


def store(path: Path, held: Held | None) -> None:
    """Remember durably what is held; raises StateError."""
    if held is not None:
        durable.write(path, json.dumps(asdict(held) | {"version": _VERSION}).encode())
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StateError(str(path), error.strerror or str(error)) from error
