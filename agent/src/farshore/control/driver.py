"""Carries the decisions about one protection group out.

Each turn looks at the facts, lets ``decide`` name one step, takes it, and stores the state that follows before
the next. Whatever is interrupted is repeated from the stored state: every request to a node is idempotent.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from farshore.config import MonitorGroup, Side
from farshore.control import api
from farshore.control.decide import (
    Action,
    Facts,
    NodeFact,
    after,
    backoff,
    decide,
    failback_backoff,
)
from farshore.control.nodes import Node
from farshore.control.state import GroupState, Wanted
from farshore.errors import FarshoreError, NotInTime, PeerUnreachable, ProtocolError
from farshore.log import Log

_log = Log(__name__)

#: Seconds to learn whether the agent of a server whose service has failed is still there.
PING_TIMEOUT = 0.4
#: Seconds that a failed server is given to send its last changes, while users wait.
FLUSH_LIMIT = 2.0
#: Seconds that promotion waits for the old owner's answer; it is told again until it has answered.
DEMOTE_WAIT = 1.0
#: Seconds that the local server's services may take to answer after their units have started.
RETURN_PATIENCE = 10.0
#: Seconds between two questions whether a service that was just started answers.
VERIFY_INTERVAL = 0.05
#: Seconds that the network may take on top of what a request to a node allows it.
GRACE = 2.0
#: Seconds between two turns when nothing wakes the loop.
TURN = 1.0
#: Seconds between two tries to tell a node something that it refused.
RETRY = (1.0, 30.0)
EVENTS = 200


class Clock(Protocol):
    """Time as the driver needs it."""

    def now(self) -> float:
        """Monotonic seconds."""
        ...

    def wall(self) -> float:
        """Seconds since the Unix epoch."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        ...


class SystemClock:
    """The real time."""

    def now(self) -> float:
        """See ``Clock``."""
        return time.monotonic()

    def wall(self) -> float:
        """See ``Clock``."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """See ``Clock``."""
        await asyncio.sleep(seconds)


class Store(Protocol):
    """Where states are kept; see ``control.state.StateStore``."""

    def load(self, group: str) -> GroupState:
        """The stored state of ``group``."""
        ...

    def save(self, state: GroupState) -> None:
        """Make ``state`` durable."""
        ...


class Switching(Protocol):
    """Who sends the users to a side; see ``ssm.switch.Switch``."""

    def want(self, group: str, switched: bool, held: bool = False) -> None:
        """Set what ``ensure`` brings about."""
        ...

    def in_place(self, group: str) -> bool:
        """Whether the rules are as wanted."""
        ...

    async def ensure(self) -> object:
        """Bring it about; raises a FarshoreError."""
        ...


class Checking(Protocol):
    """Who asks the services; see ``smm.monitor.Monitor``."""

    @property
    def verdict(self) -> bool | None:
        """Whether the local server's services are healthy."""
        ...

    @property
    def detail(self) -> str:
        """What is wrong with them."""
        ...

    def services(self) -> list[api.ServiceHealth]:
        """Every service's health."""
        ...

    def reset(self) -> None:
        """Forget the verdict."""
        ...

    async def ask(self, side: Side) -> tuple[bool, str]:
        """Ask all services on ``side`` once."""
        ...


class Events:
    """The last events of all groups, for status."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._lines: deque[str] = deque(maxlen=EVENTS)

    def add(self, group: str, text: str) -> None:
        """Record that ``text`` happened to ``group`` now."""
        now = self._wall()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        self._lines.append(f"{stamp}.{int(now % 1 * 1000):03d}Z {group} {text}")

    def lines(self) -> list[str]:
        """All recorded events, oldest first."""
        return list(self._lines)


class _Asked:
    """What is under way with a node in the background: it is told its role, or thawed."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.began = 0.0
        self.failures = 0
        self.failed_at = 0.0
        self.refused = ""
        self.told = False


class Driver:
    """Leads one group. ``wake`` makes the next turn come at once."""

    def __init__(
        self,
        group: str,
        config: MonitorGroup,
        *,
        store: Store,
        local: Node,
        backup: Node,
        checks: Checking,
        switch: Switching,
        events: Events,
        clock: Clock | None = None,
        tunnel: Callable[[], str] = lambda: "",
    ) -> None:
        self.group = group
        self.config = config
        self.state = store.load(group)
        self.reason = self.state.reason or "just started"
        self._store = store
        self._nodes: dict[Side, Node] = {"local": local, "remote": backup}
        self._asked: dict[Side, _Asked] = {"local": _Asked(), "remote": _Asked()}
        self._checks = checks
        self._switch = switch
        self._events = events
        self._clock = clock or SystemClock()
        self._tunnel = tunnel
        self._awake = asyncio.Event()
        self._saving = asyncio.Lock()
        self._failed_at = float("-inf")
        self._failback_failed_at = float("-inf")
        #: What the nodes were last seen to hold.
        self._held: dict[Side, str] = {"local": "", "remote": ""}
        #: Monotonic time by which the current turn ends, if nothing is stuck.
        self.due = self._clock.now() + self._patience()
        switch.want(group, self.state.switched)

    # --- what others ask -----------------------------------------------------------------------

    def wake(self) -> None:
        """Make the next turn come at once."""
        self._awake.set()

    async def wish(self, want: Wanted) -> None:
        """Store the operator's wish; the next decision looks at it. Raises StateError."""
        await self._save(lambda state: replace(state, wish=want, attempts=0, failbacks=0))
        self._events.add(self.group, f"the operator wishes: {want}")
        _log.info("wish", group=self.group, want=want)
        self.wake()

    def status(self) -> api.SwitchStatus:
        """The group as ``farshore status`` shows it."""
        state = self.state
        return api.SwitchStatus(
            group=self.group,
            phase=state.phase,
            owner=state.owner,
            epoch=state.epoch,
            reason=self.reason,
            since=state.since,
            served_by="remote" if state.switched else "local",
            wish=state.wish,
            health=self._checks.services(),
            local=self._nodes["local"].fact(self.group).status,
            backup=self._nodes["remote"].fact(self.group).status,
            rules_in_place=self._switch.in_place(self.group),
        )

    def facts(self) -> Facts:
        """All that the next decision looks at."""
        now = self._clock.now()
        return Facts(
            local=self._fact("local", now),
            backup=self._fact("remote", now),
            health=self._checks.verdict,
            health_detail=self._checks.detail,
            tunnel=self._tunnel(),
            failover=self.config.failover,
            failback=self.config.failback,
            hold_down=self.config.hold_down,
            pause=self._failed_at + backoff(self.state.attempts) - now,
            failback_pause=self._failback_failed_at + failback_backoff(self.state.failbacks) - now,
        )

    def _fact(self, side: Side, now: float) -> NodeFact:
        fact = self._nodes[side].fact(self.group)
        asked = self._asked[side]
        pause = min(RETRY[1], RETRY[0] * 2.0 ** min(asked.failures - 1, 10)) if asked.failures else 0.0
        return replace(
            fact,
            asking=now - asked.began if asked.task else None,
            refused=asked.refused,
            told=asked.told,
            may_ask=not asked.failures or now - asked.failed_at >= pause,
        )

    # --- the loop ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Take turns until cancelled."""
        try:
            while True:
                self._awake.clear()
                self.due = self._clock.now() + self._patience()
                try:
                    action = await self.step()
                    pause = TURN if action.kind == "stay" else 0.0
                except FarshoreError as error:
                    self._say(str(error))
                    pause = TURN
                except Exception as error:
                    # The group must not be left alone because of a mistake here; the next turn may go well.
                    _log.error("turn failed", error, group=self.group)
                    self._say(f"internal error: {error}")
                    pause = TURN
                if pause:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(pause):
                            await self._awake.wait()
        finally:
            for asked in self._asked.values():
                if asked.task:
                    asked.task.cancel()

    def _patience(self) -> float:
        return 3 * self.config.step_timeout + 30.0

    async def step(self) -> Action:
        """One turn: decide and act. Raises StateError when the state can't be stored, and then nothing is done."""
        facts = self.facts()
        self._watch_held(facts)
        action = decide(self.state, facts)
        self._say(action.reason)
        match action.kind:
            case "stay":
                pass
            case "move":
                assert action.to is not None
                await self._move(action.to, action.reason)
            case "tell" | "thaw":
                assert action.side is not None
                self._begin(action.side, action.kind)
            case "freeze" | "call_off":
                assert action.side is not None
                await self._freeze(action, action.side)
            case "promote":
                await self._promote(action, facts)
            case "verify":
                await self._verify(action)
            case "give_back":
                await self._give_back(action)
        return action

    def _watch_held(self, facts: Facts) -> None:
        """Tell once when a replica begins to hold changes, and when it no longer does."""
        for side in self._held:
            node = facts.node(side)
            if node.status is None or node.status.held == self._held[side]:
                continue
            self._held[side] = held = node.status.held
            if held:
                self._events.add(self.group, f"HELD on {node.name}: {held}")
                _log.error("held", group=self.group, node=node.name, reason=held)
            else:
                self._events.add(self.group, f"{node.name} holds nothing any more")
                _log.info("no longer held", group=self.group, node=node.name)

    def _say(self, reason: str) -> None:
        if reason == self.reason:
            return
        self.reason = reason
        self._events.add(self.group, reason)
        _log.info("decided", group=self.group, phase=self.state.phase, epoch=self.state.epoch, reason=reason)

    # --- state ---------------------------------------------------------------------------------

    async def _save(self, change: Callable[[GroupState], GroupState]) -> None:
        async with self._saving:
            before = self.state
            state = change(before)
            if state.phase != before.phase:
                state = replace(state, since=self._clock.wall())
            await asyncio.to_thread(self._store.save, state)
            self.state = state
        now = self._clock.now()
        if state.attempts > before.attempts:
            self._failed_at = now
        if state.failbacks > before.failbacks:
            self._failback_failed_at = now

    async def _move(self, to: GroupState, reason: str) -> None:
        """Store the state that a decision or an outcome leads to, and have the users follow it."""
        before = self.state

        def change(now: GroupState) -> GroupState:
            # A wish that arrived meanwhile was not among the facts of this decision, which must not undo it.
            return replace(to, reason=reason, wish=now.wish if now.wish != before.wish else to.wish)

        await self._save(change)
        state = self.state
        if state.phase != before.phase:
            _log.info("phase", group=self.group, phase=state.phase, owner=state.owner, epoch=state.epoch)
        if state.phase == "normal" and before.phase != "normal":
            # What the checks said while the server was not meant to serve is no verdict on it.
            self._checks.reset()
        self._switch.want(self.group, state.switched)
        if state.switched != before.switched:
            where = self._nodes["remote" if state.switched else "local"].name
            await self._switch.ensure()
            self._say(f"{reason}; users are sent to {where}")

    async def _finish(self, action: Action, ok: bool, why: str) -> None:
        to = after(self.state, action, ok, why)
        self._say(to.reason)
        await self._move(to, to.reason)

    # --- steps -----------------------------------------------------------------------------------

    def _begin(self, side: Side, kind: str) -> None:
        """Tell a node its role, or thaw it, in the background: a slow node must not delay a failover."""
        asked = self._asked[side]
        if asked.task:
            asked.task.cancel()
        asked.began = self._clock.now()
        asked.task = asyncio.create_task(self._ask_aside(side, kind))

    async def _ask_aside(self, side: Side, kind: str) -> None:
        asked, node, state = self._asked[side], self._nodes[side], self.state
        limit = self.config.step_timeout
        try:
            if kind == "tell":
                await self._order(side, api.SetOwner(self.group, state.owner, state.epoch), limit + GRACE)
            else:
                await self._order(side, api.Thaw(self.group, state.epoch), limit + GRACE)
            asked.failures, asked.refused, asked.told = 0, "", True
            self._events.add(self.group, f"{node.name} has confirmed: owner {state.owner}, epoch {state.epoch}")
        except FarshoreError as error:
            asked.failures += 1
            asked.failed_at = self._clock.now()
            # Silence is no refusal: what a server that is gone can't be told says nothing about when it is back.
            asked.refused = "" if isinstance(error, PeerUnreachable) else str(error)
            self._events.add(self.group, f"{node.name} could not be told its role: {error}")
            _log.warning("telling a node failed", group=self.group, node=node.name, reason=error)
        except Exception as error:
            asked.failures += 1
            asked.failed_at = self._clock.now()
            _log.error("telling a node failed", error, group=self.group, node=node.name)
        finally:
            # Cancelled means that another has taken its place.
            if asked.task is asyncio.current_task():
                asked.task = None
        if side == "local" and self.state.phase == "normal":
            # It has started its units just now, or failed to; older answers do not count.
            self._checks.reset()
        self.wake()

    async def _order(self, side: Side, request: api.Request, timeout: float) -> None:
        answer = await self._nodes[side].ask(request, timeout)
        if not isinstance(answer, api.Done):
            raise ProtocolError(self._nodes[side].name, f"{type(answer).__name__} answers {type(request).__name__}")

    async def _freeze(self, action: Action, side: Side) -> None:
        state, node = self.state, self._nodes[side]
        hasty = side == "local" and not state.planned
        limit = min(FLUSH_LIMIT, self.config.step_timeout) if hasty else self.config.step_timeout
        if action.kind == "call_off":
            await self._thaw(side)
            await self._finish(action, False, action.reason)
            return
        try:
            if hasty:
                await node.ask(api.StatusRequest(), PING_TIMEOUT)
            began = self._clock.now()
            # The node's own limit is the shorter one, so that it says what was missing.
            await self._order(side, api.Freeze(self.group, state.epoch, limit), limit + (0.5 if hasty else GRACE))
        except FarshoreError as error:
            why = f"{node.name} could not send its last changes: {error}"
            if not hasty:
                await self._thaw(side)
            await self._finish(action, False, why)
        else:
            took = self._clock.now() - began
            await self._finish(action, True, f"{node.name} has stopped and sent its last changes in {took:.2f} s")

    async def _thaw(self, side: Side) -> None:
        """Take a freeze back now; when that fails, the node's status shows it as frozen and it is tried again."""
        with contextlib.suppress(FarshoreError):
            await self._order(side, api.Thaw(self.group, self.state.epoch), self.config.step_timeout + GRACE)

    async def _promote(self, action: Action, facts: Facts) -> None:
        state, backup = self.state, self._nodes["remote"]
        if facts.local.reachable and not (facts.local.status and facts.local.status.epoch >= state.epoch):
            self._begin("local", "tell")
            task = self._asked["local"].task
            assert task is not None
            await asyncio.wait({task}, timeout=DEMOTE_WAIT)
        began = self._clock.now()
        try:
            await self._order(
                "remote",
                api.SetOwner(self.group, "remote", state.epoch),
                self.config.step_timeout + GRACE,
            )
        except FarshoreError as error:
            await self._finish(action, False, f"{backup.name} could not take over: {error}")
        else:
            took = self._clock.now() - began
            await self._finish(action, True, f"{backup.name} has taken over and started its units in {took:.2f} s")

    async def _verify(self, action: Action) -> None:
        backup = self._nodes["remote"].name
        try:
            await self._until_answers("remote", self.config.step_timeout)
        except NotInTime as error:
            await self._finish(action, False, str(error))
        else:
            await self._finish(action, True, f"the services on {backup} answer")

    async def _give_back(self, action: Action) -> None:
        state, local = self.state, self._nodes["local"]
        limit = self.config.step_timeout
        try:
            await self._order("local", api.SetOwner(self.group, "local", state.epoch), limit + GRACE)
            await self._until_answers("local", min(limit, RETURN_PATIENCE))
        except FarshoreError as error:
            await self._finish(action, False, f"{local.name} does not serve: {error}")
            return
        await self._finish(action, True, f"{local.name} has started its units and its services answer")

    async def _until_answers(self, side: Side, limit: float) -> None:
        """Ask until all services on ``side`` answer; raises NotInTime with what they say instead."""
        end = self._clock.now() + limit
        while True:
            ok, detail = await self._checks.ask(side)
            if ok:
                return
            if self._clock.now() >= end:
                raise NotInTime(f"the services on {self._nodes[side].name}", limit, detail)
            await self._clock.sleep(VERIFY_INTERVAL)
