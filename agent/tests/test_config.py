"""The configuration: what is wrong is named, with what is allowed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from farshore.config import MonitorConfig, NodeConfig, load, parse
from farshore.errors import ConfigError

NODE: dict[str, Any] = {
    "node": "web1",
    "listen": {"address": "10.1.0.10"},
    "tls": {"ca": "/c", "certificate": "/d", "key": "/k"},
    "groups": {
        "web": {
            "side": "local",
            "peer": {"node": "bak1", "address": "10.2.0.10"},
            "paths": [{"source": "/srv/www"}, {"source": "/srv/data", "path": "/mnt/data"}],
        }
    },
}
MONITOR: dict[str, Any] = {
    "node": "ldrg",
    "gateway": {"public_address": "203.0.113.1", "lan_address": "10.1.0.1"},
    "tls": NODE["tls"],
    "groups": {
        "web": {
            "local": {"node": "web1", "address": "10.1.0.10"},
            "backup": {"node": "bak1", "address": "10.2.0.10"},
            "services": [{"port": 80, "check": {"kind": "http", "path": "/health"}}],
        }
    },
}


def test_defaults_are_filled_in() -> None:
    node = parse(NODE, NodeConfig)
    assert node.listen.port == 7820
    assert [path.path for path in node.groups["web"].paths] == ["/srv/www", "/mnt/data"]
    monitor = parse(MONITOR, MonitorConfig)
    service = monitor.groups["web"].services[0]
    assert (service.backend_port, service.check.rise, service.check.fall) == (80, 3, 2)


def changed(base: dict[str, Any], keys: list[Any], value: object) -> dict[str, Any]:
    data = copy.deepcopy(base)
    at = data
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    return data


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (["nod"], 1, ["nod", "known key", "node"]),
        (["groups", "web", "side"], "left", ["groups.web.side", "left", "remote"]),
        (["groups", "web", "peer", "address"], "10.2.0.300", ["groups.web.peer.address", "10.2.0.300"]),
        (["groups", "web", "peer", "port"], 99999, ["groups.web.peer.port", "99999", "65535"]),
        (["groups", "web", "paths"], [], ["groups.web.paths", "empty"]),
        (["groups", "web", "paths"], [{"source": "srv"}], ["groups.web.paths[0].source", "absolute"]),
        (["groups", "web", "paths"], [{"source": "/"}], ["groups.web.paths[0].source"]),
        (["groups", "web", "paths"], [{"source": "/a"}, {"source": "/a/b"}], ["groups.web.paths", "/a/b"]),
        (["groups", "web", "paths"], [{"source": "/var/lib"}], ["state_dir", "/var/lib"]),
        (["groups", "web", "units"], "nginx", ["groups.web.units", "list"]),
        (["groups", "web", "rpo"], {"warn": 9, "critical": 3}, ["groups.web.rpo"]),
        (["groups", "a name"], NODE["groups"]["web"], ["a name", "letters"]),
        (["groups", "more"], NODE["groups"]["web"], ["/srv/www", "groups.web.paths"]),
        (["log_level"], "loud", ["log_level", "loud", "debug"]),
        (["listen"], None, ["listen", "mapping"]),
    ],
)
def test_a_wrong_node_configuration_is_named(keys: list[Any], value: object, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(changed(NODE, keys, value), NodeConfig)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (["groups", "web", "services", 0, "port"], 0.5, ["services[0].port", "whole number"]),
        (["groups", "web", "services", 0, "check", "kind"], "icmp", ["check.kind", "icmp", "tcp"]),
        (["groups", "web", "services", 0, "check", "path"], "health", ["check.path", "/"]),
        (["groups", "web", "services", 0, "check", "fall"], 0, ["check.fall", "1..1000"]),
        (["groups", "web", "services", 0, "check", "interval"], True, ["check.interval", "number"]),
        (["groups", "db"], MONITOR["groups"]["web"], ["groups.db.services", "80", "web"]),
        (["gateway", "public_address"], "here", ["gateway.public_address", "here"]),
    ],
)
def test_a_wrong_monitor_configuration_is_named(keys: list[Any], value: object, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(changed(MONITOR, keys, value), MonitorConfig)
    for word in words:
        assert word in str(caught.value)


def test_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "node.yml"
    with pytest.raises(ConfigError, match=r"node\.yml.*No such file"):
        load(path, NodeConfig)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match=r"node\.yml.*not YAML"):
        load(path, NodeConfig)
    path.write_text("node: web1")
    with pytest.raises(ConfigError, match=r"node\.yml.*listen.*missing"):
        load(path, NodeConfig)
