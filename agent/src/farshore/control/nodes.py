"""The nodes as the monitor sees them: asked for their status all the time, and told things by the driver."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from farshore.config import NodeRef
from farshore.control import api
from farshore.control.client import RequestFailed, ask_peer
from farshore.control.decide import NodeFact
from farshore.errors import FarshoreError, PeerUnreachable
from farshore.log import Log
from farshore.tls import Credentials

_log = Log(__name__)

#: Seconds between two questions for a node's status, and for each answer: a handshake over a long way takes some.
POLL_INTERVAL = 1.0
POLL_TIMEOUT = 2.0

#: Sends one request to one node; raises as ``control.client.ask_peer``.
Ask = Callable[[NodeRef, api.Request, float], Awaitable[api.Answer]]


class Node(Protocol):
    """One node, for the driver of one of its groups."""

    name: str

    def fact(self, group: str) -> NodeFact:
        """What is known of the node and its view of ``group``, without asking."""
        ...

    async def ask(self, request: api.Request, timeout: float) -> api.Answer:
        """Ask now; raises a FarshoreError."""
        ...


def over_tls(context: ssl.SSLContext | Credentials) -> Ask:
    """Ask nodes over TLS as the identity in ``context``."""

    async def ask(peer: NodeRef, request: api.Request, timeout: float) -> api.Answer:
        return await ask_peer(peer, context, request, timeout)

    return ask


class PolledNode:
    """A node whose status is asked for regularly, at once after it was told something, and when a check fails."""

    def __init__(self, ref: NodeRef, ask: Ask, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = ref.node
        self._ref = ref
        self._ask = ask
        self._clock = clock
        self._status: api.NodeStatus | None = None
        self._reachable = False
        self._since = clock()
        self._detail = "not asked yet"
        #: Counts what the node was told: an answer that was asked for before says nothing about after.
        self._told = 0
        self._soon = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    def listen(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` whenever the node says something new, or falls silent."""
        self._listeners.append(changed)

    def hurry(self) -> None:
        """Ask for the status now rather than at the next turn."""
        self._soon.set()

    def fact(self, group: str) -> NodeFact:
        """See ``Node.fact``."""
        status = self._status.groups.get(group) if self._status else None
        detail = self._detail
        if self._reachable and self._status and status is None:
            detail = "it does not know the group"
        return NodeFact(self.name, self._reachable, self._clock() - self._since, detail, status)

    async def ask(self, request: api.Request, timeout: float) -> api.Answer:
        """See ``Node.ask``. A node that can't be reached counts as silent from then on."""
        changes = not isinstance(request, api.StatusRequest)
        self._forget(changes)
        try:
            answer = await self._ask(self._ref, request, timeout)
        except PeerUnreachable as error:
            self._silent(str(error))
            raise
        except FarshoreError as error:
            if not changes and not isinstance(error, RequestFailed):
                self._silent(str(error))
            raise
        finally:
            self._forget(changes)
            self.hurry()
        return answer

    def _forget(self, changes: bool) -> None:
        if changes:
            self._told += 1
            self._status = None

    async def run(self) -> None:
        """Ask for the status until cancelled."""
        while True:
            self._soon.clear()
            began = self._clock()
            await self.poll()
            pause = max(0.05, began + POLL_INTERVAL - self._clock())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._soon.wait()

    async def poll(self) -> None:
        """Ask for the status once."""
        told = self._told
        try:
            answer = await self._ask(self._ref, api.StatusRequest(), POLL_TIMEOUT)
            if not isinstance(answer, api.NodeStatus):
                raise PeerUnreachable(self.name, f"it answers as {type(answer).__name__}; is it a node?")
        except FarshoreError as error:
            self._silent(str(error))
            return
        except Exception as error:
            _log.error("status poll failed", error, node=self.name)
            self._silent(f"{type(error).__name__}: {error}")
            return
        if told != self._told:
            self._soon.set()
            return
        before, self._status = self._status, answer
        self._detail = ""
        if not self._reachable:
            self._reachable, self._since = True, self._clock()
            _log.info("node answers", node=self.name, version=answer.version)
        if before is None or _gist(before) != _gist(answer):
            self._changed()

    def _silent(self, why: str) -> None:
        self._detail = why
        self._status = None
        if self._reachable:
            self._reachable, self._since = False, self._clock()
            _log.warning("node does not answer", node=self.name, reason=why)
            self._changed()

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()


def _gist(status: api.NodeStatus) -> object:
    """What of a status can change a decision; counters and ages change all the time."""
    return [
        (g.group, g.owner, g.epoch, g.state, g.connected, g.in_step, g.synced_once, g.held, tuple(g.units.items()))
        for g in status.groups.values()
    ]
