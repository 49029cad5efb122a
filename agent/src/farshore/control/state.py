"""What the monitor must not forget: one small file per protection group, written before each step is taken."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import msgspec

from farshore import durable
from farshore.config import Side
from farshore.errors import StateError

Phase = Literal[
    "normal",  # the local server owns the group and serves the users
    "handing_over",  # the local server is asked to stop and to send its last changes
    "promoting",  # the backup server owns the group by the next epoch and is being told
    "verifying",  # the backup server has started the service; does it answer?
    "failed_over",  # the backup server serves the users
    "recovering",  # as before, and the data flows home
    "recovered",  # as before, and the local server is in step: what is missing is the leave to go back
    "freezing",  # the backup server is asked to stop and to send its last changes
    "returning",  # the local server owns the group by the next epoch, is being told, and must answer
]
Wanted = Literal["failover", "failback", "recover", "none"]

PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True, slots=True)
class GroupState:
    """Where a group stands. ``since`` is seconds since the Unix epoch, for people; decisions use other clocks.

    ``switched``: users are sent to the backup server. ``planned``: the running failover is an operator's and gives
    up rather than lose data. ``tries`` counts the failures of this phase's step, ``attempts`` all of them since
    the group was last settled, ``failbacks`` the failures of a local server that ran: each makes the way back later.
    """

    group: str
    phase: Phase = "normal"
    owner: Side = "local"
    epoch: int = 1
    since: float = 0.0
    reason: str = ""
    wish: Wanted = "none"
    switched: bool = False
    planned: bool = False
    tries: int = 0
    attempts: int = 0
    failbacks: int = 0


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is in the file of a group."""

    schema: Literal[1]
    state: GroupState


class StateStore:
    """Durable states in ``state_dir``; one process at a time holds it."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "monitor"
        self._lock = -1

    def open(self) -> None:
        """Make the directory and take its lock; raises StateError when another monitor has it."""
        self._lock = durable.lock(self.path, "another farshore-monitor is running on it")

    def close(self) -> None:
        """Release the lock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def load(self, group: str) -> GroupState:
        """The stored state of ``group``, or its first one; raises StateError for a file that makes no sense."""
        path = self.path / f"{group}.json"
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return GroupState(group)
        except OSError as error:
            raise StateError(path, error.strerror or str(error)) from error
        try:
            state = msgspec.json.decode(text, type=_File).state
            if state.group != group or state.epoch < 1:
                raise ValueError(f"group {state.group!r}, epoch {state.epoch}")
        except (ValueError, RecursionError) as error:
            raise StateError(
                path,
                f"is damaged ({error}); move it away, and the monitor takes owner and epoch over from the nodes"
                " when both of them answer",
            ) from error
        return state

    def save(self, state: GroupState) -> None:
        """Make ``state`` durable: after a crash the file holds the old state or this one; raises StateError."""
        body = msgspec.json.format(msgspec.json.encode(_File(1, state))) + b"\n"
        durable.write(self.path / f"{state.group}.json", body)
