"""``farshore-node``: FMM and DBM on a local or a backup server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import signal
import ssl
import sys
import time
from pathlib import Path

from farshore import __version__, durable, log, notify, tls
from farshore.config import NodeConfig, load
from farshore.control import api, client, server
from farshore.dbm import receiver, wire
from farshore.dbm.group import Group
from farshore.dbm.messages import Hello, Refused
from farshore.errors import FarshoreError, PeerRefused, StateError, UsageError
from farshore.log import Log

_log = Log(__name__)
_REQUESTS: wire.Codec[api.Request] = wire.Codec(api.Request)
_GATEWAY_ONLY = (api.SetOwner, api.Freeze, api.Thaw, api.Flush, api.Verify)
_LOCAL_ONLY = (api.Pause, api.Resume)
_FIRST_FRAME_SECONDS = 10.0
#: MessagePack: the first byte of an array, as the messages of a group's stream are; requests are maps.
_ARRAYS = frozenset({*range(0x90, 0xA0), 0xDC, 0xDD})


class Node:
    """A running node. ``start`` listens and takes up the roles on record; ``stop`` ends everything."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self._started = time.monotonic()
        self._client_context = tls.client_context(config.tls)
        self.groups = {
            name: Group(name, group, self._client_context, config.state_dir / "groups" / name)
            for name, group in config.groups.items()
        }
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.Task[None]] = set()
        self._lock = -1
        self._socket: Path | None = None
        #: The TCP port that is listened on; the configured one, or what the system chose for 0.
        self.port = config.listen.port

    async def start(self, socket_path: Path | None) -> None:
        """Listen on TLS and, if given, on the control socket; raises StateError when another node has the state."""
        self._lock = durable.lock(self.config.state_dir, "another process uses it")
        listen = self.config.listen
        try:
            tls_server = await asyncio.start_server(
                self._connection,
                listen.address,
                listen.port,
                ssl=tls.server_context(self.config.tls),
                ssl_handshake_timeout=_FIRST_FRAME_SECONDS,
                limit=1 << 20,
            )
        except OSError as error:
            raise StateError(f"{listen.address}:{listen.port}", f"cannot listen: {error.strerror}") from error
        self.port = tls_server.sockets[0].getsockname()[1]
        self._servers.append(tls_server)
        if socket_path is not None:
            self._servers.append(await server.serve_socket(socket_path, self.handle))
            self._socket = socket_path
        for group in self.groups.values():
            await group.start()
        _log.info("listening", node=self.config.node, address=listen.address, port=self.port)

    async def stop(self) -> None:
        """Stop listening and end all groups."""
        for each in self._servers:
            each.close()
        for task in list(self._connections):
            task.cancel()
        for group in self.groups.values():
            await group.stop()
        if self._connections:
            await asyncio.wait(self._connections, timeout=5)
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)
        if self._lock >= 0:
            os.close(self._lock)

    # --- connections

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        where = str((writer.get_extra_info("peername") or ["?"])[0])
        try:
            peer = tls.peer_name(writer)
            await self._serve(reader, writer, peer)
        except asyncio.CancelledError:
            pass
        except (FarshoreError, OSError, TimeoutError, ssl.SSLError) as error:
            _log.warning("connection ended", address=where, reason=str(error) or type(error).__name__)
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str) -> None:
        async with asyncio.timeout(_FIRST_FRAME_SECONDS):
            frame = await wire.read_frame(reader, peer)
        if frame is not None and frame[0] in _ARRAYS:
            await self._stream(reader, writer, peer, frame)
            await writer.drain()
            return
        while frame is not None:
            request = _REQUESTS.decode(frame, peer)
            writer.write(await server.answer(self.handle, request, peer))
            await writer.drain()
            frame = await wire.read_frame(reader, peer)

    async def _stream(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str, frame: bytes
    ) -> None:
        hello = receiver.CODEC.decode(frame, peer)
        if not isinstance(hello, Hello):
            raise PeerRefused("this node", f"{type(hello).__name__} before Hello")
        group = self.groups.get(hello.group)
        # A peer learns nothing about groups that are not its own, not even whether they exist.
        if group is None or group.config.peer.node != peer:
            writer.write(wire.frame(Refused(f"group {hello.group} is not for {peer}", False, 0)))
            raise PeerRefused("this node", f"{peer} has no part in group {hello.group!r}")
        await group.accept(reader, writer, peer, hello)

    # --- requests

    async def handle(self, request: api.Request, peer: str) -> api.Answer:
        """Carry out a control request of ``peer``; raises FarshoreError with the reason when it is refused."""
        local = peer == server.LOCAL
        if isinstance(request, _GATEWAY_ONLY) and not (local or peer in self.config.gateways):
            raise PeerRefused(self.config.node, f"{type(request).__name__} is for gateways, and {peer} is none")
        if isinstance(request, _LOCAL_ONLY) and not local:
            raise PeerRefused(self.config.node, f"{type(request).__name__} is for the local administrator")
        match request:
            case api.StatusRequest():
                return await self.status()
            case api.SetOwner(group=name, owner=owner, epoch=epoch, units=with_units):
                return api.Done(await self._group(name).set_owner(owner, epoch, with_units))
            case api.Freeze(group=name, epoch=epoch, timeout=timeout):
                return api.Done(await self._group(name).freeze(epoch, timeout))
            case api.Thaw(group=name, epoch=epoch):
                return api.Done(await self._group(name).thaw(epoch))
            case api.Flush(group=name, timeout=timeout):
                chosen = self._owned(name)
                return api.Done("; ".join(await asyncio.gather(*(group.flush(timeout) for group in chosen))))
            case api.Verify(group=name, contents=contents, repair=repair, from_source=from_source, rate=rate):
                if rate is not None and not 0 <= rate < math.inf:
                    raise UsageError(f"a rate of {rate} bytes/s is not allowed; 0 is unlimited")
                runs = [group.verify(contents, repair, from_source, rate) for group in self._owned(name)]
                return api.Done(" ".join(runs))
            case api.Pause(group=name):
                return api.Done("; ".join([await group.pause() for group in self._owned(name)]))
            case api.Resume(group=name):
                return api.Done("; ".join([await group.resume() for group in self._owned(name)]))
            case _:
                raise PeerRefused(self.config.node, f"{type(request).__name__} is not for a node")

    async def status(self) -> api.NodeStatus:
        """How this node and its groups are."""
        groups = {name: await group.status() for name, group in self.groups.items()}
        return api.NodeStatus(self.config.node, __version__, time.monotonic() - self._started, groups)

    def _group(self, name: str) -> Group:
        group = self.groups.get(name)
        if group is None:
            known = ", ".join(self.groups) or "none"
            raise UsageError(f"group {name!r} is not known on {self.config.node}; known: {known}")
        return group

    def _owned(self, name: str) -> list[Group]:
        """The named group, or, for "", all that this node owns."""
        if name:
            return [self._group(name)]
        owned = [group for group in self.groups.values() if group.owns]
        if not owned:
            raise UsageError(f"{self.config.node} owns no group")
        return owned


async def run(config: NodeConfig) -> None:
    """Run a node until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # Compile or load the kernels before anybody waits for them.
    from farshore import delta

    await asyncio.to_thread(delta.warm_up)
    config.runtime_dir.mkdir(parents=True, exist_ok=True)
    node = Node(config)
    await node.start(config.runtime_dir / client.NODE_SOCKET)
    notify.ready(f"{len(config.groups)} groups")
    interval = notify.watchdog_interval()
    try:
        while not stop.is_set():
            notify.watchdog()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), interval)
    finally:
        notify.stopping()
        await node.stop()


def main() -> int:
    """Entry point of ``farshore-node``."""
    parser = argparse.ArgumentParser(prog="farshore-node", description="Replicate the groups of this server.")
    parser.add_argument("--config", type=Path, default=Path("/etc/farshore/node.yml"), help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="only check the configuration")
    arguments = parser.parse_args()
    try:
        config = load(arguments.config, NodeConfig)
        log.setup(config.log_level, config.log_json)
        if not arguments.check:
            asyncio.run(run(config))
    except FarshoreError as error:
        print(f"farshore-node: {error}", file=sys.stderr)
        return error.exit_code
    return 0
