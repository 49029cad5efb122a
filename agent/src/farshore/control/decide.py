"""What to do next with a protection group: pure functions of its state and the facts.

``decide`` looks at everything and names one step and why; the driver takes it; ``after`` says what state its
outcome leads to. No clock is read and nothing is sent here, so that what decides about a disaster can be tried
without one.

The epoch grows by one whenever the owner changes, and it is stored before anybody is told. So however often
monitor, nodes and links fail in between, two nodes never hold the same epoch as owners.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from farshore.config import Side
from farshore.control.api import GroupStatus
from farshore.control.state import GroupState, Phase

Kind = Literal[
    "stay",  # nothing to do
    "move",  # store the state ``to``
    "tell",  # tell ``side`` who owns the group
    "thaw",  # tell ``side`` to take a freeze back
    "freeze",  # have ``side`` stop its units and send its last changes
    "call_off",  # take the freeze of ``side`` back and return to where it began
    "promote",  # make the backup server the owner
    "verify",  # wait until the backup server's services answer
    "give_back",  # make the local server the owner, and wait until its services answer
]

#: A replica that lags no more than this is brought in step within the freeze; more would make users wait.
READY_RPO = 1.0
#: Seconds for which a local server that has just come back is given the chance to start its units when told to.
CONFIRM_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class NodeFact:
    """What is known of a node. Durations in seconds.

    ``since``: how long the agent has been answering, or has not. ``status``: its last word on the group; None
    when it has said none, or has been told something since. ``asking``: how long a tell or thaw has been under
    way. ``refused``: why the last one failed, until the next succeeds. ``may_ask``: the pause after that is over.
    ``told``: it has confirmed its role to this monitor since it started.
    """

    name: str
    reachable: bool
    since: float
    detail: str = ""
    status: GroupStatus | None = None
    asking: float | None = None
    refused: str = ""
    may_ask: bool = True
    told: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a decision looks at, besides the stored state.

    ``health``: the verdict on the local server's services. ``pause``: seconds until the next try after a failed
    step; ``failback_pause``: the same after a failed attempt to go back.
    """

    local: NodeFact
    backup: NodeFact
    health: bool | None
    health_detail: str = ""
    tunnel: str = ""
    failover: Literal["auto", "manual"] = "auto"
    failback: Literal["auto", "manual"] = "auto"
    hold_down: float = 0.0
    pause: float = 0.0
    failback_pause: float = 0.0

    def node(self, side: Side) -> NodeFact:
        """The node on ``side``."""
        return self.local if side == "local" else self.backup


@dataclass(frozen=True, slots=True)
class Action:
    """One step, and the sentence that explains it."""

    kind: Kind
    reason: str
    side: Side | None = None
    to: GroupState | None = None


def decide(state: GroupState, facts: Facts) -> Action:
    """The next step of the group."""
    return _stale(state, facts) or _PHASES[state.phase](state, facts)


def backoff(attempts: int) -> float:
    """Seconds to wait after so many failures of a step in a row while users wait."""
    return 0.0 if attempts < 2 else min(15.0, 0.5 * 2.0 ** min(attempts - 2, 10))


def failback_backoff(failbacks: int) -> float:
    """Seconds to wait after so many failed attempts to go back: each of them makes the users wait."""
    return 0.0 if failbacks < 1 else min(600.0, 5.0 * 2.0 ** min(failbacks - 1, 10))


def after(state: GroupState, action: Action, ok: bool, why: str) -> GroupState:
    """The state that follows when ``action`` went well, or failed for the reason ``why``."""
    match action.kind, action.side, ok:
        case "freeze", "local", True:
            return _hand_over(state, why)
        case "freeze", "local", False if state.planned:
            return _enter(state, "normal", f"failover given up: {why}", wish="none", planned=False)
        case "freeze", "local", False:
            return _hand_over(state, why)
        case "freeze", _, True:
            return _enter(state, "returning", why, owner="local", epoch=state.epoch + 1)
        case "freeze", _, False:
            return _enter(state, "recovering", f"failback put off: {why}", failbacks=state.failbacks + 1)
        case "call_off", "local", _:
            return _enter(state, "normal", why, planned=False)
        case "call_off", _, _:
            return _enter(state, "recovering", why)
        case "promote", _, True:
            return _enter(state, "verifying", why)
        case "promote", _, False:
            return _again(state, why)
        case "verify", _, True:
            return _enter(state, "failed_over", why, switched=True, planned=False, attempts=0)
        case "verify", _, False:
            return replace(_enter(state, "promoting", why), tries=1, attempts=state.attempts + 1)
        case "give_back", _, True:
            return settled(state, why)
        case "give_back", _, False:
            return _again(replace(state, failbacks=state.failbacks + state.switched), why)
        case _:
            raise ValueError(f"{action.kind} has no outcome")


def _hand_over(state: GroupState, why: str) -> GroupState:
    # A service that failed on a server that runs may fail there again: no failback as soon as the data allow it.
    pause = 0 if state.planned else 1
    return _enter(state, "promoting", why, owner="remote", epoch=state.epoch + 1, failbacks=state.failbacks + pause)


def _again(state: GroupState, why: str) -> GroupState:
    return replace(state, reason=why, tries=state.tries + 1, attempts=state.attempts + 1)


def settled(state: GroupState, why: str) -> GroupState:
    """The normal state that follows ``state`` when the local server serves again."""
    # A wish for a failover that came while the group was on its way home is still to be granted.
    wish = state.wish if state.wish == "failover" and state.switched else "none"
    return _enter(
        state, "normal", why, switched=False, planned=False, attempts=0, failbacks=0, wish=wish, owner="local"
    )


def _enter(state: GroupState, phase: Phase, reason: str, **changes: object) -> GroupState:
    # The names and kinds in ``changes`` are those of GroupState, at every call above and below.
    return replace(state, phase=phase, reason=reason, tries=0, **changes)  # type: ignore[arg-type]


def _stay(reason: str) -> Action:
    return Action("stay", reason)


def _move(state: GroupState, phase: Phase, reason: str, **changes: object) -> Action:
    return Action("move", reason, to=_enter(state, phase, reason, **changes))


# --- before everything else ----------------------------------------------------------------------


def _stale(state: GroupState, facts: Facts) -> Action | None:
    """A node that knows more than the stored state: the state was lost, or is an old copy."""
    known = [(fact, fact.status) for fact in (facts.local, facts.backup) if fact.status is not None]
    ahead = [
        (fact, status)
        for fact, status in known
        if status.epoch > state.epoch or (status.epoch == state.epoch and status.owner != state.owner)
    ]
    if not ahead:
        return None
    says = " and ".join(f"{fact.name} knows epoch {s.epoch} with owner {s.owner}" for fact, s in ahead)
    problem = f"stale monitor state: {says}, stored here is epoch {state.epoch} with owner {state.owner}"
    if len(known) < 2:
        return _stay(f"{problem}; nothing is decided until both nodes have answered")
    top = max(status.epoch for _, status in known)
    owners: set[Side] = {status.owner for _, status in known if status.epoch == top}
    if len(owners) > 1:
        return _stay(f"{problem}; this contradiction needs the administrator")
    (owner,) = owners
    return _move(
        state,
        "normal" if owner == "local" else "failed_over",
        f"{problem}; both nodes answered, so owner {owner} with epoch {top} is adopted",
        owner=owner,
        epoch=top,
        switched=owner == "remote",
        planned=False,
        attempts=0,
        failbacks=0,
        wish="none",
    )


def _agrees(state: GroupState, status: GroupStatus) -> bool:
    return status.owner == state.owner and status.epoch == state.epoch and status.state != "unconfirmed"


def _settle(state: GroupState, facts: Facts, side: Side) -> Action | None:
    """Tell a node what it does not know yet, or take a freeze back that nobody wants any more."""
    fact = facts.node(side)
    status = fact.status
    if not fact.reachable or status is None or fact.asking is not None or not fact.may_ask:
        return None
    # A server that knows its role but failed to start its units is told again, also by a monitor just started.
    idle = side == state.owner and not fact.told and any(u in ("inactive", "failed") for u in status.units.values())
    if not _agrees(state, status) or fact.refused or (idle and status.state != "frozen"):
        role = "serves" if side == state.owner else "is the replica"
        return Action("tell", f"{fact.name} is told that it {role}, epoch {state.epoch}", side)
    if status.state == "frozen" and side == state.owner:
        return Action("thaw", f"{fact.name} is still frozen; its units are started again", side)
    return None


def _unfit(facts: Facts) -> str:
    """Why the backup server can't take over; "" when it can."""
    backup = facts.backup
    if not backup.reachable:
        return f"the backup server {_silent(backup)}{_tunnel(facts)}"
    if backup.status is None:
        return f"the backup server {backup.name} says nothing of this group: {backup.detail or 'it was just asked'}"
    if not backup.status.synced_once:
        return f"the backup server {backup.name} has not got the whole of the data yet"
    return ""


def _held(fact: NodeFact) -> str:
    """That a replica holds changes and does not apply them; "" when it does not."""
    if fact.status is None or not fact.status.held:
        return ""
    return f"{fact.name} holds {fact.status.held_transactions} transactions that it was sent: {fact.status.held}"


def _how(status: GroupStatus) -> str:
    """A node's state, with the reason where that does not count as it goes."""
    if status.connected:
        return status.state
    return f"{status.state} ({status.reason or 'no connection'})"


def _silent(fact: NodeFact) -> str:
    return f"{fact.name} does not answer ({fact.detail or 'not asked yet'})"


def _tunnel(facts: Facts) -> str:
    return f"; tunnel {facts.tunnel}" if facts.tunnel.startswith("down") else ""


# --- the phases ------------------------------------------------------------------------------------


def _normal(state: GroupState, facts: Facts) -> Action:
    local, backup = facts.local, facts.backup
    if state.wish in ("failback", "recover"):
        return _move(state, "normal", f"nothing to {state.wish}: {local.name} serves the users", wish="none")
    if state.wish == "failover":
        return _wished_failover(state, facts)
    if facts.health is False:
        return _failed(state, facts)
    step = _settle(state, facts, "local") or _settle(state, facts, "remote")
    if step:
        return step
    served = f"{local.name} serves the users"
    if facts.health is None:
        served = f"waiting for the first verdict on {local.name}"
    refused = local.refused or backup.refused
    if refused:
        return _stay(f"{served}; not settled: {refused}")
    unfit = _unfit(facts)
    if unfit:
        return _stay(f"{served}; a failover is not possible now: {unfit}")
    if not local.reachable:
        return _stay(
            f"{served}; its agent does not answer ({local.detail or 'not asked yet'}), so changes are not protected"
        )
    if local.status is not None and (not local.status.connected or local.status.state != "replicating"):
        return _stay(f"{served}; {local.name} is {_how(local.status)}: changes are not protected")
    held = _held(backup)
    if held:
        return _stay(f"{served}; {held}")
    return _stay(f"{served}; {backup.name} stands by")


def _wished_failover(state: GroupState, facts: Facts) -> Action:
    local = facts.local
    step = _settle(state, facts, "local") or _settle(state, facts, "remote")
    if step:
        return step
    asked = "the operator asked for a failover"
    unfit = _unfit(facts)
    if unfit:
        return _stay(f"{asked}, but {unfit}")
    if facts.health is False:
        return _take_over(state, facts, f"{asked} and {local.name} has failed ({facts.health_detail})")
    if not local.reachable:
        return _stay(f"{asked}, but {_silent(local)} while its services are not known to have failed")
    if local.status is None or not _agrees(state, local.status):
        return _stay(f"{asked}; waiting until {local.name} has confirmed its role{_why(local)}")
    if not local.status.connected or local.status.state != "replicating":
        # A freeze would make the users wait for nothing.
        return _stay(f"{asked}, but {local.name} is {_how(local.status)}: its last changes can't be sent")
    if facts.backup.status is not None and facts.backup.status.state == "held":
        # Rejected changes do not stand in the way: then it is decided that the replica is right without them.
        return _stay(f"{asked}, but {_held(facts.backup)}")
    return _move(state, "handing_over", f"{asked}: {local.name} stops and sends its last changes first", planned=True)


def _failed(state: GroupState, facts: Facts) -> Action:
    local = facts.local
    failed = f"{local.name} has failed ({facts.health_detail or 'no answer'})"
    if not local.refused:
        # A server that has just been started waits to be told its role, and its service for it.
        step = _settle(state, facts, "local")
        if step:
            return step
        if local.reachable and local.asking is not None and local.asking < CONFIRM_PATIENCE:
            return _stay(f"{failed}, and was told to start its units just now")
    hindrance = _unfit(facts)
    if facts.failover == "manual" or hindrance:
        step = _settle(state, facts, "local") or _settle(state, facts, "remote")
        if step:
            return step
        if facts.failover == "manual":
            return _stay(f"{failed}; failover is manual: waiting for the operator")
        return _stay(f"{failed}, but {hindrance}")
    held = _held(facts.backup)
    return _take_over(state, facts, f"{failed}; {held}" if held else failed)


def _take_over(state: GroupState, facts: Facts, why: str) -> Action:
    if facts.local.reachable:
        return _move(
            state,
            "handing_over",
            f"{why}; its agent answers, so it may send its last changes first",
            planned=False,
        )
    return _promote(state, f"{why}; {facts.backup.name} takes over", planned=False)


def _promote(state: GroupState, why: str, **changes: object) -> Action:
    return _move(state, "promoting", why, owner="remote", epoch=state.epoch + 1, **changes)


def _why(fact: NodeFact) -> str:
    return f" ({fact.refused})" if fact.refused else ""


def _handing_over(state: GroupState, facts: Facts) -> Action:
    local = facts.local
    unfit = "" if facts.backup.reachable else _unfit(facts)
    if unfit:
        return Action("call_off", f"failover called off: {unfit}", "local")
    if local.reachable:
        return Action("freeze", f"{local.name} stops its units and sends its last changes", "local")
    if state.planned and facts.health is not False:
        return Action("call_off", f"failover called off: {_silent(local)}, its last changes can't be sent", "local")
    return _promote(state, f"{_silent(local)}; {facts.backup.name} takes over without its last changes")


def _promoting(state: GroupState, facts: Facts) -> Action:
    local, backup = facts.local, facts.backup
    if facts.pause > 0:
        return _stay(f"{state.reason}; the next try follows shortly")
    if state.tries and not state.switched and local.reachable:
        # No user was sent to the backup server yet, so nothing of theirs is there that could be lost.
        return _move(
            state,
            "returning",
            f"{backup.name} can't take over ({state.reason}); {local.name} answers and gets the group back",
            owner="local",
            epoch=state.epoch + 1,
        )
    return Action("promote", f"{backup.name} becomes the owner with epoch {state.epoch} and starts its units")


def _verifying(state: GroupState, facts: Facts) -> Action:
    return Action("verify", f"{facts.backup.name} has started its units; do its services answer?")


def _away(state: GroupState, facts: Facts) -> str:
    """How users are served while the backup server owns the group."""
    backup = facts.backup
    if backup.reachable:
        return f"{backup.name} serves the users{_why(backup)}"
    return f"users are sent to {backup.name}, whose agent does not answer ({backup.detail}){_tunnel(facts)}"


def _may_recover(state: GroupState, facts: Facts) -> bool:
    return facts.failback == "auto" or state.wish in ("recover", "failback")


def _may_return(state: GroupState, facts: Facts) -> bool:
    return state.wish == "failback" or (facts.failback == "auto" and state.wish == "none")


def _failed_over(state: GroupState, facts: Facts) -> Action:
    local = facts.local
    step = _settle(state, facts, "remote")
    if step:
        return step
    served = _away(state, facts)
    if not local.reachable:
        return _stay(f"{served}; {_silent(local)}")
    if local.status is None:
        return _stay(f"{served}; {local.name} says nothing of this group: {local.detail or 'it was just asked'}")
    if _dangerous(state, local.status):
        step = _settle(state, facts, "local")
        if step:
            return step
    if not _may_recover(state, facts):
        return _stay(f"{served}; {local.name} is back; failback is manual: waiting for the operator")
    if state.wish not in ("recover", "failback") and local.since < facts.hold_down:
        return _stay(f"{served}; {local.name} is back, for less than the hold-down of {facts.hold_down:g} s")
    return _move(state, "recovering", f"{local.name} is back: it gets the data that it missed")


def _dangerous(state: GroupState, status: GroupStatus) -> bool:
    """Whether a returned node holds, or acts on, an ownership that is over; one that waits to be told does not."""
    running = any(unit in ("active", "activating", "reloading") for unit in status.units.values())
    return not _agrees(state, status) and (status.state != "unconfirmed" or running)


def _recovering(state: GroupState, facts: Facts) -> Action:
    local, backup = facts.local, facts.backup
    if not local.reachable:
        return _move(state, "failed_over", f"{_away(state, facts)}; {_silent(local)}: recovery waits for it")
    step = _settle(state, facts, "remote") or _settle(state, facts, "local")
    if step:
        return step
    served = _away(state, facts)
    waiting = _not_ready(state, facts)
    if waiting:
        if state.phase == "recovered" and not _lapsed(state, facts):
            waiting = ""
        else:
            reason = f"{served}; {local.name} recovers: {waiting}"
            return _stay(reason) if state.phase == "recovering" else _move(state, "recovering", reason)
    if not _may_return(state, facts):
        hold = "the operator wants it so" if state.wish != "none" else "failback is manual"
        reason = f"{served}; {local.name} is in step; {hold}: waiting for a failback"
        return _stay(reason) if state.phase == "recovered" else _move(state, "recovered", reason)
    if facts.failback_pause > 0:
        return _stay(
            f"{served}; {local.name} is in step; as it has failed while it ran, a pause comes before a failback"
        )
    if not backup.reachable or _not_ready(state, facts):
        return _stay(f"{served}; {local.name} waits for a quiet moment to go back")
    return _move(state, "freezing", f"{local.name} is in step: the users go back to it")


def _not_ready(state: GroupState, facts: Facts) -> str:
    """What is missing before a freeze would be short; "" when nothing is."""
    local, backup = facts.local, facts.backup
    if local.status is None or not _agrees(state, local.status):
        return f"{local.name} has not confirmed its role as replica yet{_why(local)}"
    status = backup.status
    if not backup.reachable or status is None or not _agrees(state, status):
        return f"{backup.name} has not confirmed its role as source yet{_why(backup)}"
    if not status.connected:
        return f"{backup.name} has no connection to it ({status.reason})"
    if status.state != "replicating":
        return f"{backup.name} is {status.state}"
    # A source that has just compared everything has young changes only, and yet all of them still to send. It is the
    # replica that knows that it has had the whole.
    if not local.status.synced_once:
        return f"{backup.name} sends what is missing there"
    # The source counts what is held there as received; the tree is without it.
    if local.status.held:
        return _held(local)
    if not status.in_step and (status.rpo is None or status.rpo > READY_RPO):
        return f"changes older than {READY_RPO:g} s are still on their way"
    return ""


def _lapsed(state: GroupState, facts: Facts) -> bool:
    """Whether a recovered server has fallen out of step for more than a moment's backlog."""
    local, status = facts.local.status, facts.backup.status
    if local is None or status is None:
        return False
    current = _agrees(state, local) and _agrees(state, status)
    return not (current and status.connected and status.state == "replicating") or bool(local.held)


def _freezing(state: GroupState, facts: Facts) -> Action:
    local, backup = facts.local, facts.backup
    if not local.reachable:
        return Action("call_off", f"failback called off: {_silent(local)}", "remote")
    if not backup.reachable:
        return Action("call_off", f"failback called off: {_silent(backup)}", "remote")
    if not _may_return(state, facts):
        return Action("call_off", "failback called off: the operator does not want it any more", "remote")
    if _held(local):
        return Action("call_off", f"failback called off: {_held(local)}", "remote")
    return Action("freeze", f"{backup.name} stops its units and sends its last changes", "remote")


def _returning(state: GroupState, facts: Facts) -> Action:
    local, backup = facts.local, facts.backup
    if facts.pause > 0:
        return _stay(f"{state.reason}; the next try follows shortly")
    held = _held(local) if local.status is not None and local.status.owner != "local" else ""
    if (state.tries or not local.reachable or held) and backup.reachable:
        why = state.reason if state.tries else held or _silent(local)
        more = 0 if state.tries else 1
        return _promote(
            state,
            f"{local.name} can't take the group back ({why}); {backup.name} goes on with it",
            attempts=state.attempts + more,
            failbacks=state.failbacks + (more if state.switched else 0),
        )
    return Action("give_back", f"{local.name} becomes the owner with epoch {state.epoch} and starts its units", "local")


_PHASES: dict[Phase, Callable[[GroupState, Facts], Action]] = {
    "normal": _normal,
    "handing_over": _handing_over,
    "promoting": _promoting,
    "verifying": _verifying,
    "failed_over": _failed_over,
    "recovering": _recovering,
    "recovered": _recovering,
    "freezing": _freezing,
    "returning": _returning,
}
