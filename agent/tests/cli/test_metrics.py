"""``farshore metrics``: read by Prometheus's own parser."""

from __future__ import annotations

import asyncio
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from farshore.cli import main
from farshore.control import api, client
from farshore.control.metrics import Page
from farshore.control.server import serve_socket

REPORT = api.VerificationReport(
    "r", True, True, 100.0, 160.0, "drift", "", 5, 2_500_000, 999, {"index": 2, "unseen": 1}, 2, 3, 1, []
)
WATCH = api.WatchStatus("inotify", "partial", 1204, 3, 2, 77, 4, "the limit on watches is reached")
OWNER = api.GroupStatus(
    "web", "local", "local", 7, "replicating", "", True, False, 2.5, 9, 40, 5000,
    {"nginx.service": "active"}, ["one", "two"], True, watch=WATCH,
    verification=api.VerificationStatus("", "", 0.0, 0, 0, 0, 1000.0, REPORT),
)  # fmt: skip
REPLICA = api.GroupStatus(
    "db", "local", "remote", 3, "held", "the brake holds", True, False, None, 0, 0, 0, {}, [], True,
    backlog_bytes=64, history_since=900.5, history_bytes=1 << 20,
    held="too much", held_transactions=17, held_since=950.0,
)  # fmt: skip
CONFIG = api.ConfigStatus(77.0, "it is broken", [])
NODE = api.NodeStatus("web1", "1.2.3", 61.0, {"web": OWNER, "db": REPLICA}, CONFIG)
MONITOR = api.MonitorStatus(
    "ldrg", "1.2.3", 5.0, "down: charon does not run",
    {
        "web": api.SwitchStatus(
            "web", "failed_over", "remote", 8, "", 990.0, "remote", "none",
            [
                api.ServiceHealth("tcp/80", "10.1.0.10:80", False, ""),
                api.ServiceHealth("tcp/81", "10.1.0.10:81", None, ""),
            ],
            None, replace(OWNER, side="remote", rpo=0.0), True,
        )
    },
    [],
)  # fmt: skip

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def of(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((f"farshore_{name}", frozenset(labels.items())))


def page(*answers: api.NodeStatus | api.MonitorStatus) -> Samples:
    made = Page()
    for answer in answers:
        made.add(answer)
    return samples(made.text().decode())


def test_what_an_owner_tells() -> None:
    found = page(NODE)
    assert of(found, "up", daemon="node") == 1
    assert of(found, "build_info", daemon="node", node="web1", version="1.2.3") == 1
    assert of(found, "uptime_seconds", daemon="node") == 61
    assert of(found, "config_timestamp_seconds") == 77
    assert (of(found, "config_in_force"), of(found, "config_restart_needed")) == (0, 0)
    for name, value in (
        ("owner", 1),
        ("epoch", 7),
        ("connected", 1),
        ("in_step", 0),
        ("rpo_seconds", 2.5),
        ("backlog_paths", 9),
        ("sent_bytes_total", 5000),
        ("last_transaction", 40),
        ("problems", 2),
        ("held", 0),
        ("watch_directories", 1204),
        ("watch_unwatched_directories", 3),
        ("watch_overflows_total", 2),
        ("watch_events_total", 77),
        ("watch_waiting_paths", 4),
        ("verification_running", 0),
        ("verification_due_timestamp_seconds", 1000),
        ("verification_last_timestamp_seconds", 160),
        ("verification_last_duration_seconds", 60),
        ("verification_last_unrepaired_paths", 2),
    ):
        assert of(found, name, group="web") == value, name
    assert of(found, "group_state", group="web", state="replicating") == 1
    assert of(found, "group_state", group="web", state="error") == 0
    assert of(found, "watch_state", group="web", state="partial") == 1
    assert of(found, "watch_state", group="web", state="watching") == 0
    assert of(found, "unit_state", group="web", unit="nginx.service", state="active") == 1
    assert of(found, "verification_last_result", group="web", result="drift") == 1
    assert of(found, "verification_last_differences", group="web", finding="index") == 2
    assert of(found, "verification_last_differences", group="web", finding="replica") == 0
    assert of(found, "verification_last_read_bytes", group="web", side="source") == 2_500_000


def test_what_a_replica_tells() -> None:
    found = page(NODE)
    assert of(found, "owner", group="db") == 0
    assert of(found, "held", group="db") == 1
    assert of(found, "held_transactions", group="db") == 17
    assert of(found, "held_since_timestamp_seconds", group="db") == 950
    assert of(found, "journal_backlog_bytes", group="db") == 64
    assert of(found, "history_bytes", group="db") == 1 << 20
    assert of(found, "history_oldest_timestamp_seconds", group="db") == 900.5
    # What is not known is not 0.
    assert of(found, "rpo_seconds", group="db") is None
    assert of(found, "watch_directories", group="db") is None
    assert of(found, "held_since_timestamp_seconds", group="web") is None


def test_what_the_monitor_tells() -> None:
    found = page(MONITOR)
    assert of(found, "monitor_tunnel_state", state="down") == 1
    assert of(found, "monitor_tunnel_state", state="up") == 0
    assert of(found, "monitor_phase", group="web", phase="failed_over") == 1
    assert of(found, "monitor_phase", group="web", phase="normal") == 0
    assert of(found, "monitor_owner", group="web", side="remote") == 1
    assert of(found, "monitor_served_by", group="web", side="local") == 0
    assert of(found, "monitor_service_healthy", group="web", service="tcp/80", target="10.1.0.10:80") == 0
    assert of(found, "monitor_service_healthy", group="web", service="tcp/81", target="10.1.0.10:81") is None
    assert of(found, "monitor_node_answers", group="web", side="local") == 0
    assert of(found, "monitor_node_rpo_seconds", group="web", side="remote") == 0


def test_two_daemons_of_one_machine_share_the_metrics() -> None:
    found = page(MONITOR, NODE)
    assert of(found, "up", daemon="node") == of(found, "up", daemon="monitor") == 1


def test_a_state_that_nobody_knows_is_told_all_the_same() -> None:
    found = page(replace(NODE, groups={"web": replace(OWNER, state="new")}))
    assert of(found, "group_state", group="web", state="new") == 1


def documented(root: Path) -> set[str]:
    return set(re.findall(r"`(farshore_\w+)", (root / "docs/metrics.md").read_text()))


def test_every_metric_is_documented_and_every_documented_one_is_there() -> None:
    verifying = replace(OWNER, verification=api.VerificationStatus("r", "reading", 1.0, 2, 3, 4, 9.0, REPORT))
    found = {name for name, _ in page(MONITOR, replace(NODE, groups={"web": verifying, "db": REPLICA}))}
    assert found == documented(Path(__file__).resolve().parents[3])


class Daemons:
    """The sockets of a node and a monitor, in a thread of their own."""

    def __init__(self, directory: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._servers: list[asyncio.Server] = []
        self._directory = directory

    def start(self, name: str, status: api.Answer) -> None:
        async def answer(request: api.Request, peer: str) -> api.Answer:
            assert isinstance(request, api.StatusRequest)
            return status

        serving = serve_socket(self._directory / name, answer)
        self._servers.append(asyncio.run_coroutine_threadsafe(serving, self._loop).result(30))

    def close(self) -> None:
        async def end() -> None:
            for server in self._servers:
                server.close()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    made = Daemons(tmp_path)
    yield made
    made.close()


def test_it_is_printed(daemons: Daemons, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    daemons.start(client.NODE_SOCKET, NODE)
    daemons.start(client.MONITOR_SOCKET, MONITOR)
    assert main(["metrics", "--runtime-dir", str(tmp_path)]) == 0
    sys.stdout.flush()
    text = capfdbinary.readouterr().out.decode()
    assert "# HELP farshore_rpo_seconds Age of " in text
    assert "# TYPE farshore_sent_bytes_total counter" in text
    found = samples(text)
    assert of(found, "epoch", group="web") == 7
    assert of(found, "monitor_epoch", group="web") == 8


def test_a_file_is_replaced_and_all_may_read_it(daemons: Daemons, tmp_path: Path) -> None:
    daemons.start(client.NODE_SOCKET, NODE)
    output = tmp_path / "textfile" / "farshore.prom"
    output.parent.mkdir()
    before = os.umask(0o077)
    try:
        for _ in range(2):
            assert main(["metrics", "--runtime-dir", str(tmp_path), "--output", str(output)]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(output.stat().st_mode) == 0o644
    assert of(samples(output.read_text()), "epoch", group="web") == 7
    assert [path.name for path in output.parent.iterdir()] == ["farshore.prom"]


def test_a_daemon_that_is_silent_is_told_of(
    daemons: Daemons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemons.start(client.NODE_SOCKET, NODE)
    output = tmp_path / "farshore.prom"
    where = ["--runtime-dir", str(tmp_path), "--output", str(output)]
    assert main(["metrics", "--daemon", "node", "--daemon", "monitor", *where]) == 10
    found = samples(output.read_text())
    assert (of(found, "up", daemon="node"), of(found, "up", daemon="monitor")) == (1, 0)
    assert of(found, "epoch", group="web") == 7
    assert "monitor.sock" in capsys.readouterr().err


def test_without_a_daemon_there_is_nothing_to_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "--runtime-dir", str(tmp_path)]) == 10
    assert "is farshore running?" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_named(
    daemons: Daemons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemons.start(client.NODE_SOCKET, NODE)
    assert main(["metrics", "--runtime-dir", str(tmp_path), "--output", str(tmp_path / "no/f.prom")]) == 32
    assert f"Cannot write {tmp_path}/no/f.prom: No such file" in capsys.readouterr().err


def test_other_commands_do_not_load_the_library() -> None:
    code = "import sys, farshore.cli, farshore.daemons.node, farshore.daemons.monitor\nfarshore.cli.build_parser()\n"
    code += "print('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"
