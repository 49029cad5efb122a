"""How fast a group may send: a token bucket that follows the week's schedule."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from datetime import datetime

from farshore.config import Bandwidth

#: Seconds of the rate that a piece is worth: what others may have to wait for.
PIECE = 0.025
SMALLEST_PIECE, LARGEST_PIECE = 4 << 10, 256 << 10
#: Seconds of the rate that a burst is worth: twice a piece, so that who sleeps too long before a piece loses nothing.
BURST = 0.05
SMALLEST_BURST, LARGEST_BURST = 8 << 10, 4 << 20
#: Seconds; what rounding leaves to wait for is less.
SHORTEST_SLEEP = 1e-6


def local_now() -> datetime:
    """The node's wall clock, with its zone."""
    return datetime.now().astimezone()


class Pacer:
    """Lets bytes of one group go, no faster than ``bandwidth`` allows at the moment.

    In any t seconds, no more than t times the limit and a burst go: ``BURST`` seconds' worth of the limit, within
    ``SMALLEST_BURST`` and ``LARGEST_BURST`` bytes. What counts is the stream's bytes, without the headers of TLS, TCP
    and the tunnel. ``clock`` is in seconds and never goes back; ``wall_clock``
    gives the local time with its zone; ``sleep`` waits for so many seconds of ``clock``.
    """

    def __init__(
        self,
        bandwidth: Bandwidth,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], datetime] = local_now,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._bandwidth = bandwidth
        self._clock = clock
        self._wall_clock = wall_clock
        self._sleep = sleep
        self._turn = asyncio.Lock()
        self._at = clock()
        self._tokens = 0.0
        self._rate = math.inf
        #: When, by ``clock``, the limit may be another one.
        self._until = self._at
        self._look()
        self._tokens = self._burst()

    def adopt(self, bandwidth: Bandwidth) -> None:
        """Another limit holds from now on."""
        self._bandwidth = bandwidth
        self._earn(self._clock())
        self._look()

    async def take(self, n: int) -> None:
        """Wait until ``n`` bytes may go; first come, first served. More than half a burst is saved up in halves."""
        async with self._turn:
            left = float(n)
            while left > 0:
                self._refill()
                if math.isinf(self._rate):
                    return
                portion = min(left, self._burst() / 2)
                if self._tokens >= portion:
                    self._tokens -= portion
                    left -= portion
                else:
                    wait = (portion - self._tokens) / self._rate
                    await self._sleep(max(min(wait, self._until - self._at), SHORTEST_SLEEP))

    def piece(self) -> int:
        """Bytes to send at once, so that nothing else waits much longer than ``PIECE`` seconds for them."""
        self._refill()
        return int(min(max(self._rate * PIECE, SMALLEST_PIECE), LARGEST_PIECE))

    def _burst(self) -> float:
        return min(max(self._rate * BURST, SMALLEST_BURST), LARGEST_BURST)

    def _refill(self) -> None:
        now = self._clock()
        if now >= self._until:
            self._earn(self._until)
            self._look()
        self._earn(now)

    def _earn(self, now: float) -> None:
        if not math.isinf(self._rate):
            self._tokens = min(self._tokens + self._rate * (now - self._at), self._burst())
        self._at = now

    def _look(self) -> None:
        """Read the limit, which is good until the minute ends by the wall clock.

        Schedules change at whole minutes, and so do the zones' offsets: no boundary lies within a minute, whatever
        summer time or a set clock does to the hours.
        """
        now = self._wall_clock()
        self._rate = self._bandwidth.at(now)
        self._until = self._clock() + 60 - now.timestamp() % 60
        self._tokens = min(self._tokens, self._burst())
