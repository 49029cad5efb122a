"""TLS 1.3 with both sides authenticated by the deployment's own CA.

A node's identity is the first DNS name in its certificate's subjectAltName: the name that it has
in the inventory. A client insists on the name that it means to reach; a server reads the name of
who called and lets the rooms above decide what that name may do.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from typing import Any

from farshore.config import NodeRef, Tls
from farshore.errors import ConfigError, PeerRefused, PeerUnreachable

#: Seconds for a connection and its handshake.
CONNECT_TIMEOUT = 5.0


def server_context(tls: Tls) -> ssl.SSLContext:
    """Accept only peers with a certificate of the deployment; raises ConfigError for unusable files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return _load(context, tls)


def client_context(tls: Tls) -> ssl.SSLContext:
    """Connect only to the node that was meant; raises ConfigError for unusable files."""
    return _load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), tls)


def _load(context: ssl.SSLContext, tls: Tls) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    for name, path in (("ca", tls.ca), ("certificate", tls.certificate), ("key", tls.key)):
        if not path.is_file():
            raise ConfigError(f"tls.{name}", f"{path} is not a file")
    try:
        context.load_verify_locations(tls.ca)
        context.load_cert_chain(tls.certificate, tls.key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError("tls", f"{tls.certificate} and {tls.key} do not load: {error}") from error
    return context


def peer_name(writer: asyncio.StreamWriter) -> str:
    """Who is on the other end: the first DNS name of its certificate; raises PeerRefused if it has none."""
    certificate: dict[str, Any] = writer.get_extra_info("peercert") or {}
    for kind, value in certificate.get("subjectAltName", ()):
        if kind == "DNS":
            return str(value)
    raise PeerRefused("this node", "the peer's certificate has no DNS name")


async def connect(
    peer: NodeRef, context: ssl.SSLContext, timeout: float = CONNECT_TIMEOUT
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to ``peer`` and make sure that it is the one; raises PeerUnreachable with the cause."""
    where = f"{peer.node} ({peer.address}:{peer.port})"
    try:
        async with asyncio.timeout(timeout):
            return await asyncio.open_connection(
                peer.address, peer.port, ssl=context, server_hostname=peer.node, limit=1 << 20
            )
    except TimeoutError:
        raise PeerUnreachable(where, f"no answer within {timeout:g} s") from None
    except ssl.SSLCertVerificationError as error:
        raise PeerUnreachable(where, f"its certificate was not accepted: {error.verify_message}") from None
    except OSError as error:
        # asyncio's own words hold the address again; the numbers of TLS and of the resolver are not errno's.
        plain = error.errno is not None and not isinstance(error, (ssl.SSLError, socket.gaierror))
        raise PeerUnreachable(where, os.strerror(error.errno or 0) if plain else str(error)) from None
