"""The control API: what a gateway's monitor, or the command line, may ask of a daemon.

A request is one frame, its answer is one frame (``dbm.wire`` has the framing). The same requests travel over
TLS between hosts, where the certificate says who asks, and over the Unix socket of the daemon, where the socket's
permissions do. Every request is idempotent. A request that changes the owner carries the epoch, and one with
an epoch lower than the node knows is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from farshore.config import Side


class _Message(msgspec.Struct, frozen=True, tag_field="t", omit_defaults=True, forbid_unknown_fields=True):
    """Common settings of all messages."""


#: A time limit in seconds, a week at most. Neither infinity nor NaN, which no timer survives.
Seconds = Annotated[float, msgspec.Meta(ge=0, le=7 * 86400)]

# --- requests to a node ------------------------------------------------------------------------


class StatusRequest(_Message, frozen=True, tag="status?"):
    """How are you? A peer is told of the groups that it has a part in, a gateway of all."""


class SetOwner(_Message, frozen=True, tag="set-owner"):
    """From ``epoch`` on, ``owner``'s data is the truth for ``group``. Gateways and the local administrator only.

    The node on the owner's side becomes the source and, with ``units``, starts the group's units before it answers;
    the other becomes the replica: it stops the group's units first.
    """

    group: str
    owner: Side
    epoch: int
    units: bool = True


class Freeze(_Message, frozen=True, tag="freeze"):
    """The owner stops the group's units and answers Done when every change is durable on the other side."""

    group: str
    epoch: int
    timeout: Seconds


class Thaw(_Message, frozen=True, tag="thaw"):
    """Take a freeze back: start the group's units again."""

    group: str
    epoch: int


class Flush(_Message, frozen=True, tag="flush"):
    """Answer Done when the other side's tree has all changes made before the call. group "" means all.

    ``durable``: answer already when they are durable there.
    """

    timeout: Seconds
    group: str = ""
    durable: bool = False


class Pause(_Message, frozen=True, tag="pause"):
    """Stop watching and sending for ``group`` ("" means all). Local administrator only."""

    group: str = ""


class Resume(_Message, frozen=True, tag="resume"):
    """Watch and send again; what changed in between is found and sent."""

    group: str = ""


class Approve(_Message, frozen=True, tag="approve"):
    """Apply what the brake holds of ``group`` on this replica. Local administrator only."""

    group: str


class Reject(_Message, frozen=True, tag="reject"):
    """Set aside what the brake holds of ``group``, and hold what follows until Approve or a change of the owner.

    Local administrator only.
    """

    group: str


# --- requests to the monitor ---------------------------------------------------------------------


class Wish(_Message, frozen=True, tag="wish"):
    """An operator's wish: it is one of the facts that the next decision looks at."""

    group: str
    want: Literal["failover", "failback", "recover", "none"]


Request = StatusRequest | SetOwner | Freeze | Thaw | Flush | Pause | Resume | Approve | Reject | Wish

# --- answers -------------------------------------------------------------------------------------


class GroupStatus(msgspec.Struct, frozen=True):
    """One group as a node sees it. Ages and durations in seconds, sizes in bytes.

    ``state``: "unconfirmed" (epoch not confirmed since start), "replicating" (in step or sending), "syncing"
    (a full comparison is under way), "disconnected", "paused", "replica", "fenced" (the other side owns a
    newer epoch), "frozen", "held" (the brake waits for the administrator), "rejected", "error".
    ``rpo``: age of the oldest change that is not yet durable on the other side, 0 when there is none, None on
    the side that doesn't own the group. ``in_step``: this node owns the group and everything seen so far is
    durable on the other side. ``backlog_bytes``: what this replica has made durable and not applied to its tree yet.
    ``history_since``: seconds since the epoch of the oldest state that this replica can go back to; ``history_bytes``:
    what its history takes. ``held``: why this replica does not apply what it receives until the administrator has
    decided, "" when it does; ``held_transactions`` wait since ``held_since`` (seconds since the Unix epoch, else 0).
    """

    group: str
    side: Side
    owner: Side
    epoch: int
    state: str
    reason: str
    connected: bool
    in_step: bool
    rpo: float | None
    backlog_paths: int
    seq: int
    sent_bytes: int
    units: dict[str, str]
    problems: list[str]
    synced_once: bool
    backlog_bytes: int = 0
    history_since: float | None = None
    history_bytes: int = 0
    held: str = ""
    held_transactions: int = 0
    held_since: float = 0.0


class NodeStatus(_Message, frozen=True, tag="node-status"):
    """Answer of ``farshore-node``."""

    node: str
    version: str
    uptime: float
    groups: dict[str, GroupStatus]


class ServiceHealth(msgspec.Struct, frozen=True):
    """Last known answers of one service: ``healthy`` after rise and fall; None before the first verdict."""

    service: str
    target: str
    healthy: bool | None
    detail: str


class SwitchStatus(msgspec.Struct, frozen=True):
    """One group as the monitor sees it; ``phase`` and ``reason`` are the last decision and its why."""

    group: str
    phase: str
    owner: Side
    epoch: int
    reason: str
    since: float
    served_by: Side
    wish: str
    health: list[ServiceHealth]
    local: GroupStatus | None
    backup: GroupStatus | None
    rules_in_place: bool


class MonitorStatus(_Message, frozen=True, tag="monitor-status"):
    """Answer of ``farshore-monitor``. ``events`` are the last ones, oldest first, each "time group text"."""

    node: str
    version: str
    uptime: float
    tunnel: str
    groups: dict[str, SwitchStatus]
    events: list[str]


class Done(_Message, frozen=True, tag="done"):
    """The request was carried out."""

    detail: str = ""


class Failed(_Message, frozen=True, tag="failed"):
    """The request was not carried out; ``code`` is the exit code of the error behind it."""

    reason: str
    code: int = 1


Answer = NodeStatus | MonitorStatus | Done | Failed
