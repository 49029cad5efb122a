"""The check that asks for a page over HTTP/1.1 (RFC 9112)."""

from __future__ import annotations

import asyncio

from farshore.smm.checks.base import BaseCheck, NotWell

#: A server whose header is longer is not one that we know how to ask.
MAX_HEADER = 16 << 10


class HttpCheck(BaseCheck):
    """Healthy when a GET of the check's path answers with one of its statuses, or 200..399 when it names none."""

    async def ask(self) -> str:
        port = self.service.backend_port
        reader, writer = await asyncio.open_connection(self.address, port, limit=MAX_HEADER)
        try:
            writer.write(self._request())
            try:
                header = await reader.readuntil(b"\r\n\r\n")
            except asyncio.LimitOverrunError:
                raise NotWell(f"the header of the answer is over {MAX_HEADER} bytes") from None
            except asyncio.IncompleteReadError as error:
                header = error.partial
                if not header:
                    raise NotWell("closed the connection without an answer") from None
                _status(header)
                raise NotWell("closed the connection within the header of its answer") from None
        finally:
            writer.transport.abort()
        status = _status(header)
        check = self.service.check
        if status in check.statuses or (not check.statuses and 200 <= status <= 399):
            return f"HTTP {status}"
        raise NotWell(f"HTTP {status}")

    def _request(self) -> bytes:
        host = self.service.check.host
        if not host:
            name = f"[{self.address}]" if ":" in self.address else self.address
            host = name if self.service.backend_port == 80 else f"{name}:{self.service.backend_port}"
        lines = [
            f"GET {self.service.check.path} HTTP/1.1",
            f"Host: {host}",
            "User-Agent: farshore-monitor",
            "Accept: */*",
            "Connection: close",
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _status(header: bytes) -> int:
    line = header.split(b"\r\n", 1)[0]
    version, _, rest = line.partition(b" ")
    code = rest[:3]
    if not version.startswith(b"HTTP/1.") or len(code) != 3 or not code.isdigit():
        raise NotWell(f"the answer is not HTTP: {line[:40]!r}")
    return int(code)
