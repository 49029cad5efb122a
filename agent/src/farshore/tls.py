"""TLS 1.3 with both sides authenticated by the deployment's own CA.

A node's identity is the first DNS name in its certificate's subjectAltName: the name that it has
in the inventory. A client insists on the name that it means to reach; a server reads the name of
who called and lets the rooms above decide what that name may do. A certificate that the CA has taken
back is refused in both directions.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from farshore import crl
from farshore.config import NodeRef, Tls
from farshore.errors import ConfigError, FarshoreError, PeerRefused, PeerUnreachable
from farshore.log import Log

_log = Log(__name__)

#: Seconds for a connection and its handshake.
CONNECT_TIMEOUT = 5.0
#: Seconds after which the files are looked at again, for connections that are open: the longest that a peer stays
#: connected once it was taken back.
LOOK_SECONDS = 5.0
#: What an inventory may call a host; all else in a certificate is no name of ours.
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,251}[A-Za-z0-9_])?")

_Stamp = tuple[tuple[int, int, int] | None, ...]


def server_context(tls: Tls) -> ssl.SSLContext:
    """Accept only peers with a certificate of the deployment; raises ConfigError for unusable files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    # A session that is taken up again is not verified anew: neither the list nor the dates would be looked at.
    context.num_tickets = 0
    return _load(context, tls)


def client_context(tls: Tls) -> ssl.SSLContext:
    """Connect only to the node that was meant; raises ConfigError for unusable files."""
    return _load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), tls)


def _load(context: ssl.SSLContext, tls: Tls) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    for name, path in _files(tls):
        if not path.is_file():
            raise ConfigError(f"tls.{name}", f"{path} is not a file")
    try:
        context.load_verify_locations(tls.ca)
        context.load_cert_chain(tls.certificate, tls.key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError("tls", f"{tls.certificate} and {tls.key} do not load: {error}") from error
    if tls.crl is not None:
        try:
            context.load_verify_locations(tls.crl)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError("tls.crl", f"{tls.crl} does not load: {error}") from error
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def _files(tls: Tls) -> list[tuple[str, Path]]:
    files = [("ca", tls.ca), ("certificate", tls.certificate), ("key", tls.key)]
    return files if tls.crl is None else [*files, ("crl", tls.crl)]


def _read_list(tls: Tls) -> crl.Crl | None:
    """The CA's list; raises ConfigError when it is unusable, or another CA's: nobody at all would be accepted."""
    if tls.crl is None:
        return None
    try:
        found = crl.parse(tls.crl.read_bytes())
        issuer = crl.subject(tls.ca.read_bytes())
    except (FarshoreError, OSError) as error:
        raise ConfigError("tls.crl", f"{tls.crl}: {error}") from error
    if found.issuer != issuer:
        raise ConfigError("tls.crl", f"{tls.crl} was not issued by the CA in {tls.ca}")
    return found


class Credentials:
    """A node's identity, and whom it accepts, as its files say: they are read again when they change.

    A change that is unusable is logged, and what was read before remains in force. Connections that are watched are
    ended when their peer's certificate is taken back. Raises ConfigError when the files are unusable at first. All
    methods belong to the event loop.
    """

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._stamp: _Stamp | None = None
        self._complaint = ""
        self._open: dict[asyncio.StreamWriter, tuple[int, Callable[[], object]]] = {}
        self._revoked: frozenset[int] = frozenset()
        self._read(self._look())

    @property
    def server(self) -> ssl.SSLContext:
        """The context for a peer that connects now."""
        self.refresh()
        return self._server

    @property
    def client(self) -> ssl.SSLContext:
        """The context for connecting to a peer now."""
        self.refresh()
        return self._client

    def refresh(self) -> None:
        """Take up what has changed."""
        stamp = self._look()
        if stamp == self._stamp:
            return
        try:
            self._read(stamp)
        except ConfigError as error:
            if self._complaint != str(error):
                self._complaint = str(error)
                _log.error("what changed is not usable; what was read before stays in force", reason=error)
            return
        self._complaint = ""
        _log.info("certificates read again", revoked=len(self._revoked))
        for writer, (serial, end) in list(self._open.items()):
            if serial in self._revoked:
                del self._open[writer]
                _log.warning("a connection ends: its certificate was revoked", peer=_said_name(writer))
                end()

    async def keep(self) -> None:
        """Refresh from time to time until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.refresh()

    def watch(self, writer: asyncio.StreamWriter, end: Callable[[], object]) -> None:
        """Call ``end`` when the certificate of the peer at ``writer`` is taken back; raises PeerRefused if it is."""
        serial = int((writer.get_extra_info("peercert") or {}).get("serialNumber", "-1"), 16)
        if serial in self._revoked:
            # The handshake was under way when the list came.
            raise PeerRefused("this node", "the peer's certificate is revoked")
        self._open = {each: known for each, known in self._open.items() if not each.is_closing()}
        self._open[writer] = (serial, end)

    def _look(self) -> _Stamp:
        def stamp(path: Path) -> tuple[int, int, int] | None:
            try:
                status = path.stat()
            except OSError:
                return None
            return status.st_ino, status.st_size, status.st_mtime_ns

        return tuple(stamp(path) for _, path in _files(self._tls))

    def _read(self, stamp: _Stamp) -> None:
        server, client = server_context(self._tls), client_context(self._tls)
        listed = _read_list(self._tls)
        self._server, self._client, self._stamp = server, client, stamp
        if listed is not None:
            self._revoked = listed.revoked
            now = datetime.now(UTC)
            if now < listed.this_update or (listed.next_update is not None and listed.next_update < now):
                times = f"{listed.this_update} to {listed.next_update}"
                _log.error("the list of revoked certificates is not in force: no peer is accepted", in_force=times)
        else:
            self._revoked = frozenset()


def peer_name(writer: asyncio.StreamWriter) -> str:
    """Who is on the other end: the first DNS name of its certificate; raises PeerRefused if it has none."""
    name = _said_name(writer)
    if not name:
        raise PeerRefused("this node", "the peer's certificate has no DNS name")
    if not _NAME.fullmatch(name):
        raise PeerRefused("this node", f"the DNS name of the peer's certificate is not a host's: {name[:80]!r}")
    return name


def _said_name(writer: asyncio.StreamWriter) -> str:
    certificate: dict[str, Any] = writer.get_extra_info("peercert") or {}
    return next((str(value) for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"), "")


async def connect(
    peer: NodeRef, context: ssl.SSLContext | Credentials, timeout: float = CONNECT_TIMEOUT
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to ``peer`` and make sure that it is the one; raises PeerUnreachable with the cause.

    With Credentials, the connection is ended when the peer's certificate is taken back.
    """
    where = f"{peer.node} ({peer.address}:{peer.port})"
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(
                peer.address,
                peer.port,
                ssl=context.client if isinstance(context, Credentials) else context,
                server_hostname=peer.node,
                limit=1 << 20,
            )
    except TimeoutError:
        raise PeerUnreachable(where, f"no answer within {timeout:g} s") from None
    except ssl.SSLCertVerificationError as error:
        raise PeerUnreachable(where, f"its certificate was not accepted: {error.verify_message}") from None
    except OSError as error:
        # asyncio's own words hold the address again; the numbers of TLS and of the resolver are not errno's.
        plain = error.errno is not None and not isinstance(error, (ssl.SSLError, socket.gaierror))
        raise PeerUnreachable(where, os.strerror(error.errno or 0) if plain else str(error)) from None
    if isinstance(context, Credentials):
        try:
            context.watch(writer, writer.transport.abort)
        except PeerRefused as error:
            writer.transport.abort()
            raise PeerUnreachable(where, str(error)) from None
    return reader, writer
