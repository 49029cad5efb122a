"""What is decided, and the sentence that explains it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from farshore.control.api import GroupStatus
from farshore.control.decide import Action, Facts, NodeFact, after, backoff, decide, failback_backoff
from farshore.control.state import PHASES, GroupState

STATUS = GroupStatus(
    group="web",
    side="local",
    owner="local",
    epoch=1,
    state="replicating",
    reason="",
    connected=True,
    in_step=True,
    rpo=0.0,
    backlog_paths=0,
    seq=1,
    sent_bytes=1,
    units={"nginx.service": "active"},
    problems=[],
    synced_once=True,
)


def said(**changes: Any) -> GroupStatus:
    values = {name: getattr(STATUS, name) for name in STATUS.__struct_fields__}
    return GroupStatus(**(values | changes))


REPLICA = {"state": "replica", "rpo": None, "in_step": False, "units": {"nginx.service": "inactive"}}
WEB = NodeFact("web1", True, 100.0, "", STATUS, told=True)
BAK = NodeFact("bak1", True, 100.0, "", said(side="remote", **REPLICA), told=True)
GONE = replace(WEB, reachable=False, status=None, detail="timed out")
BAK_GONE = replace(BAK, reachable=False, status=None, detail="timed out")
NORMAL = GroupState("web")
FACTS = Facts(WEB, BAK, True)
DEAD = Facts(GONE, BAK, False, "80/tcp: refused")
AWAY = GroupState("web", "failed_over", "remote", 2, switched=True)
WEB_2 = replace(WEB, status=said(owner="remote", epoch=2, **REPLICA))
BAK_2 = replace(BAK, status=said(side="remote", owner="remote", epoch=2))
BACK = Facts(WEB_2, BAK_2, True)
WAITING = replace(WEB, status=said(state="unconfirmed", units={"nginx.service": "inactive"}))


def says(fact: NodeFact, **changes: Any) -> NodeFact:
    assert fact.status
    values = {name: getattr(fact.status, name) for name in fact.status.__struct_fields__}
    return replace(fact, status=GroupStatus(**(values | changes)))


HOLDS = says(BAK, state="held", held="24% were rewritten", held_transactions=12)


@pytest.mark.parametrize(
    ("state", "facts", "kind", "to", "reason"),
    [
        # The quiet life.
        (NORMAL, FACTS, "stay", None, "web1 serves the users; bak1 stands by"),
        (NORMAL, replace(FACTS, health=None), "stay", None, "waiting for the first verdict on web1; bak1 stands by"),
        (NORMAL, replace(FACTS, backup=BAK_GONE), "stay", None, "failover is not possible now: the backup server bak1"),
        (
            NORMAL,
            replace(FACTS, backup=BAK_GONE, tunnel="down: no IKE SA"),
            "stay",
            None,
            "does not answer (timed out); tunnel down: no IKE SA",
        ),
        (NORMAL, replace(FACTS, local=GONE), "stay", None, "its agent does not answer (timed out), so changes"),
        (NORMAL, replace(FACTS, local=WAITING), "tell", None, "web1 is told that it serves, epoch 1"),
        (NORMAL, replace(FACTS, backup=says(BAK, epoch=0)), "tell", None, "bak1 is told that it is the replica"),
        (NORMAL, replace(FACTS, local=says(WEB, state="frozen")), "thaw", None, "web1 is still frozen"),
        (NORMAL, replace(FACTS, local=replace(WAITING, may_ask=False, refused="no")), "stay", None, "not settled: no"),
        (
            NORMAL,
            replace(FACTS, local=says(WEB, state="disconnected", connected=False, reason="refused")),
            "stay",
            None,
            "web1 serves the users; web1 is disconnected (refused): changes are not protected",
        ),
        # The server fails.
        (NORMAL, DEAD, "move", "promoting", "web1 has failed (80/tcp: refused); bak1 takes over"),
        (NORMAL, replace(DEAD, local=WEB), "move", "handing_over", "its agent answers, so it may send its last"),
        (NORMAL, replace(DEAD, failover="manual"), "stay", None, "failover is manual: waiting for the operator"),
        (NORMAL, replace(DEAD, backup=BAK_GONE), "stay", None, "but the backup server bak1 does not answer"),
        (
            NORMAL,
            replace(DEAD, backup=says(BAK, synced_once=False)),
            "stay",
            None,
            "web1 has failed (80/tcp: refused), but the backup server bak1 has not got the whole of the data yet",
        ),
        (NORMAL, replace(DEAD, backup=replace(BAK, status=None)), "stay", None, "bak1 says nothing of this group"),
        # It has just booted, and its service waits for the word.
        (NORMAL, replace(DEAD, local=WAITING), "tell", None, "web1 is told that it serves"),
        (NORMAL, replace(DEAD, local=replace(WAITING, asking=1.0)), "stay", None, "was told to start its units"),
        (NORMAL, replace(DEAD, local=replace(WAITING, asking=60.0)), "move", "handing_over", "has failed"),
        (NORMAL, replace(DEAD, local=replace(WAITING, refused="no")), "move", "handing_over", "has failed"),
        # Wishes in the quiet life.
        (replace(NORMAL, wish="failback"), FACTS, "move", "normal", "nothing to failback: web1 serves the users"),
        (replace(NORMAL, wish="recover"), FACTS, "move", "normal", "nothing to recover: web1 serves the users"),
        (replace(NORMAL, wish="failover"), FACTS, "move", "handing_over", "web1 stops and sends its last changes"),
        (
            replace(NORMAL, wish="failover"),
            replace(FACTS, backup=BAK_GONE),
            "stay",
            None,
            "the operator asked for a failover, but the backup server",
        ),
        (
            replace(NORMAL, wish="failover"),
            replace(FACTS, local=says(WEB, connected=False)),
            "stay",
            None,
            "but web1 is replicating (no connection): its last changes can't be sent",
        ),
        (
            replace(NORMAL, wish="failover"),
            replace(FACTS, local=GONE),
            "stay",
            None,
            "web1 does not answer (timed out) while its services are not known to have failed",
        ),
        (
            replace(NORMAL, wish="failover"),
            replace(DEAD, failover="manual"),
            "move",
            "promoting",
            "the operator asked for a failover and web1 has failed (80/tcp: refused)",
        ),
        # On the way.
        (replace(NORMAL, phase="handing_over"), replace(DEAD, local=WEB), "freeze", None, "web1 stops its units"),
        (replace(NORMAL, phase="handing_over"), DEAD, "move", "promoting", "takes over without its last changes"),
        (replace(NORMAL, phase="handing_over"), replace(DEAD, backup=BAK_GONE), "call_off", None, "called off"),
        (
            replace(NORMAL, phase="handing_over", planned=True),
            replace(FACTS, local=GONE),
            "call_off",
            None,
            "its last changes can't be sent",
        ),
        (replace(AWAY, phase="promoting", switched=False), DEAD, "promote", None, "bak1 becomes the owner"),
        (
            replace(AWAY, phase="promoting", switched=False, tries=1, reason="no units"),
            replace(DEAD, local=WEB),
            "move",
            "returning",
            "bak1 can't take over (no units); web1 answers and gets the group back",
        ),
        (
            # Users have been on the backup: what they wrote there may be nowhere else.
            replace(AWAY, phase="promoting", switched=True, tries=1, reason="no units"),
            replace(DEAD, local=WEB_2),
            "promote",
            None,
            "bak1 becomes the owner with epoch 2",
        ),
        (
            replace(AWAY, phase="promoting", tries=3, reason="no units"),
            replace(DEAD, pause=3.0),
            "stay",
            None,
            "no units; the next try follows shortly",
        ),
        (replace(AWAY, phase="verifying"), DEAD, "verify", None, "bak1 has started its units"),
        # Away from home.
        (AWAY, replace(BACK, local=GONE), "stay", None, "bak1 serves the users; web1 does not answer (timed out)"),
        (
            AWAY,
            replace(BACK, local=GONE, backup=BAK_GONE),
            "stay",
            None,
            "users are sent to bak1, whose agent does not answer (timed out); web1 does not answer",
        ),
        (AWAY, replace(BACK, backup=says(BAK_2, state="unconfirmed")), "tell", None, "bak1 is told that it serves"),
        (AWAY, replace(BACK, backup=says(BAK_2, state="frozen")), "thaw", None, "bak1 is still frozen"),
        (AWAY, replace(BACK, local=WEB, hold_down=200.0), "tell", None, "web1 is told that it is the replica, epoch 2"),
        (
            AWAY,
            replace(BACK, local=says(WAITING, units={"nginx.service": "active"}), failback="manual"),
            "tell",
            None,
            "web1 is told that it is the replica",
        ),
        (
            AWAY,
            replace(BACK, local=WAITING, hold_down=200.0),
            "stay",
            None,
            "bak1 serves the users; web1 is back, for less than the hold-down of 200 s",
        ),
        (AWAY, replace(BACK, local=WAITING, failback="manual"), "stay", None, "failback is manual: waiting for the op"),
        (
            replace(AWAY, wish="recover"),
            replace(BACK, local=WAITING, failback="manual", hold_down=200.0),
            "move",
            "recovering",
            "web1 is back: it gets the data that it missed",
        ),
        (AWAY, replace(BACK, local=WAITING), "move", "recovering", "web1 is back"),
        # Coming home.
        (replace(AWAY, phase="recovering"), replace(BACK, local=WAITING), "tell", None, "is told that it is"),
        (replace(AWAY, phase="recovering"), replace(BACK, local=GONE), "move", "failed_over", "recovery waits for it"),
        (
            replace(AWAY, phase="recovering"),
            replace(BACK, backup=says(BAK_2, connected=False, reason="refused")),
            "stay",
            None,
            "web1 recovers: bak1 has no connection to it (refused)",
        ),
        (
            replace(AWAY, phase="recovering"),
            replace(BACK, backup=says(BAK_2, state="syncing", reason="comparing")),
            "stay",
            None,
            "web1 recovers: bak1 is syncing",
        ),
        (
            # All that it has to send is young, because it has just begun.
            replace(AWAY, phase="recovering"),
            replace(BACK, local=says(WEB_2, synced_once=False), backup=says(BAK_2, in_step=False, rpo=0.1)),
            "stay",
            None,
            "web1 recovers: bak1 sends what is missing there",
        ),
        (
            replace(AWAY, phase="recovering"),
            replace(BACK, backup=says(BAK_2, in_step=False, rpo=5.0)),
            "stay",
            None,
            "changes older than 1 s are still on their way",
        ),
        (replace(AWAY, phase="recovering"), BACK, "move", "freezing", "web1 is in step: the users go back to it"),
        (
            replace(AWAY, phase="recovering"),
            replace(BACK, backup=says(BAK_2, in_step=False, rpo=0.4)),
            "move",
            "freezing",
            "web1 is in step",
        ),
        (
            replace(AWAY, phase="recovering"),
            replace(BACK, failback="manual"),
            "move",
            "recovered",
            "web1 is in step; failback is manual: waiting for a failback",
        ),
        (
            replace(AWAY, phase="recovered", wish="failover"),
            BACK,
            "stay",
            None,
            "web1 is in step; the operator wants it so: waiting for a failback",
        ),
        (
            replace(AWAY, phase="recovered", wish="recover"),
            replace(BACK, backup=says(BAK_2, in_step=False, rpo=9.0)),
            "stay",
            None,
            "web1 is in step",
        ),
        (
            replace(AWAY, phase="recovered", wish="recover"),
            replace(BACK, backup=says(BAK_2, connected=False)),
            "move",
            "recovering",
            "has no connection",
        ),
        (replace(AWAY, phase="recovered", wish="failback"), BACK, "move", "freezing", "the users go back to it"),
        (
            replace(AWAY, phase="recovering", failbacks=1, reason="failback put off: why"),
            replace(BACK, failback_pause=3.0),
            "stay",
            None,
            "web1 is in step; as it has failed while it ran, a pause comes before a failback",
        ),
        (replace(AWAY, phase="freezing"), BACK, "freeze", None, "bak1 stops its units and sends its last changes"),
        (replace(AWAY, phase="freezing"), replace(BACK, local=GONE), "call_off", None, "called off: web1 does not"),
        (replace(AWAY, phase="freezing", wish="recover"), BACK, "call_off", None, "does not want it any more"),
        (
            GroupState("web", "returning", "local", 3, switched=True),
            BACK,
            "give_back",
            None,
            "web1 becomes the owner with epoch 3 and starts its units",
        ),
        (
            GroupState("web", "returning", "local", 3, switched=True, tries=1, reason="no units"),
            BACK,
            "move",
            "promoting",
            "web1 can't take the group back (no units); bak1 goes on with it",
        ),
        (
            GroupState("web", "returning", "local", 3, switched=True, tries=1),
            replace(BACK, backup=BAK_GONE),
            "give_back",
            None,
            "web1 becomes the owner",
        ),
        # Changes that a replica holds.
        (NORMAL, replace(FACTS, backup=HOLDS), "stay", None, "web1 serves the users; bak1 holds 12 transactions"),
        (
            replace(NORMAL, wish="failover"),
            replace(FACTS, backup=HOLDS),
            "stay",
            None,
            "the operator asked for a failover, but bak1 holds 12 transactions that it was sent: 24% were rewritten",
        ),
        (
            replace(NORMAL, wish="failover"),
            replace(FACTS, backup=says(HOLDS, state="rejected")),
            "move",
            "handing_over",
            "web1 stops and sends its last changes first",
        ),
        (NORMAL, replace(DEAD, backup=HOLDS), "move", "promoting", "bak1 holds 12 transactions"),
        (
            replace(AWAY, phase="recovering"),
            replace(BACK, local=says(WEB_2, held="too much", state="held")),
            "stay",
            None,
            "web1 recovers: web1 holds 0 transactions that it was sent: too much",
        ),
        (
            replace(AWAY, phase="recovered"),
            replace(BACK, local=says(WEB_2, held="too much", state="held")),
            "move",
            "recovering",
            "web1 recovers: web1 holds",
        ),
        (
            replace(AWAY, phase="freezing"),
            replace(BACK, local=says(WEB_2, held="too much", state="held")),
            "call_off",
            None,
            "failback called off: web1 holds",
        ),
        (
            replace(AWAY, phase="returning", owner="local", epoch=3),
            replace(BACK, local=says(WEB_2, held="too much", state="held")),
            "move",
            "promoting",
            "web1 can't take the group back (web1 holds",
        ),
        # A state that was lost.
        (
            NORMAL,
            replace(BACK, local=GONE),
            "stay",
            None,
            "stale monitor state: bak1 knows epoch 2 with owner remote, stored here is epoch 1 with owner local;",
        ),
        (NORMAL, BACK, "move", "failed_over", "so owner remote with epoch 2 is adopted"),
        (NORMAL, replace(BACK, local=WEB), "move", "failed_over", "so owner remote with epoch 2 is adopted"),
        (
            NORMAL,
            replace(BACK, local=says(WEB, epoch=2)),
            "stay",
            None,
            "this contradiction needs the administrator",
        ),
    ],
)
def test_decisions(state: GroupState, facts: Facts, kind: str, to: str | None, reason: str) -> None:
    action = decide(state, facts)
    assert reason in action.reason
    assert (action.kind, action.to.phase if action.to else None) == (kind, to)
    if action.to:
        assert action.to.owner == state.owner or action.to.epoch > state.epoch, "a new owner has a new epoch"


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_decides_about_anything(phase: Any) -> None:
    for owner in ("local", "remote"):
        state = GroupState("web", phase, owner, 2)  # type: ignore[arg-type]
        for local in (WEB, WEB_2, GONE, WAITING, replace(WEB, status=None)):
            for backup in (BAK, BAK_2, BAK_GONE, replace(BAK, status=None)):
                for health in (True, False, None):
                    assert decide(state, Facts(local, backup, health)).reason


def test_after_a_freeze_the_next_owner_has_the_next_epoch() -> None:
    freeze = Action("freeze", "", "local")
    promoting = after(replace(NORMAL, phase="handing_over", planned=True), freeze, True, "done")
    assert (promoting.phase, promoting.owner, promoting.epoch, promoting.failbacks) == ("promoting", "remote", 2, 0)
    hasty = after(replace(NORMAL, phase="handing_over"), freeze, False, "it hangs")
    assert (hasty.phase, hasty.epoch, hasty.failbacks) == ("promoting", 2, 1)
    given_up = after(replace(NORMAL, phase="handing_over", planned=True, wish="failover"), freeze, False, "it hangs")
    assert (given_up.phase, given_up.epoch, given_up.wish) == ("normal", 1, "none")
    assert given_up.reason == "failover given up: it hangs"


def test_a_freeze_that_fails_keeps_users_where_they_are() -> None:
    state = after(replace(AWAY, phase="freezing"), Action("freeze", "", "remote"), False, "not durable")
    assert (state.phase, state.owner, state.epoch, state.switched, state.failbacks) == (
        "recovering",
        "remote",
        2,
        True,
        1,
    )


def test_a_wish_outlives_what_it_did_not_ask_for() -> None:
    home = GroupState("web", "returning", "local", 3, switched=True)
    give = Action("give_back", "", "local")
    assert after(replace(home, wish="failback"), give, True, "").wish == "none"
    assert after(replace(home, wish="failover"), give, True, "").wish == "failover"
    assert after(replace(home, wish="failover", switched=False), give, True, "").wish == "none"


def test_an_action_without_an_outcome() -> None:
    with pytest.raises(ValueError, match="stay has no outcome"):
        after(NORMAL, Action("stay", ""), True, "")


def test_pauses_grow_and_end() -> None:
    pauses = [backoff(n) for n in range(200)]
    assert pauses[:4] == [0.0, 0.0, 0.5, 1.0] and pauses == sorted(pauses) and pauses[-1] == 15.0
    pauses = [failback_backoff(n) for n in range(200)]
    assert pauses[:3] == [0.0, 5.0, 10.0] and pauses == sorted(pauses) and pauses[-1] == 600.0
