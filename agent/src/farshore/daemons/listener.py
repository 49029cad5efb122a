"""The TLS port of a node: lets connections in, finds out who they are, and ends them.

Each connection is weighed (``admission``) before anything is done for it, makes its handshake with the certificates as
they are at that moment, and says its first words within a time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable

from farshore import tls
from farshore.config import Endpoint
from farshore.daemons.admission import Admission, Causes, Ticket
from farshore.errors import FarshoreError, PeerRefused, StateError
from farshore.log import Log

_log = Log(__name__)

#: Seconds for the handshake, for the first frame after it, and for saying goodbye.
HANDSHAKE_SECONDS = 10.0
FIRST_FRAME_SECONDS = 10.0
_GOODBYE_SECONDS = 5.0
#: Seconds without connections when the system has no more descriptors, as asyncio's own servers wait.
_RETRY_SECONDS = 1.0
_BACKLOG = 256
_LIMIT = 1 << 20
#: Seconds between two looks at what is to be logged again.
_REPORT_SECONDS = 10.0
#: Characters of a reason that are logged: some of it is the peer's.
_MOST_REASON = 300
#: Connections that are accepted before others of the event loop have their turn.
_AT_ONCE = 32


class Caller:
    """One connection whose peer is known by name. ``settled`` is to be called once its first frame has come."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str, address: str, ticket: Ticket
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.name = name
        self.address = address
        self._ticket = ticket

    def settled(self) -> None:
        """It has said what it wants: it no longer counts among those of whom nobody knows."""
        self._ticket.give_back()


class Listener:
    """Listens at ``endpoint``. ``serve`` is called for each peer that proved its name.

    ``known``: addresses of configured peers. ``part`` tells how many connections a name may have, and whether it is one
    that matters, whose address is then known.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        credentials: tls.Credentials,
        serve: Callable[[Caller], Awaitable[None]],
        known: Iterable[str],
        part: Callable[[str], tuple[int, bool]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint = endpoint
        self._credentials = credentials
        self._serve = serve
        self._part = part
        self.admission = Admission(clock, known)
        self._causes = Causes(clock)
        self._socket: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: set[asyncio.Task[None]] = set()
        #: The port that is listened on: the configured one, or what the system chose for 0.
        self.port = endpoint.port

    def start(self) -> None:
        """Listen; raises StateError when the address is not to be had."""
        where = f"{self._endpoint.address}:{self._endpoint.port}"
        try:
            family = socket.AF_INET6 if ":" in self._endpoint.address else socket.AF_INET
            address = self._endpoint.address, self._endpoint.port
            listening = socket.create_server(address, family=family, backlog=_BACKLOG)
        except OSError as error:
            raise StateError(where, f"cannot listen: {error.strerror}") from error
        listening.setblocking(False)
        self._socket = listening
        self.port = listening.getsockname()[1]
        self._listen()
        for job in (self._credentials.keep(), self._report()):
            self._tasks.add(asyncio.create_task(job))

    def close(self) -> None:
        """Listen no more, and end all connections; they are gone after ``wait_closed``."""
        listening, self._socket = self._socket, None
        if listening is not None:
            asyncio.get_running_loop().remove_reader(listening)
            listening.close()
        for task in (*self._tasks, *self._connections):
            task.cancel()

    async def wait_closed(self, timeout: float) -> None:
        """Wait until all connections have ended, for ``timeout`` seconds at most."""
        if self._connections or self._tasks:
            await asyncio.wait([*self._tasks, *self._connections], timeout=timeout)

    # --- one after the other

    def _listen(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().add_reader(self._socket, self._accept, self._socket)

    def _accept(self, listening: socket.socket) -> None:
        """Connections have come: take those that may come in, and turn the others away without a word."""
        for _ in range(_AT_ONCE):
            try:
                sock, source = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._note("cannot accept connections", str(error.strerror))
                loop = asyncio.get_running_loop()
                loop.remove_reader(listening)
                loop.call_later(_RETRY_SECONDS, self._listen)
                return
            address = str(source[0])
            ticket = self.admission.enter(address)
            if isinstance(ticket, str):
                sock.close()
                self._note(ticket, address)
                continue
            sock.setblocking(False)
            task = asyncio.create_task(self._connection(sock, address, ticket))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)
            # A task that is cancelled before its first step does nothing at all.
            task.add_done_callback(lambda _, ticket=ticket: ticket.give_back())  # type: ignore[misc]

    async def _connection(self, sock: socket.socket, address: str, ticket: Ticket) -> None:
        """From the handshake to the end; nothing but cancellation gets out."""
        with contextlib.ExitStack() as stack:
            try:
                reader, writer = await self._handshake(sock)
            except (OSError, TimeoutError, FarshoreError) as error:
                self._note("handshake failed", f"{address}: {_words(error)}")
                return
            stack.callback(writer.close)
            name = ""
            try:
                name = tls.peer_name(writer)
                most, matters = self._part(name)
                if not self.admission.identify(name, most):
                    raise PeerRefused("this node", f"{name} has {most} connections already")
                stack.callback(self.admission.leave, name)
                if matters:
                    self.admission.learn(address)
                task = asyncio.current_task()
                assert task is not None
                self._credentials.watch(writer, task.cancel)
                await self._serve(Caller(reader, writer, name, address, ticket))
                await self._goodbye(writer)
            except (FarshoreError, OSError, TimeoutError) as error:
                # An error's kind is ours, its words may be the peer's.
                self._note(f"connection of {name or 'a nameless peer'} ended", f"{address}: {_words(error)}", error)
            except Exception as error:
                _log.error("connection failed", error, peer=name, address=address)

    async def _handshake(self, sock: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        try:
            _detect_death(sock)
        except OSError:
            sock.close()
            raise
        reader = asyncio.StreamReader(_LIMIT, loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                sock,
                ssl=self._credentials.server,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=_GOODBYE_SECONDS,
            )
        except asyncio.CancelledError:
            # A transport that is cancelled in its first steps forgets its socket; it finds the end of the stream there.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            raise
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    @staticmethod
    async def _goodbye(writer: asyncio.StreamWriter) -> None:
        """What was written reaches the peer, if it takes it in time."""
        writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await writer.wait_closed()

    # --- what is said of it

    def _note(self, cause: str, detail: str, error: BaseException | None = None) -> None:
        if error is not None:
            cause = f"{cause}: {type(error).__name__}"
        if self._causes.note(cause, detail):
            _log.warning(cause, detail=detail)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            for cause, count, last in self._causes.due():
                _log.warning(cause, times=count, last=last)


def _words(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate was not accepted: {error.verify_message}"
    return (str(error) or type(error).__name__)[:_MOST_REASON]


def _detect_death(sock: socket.socket) -> None:
    """Let TCP notice a peer that is gone within a minute, also when nothing is sent."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
