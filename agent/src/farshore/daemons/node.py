"""``farshore-node``: FMM and DBM on a local or a backup server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import math
import os
import signal
import sys
import time
from pathlib import Path

from msgspec import structs

from farshore import __version__, log, notify, tls
from farshore.config import NodeConfig, load
from farshore.control import api, client, server
from farshore.daemons import rights
from farshore.daemons.admission import MOST_OF_OTHER, MOST_OF_PEER
from farshore.daemons.listener import FIRST_FRAME_SECONDS, Caller, Listener
from farshore.daemons.reload import Reload, merge, regrouped
from farshore.dbm import layout, receiver, wire
from farshore.dbm.explain import locate
from farshore.dbm.group import BeingReplaced, Group
from farshore.dbm.messages import Hello, Refused
from farshore.dbm.replica.restore import When
from farshore.dbm.unkept import shown
from farshore.errors import ConfigError, FarshoreError, PeerRefused, UsageError
from farshore.log import Log

_log = Log(__name__)
_REQUESTS: wire.Codec[api.Request] = wire.Codec(api.Request)
#: Seconds between an answer and the next request on a connection, and for taking the answer.
_IDLE_SECONDS = 30.0
#: Seconds after which a group that is being replaced is asked again.
_AGAIN_SECONDS = 0.1
#: Seconds that a reload which is under way may take to end when the daemon does.
_RELOAD_ENDS_SECONDS = 10.0
#: Characters of a group's name that are said again.
_MOST_GROUP = 40
#: MessagePack: the first byte of an array, as the messages of a group's stream are; requests are maps.
_ARRAYS = frozenset({*range(0x90, 0xA0), 0xDC, 0xDD})


class Node:
    """A running node. ``start`` listens and takes up the roles on record; ``stop`` ends everything."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self._started = time.monotonic()
        self._credentials = tls.Credentials(config.tls)
        self.groups = {name: self._make(name, config) for name in config.groups}
        self._listener = Listener(config.listen, self._credentials, self._serve, _peers(config), self._part)
        self._reloading = asyncio.Lock()
        self._config_since = time.time()
        self._config_failed = ""
        self._config_restart: tuple[str, ...] = ()
        self._control: asyncio.Server | None = None
        self._lock = -1
        self._socket: Path | None = None

    def _make(self, name: str, config: NodeConfig) -> Group:
        return Group(name, config.groups[name], self._credentials, config.state_dir / "groups" / name)

    @property
    def port(self) -> int:
        """The TCP port that is listened on; the configured one, or what the system chose for 0."""
        return self._listener.port

    async def start(self, socket_path: Path | None) -> None:
        """Listen on TLS and, if given, on the control socket; raises StateError when another node has the state."""
        self._lock = layout.open_state(self.config.state_dir)
        for group in self.groups.values():
            await group.recover()
        self._listener.start()
        if socket_path is not None:
            self._control = await server.serve_socket(socket_path, self.handle)
            self._socket = socket_path
        for group in self.groups.values():
            await group.start()
        _log.info("listening", node=self.config.node, address=self.config.listen.address, port=self.port)

    async def stop(self) -> None:
        """Stop listening and end all groups."""
        if self._control is not None:
            self._control.close()
        self._listener.close()
        for group in self.groups.values():
            with contextlib.suppress(BeingReplaced):
                await group.stop()
        await self._listener.wait_closed(5)
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)
        if self._lock >= 0:
            os.close(self._lock)

    # --- another configuration

    async def reload(self, path: Path) -> None:
        """Read the configuration anew and go on by it; a broken one changes nothing, which the status tells."""
        async with self._reloading:
            try:
                reload = merge(self.config, load(path, NodeConfig))
            except ConfigError as error:
                _log.error("the configuration is broken; the one from before stays in force", reason=error)
                self._config_failed = f"the configuration is broken, and the one from before is in force: {error}"
                return
            await self._adopt(reload)

    async def _adopt(self, reload: Reload) -> None:
        before, config = self.config, reload.config
        gone, other, new = regrouped(before, config)
        # One that could not begin is tried again.
        other += [name for name in config.groups if name in before.groups and name not in self.groups]
        anew = [name for name in other if name not in self.groups or not self.groups[name].adopt(config.groups[name])]
        if reload.restart:
            _log.warning("a restart is needed for what has changed", keys=",".join(reload.restart))
        # Who may come in, and to what, is decided by the new one from here on.
        self.config = config
        self._listener.admission.configure(_peers(config))
        log.setup(config.log_level, config.log_json)
        ended = [name for name in (*gone, *anew) if name in self.groups]
        paused = {name for name in ended if self.groups[name].paused}
        # A path may go from one group to another: first, all that end have ended.
        await asyncio.gather(*(self.groups[name].stop(hurry=False) for name in ended))
        for name in gone:
            self.groups.pop(name, None)
        begun = await asyncio.gather(*(self._begin(name, config, name in paused) for name in (*anew, *new)))
        # Their order is the configuration's.
        self.groups = {name: self.groups[name] for name in config.groups if name in self.groups}
        self._config_since = time.time()
        self._config_failed = "; ".join(filter(None, begun))
        self._config_restart = reload.restart
        words = {"gone": gone, "new": new, "anew": anew, "changed": [name for name in other if name not in anew]}
        _log.info("reloaded", **{word: ",".join(names) or "none" for word, names in words.items()})

    async def _begin(self, name: str, config: NodeConfig, paused: bool) -> str:
        """Run a group by ``config``; returns why that cannot be, "" if it can."""
        try:
            group = self._make(name, config)
            try:
                await group.recover()
                await group.start()
                if paused and group.owns:
                    await group.pause()
                self.groups[name] = group
            except BaseException:
                await group.stop()
                raise
        except (FarshoreError, OSError) as error:
            self.groups.pop(name, None)
            _log.error("a group cannot begin", error, group=name)
            return f"group {name} cannot begin: {error}"
        return ""

    def _config_status(self) -> api.ConfigStatus:
        return api.ConfigStatus(self._config_since, self._config_failed, list(self._config_restart))

    # --- connections

    def _part(self, name: str) -> tuple[int, bool]:
        """How many connections ``name`` may have, and whether it is a peer or a gateway."""
        if rights.party(self.config, name) == "other":
            return MOST_OF_OTHER, False
        return MOST_OF_PEER + 2 * len(self.groups), True

    async def _serve(self, caller: Caller) -> None:
        reader, writer, peer = caller.reader, caller.writer, caller.name
        async with asyncio.timeout(FIRST_FRAME_SECONDS):
            frame = await wire.read_frame(reader, peer)
        caller.settled()
        if frame is not None and frame[0] in _ARRAYS:
            await self._stream(reader, writer, peer, frame)
            await writer.drain()
            return
        while frame is not None:
            request = _REQUESTS.decode(frame, peer)
            writer.write(await server.answer(self.handle, request, peer))
            # Who asks must take the answer, and ask again, in time: connections are few.
            async with asyncio.timeout(_IDLE_SECONDS):
                await writer.drain()
                frame = await wire.read_frame(reader, peer)

    async def _stream(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str, frame: bytes
    ) -> None:
        hello = receiver.CODEC.decode(frame, peer)
        if not isinstance(hello, Hello):
            raise PeerRefused("this node", f"{type(hello).__name__} before Hello")
        # A peer learns nothing about groups that are not its own, not even whether they exist.
        if not rights.may_stream(self.config, peer, hello.group):
            group = hello.group[:_MOST_GROUP]
            writer.write(wire.frame(Refused(f"group {group} is not for {peer}", False, 0)))
            raise PeerRefused("this node", f"{peer} has no part in group {group!r}")
        await self._group(hello.group).accept(reader, writer, peer, hello)

    # --- requests

    async def handle(self, request: api.Request, peer: str) -> api.Answer:
        """Carry out a control request of ``peer``; raises FarshoreError with the reason when it is refused."""
        rights.check_node(request, peer, self.config)
        match request:
            case api.StatusRequest():
                party = rights.party(self.config, peer)
                status = await self.status(only_for=peer if party == "peer" else None)
                return structs.replace(status, config=self._config_status()) if party == "local" else status
            case api.SetOwner(group=name, owner=owner, epoch=epoch, units=with_units):
                return api.Done(await self._group(name).set_owner(owner, epoch, with_units))
            case api.Freeze(group=name, epoch=epoch, timeout=timeout):
                return api.Done(await self._group(name).freeze(epoch, timeout))
            case api.Thaw(group=name, epoch=epoch):
                return api.Done(await self._group(name).thaw(epoch))
            case api.Flush(group=name, timeout=timeout, durable=durable):
                chosen = self._owned(name)
                flushes = (self._flush(group.name, timeout, durable) for group in chosen)
                return api.Done("; ".join(await asyncio.gather(*flushes)))
            case api.Verify(group=name, contents=contents, repair=repair, from_source=from_source, rate=rate):
                if rate is not None and not 0 <= rate < math.inf:
                    raise UsageError(f"a rate of {rate} bytes/s is not allowed; 0 is unlimited")
                runs = [group.verify(contents, repair, from_source, rate) for group in self._owned(name)]
                return api.Done(" ".join(runs))
            case api.Pause(group=name):
                return api.Done("; ".join([await group.pause() for group in self._owned(name)]))
            case api.Resume(group=name):
                return api.Done("; ".join([await group.resume() for group in self._owned(name)]))
            case api.Explain(path=path):
                return await self.explain(path)
            case api.History(group=name, path=path, limit=limit):
                return await self._group(name).history(path, limit)
            case api.Restore(group=name, path=path, seq=seq, time_ns=time_ns, to=to):
                return api.Done(await self._group(name).restore(path, When(seq, time_ns), to))
            case api.RestoreOnPromotion(group=name, cancel=True):
                return api.Done(await self._group(name).cancel_on_promotion())
            case api.RestoreOnPromotion(group=name, seq=seq, time_ns=time_ns):
                return api.Done(await self._group(name).restore_on_promotion(When(seq, time_ns)))
            case api.Approve(group=name):
                return api.Done(await self._group(name).approve())
            case api.Reject(group=name):
                return api.Done(await self._group(name).reject())
            case _:
                raise AssertionError(f"{type(request).__name__} is permitted, and nobody carries it out")

    async def _flush(self, name: str, timeout: float, durable: bool) -> str:
        """As the group's own, across a reload in which it begins anew."""
        until = time.monotonic() + timeout
        while True:
            try:
                return await self._group(name).flush(max(0.05, until - time.monotonic()), durable)
            except BeingReplaced:
                if time.monotonic() >= until:
                    raise
                await asyncio.sleep(_AGAIN_SECONDS)

    async def status(self, only_for: str | None = None) -> api.NodeStatus:
        """How this node and its groups are; of these, only those of the peer ``only_for``, if given."""
        groups = {
            name: await group.status()
            for name, group in list(self.groups.items())
            if only_for is None or group.config.peer.node == only_for
        }
        return api.NodeStatus(self.config.node, __version__, time.monotonic() - self._started, groups)

    async def explain(self, path: bytes) -> api.Explanation:
        """What ``api.Explain`` asks for; raises UsageError for a path that is not absolute."""
        if not path.startswith(b"/") or b"\0" in path:
            raise UsageError(f"{shown(path)}: an absolute path is needed")
        roots = [(name, number, root.path) for name, group in self.groups.items() for number, root in group.roots()]
        place = await asyncio.to_thread(locate, path, roots)
        if place.group:
            return await self.groups[place.group].explain(place)
        return api.Explanation(
            shown(place.path),
            near=[shown(each) for each in place.near],
            why="it does not lie below any protected path of this server",
        )

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


def _peers(config: NodeConfig) -> list[str]:
    return [group.peer.address for group in config.groups.values()]


def warm_up() -> None:
    """Compile or load the kernels before anybody waits for them; raises RuntimeError if they are wrong."""
    from farshore import delta
    from farshore.fmm import sums

    delta.warm_up()
    sums.warm_up()
    # Compiled when it is imported, by whoever watches with inotify.
    importlib.import_module("farshore.fmm.descent")


async def run(config: NodeConfig, path: Path | None = None) -> None:
    """Run a node until SIGTERM or SIGINT; SIGHUP has it read its configuration at ``path``, if given, anew."""
    stop, again = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if path is not None:
        loop.add_signal_handler(signal.SIGHUP, again.set)
    await asyncio.to_thread(warm_up)
    config.runtime_dir.mkdir(parents=True, exist_ok=True)
    node = Node(config)
    await node.start(config.runtime_dir / client.NODE_SOCKET)
    notify.ready(_summary(node))
    interval = notify.watchdog_interval()
    reloads = asyncio.create_task(_reload_when_told(node, path or Path(), again), name="reload")
    try:
        while not stop.is_set():
            notify.watchdog()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), interval)
    finally:
        notify.stopping()
        reloads.cancel()
        await asyncio.wait([reloads], timeout=_RELOAD_ENDS_SECONDS)
        await node.stop()


async def _reload_when_told(node: Node, path: Path, again: asyncio.Event) -> None:
    while True:
        await again.wait()
        again.clear()
        notify.reloading()
        try:
            await node.reload(path)
        except Exception as error:
            _log.error("the reload failed", error)
        notify.ready(_summary(node))


def _summary(node: Node) -> str:
    return f"{len(node.groups)} groups"


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
            asyncio.run(run(config, arguments.config))
    except FarshoreError as error:
        print(f"farshore-node: {error}", file=sys.stderr)
        return error.exit_code
    return 0
