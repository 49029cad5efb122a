"""The configuration: what is wrong is named, with what is allowed."""

from __future__ import annotations

import copy
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from farshore.config import (
    Bandwidth,
    BrakeConfig,
    Consistency,
    MonitorConfig,
    NodeConfig,
    Verification,
    Window,
    load,
    parse,
)
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


def test_the_list_of_revoked_certificates_may_be_left_out() -> None:
    assert parse(NODE, NodeConfig).tls.crl is None
    assert parse(changed(NODE, ["tls", "crl"], "/e"), NodeConfig).tls.crl == Path("/e")
    with pytest.raises(ConfigError, match=r"tls.crl: 7 is not a path"):
        parse(changed(NODE, ["tls", "crl"], 7), NodeConfig)


def changed(base: dict[str, Any], keys: list[Any], value: object) -> dict[str, Any]:
    data = copy.deepcopy(base)
    at = data
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    return data


WRONG_CONSISTENCIES: list[tuple[dict[str, Any], str]] = [
    ({"mode": "frozen"}, r"mode: 'frozen' is not allowed; allowed: 'none', 'snapshot'"),
    ({"mode": "snapshot", "snapshot": "lvm"}, r"snapshot: 'lvm' is not allowed; allowed: 'auto', 'btrfs', 'reflink'"),
    ({"interval": 0}, r"interval: 0 is not in 0\.1\.\.86400 seconds"),
    ({"timeout": 9999}, r"timeout: 9999 is not in 0\.1\.\.3600 seconds"),
    ({"mode": "snapshot", "freeze": "x"}, r"thaw: is missing; freeze needs it"),
    ({"mode": "snapshot", "thaw": "x"}, r"freeze: is missing; thaw needs it"),
    ({"freeze": "x", "thaw": "y"}, r"mode: 'none' takes no freeze and thaw; snapshot does"),
]


@pytest.mark.parametrize(("given", "message"), WRONG_CONSISTENCIES)
def test_a_consistency_that_cannot_be_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"^groups\.web\.consistency\." + message):
        parse(changed(NODE, ["groups", "web", "consistency"], given), NodeConfig)


def test_consistency_has_defaults() -> None:
    assert parse(NODE, NodeConfig).groups["web"].consistency == Consistency("none", "auto", 5.0, "", "", 10.0)


def window(**keys: object) -> dict[str, Any]:
    return {"limit": "20Mbit/s", "schedule": [keys]}


def test_bandwidth_is_read() -> None:
    data = window(days="mon-fri", limit="5 Mbit/s", to="18:00", **{"from": "08:00"})
    group = parse(changed(NODE, ["groups", "web", "bandwidth"], data), NodeConfig).groups["web"]
    assert group.bandwidth == Bandwidth("20Mbit/s", (Window("5 Mbit/s", "mon-fri", "08:00", "18:00"),))
    default = parse(NODE, NodeConfig).groups["web"]
    assert (default.bandwidth, default.compress) == (Bandwidth("unlimited"), True)


def test_verification_is_read() -> None:
    data = {"every": "month", "contents": False, "rate": "5MB/s", "days": "sat,sun", "from": "22:00", "to": "06:00"}
    verify = parse(changed(NODE, ["groups", "web", "verify"], data), NodeConfig).groups["web"].verify
    assert verify == Verification("month", False, "5MB/s", "sat,sun", "22:00", "06:00")
    assert verify.window.covers(datetime(2026, 11, 23, 5, 59))  # Monday, in the night that began on Sunday
    assert not verify.window.covers(datetime(2026, 11, 23, 22, 0))
    assert parse(NODE, NodeConfig).groups["web"].verify == Verification("week", True, "20MB/s")


@pytest.mark.parametrize(
    ("data", "brake"),
    [
        ({}, BrakeConfig("hold", 60, 20, 50, 5)),
        ({"mode": "warn", "window": 600, "most_share": 12.5}, BrakeConfig("warn", 600, 12.5)),
        ({"mode": "off"}, BrakeConfig("off")),
        # So YAML reads the word when it has no quotes.
        ({"mode": False}, BrakeConfig("off")),
    ],
)
def test_the_brake_is_read(data: dict[str, Any], brake: BrakeConfig) -> None:
    assert parse(changed(NODE, ["groups", "web", "brake"], data), NodeConfig).groups["web"].brake == brake
    assert parse(NODE, NodeConfig).groups["web"].brake == BrakeConfig()


@pytest.mark.parametrize(
    ("limit", "rate"),
    [
        ("unlimited", math.inf),
        ("64000bit/s", 8e3),
        ("64kbit/s", 8e3),
        ("2.5Mbit/s", 312500),
        ("1Gbit/s", 125e6),
        ("8000B/s", 8e3),
        ("8kB/s", 8e3),
        ("20 MB/s", 20e6),
        ("1GB/s", 1e9),
    ],
)
def test_units_of_bandwidth(limit: str, rate: float) -> None:
    assert Bandwidth(limit).at(datetime(2025, 1, 1)) == rate


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
        (
            ["groups", "web", "paths"],
            [{"source": "/a", "max_size": "10"}],
            ["groups.web.paths[0].max_size", "'10'", "GB"],
        ),
        (["groups", "web", "paths"], [{"source": "/a", "min_age": "1w"}], ["groups.web.paths[0].min_age", "'1w'"]),
        (
            ["groups", "web", "paths"],
            [{"source": "/a", "min_age": "2h", "max_age": "90m"}],
            ["groups.web.paths[0].max_age", "90m", "2h"],
        ),
        (["groups", "web", "paths"], [{"source": "/a", "one_filesystem": "yes"}], ["paths[0].one_filesystem", "true"]),
        (["groups", "web", "paths"], [{"source": "/a"}, {"source": "/a/b"}], ["groups.web.paths", "/a/b"]),
        (["groups", "web", "paths"], [{"source": "/var/lib"}], ["state_dir", "/var/lib"]),
        (["groups", "web", "units"], "nginx", ["groups.web.units", "list"]),
        (["groups", "web", "rpo"], {"warn": 9, "critical": 3}, ["groups.web.rpo"]),
        (["groups", "web", "compress"], "yes", ["groups.web.compress", "yes", "true or false"]),
        (["groups", "web", "bandwidth"], "5Mbit/s", ["groups.web.bandwidth", "mapping"]),
        (["groups", "web", "bandwidth"], {"limit": 5}, ["groups.web.bandwidth.limit", "5", "quotes"]),
        (["groups", "web", "bandwidth"], {"limit": "5mb/s"}, ["bandwidth.limit", "5mb/s", "unlimited", "Mbit/s"]),
        (["groups", "web", "bandwidth"], {"limit": "0Mbit/s"}, ["bandwidth.limit", "0Mbit/s", "64kbit/s"]),
        (["groups", "web", "bandwidth"], {"rate": "5MB/s"}, ["groups.web.bandwidth.rate", "known key", "schedule"]),
        (["groups", "web", "bandwidth"], window(), ["groups.web.bandwidth.schedule[0].limit", "missing"]),
        (["groups", "web", "bandwidth"], window(limit="fast"), ["schedule[0].limit", "fast", "Gbit/s"]),
        (["groups", "web", "bandwidth"], window(limit="1MB/s", days="mon-fry"), ["schedule[0].days", "fry", "fri"]),
        (["groups", "web", "bandwidth"], window(limit="1MB/s", **{"from": "8:00"}), ["schedule[0].from", "08:00"]),
        (["groups", "web", "bandwidth"], window(limit="1MB/s", to="24:01"), ["schedule[0].to", "24:01", "24:00"]),
        (["groups", "web", "bandwidth"], window(limit="1MB/s", to=1080), ["schedule[0].to", "1080", "quotes"]),
        (["groups", "web", "bandwidth"], window(limit="1MB/s", to="00:00"), ["schedule[0]", "no time at all"]),
        (["groups", "web", "bandwidth"], window(limit="1MB/s", start="08:00"), ["schedule[0].start", "from, to"]),
        (["groups", "web", "brake"], "hold", ["groups.web.brake", "mapping"]),
        (["groups", "web", "brake"], {"mode": "stop"}, ["groups.web.brake.mode", "stop", "'hold', 'warn', 'off'"]),
        (["groups", "web", "brake"], {"mode": True}, ["groups.web.brake.mode", "True", "'hold'"]),
        (["groups", "web", "brake"], {"window": 0}, ["groups.web.brake.window", "0", "1..86400"]),
        (["groups", "web", "brake"], {"most_share": 0.2}, ["brake.most_share", "0.2", "1..100 percent"]),
        (["groups", "web", "brake"], {"entropy_share": 101}, ["brake.entropy_share", "101", "1..100 percent"]),
        (["groups", "web", "brake"], {"least_files": 0}, ["brake.least_files", "0", "from 1"]),
        (["groups", "web", "brake"], {"least_files": 9.5}, ["brake.least_files", "9.5", "whole number"]),
        (["groups", "web", "verify"], {"every": "hour"}, ["groups.web.verify.every", "hour", "never", "week"]),
        (["groups", "web", "verify"], {"rate": "20mb"}, ["groups.web.verify.rate", "20mb", "MB/s"]),
        (["groups", "web", "verify"], {"days": "weekend"}, ["groups.web.verify.days", "weekend", "mon"]),
        (["groups", "web", "verify"], {"from": "02:00", "to": "02:00"}, ["groups.web.verify", "no time at all"]),
        (["groups", "web", "verify"], {"interval": 5}, ["groups.web.verify.interval", "known key", "every"]),
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
