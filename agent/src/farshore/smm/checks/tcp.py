"""The check that is satisfied when the port accepts a connection."""

from __future__ import annotations

import asyncio

from farshore.smm.checks.base import BaseCheck


class TcpCheck(BaseCheck):
    """Healthy when a TCP connection to the service's backend port is accepted."""

    async def ask(self) -> str:
        _, writer = await asyncio.open_connection(self.address, self.service.backend_port)
        # A reset rather than a goodbye: thousands of checks an hour must not pile up in TIME_WAIT.
        writer.transport.abort()
        return "accepts connections"
