"""What all checks share: the time limit, and that every failure becomes an observation."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from farshore.config import Service, Side


@dataclass(frozen=True, slots=True)
class Observation:
    """One answer of one service, or its absence; ``at`` is monotonic seconds at the end of the check."""

    group: str
    service: str
    side: Side
    ok: bool
    detail: str
    at: float


class NotWell(Exception):
    """What a probe found wrong; its text becomes the observation's detail."""


def name_of(service: Service) -> str:
    """A service's name in status and log: "80/tcp"."""
    return f"{service.port}/{service.protocol}"


class BaseCheck:
    """A check of one service on one host; a kind of check says how to ``ask``."""

    def __init__(
        self, group: str, side: Side, address: str, service: Service, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.group = group
        self.side: Side = side
        self.address = address
        self.service = service
        self.clock = clock

    async def ask(self) -> str:
        """Ask the service and return what to show; raises NotWell, OSError or TimeoutError."""
        raise NotImplementedError

    async def probe(self) -> Observation:
        """Ask once; see ``Check.probe``."""
        limit = self.service.check.timeout
        ok = False
        try:
            async with asyncio.timeout(limit):
                detail = await self.ask()
            ok = True
        except TimeoutError:
            detail = f"no answer within {limit:g} s"
        except NotWell as error:
            detail = str(error)
        except OSError as error:
            # asyncio puts words of its own in the place of the system's.
            detail = os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
        except Exception as error:
            # A surprise in a check is a failed check, never the end of the monitoring.
            detail = f"{type(error).__name__}: {error}"
        return Observation(self.group, name_of(self.service), self.side, ok, detail, self.clock())
