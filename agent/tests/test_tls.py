"""Who is accepted, and who no longer is: certificates that are taken back, in both directions and without a restart."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

import pytest
from authority import Authority
from nodes import until

from farshore import tls
from farshore.config import NodeRef
from farshore.errors import ConfigError, FarshoreError, PeerRefused, PeerUnreachable
from farshore.tls import Credentials


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "pki")
    for name in ("web1", "bak1", "ldrg"):
        made.issue(name)
    made.revoke()
    return made


class Server:
    """Greets everybody whom it accepts, and waits."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        self.peers: list[str] = []

    async def __aenter__(self) -> NodeRef:
        self.server = await asyncio.start_server(self._client, "127.0.0.1", 0, ssl=self.context)
        return NodeRef("bak1", "127.0.0.1", self.server.sockets[0].getsockname()[1])

    async def __aexit__(self, *_: object) -> None:
        self.server.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(FarshoreError, OSError):
            self.peers.append(tls.peer_name(writer))
            writer.write(b"welcome")
            await reader.read(1)
        writer.close()


async def greeting(peer: NodeRef, context: ssl.SSLContext | Credentials) -> bytes:
    """What the server says; raises when one of both does not accept the other."""
    reader, writer = await tls.connect(peer, context)
    try:
        async with asyncio.timeout(30):
            return await reader.readexactly(7)
    finally:
        writer.close()


@pytest.mark.parametrize("who", ["ca", "certificate", "key", "crl"])
def test_a_file_that_is_missing_is_named(authority: Authority, who: str) -> None:
    files = authority.tls("web1")
    path = getattr(files, who)
    path.unlink()
    with pytest.raises(ConfigError, match=rf"tls.{who}: {path} is not a file"):
        Credentials(files)


def test_a_list_that_is_none_is_refused(authority: Authority) -> None:
    files = authority.tls("web1")
    assert files.crl is not None
    files.crl.write_text("nothing of the kind")
    with pytest.raises(ConfigError, match=r"tls.crl"):
        Credentials(files)


def test_a_list_of_another_authority_is_refused(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", "another authority")
    other.revoke()
    (authority.directory / "ca.crl").write_bytes((other.directory / "ca.crl").read_bytes())
    with pytest.raises(ConfigError, match=r"tls.crl: .* was not issued by the CA"):
        Credentials(authority.tls("web1"))


async def test_without_a_list_everybody_is_accepted(authority: Authority) -> None:
    authority.revoke("web1")
    async with Server(tls.server_context(authority.tls("bak1", crl=False))) as peer:
        assert await greeting(peer, tls.client_context(authority.tls("web1"))) == b"welcome"


async def test_a_revoked_client_is_refused(authority: Authority) -> None:
    authority.revoke("web1")
    server = Server(tls.server_context(authority.tls("bak1")))
    async with server as peer:
        assert await greeting(peer, tls.client_context(authority.tls("ldrg"))) == b"welcome"
        with pytest.raises((OSError, asyncio.IncompleteReadError, PeerUnreachable)):
            await greeting(peer, tls.client_context(authority.tls("web1", crl=False)))
    assert server.peers == ["ldrg"]


async def test_a_revoked_server_is_refused(authority: Authority) -> None:
    authority.revoke("bak1")
    async with Server(tls.server_context(authority.tls("bak1", crl=False))) as peer:
        with pytest.raises(PeerUnreachable, match="certificate was not accepted: certificate revoked"):
            await greeting(peer, Credentials(authority.tls("web1")))


async def test_a_list_of_yesterday_accepts_nobody_and_says_so(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    authority.revoke(days=-0.5)
    async with Server(tls.server_context(authority.tls("bak1", crl=False))) as peer:
        with pytest.raises(PeerUnreachable, match="CRL has expired"):
            await greeting(peer, Credentials(authority.tls("web1")))
    assert "no peer is accepted" in caplog.text


async def test_a_session_cannot_be_taken_up_again(authority: Authority) -> None:
    """It would not be verified anew."""
    credentials = Credentials(authority.tls("bak1"))
    async with Server(credentials.server) as peer:
        reader, writer = await tls.connect(peer, tls.client_context(authority.tls("web1")))
        await reader.readexactly(7)
        session = writer.get_extra_info("ssl_object").session
        writer.close()
        assert session is None or not session.has_ticket


async def test_a_list_is_read_again_when_it_changes(authority: Authority) -> None:
    """By the client, which ends the connection that is open, and makes no other; and taking back can be taken back."""
    credentials = Credentials(authority.tls("web1"))
    async with Server(tls.server_context(authority.tls("bak1", crl=False))) as peer:
        reader, writer = await tls.connect(peer, credentials)
        assert await reader.readexactly(7) == b"welcome"
        authority.revoke("ldrg")
        credentials.refresh()
        assert not writer.is_closing()
        authority.revoke("ldrg", "bak1")
        credentials.refresh()
        async with asyncio.timeout(30):
            with contextlib.suppress(OSError):
                assert await reader.read() == b""
        assert writer.is_closing()
        with pytest.raises(PeerUnreachable, match="revoked"):
            await greeting(peer, credentials)
        authority.revoke("ldrg")
        assert await greeting(peer, credentials) == b"welcome"


async def test_what_becomes_unusable_leaves_in_force_what_was(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    authority.revoke("bak1")
    credentials = Credentials(authority.tls("web1"))
    async with Server(tls.server_context(authority.tls("bak1", crl=False))) as peer:
        for damage in (lambda path: path.write_text("damaged"), lambda path: path.unlink()):
            damage(authority.directory / "ca.crl")
            for _ in range(3):
                with pytest.raises(PeerUnreachable, match="revoked"):
                    await greeting(peer, credentials)
    assert caplog.text.count("stays in force") == 2


async def test_a_new_certificate_is_taken_up(authority: Authority) -> None:
    credentials = Credentials(authority.tls("web1"))
    authority.revoke("web1")
    server = Server(tls.server_context(authority.tls("bak1")))
    async with server as peer:
        with pytest.raises((OSError, asyncio.IncompleteReadError, PeerUnreachable)):
            await greeting(peer, credentials)
        authority.issue("web1")
        assert await greeting(peer, credentials) == b"welcome"


async def test_files_are_looked_at_from_time_to_time(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "LOOK_SECONDS", 0.01)
    credentials = Credentials(authority.tls("web1"))
    keeping = asyncio.create_task(credentials.keep())
    async with Server(tls.server_context(authority.tls("bak1", crl=False))) as peer:
        _, writer = await tls.connect(peer, credentials)
        authority.revoke("bak1")
        await until(writer.is_closing, "the connection goes on")
    keeping.cancel()


@pytest.mark.parametrize("name", ["", "local administrator", "*", "web1/../x", "we b1", "w" * 260, "-web1"])
async def test_a_certificate_whose_name_is_no_hosts_is_refused(authority: Authority, name: str) -> None:
    try:
        authority.issue("odd", dns=name)
    except ValueError:
        pytest.skip("the library makes no such certificate")
    server = Server(tls.server_context(authority.tls("bak1")))
    async with server as peer:
        with pytest.raises((OSError, asyncio.IncompleteReadError, PeerUnreachable)):
            await greeting(peer, tls.client_context(authority.tls("odd")))
    assert server.peers == []


def test_the_reason_is_that_of_a_peer() -> None:
    class Writer:
        def get_extra_info(self, _: str) -> dict[str, object]:
            return {"subjectAltName": (("DNS", "local administrator"),)}

    with pytest.raises(PeerRefused, match="is not a host's"):
        tls.peer_name(Writer())  # type: ignore[arg-type]
