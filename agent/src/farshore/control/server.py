"""Answer control requests: ``answer`` for one of any stream, ``serve_socket`` on a daemon's Unix socket."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from farshore.control import api
from farshore.dbm import wire
from farshore.errors import FarshoreError
from farshore.log import Log

_log = Log(__name__)
_CODEC: wire.Codec[api.Request] = wire.Codec(api.Request)

#: Who asks, as the handler is told for requests that came over the Unix socket.
LOCAL = "local administrator"

#: Handles one request of the named peer; a FarshoreError becomes a Failed answer.
Handler = Callable[[api.Request, str], Awaitable[api.Answer]]


async def answer(handler: Handler, request: api.Request, peer: str) -> bytes:
    """The frame that answers ``request``; no exception of the handler's gets past here."""
    try:
        result = await handler(request, peer)
    except FarshoreError as error:
        result = api.Failed(str(error), error.exit_code)
    except Exception as error:
        _log.error("request failed", error, request=type(request).__name__, peer=peer)
        result = api.Failed(f"internal error: {error}", 70)
    return wire.frame(result)


async def serve_socket(path: Path, handler: Handler, mode: int = 0o660) -> asyncio.Server:
    """Listen on the Unix socket ``path``; who can open it is the local administrator."""
    path.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (request := await _CODEC.read(reader, LOCAL)) is not None:
                writer.write(await answer(handler, request, LOCAL))
                await writer.drain()
        except (FarshoreError, OSError) as error:
            _log.debug("control connection ended", reason=error)
        finally:
            writer.close()

    try:
        # Python 3.13 would remove the socket by this path, whose descriptor is gone by then.
        keep: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        where = f"/proc/self/fd/{directory}/{path.name}"
        server = await asyncio.start_unix_server(client, where, limit=1 << 20, **keep)
        os.chmod(path, mode)
    finally:
        os.close(directory)
    return server
