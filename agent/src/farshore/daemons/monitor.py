"""``farshore-monitor``: SMM, SSM and control in one daemon, on the gateway of the local data centre.

It leaves the rules as they are when it ends: the users of a group that is served by the backup server must not
notice that the monitor is restarted.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from farshore import __version__, config, log, notify, tls
from farshore.config import MonitorConfig, NodeRef
from farshore.control import api
from farshore.control.client import MONITOR_SOCKET
from farshore.control.driver import Driver, Events
from farshore.control.nodes import Ask, PolledNode, over_tls
from farshore.control.server import serve_socket
from farshore.control.state import StateStore
from farshore.daemons import rights
from farshore.errors import FarshoreError, UsageError
from farshore.ipts import tunnel
from farshore.log import Log
from farshore.smm.monitor import Monitor
from farshore.ssm.switch import Switch

_log = Log(__name__)

CONFIG = Path("/etc/farshore/monitor.yml")
#: Seconds between two looks at the rules in the kernel; after one that failed; and at the tunnel.
RULES_INTERVAL = 2.0
RULES_RETRY = 0.5
TUNNEL_INTERVAL = 5.0
#: Name under which events that concern no single group are recorded.
GATEWAY = "-"


class MonitorDaemon:
    """Everything that runs on the gateway. ``ask`` reaches nodes, ``switch`` the kernel, ``look`` the tunnel."""

    def __init__(
        self,
        settings: MonitorConfig,
        ask: Ask,
        *,
        switch: Switch | None = None,
        look: Callable[[], Awaitable[str]] = tunnel.state,
    ) -> None:
        self.settings = settings
        self.switch = switch or Switch(settings)
        self.events = Events()
        self.tunnel = "unknown: not asked yet"
        self._look = look
        self._began = time.monotonic()
        self._store = StateStore(settings.state_dir)
        self._store.open()
        try:
            self._nodes: dict[NodeRef, PolledNode] = {}
            self.monitors: dict[str, Monitor] = {}
            self.drivers: dict[str, Driver] = {}
            for name in settings.groups:
                self._add(name, ask)
        except BaseException:
            self._store.close()
            raise

    def _add(self, name: str, ask: Ask) -> None:
        group = self.settings.groups[name]
        local, backup = (self._nodes.setdefault(ref, PolledNode(ref, ask)) for ref in (group.local, group.backup))
        monitor = Monitor(name, group, lambda: self.drivers[name].wake(), doubt=local.hurry)
        self.monitors[name] = monitor
        driver = Driver(
            name,
            group,
            store=self._store,
            local=local,
            backup=backup,
            checks=monitor,
            switch=self.switch,
            events=self.events,
            tunnel=lambda: self.tunnel,
        )
        self.drivers[name] = driver
        local.listen(driver.wake)
        backup.listen(driver.wake)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set. Raises OSError when the control socket can't be opened."""
        # Users of switched groups come first: a gateway that has just booted has no rules.
        await self._ensure()
        self.settings.runtime_dir.mkdir(parents=True, exist_ok=True)
        socket = self.settings.runtime_dir / MONITOR_SOCKET
        server = await serve_socket(socket, self.handle)
        jobs = [
            *(asyncio.create_task(node.run(), name=f"node {node.name}") for node in self._nodes.values()),
            *(asyncio.create_task(monitor.run(), name=f"checks {g}") for g, monitor in self.monitors.items()),
            *(asyncio.create_task(driver.run(), name=f"driver {g}") for g, driver in self.drivers.items()),
            asyncio.create_task(self._keep_rules(), name="rules"),
            asyncio.create_task(self._watch_tunnel(), name="tunnel"),
            asyncio.create_task(self._report(), name="report"),
        ]
        stopped = asyncio.create_task(stop.wait(), name="stop")
        _log.info("started", node=self.settings.node, groups=",".join(self.drivers))
        notify.ready(self._summary())
        try:
            done, _ = await asyncio.wait([stopped, *jobs], return_when=asyncio.FIRST_COMPLETED)
            for job in done - {stopped}:
                # None of them ends by itself; systemd starts afresh what is broken beyond that.
                job.result()
                raise RuntimeError(f"{job.get_name()} ended")
        finally:
            notify.stopping()
            server.close()
            socket.unlink(missing_ok=True)
            for job in (stopped, *jobs):
                job.cancel()
            await asyncio.gather(stopped, *jobs, return_exceptions=True)
            self._store.close()
            _log.info("stopped", rules="left in place")

    async def handle(self, request: api.Request, peer: str) -> api.Answer:
        """Answer one request of the control API; raises PeerRefused when it is not for ``peer`` to ask."""
        rights.check_monitor(request, peer, self.settings.node)
        if isinstance(request, api.StatusRequest):
            return self.status()
        if isinstance(request, api.Wish):
            driver = self.drivers.get(request.group)
            if driver is None:
                known = ", ".join(self.drivers) or "none"
                raise UsageError(f"no group {request.group!r}; the groups here are: {known}")
            await driver.wish(request.want)
            return api.Done(f"{request.group}: the operator wishes: {request.want}")
        raise AssertionError(f"{type(request).__name__} is permitted, and nobody carries it out")

    def status(self) -> api.MonitorStatus:
        """The whole monitor as ``farshore status`` shows it."""
        return api.MonitorStatus(
            node=self.settings.node,
            version=__version__,
            uptime=time.monotonic() - self._began,
            tunnel=self.tunnel,
            groups={name: driver.status() for name, driver in self.drivers.items()},
            events=self.events.lines(),
        )

    async def _ensure(self) -> bool:
        known = self.switch.problem
        try:
            repair = await self.switch.ensure()
        except FarshoreError as error:
            if str(error) != known:
                self.events.add(GATEWAY, f"rules are not in place: {error}")
                _log.error("rules are not in place", reason=error)
            return False
        if repair.chains:
            self.events.add(GATEWAY, f"rules repaired: {', '.join(repair.chains)} were not as wanted")
        return True

    async def _keep_rules(self) -> None:
        while True:
            await asyncio.sleep(RULES_RETRY if self.switch.problem else RULES_INTERVAL)
            await self._ensure()

    async def _watch_tunnel(self) -> None:
        while True:
            before, self.tunnel = self.tunnel, await self._look()
            if before.split(" ", 1)[0] != self.tunnel.split(" ", 1)[0]:
                self.events.add(GATEWAY, f"tunnel {self.tunnel}")
                _log.info("tunnel", state=self.tunnel)
            await asyncio.sleep(TUNNEL_INTERVAL)

    async def _report(self) -> None:
        """Feed the watchdog as long as every group takes its turns, and keep the status line."""
        pause = min(1.0, notify.watchdog_interval() or 1.0)
        last = ""
        while True:
            late = [name for name, driver in self.drivers.items() if time.monotonic() > driver.due]
            if late:
                _log.error("stuck", groups=",".join(late))
            else:
                notify.watchdog()
            summary = self._summary()
            if summary != last:
                notify.status(summary)
                last = summary
            await asyncio.sleep(pause)

    def _summary(self) -> str:
        return "; ".join(f"{name} [{driver.state.phase}] {driver.reason}" for name, driver in self.drivers.items())


async def _run(settings: MonitorConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    credentials = tls.Credentials(settings.tls)
    keeping = asyncio.create_task(credentials.keep(), name="credentials")
    try:
        await MonitorDaemon(settings, over_tls(credentials)).run(stop)
    finally:
        keeping.cancel()


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``farshore-monitor``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="farshore-monitor",
        description="Watch the local servers and switch their users to the backup servers when they fail.",
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="monitor.yml (default: %(default)s)")
    options = parser.parse_args(arguments)
    # What the control socket and the state may be used for is for root and its group.
    os.umask(0o027)
    try:
        settings = config.load(options.config, MonitorConfig)
        log.setup(settings.log_level, settings.log_json)
        asyncio.run(_run(settings))
    except FarshoreError as error:
        print(f"farshore-monitor: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"farshore-monitor: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
