"""Watches the services of one protection group."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from farshore.config import MonitorGroup, Service, Side
from farshore.control.api import ServiceHealth
from farshore.log import Log
from farshore.smm.checks import Check, Observation, make_check, name_of
from farshore.smm.health import Health

_log = Log(__name__)


class _Watched:
    """One service: its check, the count of its answers, and the last of them."""

    def __init__(self, service: Service, check: Check, target: str) -> None:
        self.service = service
        self.check = check
        self.target = target
        self.health = Health(service.check.rise, service.check.fall)
        self.last: Observation | None = None


class Monitor:
    """Checks a group's services on its local server all the time, and on either server when asked.

    ``changed`` is called at once when the group's verdict changes, so that the decision need not wait for its
    next turn; ``doubt`` when a service does not answer for the first time, so that by the time of a verdict it is
    known whether the rest of the server still does.
    """

    def __init__(
        self,
        group: str,
        config: MonitorGroup,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        doubt: Callable[[], None] = lambda: None,
    ) -> None:
        self.group = group
        self._changed = changed
        self._doubt = doubt
        self._clock = clock
        self._round = 0
        self._addresses: dict[Side, str] = {"local": config.local.address, "remote": config.backup.address}
        self._checks: dict[Side, list[Check]] = {
            side: [make_check(group, side, address, service, clock) for service in config.services]
            for side, address in self._addresses.items()
        }
        self._watched = [
            _Watched(service, check, f"{config.local.address}:{service.backend_port}")
            for service, check in zip(config.services, self._checks["local"], strict=True)
        ]

    @property
    def verdict(self) -> bool | None:
        """False when a service of the group has failed, True when all are healthy, None when not yet known."""
        verdicts = [watched.health.verdict for watched in self._watched]
        if False in verdicts:
            return False
        return None if None in verdicts else True

    @property
    def detail(self) -> str:
        """What the services that are not healthy last answered; "" when there is none."""
        return "; ".join(
            f"{name_of(w.service)}: {w.last.detail}"
            for w in self._watched
            if w.health.verdict is not True and w.last is not None and not w.last.ok
        )

    def services(self) -> list[ServiceHealth]:
        """Every service's last answer and verdict."""
        return [
            ServiceHealth(
                service=name_of(w.service),
                target=w.target,
                healthy=w.health.verdict,
                detail=w.last.detail if w.last else "not asked yet",
            )
            for w in self._watched
        ]

    def reset(self) -> None:
        """Forget the verdict: the server has just changed its role, and what it answered before says nothing."""
        self._round += 1
        for watched in self._watched:
            watched.health.reset()

    async def ask(self, side: Side) -> tuple[bool, str]:
        """Ask all services on ``side`` once, at the same time: whether all answer, and what those say that don't."""
        answers = await asyncio.gather(*(check.probe() for check in self._checks[side]))
        failed = [f"{answer.service}: {answer.detail}" for answer in answers if not answer.ok]
        return not failed, "; ".join(failed) or "answers"

    async def run(self) -> None:
        """Check the local server until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for watched in self._watched:
                tasks.create_task(self._watch(watched))

    async def _watch(self, watched: _Watched) -> None:
        interval = watched.service.check.interval
        due = self._clock()
        while True:
            turn = self._round
            observation = await watched.check.probe()
            # An answer that was under way during a reset belongs to the time before it.
            if turn == self._round:
                self._take(watched, observation)
            due += interval
            late = self._clock() - due
            if late > 0:
                # Missed turns are left out, and the rhythm is kept: no burst of checks after a stall.
                due += (late // interval) * interval
            await asyncio.sleep(max(0.0, due - self._clock()))

    def _take(self, watched: _Watched, observation: Observation) -> None:
        before = self.verdict
        previous = watched.last
        watched.last = observation
        watched.health.observe(observation.ok)
        if previous is None or previous.ok != observation.ok:
            _log.info(
                "service answers" if observation.ok else "service does not answer",
                group=self.group,
                service=observation.service,
                target=watched.target,
                detail=observation.detail,
            )
            if not observation.ok:
                self._doubt()
        if self.verdict != before:
            self._changed()
