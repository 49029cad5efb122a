"""Checks: one file per way of asking a service whether it answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from farshore.config import Service, Side
from farshore.smm.checks.base import BaseCheck, Observation, name_of
from farshore.smm.checks.http import HttpCheck
from farshore.smm.checks.tcp import TcpCheck

__all__ = ["Check", "Observation", "make_check", "name_of"]

_KINDS: dict[str, type[BaseCheck]] = {"tcp": TcpCheck, "http": HttpCheck}


class Check(Protocol):
    """Asks one service on one host."""

    async def probe(self) -> Observation:
        """Ask once. Never raises, except for cancellation, and never takes longer than the check's timeout."""
        ...


def make_check(
    group: str, side: Side, address: str, service: Service, clock: Callable[[], float] = time.monotonic
) -> Check:
    """The check that ``service`` asks for, against the server at ``address``."""
    return _KINDS[service.check.kind](group, side, address, service, clock)
