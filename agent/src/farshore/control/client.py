"""Ask a daemon: over TLS from another host, or over its Unix socket on this one."""

from __future__ import annotations

import asyncio
import os
import ssl
from pathlib import Path

from farshore import tls
from farshore.config import NodeRef
from farshore.control import api
from farshore.dbm import wire
from farshore.errors import FarshoreError, NotInTime, PeerUnreachable

_CODEC: wire.Codec[api.Answer] = wire.Codec(api.Answer)

Answer = api.NodeStatus | api.MonitorStatus | api.HistoryAnswer | api.Explanation | api.Done

#: Name of a daemon's socket in its runtime or state directory.
NODE_SOCKET = "node.sock"
MONITOR_SOCKET = "monitor.sock"


class RequestFailed(FarshoreError):
    """{0}: {1}"""

    def __init__(self, who: str, answer: api.Failed) -> None:
        super().__init__(who, answer.reason)
        self.exit_code = answer.code


async def ask_peer(
    peer: NodeRef, context: ssl.SSLContext | tls.Credentials, request: api.Request, timeout: float
) -> Answer:
    """Send ``request`` to the daemon on another host and return its answer.

    Raises PeerUnreachable, NotInTime, ProtocolError, or RequestFailed with the daemon's reason.
    """
    reader, writer = await tls.connect(peer, context, min(timeout, tls.CONNECT_TIMEOUT))
    return await _exchange(reader, writer, request, timeout, peer.node)


async def ask_socket(path: Path, request: api.Request, timeout: float) -> Answer:
    """Send ``request`` to the daemon on this host whose socket is ``path``; raises as ``ask_peer``."""
    try:
        # A socket's address holds 107 bytes; going through the directory's descriptor lifts that limit.
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    except OSError as error:
        raise PeerUnreachable(str(path), error.strerror) from None
    try:
        reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{directory}/{path.name}", limit=1 << 20)
    except OSError as error:
        raise PeerUnreachable(f"the daemon at {path}", error.strerror or str(error)) from None
    finally:
        os.close(directory)
    return await _exchange(reader, writer, request, timeout, str(path))


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    request: api.Request,
    timeout: float,
    who: str,
) -> Answer:
    try:
        async with asyncio.timeout(timeout):
            writer.write(wire.frame(request))
            await writer.drain()
            answer = await _CODEC.read(reader, who)
    except TimeoutError:
        raise NotInTime(type(request).__name__, timeout, f"{who} did not answer") from None
    except OSError as error:
        raise PeerUnreachable(who, error.strerror or str(error)) from None
    finally:
        writer.close()
    if answer is None:
        raise PeerUnreachable(who, "it closed the connection without an answer")
    if isinstance(answer, api.Failed):
        raise RequestFailed(who, answer)
    return answer
