from __future__ import annotations

import asyncio

from nodes import until

from farshore.config import Check, MonitorGroup, NodeRef, Service
from farshore.smm.monitor import Monitor


class Port:
    """A port of the loopback that a service listens on, or does not."""

    def __init__(self) -> None:
        self.server: asyncio.Server | None = None
        self.number = 0

    async def open(self) -> None:
        async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        self.server = await asyncio.start_server(client, "127.0.0.1", self.number, reuse_address=True)
        self.number = self.server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        assert self.server
        self.server.close()


def group(*ports: Port) -> MonitorGroup:
    check = Check(interval=0.02, timeout=0.5, rise=2, fall=2)
    return MonitorGroup(
        local=NodeRef("web1", "127.0.0.1"),
        backup=NodeRef("bak1", "127.0.0.2"),
        services=tuple(Service(80 + i, backend_port=port.number, check=check) for i, port in enumerate(ports)),
    )


async def test_the_verdict_follows_the_services_and_wakes_whoever_decides() -> None:
    one, two = Port(), Port()
    await one.open()
    await two.open()
    verdicts: list[bool | None] = []
    doubts: list[bool] = []
    monitor = Monitor(
        "web", group(one, two), lambda: verdicts.append(monitor.verdict), doubt=lambda: doubts.append(True)
    )
    assert monitor.verdict is None and [s.detail for s in monitor.services()] == ["not asked yet"] * 2
    task = asyncio.create_task(monitor.run())
    try:
        await until(lambda: monitor.verdict is True, "the services answer")
        assert await monitor.ask("local") == (True, "answers")
        assert not doubts and monitor.detail == ""
        await two.close()
        await until(lambda: monitor.verdict is False, "a service has failed")
        assert doubts == [True]
        assert "81/tcp" in monitor.detail and "80/tcp" not in monitor.detail
        ok, detail = await monitor.ask("local")
        assert not ok and detail.startswith("81/tcp: ")
        assert [s.healthy for s in monitor.services()] == [True, False]
        await two.open()
        await until(lambda: monitor.verdict is True, "it answers again")
        assert verdicts == [True, False, True]
        assert (await monitor.ask("remote"))[0] is False, "nothing listens on the backup's address"
        monitor.reset()
        assert monitor.verdict is None
        await until(lambda: monitor.verdict is True, "it is asked anew")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await one.close()
        await two.close()
