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


class History(_Message, frozen=True, tag="history"):
    """What can be gone back to of ``group``, or, with an absolute ``path`` of this server, what changed there.

    At most ``limit`` changes. Local administrator only.
    """

    group: str
    path: str = ""
    limit: int = 100


class Restore(_Message, frozen=True, tag="restore"):
    """Bring back ``path`` of ``group`` ("" means all) as it was after transaction ``seq`` or at ``time_ns``.

    Copies go to the directory ``to``, or, if that is "", in place, which the owner alone may. Answered when it is done;
    a node's status tells how far it is. Local administrator only.
    """

    group: str
    path: str = ""
    seq: int | None = None
    time_ns: int | None = None
    to: str = ""


class RestoreOnPromotion(_Message, frozen=True, tag="restore-on-promotion"):
    """When this replica of ``group`` becomes the owner, its trees are put back first, as Restore does it in place.

    To the state after transaction ``seq`` or at ``time_ns``; with ``cancel``, that is taken back. Local administrator
    only.
    """

    group: str
    seq: int | None = None
    time_ns: int | None = None
    cancel: bool = False


class Verify(_Message, frozen=True, tag="verify"):
    """Begin to compare source, index and replica of ``group`` ("" means all); the owner answers Done at once.

    How far it is, and what came out, is told by the group's status. ``contents``: also what the files hold; ``repair``:
    what differs on the replica is sent anew; ``from_source``: so is what changed on the source without a trace, which
    may be damage. ``rate`` is in bytes/s, 0: as fast as it goes, None: as configured. One that is under way with the
    same options is joined.
    """

    group: str = ""
    contents: bool = True
    repair: bool = True
    from_source: bool = False
    rate: float | None = None


class Explain(_Message, frozen=True, tag="explain"):
    """Is the absolute ``path`` of this server protected, and is its copy up to date? Local administrator only.

    Links in the directories above it are resolved, the path itself is not followed.
    """

    path: bytes


# --- requests to the monitor ---------------------------------------------------------------------


class Wish(_Message, frozen=True, tag="wish"):
    """An operator's wish: it is one of the facts that the next decision looks at."""

    group: str
    want: Literal["failover", "failback", "recover", "none"]


Request = (
    StatusRequest
    | SetOwner
    | Freeze
    | Thaw
    | Flush
    | Pause
    | Resume
    | Approve
    | Reject
    | History
    | Restore
    | RestoreOnPromotion
    | Verify
    | Explain
    | Wish
)

# --- answers -------------------------------------------------------------------------------------


class Drift(msgspec.Struct, frozen=True):
    """A path at which something differed.

    ``finding``: "replica" (it lost or changed what it had acknowledged), "index" (source and replica agreed, the
    index was wrong), "unseen" (the source had changed, and no event had told), "untraced" (the source's content
    changed, and nothing else of the file: damage, perhaps). ``differences`` says what of it, in words. ``repaired``:
    now all three say the same.
    """

    path: str
    finding: str
    differences: list[str]
    repaired: bool


class VerificationReport(msgspec.Struct, frozen=True):
    """A verification that has ended. Times in seconds since 1970, sizes in bytes.

    ``result``: "clean", "repaired", "drift" (something is not repaired) or "failed" with the ``reason``. ``findings``
    counts paths by finding, ``unrepaired`` those that differ still, ``busy`` those that could not be compared, as they
    changed all the time or cannot be read on the source, ``withheld`` those that cannot be replicated, as ``problems``
    tell. ``drifts`` names the first of them.
    """

    run: str
    scheduled: bool
    contents: bool
    started: float
    ended: float
    result: str
    reason: str
    paths: int
    read_source: int
    read_replica: int
    findings: dict[str, int]
    unrepaired: int
    busy: int
    withheld: int
    drifts: list[Drift]


class VerificationStatus(msgspec.Struct, frozen=True):
    """Verifications of a group on its owner. ``run`` is the one under way, "" when there is none.

    ``phase``: "waiting", "reading", "comparing", "repairing". ``paths`` and the bytes read are what it has come to;
    ``due`` is when the next one starts by itself, None: never.
    """

    run: str
    phase: str
    started: float
    paths: int
    read_source: int
    read_replica: int
    due: float | None
    last: VerificationReport | None


class WatchStatus(msgspec.Struct, frozen=True):
    """How the owner of a group watches it.

    ``state``: "watching", "starting", "partial" (some of it is scanned instead), "paused", or "failed" (nothing is
    watched); ``reason`` says why, and what to do, "" when all is well. ``directories`` are watched now, ``unwatched``
    ones are scanned. The kernel's queue ``overflows`` and its ``events`` count since this node became the owner or
    started; ``waiting_files`` are paths that were told of and not looked at yet.
    """

    engine: str
    state: str
    directories: int
    unwatched: int
    overflows: int
    events: int
    waiting_files: int
    reason: str


class GroupStatus(msgspec.Struct, frozen=True):
    """One group as a node sees it. Ages and durations in seconds, sizes in bytes.

    ``state``: "unconfirmed" (epoch not confirmed since start), "replicating" (in step or sending), "syncing"
    (a full comparison is under way), "disconnected", "paused", "replica", "fenced" (the other side owns a
    newer epoch), "frozen", "held" (the brake waits for the administrator), "rejected", "error".
    ``rpo``: age of the oldest change that is not yet durable on the other side, 0 when there is none, None on
    the side that doesn't own the group. ``in_step``: this node owns the group and everything seen so far is
    durable on the other side. ``backlog_bytes``: what this replica has made durable and not applied to its tree yet.
    ``history_since``: seconds since the epoch of the oldest state that this replica can go back to; ``history_bytes``:
    what its history takes; ``restoring``: how far a restore is, "" when none is under way. ``back_to``: this replica,
    when it becomes the owner, first takes the state after that transaction, which it reached at ``back_to_time``
    (seconds since the Unix epoch, 0: not known); None: it takes its last one. ``restored``: what was put in place since
    this node became the owner, and where is what was there. ``held``: why this replica does not apply what it receives
    until the administrator has decided, "" when it does; ``held_transactions`` wait since ``held_since`` (seconds since
    the Unix epoch, else 0). ``watch``: how the owner watches; None on the replica.
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
    restoring: str = ""
    back_to: int | None = None
    back_to_time: float = 0.0
    restored: str = ""
    held: str = ""
    held_transactions: int = 0
    held_since: float = 0.0
    verification: VerificationStatus | None = None
    watch: WatchStatus | None = None


class ConfigStatus(msgspec.Struct, frozen=True):
    """The configuration that a node runs by.

    ``since``: when it was read, in seconds since the Unix epoch. ``failed``: why a later one, or a group of this one,
    is not in force, "" when all is. ``restart``: keys that have changed and count only after a restart of the daemon.
    """

    since: float
    failed: str
    restart: list[str]


class NodeStatus(_Message, frozen=True, tag="node-status"):
    """Answer of ``farshore-node``; ``config`` is for the local administrator."""

    node: str
    version: str
    uptime: float
    groups: dict[str, GroupStatus]
    config: ConfigStatus | None = None


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


class Version(msgspec.Struct, frozen=True):
    """A change at a path: what the transaction ``seq``, made durable at ``time`` (seconds since the Unix epoch), did.

    ``was``: "nothing", "file", "directory", "link", "other", "metadata", or "moved", which is what can be gone back to;
    ``size`` and ``mtime`` are those of a file that was there. ``path`` is where it was then.
    """

    seq: int
    time: float
    was: str
    size: int
    mtime: float
    path: str


class Span(msgspec.Struct, frozen=True):
    """A part of the history: transactions ``first`` to ``last`` between two times, in seconds since the Unix epoch.

    ``exact``: every one of them can be gone back to, otherwise only the state before the first. ``size`` in bytes.
    """

    first: int
    last: int
    begin: float
    end: float
    exact: bool
    changes: int
    size: int


class HistoryAnswer(_Message, frozen=True, tag="history-is"):
    """Answer to History: ``spans``, the oldest first, or ``versions`` of a path, the newest first."""

    spans: list[Span]
    versions: list[Version]


class Explanation(_Message, frozen=True, tag="explanation"):
    """Answer to Explain. Sizes in bytes, times in seconds.

    ``path`` is what was looked at, ``root`` the protected path of ``group`` that it belongs to, ``peer`` the other
    node; all "" when it belongs to none, and ``near`` names the nearest protected paths. ``protected``: changes of it
    are sent; ``why`` says why not, or what takes it back: then ``option`` ("exclude" or "include"), ``number`` (from 1)
    and ``pattern`` are those of the pattern that decides.

    ``state``: "same" (``peer`` has it as it is), "waiting", "sending", "missing" (``peer`` has nothing there),
    "different" (and nobody has noticed yet), "young" (it is sent when it is as old as min_age), "kept" (it is gone
    here, or left alone, and ``peer`` has an earlier state), "absent" (it is neither here nor there), "replica" (this
    node has the copy), "unknown", or "" for what is not protected. ``reason`` says what holds it up. ``waiting`` is for
    how long it waits, ``durable_at`` when the last change that is durable there was sent (since the Unix epoch), as far
    as that is known. ``durable``: what is here, and below it, is durable there, and nothing has changed since.

    ``known_below`` and ``waiting_below`` count paths below a directory that the copy has, and that wait.
    """

    path: str
    group: str = ""
    root: str = ""
    peer: str = ""
    near: list[str] = []
    protected: bool = False
    why: str = ""
    option: str = ""
    number: int = 0
    pattern: str = ""
    state: str = ""
    reason: str = ""
    waiting: float | None = None
    durable: bool = False
    durable_at: float | None = None
    known_below: int | None = None
    waiting_below: int | None = None


class Failed(_Message, frozen=True, tag="failed"):
    """The request was not carried out; ``code`` is the exit code of the error behind it."""

    reason: str
    code: int = 1


Answer = NodeStatus | MonitorStatus | HistoryAnswer | Explanation | Done | Failed
