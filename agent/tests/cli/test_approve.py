"""``farshore approve`` and ``reject``, and how a hold is shown."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from farshore.cli import main, status
from farshore.control import api, client
from farshore.control.server import serve_socket
from farshore.errors import FarshoreError

GROUP = api.GroupStatus(
    "web", "remote", "local", 1, "held", "the brake holds", True, False, None, 0, 0, 0, {}, [], True,
    held="1,204 of 5,000 files (24%) were rewritten or removed within 60 s; allowed are 20%",
    held_transactions=17, held_since=1_700_000_000.0,
)  # fmt: skip


class NothingHeld(FarshoreError):
    """Group {0}: nothing is held on this node"""

    exit_code = 28


class Daemon:
    """A node's socket in a thread of its own; ``asked`` are the requests that change something."""

    def __init__(self, directory: Path) -> None:
        self.asked: list[api.Request] = []
        self._socket = directory / client.NODE_SOCKET
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(serve_socket(self._socket, self._answer), self._loop).result(30)

    async def _answer(self, request: api.Request, peer: str) -> api.Answer:
        if isinstance(request, api.StatusRequest):
            return api.NodeStatus("bak1", "0", 1.0, {"web": GROUP})
        assert isinstance(request, (api.Approve, api.Reject))
        if request.group != "web":
            raise NothingHeld(request.group)
        self.asked.append(request)
        return api.Done(f"{type(request).__name__} was done")

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        if connections:
            await asyncio.wait(connections, timeout=30)


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """The command sets the process's log up for itself."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize(("command", "request_kind"), [("approve", api.Approve), ("reject", api.Reject)])
def test_a_decision_reaches_the_node(
    daemon: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, request_kind: type
) -> None:
    assert main([command, "web", "--runtime-dir", str(tmp_path)]) == 0
    assert daemon.asked == [request_kind("web")]
    assert capsys.readouterr().out == f"{request_kind.__name__} was done\n"


@pytest.mark.parametrize("command", ["approve", "reject"])
def test_as_json_the_status_is_printed(
    daemon: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, "web", "--json", "--runtime-dir", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["group"], printed["held_transactions"], printed["held_since"]) == ("web", 17, 1_700_000_000.0)


def test_when_nothing_is_held_the_exit_code_says_so(
    daemon: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["approve", "db", "--runtime-dir", str(tmp_path)]) == 28
    assert "Group db: nothing is held on this node" in capsys.readouterr().err


def test_a_group_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["approve"])
    assert caught.value.code == 2


def test_the_status_shows_a_hold_before_anything_else(
    daemon: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--runtime-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(GROUP.held_since))
    assert f"HELD web: {GROUP.held}\n" in printed
    assert f"17 transactions wait since {since}" in printed
    assert "'farshore approve web' or 'farshore reject web' ends it" in printed


def test_the_monitor_says_where_to_decide() -> None:
    group = api.SwitchStatus("web", "normal", "local", 1, "", 0.0, "local", "none", [], None, GROUP, True)
    text = "\n".join(status._describe(api.MonitorStatus("ldrg", "0", 1.0, "up", {"web": group}, [])))
    assert "HELD web on the backup server: 1,204 of 5,000 files" in text
    assert "'farshore reject web' on the backup server ends it" in text
