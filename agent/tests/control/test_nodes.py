from __future__ import annotations

import asyncio
from typing import Any

import pytest

from farshore.config import NodeRef
from farshore.control import api
from farshore.control.client import RequestFailed
from farshore.control.nodes import PolledNode
from farshore.errors import NotInTime, PeerUnreachable


def group(epoch: int) -> api.GroupStatus:
    return api.GroupStatus(
        "web", "local", "local", epoch, "replicating", "", True, True, 0.0, 0, 0, 0, {}, [], True
    )  # fmt: skip


class Fake:
    """A node's answers, as the test sets them."""

    def __init__(self) -> None:
        self.epoch = 1
        self.error: Exception | None = None
        self.hold: asyncio.Event | None = None
        self.node = PolledNode(NodeRef("web1", "10.1.0.5"), self.ask)
        self.changes = 0
        self.node.listen(self.changed)

    def changed(self) -> None:
        self.changes += 1

    async def ask(self, ref: NodeRef, request: api.Request, timeout: float) -> Any:
        assert ref.node == "web1"
        if isinstance(request, api.StatusRequest):
            answer = api.NodeStatus("web1", "0", 1.0, {"web": group(self.epoch)})
            if self.hold:
                await self.hold.wait()
        else:
            answer = api.Done()  # type: ignore[assignment]
        if self.error:
            raise self.error
        return answer


async def test_what_a_node_says_is_known_until_it_falls_silent() -> None:
    fake = Fake()
    fact = fake.node.fact("web")
    assert not fact.reachable and fact.detail == "not asked yet"
    await fake.node.poll()
    fact = fake.node.fact("web")
    assert fact.reachable and fact.status == group(1) and fake.changes == 1
    await fake.node.poll()
    assert fake.changes == 1, "the same again wakes nobody"
    fake.epoch = 2
    await fake.node.poll()
    assert fake.changes == 2
    assert fake.node.fact("other").detail == "it does not know the group"
    fake.error = PeerUnreachable("web1", "timed out")
    await fake.node.poll()
    fact = fake.node.fact("web")
    assert not fact.reachable and "timed out" in fact.detail and fact.status is None and fake.changes == 3


@pytest.mark.parametrize("error", [RuntimeError("surprise"), NotInTime("StatusRequest", 1.0, "no answer")])
async def test_any_failure_to_say_how_it_is_counts_as_silence(error: Exception) -> None:
    fake = Fake()
    await fake.node.poll()
    fake.error = error
    await fake.node.poll()
    assert not fake.node.fact("web").reachable


async def test_an_answer_from_before_a_change_is_not_believed() -> None:
    fake = Fake()
    await fake.node.poll()
    fake.hold = asyncio.Event()
    poll = asyncio.create_task(fake.node.poll())
    await asyncio.sleep(0)
    await fake.node.ask(api.SetOwner("web", "remote", 2), 1.0)
    fake.hold.set()
    await poll
    fact = fake.node.fact("web")
    assert fact.reachable and fact.status is None


async def test_a_refusal_is_not_silence() -> None:
    fake = Fake()
    await fake.node.poll()
    fake.error = RequestFailed("web1", api.Failed("no", 13))
    with pytest.raises(RequestFailed):
        await fake.node.ask(api.SetOwner("web", "remote", 2), 1.0)
    assert fake.node.fact("web").reachable
    fake.error = NotInTime("StatusRequest", 0.4, "no answer")
    with pytest.raises(NotInTime):
        await fake.node.ask(api.StatusRequest(), 0.4)
    assert not fake.node.fact("web").reachable


async def test_hurry_asks_at_once() -> None:
    fake = Fake()
    task = asyncio.create_task(fake.node.run())
    try:
        for epoch in range(2, 12):
            fake.epoch = epoch
            fake.node.hurry()
            async with asyncio.timeout(20):
                while True:
                    status = fake.node.fact("web").status
                    if status and status.epoch == epoch:
                        break
                    await asyncio.sleep(0.001)
    finally:
        task.cancel()
