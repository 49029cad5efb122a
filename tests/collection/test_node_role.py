"""What the roles node and metrics write, rendered as Ansible does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

GROUP = {
    "side": "local",
    "peer": {"node": "bak1", "address": "10.2.0.10", "port": 7820},
    "paths": [{"source": "/srv/www", "path": "/srv/www"}],
}
Render = Callable[..., str]


@pytest.fixture
def render(root: Path) -> Render:
    """The text of a role's template."""

    def text(role: str, template: str, **given: Any) -> str:
        loader = DataLoader()
        variables: dict[str, Any] = {"ansible_managed": "managed", "inventory_hostname": "web1"}
        variables |= {"farshore_address": "10.1.0.10", "groups": {"ldrg": ["ldrg"]}, "farshore_groups": {}}
        for part in ("defaults", "vars"):
            path = root / "roles" / role / part / "main.yml"
            if path.exists():
                variables |= loader.load_from_file(str(path), trusted_as_template=True)
        templar = Templar(loader=loader, variables=variables | {"node_groups": {"web": GROUP}} | given)
        # As the module template has it.
        source = (root / "roles" / role / "templates" / template).read_text()
        rendered: str = templar.template(trust_as_template(source), preserve_trailing_newlines=True)
        return rendered

    return text


def node_yml(render: Render, **given: Any) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(render("node", "node.yml.j2", **given))
    return data


def capabilities(render: Render, **given: Any) -> set[str]:
    lines = re.findall(
        r"^CapabilityBoundingSet=(.*)$", render("node", "farshore-node.service.j2", **given), re.MULTILINE
    )
    return set(" ".join(lines).split())


def test_each_group_says_how_it_is_watched(render: Render) -> None:
    assert node_yml(render)["groups"]["web"] == {**GROUP, "watch": {"engine": "auto", "mapped": True}}
    given: dict[str, Any] = {"node_watch_engine": "inotify", "node_watch_mapped": False}
    assert node_yml(render, **given)["groups"]["web"]["watch"] == {"engine": "inotify", "mapped": False}
    own = {"web": {**GROUP, "watch": {"engine": "fanotify"}}, "db": {**GROUP, "watch": {"mapped": True}}, "mail": GROUP}
    groups = node_yml(render, node_groups=own, **given)["groups"]
    assert {name: tuple(group["watch"].values()) for name, group in groups.items()} == {
        "web": ("fanotify", False),
        "db": ("inotify", True),
        "mail": ("inotify", False),
    }
    assert node_yml(render, node_groups={})["groups"] == {}


def test_the_configuration_does_not_change_with_the_runtime(render: Render) -> None:
    runtime = {"__agent_runtime_installed": {"release": "1.2.3-abc"}}
    assert render("node", "node.yml.j2", **runtime) == render("node", "node.yml.j2")
    assert "1.2.3-abc" in render("node", "farshore-node.service.j2", **runtime)


@pytest.mark.parametrize(
    ("engine", "mapped", "more"),
    [
        ("auto", True, {"CAP_SYS_ADMIN", "CAP_SYS_PTRACE"}),
        ("fanotify", False, {"CAP_SYS_ADMIN"}),
        ("inotify", True, {"CAP_SYS_PTRACE"}),
        ("inotify", False, set()),
    ],
)
def test_capabilities_follow_what_watches(render: Render, engine: str, mapped: bool, more: set[str]) -> None:
    plain = capabilities(render, node_watch_engine="inotify", node_watch_mapped=False)
    assert not plain & {"CAP_SYS_ADMIN", "CAP_SYS_PTRACE"}
    assert capabilities(render, node_watch_engine=engine, node_watch_mapped=mapped) == plain | more


def test_one_group_with_an_engine_of_its_own_is_enough(render: Render) -> None:
    groups = {"web": {**GROUP, "watch": {"engine": "fanotify"}}, "db": GROUP}
    given = {"node_watch_engine": "inotify", "node_watch_mapped": False, "node_groups": groups}
    assert capabilities(render, **given) & {"CAP_SYS_ADMIN", "CAP_SYS_PTRACE"} == {"CAP_SYS_ADMIN"}


def test_the_daemon_can_be_told_to_reload(render: Render) -> None:
    unit = render("node", "farshore-node.service.j2")
    assert "ExecReload=/bin/kill -HUP $MAINPID\n" in unit
    assert "Type=notify\n" in unit


def sysctl(render: Render, **given: Any) -> dict[str, int]:
    lines = [line for line in render("node", "sysctl.conf.j2", **given).splitlines() if "=" in line]
    return {key.strip(): int(value) for key, _, value in (line.partition("=") for line in lines)}


def test_the_kernels_limits_follow_the_tree(render: Render) -> None:
    counted = {"__node_count": {"rc": 0, "stdout": '{"directories": 3000000, "watches": 8388608}'}}
    assert sysctl(render, **counted) == {
        "fs.inotify.max_user_watches": 8388608,
        "fs.inotify.max_queued_events": 1048576,
        "-fs.fanotify.max_queued_events": 1048576,
    }


@pytest.mark.parametrize(
    "count",
    [
        {"skipped": True},
        {"rc": 2, "stdout": ""},
        {"msg": "No such file", "rc": 2},
        {"rc": 0, "stdout": '{"directories": 5, "watches": 16}'},
    ],
)
def test_the_limits_have_a_floor(render: Render, count: dict[str, Any]) -> None:
    assert sysctl(render, __node_count=count)["fs.inotify.max_user_watches"] == 1048576
    assert sysctl(render, __node_count=count, node_inotify_watches=600000)["fs.inotify.max_user_watches"] == 600000


def test_a_limit_is_never_lowered_and_what_was_raised_does_not_stick(render: Render) -> None:
    # What was recorded before the first deployment comes first, then what holds now.
    before = {
        "__node_before": {
            "stdout": "fs.inotify.max_user_watches = 4194304\nfs.inotify.max_queued_events = 16384\n"
            "fs.inotify.max_user_watches = 8388608\nfs.inotify.max_queued_events = 2097152\n"
            "fs.fanotify.max_queued_events = 3000000\n"
        }
    }
    assert sysctl(render, **before) == {
        "fs.inotify.max_user_watches": 4194304,
        "fs.inotify.max_queued_events": 1048576,
        "-fs.fanotify.max_queued_events": 3000000,
    }


def test_all_limits_that_are_set_are_taken_back(root: Path, render: Render) -> None:
    handlers = (root / "roles/node/handlers/main.yml").read_text()
    for key in sysctl(render, __node_count={"skipped": True}):
        assert key.lstrip("-") in handlers
    assert "node-sysctl.conf" in (root / "roles/node/tasks/teardown.yml").read_text()


@pytest.mark.parametrize("daemon", ["node", "monitor"])
def test_the_metrics_service_may_write_one_directory(render: Render, daemon: str) -> None:
    given = {"metrics_daemon": daemon, "metrics_file": "/var/lib/prometheus/node-exporter/farshore.prom"}
    unit = render("metrics", "farshore-metrics.service.j2", **given)
    assert (
        f"ExecStart=/opt/farshore/current/bin/farshore metrics --daemon {daemon} "
        "--output /var/lib/prometheus/node-exporter/farshore.prom\n"
    ) in unit
    assert "ReadWritePaths=/var/lib/prometheus/node-exporter\n" in unit
    assert "OnUnitActiveSec=15\n" in render("metrics", "farshore-metrics.timer.j2", **given)
