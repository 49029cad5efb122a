"""What ``farshore explain`` tells of one path: whether it is protected, why not, and how its copy is."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from msgspec.structs import replace

from farshore.control.api import Explanation
from farshore.dbm.index import Index, Known, clamp_time
from farshore.dbm.planner import MAX_PATH, Planner
from farshore.dbm.replica import paths
from farshore.dbm.unkept import shown
from farshore.errors import UnsafePath
from farshore.fmm import limits
from farshore.fmm.dirty import Wait
from farshore.fmm.patterns import STAGING, Decision, Filter
from farshore.fmm.scanner import ABSENT, kind_of
from farshore.fmm.types import FileKind, Root

#: Protected paths that are named for a path that lies below none.
_MOST_NEAR = 3
_LONGEST_NAME = 255


@dataclass(frozen=True, slots=True)
class Place:
    """Where a path lies: ``below`` root number ``root`` of ``group``, or, if that is "", ``near`` some others."""

    path: bytes
    group: str = ""
    root: int = -1
    below: bytes = b""
    near: tuple[bytes, ...] = ()


def locate(path: bytes, roots: Iterable[tuple[str, int, bytes]]) -> Place:
    """Where an absolute path lies; ``roots`` are by group and number. Links in the directories above are resolved."""
    bare = path.rstrip(b"/") or b"/"
    name = os.path.basename(bare)
    if name in (b".", b".."):
        found = os.path.realpath(bare)
    else:
        found = os.path.join(os.path.realpath(os.path.dirname(bare)), name)
    known = list(roots)
    for group, number, root in known:
        above = os.path.join(os.path.realpath(os.path.dirname(root)), os.path.basename(root))
        for top in (above, os.path.realpath(root)):
            if found == top:
                return Place(root, group, number)
            if found.startswith(top + b"/"):
                below = found[len(top) + 1 :]
                return Place(root + b"/" + below, group, number, below)
    near = sorted({root for _, _, root in known}, key=lambda root: (-_common(root, found), root))
    return Place(found, near=tuple(near[:_MOST_NEAR]))


def _common(one: bytes, other: bytes) -> int:
    """How many directories two paths have in common."""
    pairs = zip(one.split(b"/"), other.split(b"/"), strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(one.count(b"/"), other.count(b"/")) + 1)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is here: ``status`` is None where nothing is. ``out`` says why it is not protected, "" when it is.

    ``young``: how many seconds are left until it is as old as it must be; 0: it is.
    """

    place: Place
    root: Root
    status: os.stat_result | None
    decision: Decision | None
    out: str
    young: float = 0.0

    @property
    def is_directory(self) -> bool:
        """Whether it is one."""
        return self.status is not None and stat.S_ISDIR(self.status.st_mode)


def look(root: Root, place: Place) -> Facts:
    """Look at a path, and ask patterns and limits. It takes system calls."""
    path, full = place.below, root.path + b"/" + place.below if place.below else root.path
    status, problem = None, ""
    try:
        status = os.lstat(full) if path else os.stat(full)
    except OSError as error:
        if error.errno not in ABSENT:
            problem = f"it cannot be looked at: {error.strerror or error}"
    is_directory = status is not None and stat.S_ISDIR(status.st_mode)
    filter = Filter(root)
    decision = filter.decision(path, is_directory)
    allowed = filter.allows(path, is_directory)
    out = _unnamed(root, path) or ("" if allowed else _excluded(root, path, decision)) or problem
    young = 0.0
    if status is not None and not out:
        out, young = _limited(root, path, status)
    return Facts(place, root, status, decision, out, young)


def _unnamed(root: Root, path: bytes) -> str:
    """Why nothing of this name is ever sent."""
    if path.startswith(STAGING) or b"/" + STAGING in path:
        return f"names that begin with {STAGING.decode()} are Farshore's own temporary files"
    try:
        paths.check(path)
    except UnsafePath:
        if len(path) > MAX_PATH:
            return f"its path below {shown(root.path)} has {len(path)} bytes; the replica takes at most {MAX_PATH}"
        longest = max(map(len, path.split(b"/")))
        return f"a name in it has {longest} bytes; the replica takes at most {_LONGEST_NAME}"
    return ""


def _excluded(root: Root, path: bytes, decision: Decision | None) -> str:
    if decision is None:
        return "a pattern leaves it out"
    what = f"the pattern {decision.pattern!r} leaves it out"
    if decision.at != path:
        directory = shown(root.path + b"/" + decision.at)
        what = f"the pattern {decision.pattern!r} leaves out the directory {directory}, and all that is in it"
    return f"{what} ({decision.option}, number {decision.index + 1})"


def _limited(root: Root, path: bytes, status: os.stat_result) -> tuple[str, float]:
    """Why the limits leave a path alone, with numbers; or for how many seconds it is too young."""
    if stat.S_ISSOCK(status.st_mode):
        return "it is a socket, which is of no use without the program that made it", 0.0
    mount = limits.Boundaries([root]).mount_of(0, path.rpartition(b"/")[0])
    if mount is not None:
        point = shown(root.path + b"/" + mount)
        return f"it lies on another filesystem, mounted at {point}, and one_filesystem is set", 0.0
    if not stat.S_ISREG(status.st_mode):
        return "", 0.0
    now_ns = time.time_ns()
    found = limits.excess(root, status.st_size, status.st_mtime_ns, now_ns)
    if found is None:
        return "", 0.0
    if found.limit == "min_age":
        return "", max(0.001, limits.seconds_to_wait(root, status.st_mtime_ns, now_ns))
    if found.limit == "max_size":
        return f"it {found.text}: it has {status.st_size} bytes", 0.0
    changed = datetime.fromtimestamp(status.st_mtime_ns / 1e9).isoformat(" ", "seconds")
    return f"it {found.text}: it was changed last at {changed}", 0.0


@dataclass(frozen=True, slots=True)
class Copy:
    """What is known of the copy: its entry, how many paths are known below, and what keeps it from being sent."""

    known: Known | None
    below: int
    problem: str
    left_alone: str
    kept: bool


def ask(index: Index, planner: Planner, root: int, path: bytes) -> Copy:
    """For the source's worker: what index and planner say."""
    known = index.get(root, path)
    below = 0
    if known is not None and known.kind is FileKind.DIRECTORY:
        below = index.count_below(root, path)
    problem = ""
    for what in ("root", "state", "content", "entries", "name"):
        why = planner.problems.get((root, path, what), "")
        if why:
            problem = f"it cannot be read: {why}" if what in ("state", "content", "entries") else why
            break
    above = path
    while above and not problem:
        above = above.rpartition(b"/")[0]
        if why := planner.problems.get((root, above, "entries"), ""):
            problem = f"a directory above it cannot be read: {why}"
    kept = known is not None and planner.kept(known) is not False
    return Copy(known, below, problem, planner.left_alone.why(root, path) or "", kept)


@dataclass(frozen=True, slots=True)
class Line:
    """How the group is: ``connected`` and watched, or not for a ``reason``; ``acknowledged``: nothing is on its way.

    ``stalled``: why the replica does not apply what it has; ``absent``: why the protected path is not there. ``now``:
    of a monotonic clock.
    """

    connected: bool
    reason: str
    acknowledged: bool
    stalled: str
    absent: str
    now: float


def on_replica(facts: Facts, group: str, peer: str, reason: str) -> Explanation:
    """What the node says that has the copy, or does not know yet who owns the group."""
    told = _begun(facts, group, peer)
    if facts.out:
        return told
    return replace(told, protected=True, state="replica", reason=f"{reason}; ask on {peer} how it is")


def judge(
    facts: Facts, copy: Copy | None, wait: Wait | None, waiting_below: int, line: Line, group: str, peer: str
) -> Explanation:
    """What the source says: pure, from what was found out."""
    told = _begun(facts, group, peer)
    known = copy.known if copy is not None else None
    # While something is on its way, that may be the last change; when the one before was told is not known any more.
    if known is not None and known.told_ns and (wait is None or line.acknowledged):
        told = replace(told, durable_at=known.told_ns / 1e9)
    out = facts.out or line.absent or (copy.problem if copy is not None else "")
    if out:
        return replace(told, why=out, state="kept" if known is not None and known.kind is not FileKind.SOCKET else "")
    told = replace(told, protected=True)
    if known is not None and known.kind is FileKind.DIRECTORY and copy is not None:
        told = replace(told, known_below=copy.below, waiting_below=waiting_below)
    if copy is None:
        return replace(told, state="unknown", reason=line.reason or f"not compared with {peer} yet")
    same = _is_same(known, facts.status)
    exact = wait is not None and wait.at == facts.place.below
    # Of a file, it is seen at once that nothing has changed; what is below a directory has to be looked at.
    if wait is not None and (exact or not (same and not facts.is_directory and line.acknowledged)):
        return replace(told, **_waiting(facts, wait, exact, line))
    if facts.status is None:
        return _gone(told, copy, line)
    if facts.young and not same:
        text = f"it is sent when it is as old as min_age, in {max(1, round(facts.young))} s"
        return replace(told, state="young", reason=text)
    if copy.left_alone and not same:
        return replace(told, protected=False, why=copy.left_alone, state="kept" if known is not None else "")
    if not same:
        seen = "" if line.connected else line.reason
        return replace(told, state="missing" if known is None else "different", reason=seen)
    durable = line.connected and not waiting_below
    reason = "" if line.connected else line.reason
    if line.stalled:
        reason = "; ".join(filter(None, (reason, f"durable on {peer}, but not in its tree: {line.stalled}")))
    return replace(told, state="same", durable=durable, reason=reason)


def _begun(facts: Facts, group: str, peer: str) -> Explanation:
    told = Explanation(shown(facts.place.path), group, shown(facts.root.path), peer, why=facts.out)
    decision = facts.decision
    if decision is None:
        return told
    if not facts.out and decision.option == "include":
        told = replace(
            told, why=f"the pattern {decision.pattern!r} takes it back (include, number {decision.index + 1})"
        )
    return replace(told, option=decision.option, number=decision.index + 1, pattern=decision.pattern)


def _waiting(facts: Facts, wait: Wait, exact: bool, line: Line) -> dict[str, Any]:
    reason = line.reason
    if not exact:
        above = shown(facts.root.path + (b"/" + wait.at if wait.at else b""))
        reason = "; ".join(filter(None, (reason, f"all below {above} is being gone over")))
    return {
        "state": "sending" if wait.taken else "waiting",
        "waiting": max(0.0, line.now - wait.since),
        "reason": reason,
    }


def _gone(told: Explanation, copy: Copy, line: Line) -> Explanation:
    if copy.known is None:
        return replace(told, state="absent", reason="nothing is here, nor on the other server")
    if copy.kept:
        return replace(told, protected=False, state="kept", why=copy.left_alone or "it is gone here; its copy is kept")
    return replace(told, state="different", reason=line.reason or "it is gone here, and its copy is not yet")


def _is_same(known: Known | None, status: os.stat_result | None) -> bool:
    """Whether the copy is what is here, as far as lstat tells."""
    if known is None or status is None or known.kind is not kind_of(status):
        return False
    return (
        (known.kind is not FileKind.FILE or known.size == status.st_size)
        and known.mtime_ns == clamp_time(status.st_mtime_ns)
        and known.mode == stat.S_IMODE(status.st_mode)
        and (known.uid, known.gid) == (status.st_uid, status.st_gid)
    )
