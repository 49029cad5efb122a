"""What a host's part is, computed from what the user wrote; and what is said about mistakes."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

Inventory = dict[str, Any]


@pytest.fixture
def inventory(root: Path) -> Inventory:
    """The example inventory, as the filters are given it."""
    hosts = yaml.safe_load((root / "inventories/example/hosts.yml").read_text())["all"]["children"]
    variables = yaml.safe_load((root / "inventories/example/group_vars/all.yml").read_text())
    return {
        "sites": variables["farshore_sites"],
        "groups": {name: list(group["hosts"]) for name, group in hosts.items()},
        "hostvars": {host: data for group in hosts.values() for host, data in group["hosts"].items()},
        "intent": variables["farshore_groups"],
    }


@pytest.fixture
def two_servers(inventory: Inventory) -> Inventory:
    """A second local server, backed up on the same backup server."""
    changed = copy.deepcopy(inventory)
    changed["groups"]["local_servers"].append("db1")
    changed["hostvars"]["db1"] = {"farshore_address": "10.1.0.11"}
    changed["intent"]["db"] = {
        "local_server": "db1",
        "backup_server": "bak1",
        "paths": ["/srv/www"],
        "services": [{"port": 5432, "backend_port": 5433}],
    }
    return changed


def errors(intent: ModuleType, inventory: Inventory) -> list[str]:
    found: list[str] = intent.intent_errors(
        inventory["intent"], inventory["sites"], inventory["groups"], inventory["hostvars"]
    )
    return found


def test_both_ends_of_a_group_name_each_other(intent: ModuleType, inventory: Inventory) -> None:
    local = intent.node_groups(inventory["intent"], "web1", inventory["hostvars"], "/replicas")
    remote = intent.node_groups(inventory["intent"], "bak1", inventory["hostvars"], "/replicas")
    assert local["web"]["side"] == "local"
    assert local["web"]["peer"] == {"node": "bak1", "address": "10.2.0.10", "port": 7820}
    assert remote["web"]["side"] == "remote"
    assert remote["web"]["peer"] == {"node": "web1", "address": "10.1.0.10", "port": 7820}


def test_one_server_is_backed_up_at_the_same_path(intent: ModuleType, inventory: Inventory) -> None:
    remote = intent.node_groups(inventory["intent"], "bak1", inventory["hostvars"], "/replicas")
    assert remote["web"]["paths"] == [{"source": "/srv/www", "path": "/srv/www", "exclude": ["*.tmp"]}]


def test_several_servers_are_backed_up_below_the_replica_root(intent: ModuleType, two_servers: Inventory) -> None:
    remote = intent.node_groups(two_servers["intent"], "bak1", two_servers["hostvars"], "/replicas/")
    assert [path["path"] for group in remote.values() for path in group["paths"]] == [
        "/replicas/db/srv/www",
        "/replicas/web/srv/www",
    ]
    assert errors(intent, two_servers) == []


def test_a_replica_lies_where_the_user_says(intent: ModuleType, inventory: Inventory) -> None:
    inventory["intent"]["web"]["paths"][0]["replica"] = "/data/web"
    remote = intent.node_groups(inventory["intent"], "bak1", inventory["hostvars"], "/replicas")
    assert remote["web"]["paths"][0]["path"] == "/data/web"


def test_hosts_without_a_group_have_none(intent: ModuleType, inventory: Inventory) -> None:
    assert intent.node_groups(inventory["intent"], "ldrg", inventory["hostvars"], "/replicas") == {}


def test_the_monitor_knows_every_group(intent: ModuleType, two_servers: Inventory) -> None:
    groups = intent.monitor_groups(two_servers["intent"], two_servers["hostvars"])
    assert set(groups) == {"db", "web"}
    assert groups["web"]["failover"] == "auto"
    assert groups["db"]["services"] == [{"port": 5432, "backend_port": 5433}]
    assert groups["db"]["local"] == {"node": "db1", "address": "10.1.0.11", "port": 7820}


def test_publications_lead_to_the_local_servers(intent: ModuleType, two_servers: Inventory) -> None:
    assert intent.publications(two_servers["intent"], two_servers["hostvars"]) == [
        {"group": "db", "protocol": "tcp", "port": 5432, "address": "10.1.0.11", "backend_port": 5433},
        {"group": "web", "protocol": "tcp", "port": 80, "address": "10.1.0.10", "backend_port": 80},
    ]


def test_the_gateways_places_mirror_each_other(intent: ModuleType, inventory: Inventory) -> None:
    args = inventory["sites"], inventory["hostvars"]
    here = intent.gateway_place(inventory["groups"], "ldrg", *args)
    there = intent.gateway_place(inventory["groups"], "rdrg", *args)
    assert here["network"] == there["peer_network"] == "10.1.0.0/24"
    assert here["peer_public_address"] == there["public_address"] == "198.51.100.1"
    assert (here["peer"], there["peer"]) == ("rdrg", "ldrg")


@pytest.mark.parametrize(
    ("host", "role"),
    [("ldrg", "ldrg"), ("rdrg", "rdrg"), ("web1", "local_server"), ("bak1", "backup_server"), ("user", "")],
)
def test_the_inventory_group_is_the_type_of_node(
    intent: ModuleType, inventory: Inventory, host: str, role: str
) -> None:
    assert intent.node_type(inventory["groups"], host) == role


def test_the_example_is_right(intent: ModuleType, inventory: Inventory) -> None:
    assert errors(intent, inventory) == []


def window(**keys: Any) -> dict[str, Any]:
    return {"limit": "20Mbit/s", "schedule": [{"limit": "5Mbit/s", **keys}]}


MISTAKES: list[tuple[list[Any], Any, str]] = [
    (["intent", "web", "pathes"], [], "farshore_groups.web.pathes: is not a known key; allowed: local_server"),
    (["intent", "web", "local_server"], "web2", "'web2' is not in the inventory group local_servers; allowed: web1"),
    (["intent", "web", "failover"], "yes", "farshore_groups.web.failover: 'yes' is not allowed; allowed: auto, manual"),
    (["intent", "web", "paths"], [], "farshore_groups.web.paths: [] is not allowed"),
    (["intent", "web", "paths", 0, "path"], "srv", "farshore_groups.web.paths[0].path: 'srv' is not allowed"),
    (["intent", "web", "paths", 0, "path"], "/a/../b", "farshore_groups.web.paths[0].path: '/a/../b'"),
    (["intent", "web", "services", 0, "port"], 70000, "farshore_groups.web.services[0].port: 70000 is not a port"),
    (["intent", "web", "services", 0, "check", "kind"], "smtp", "services[0].check.kind: 'smtp' is not allowed"),
    (["intent", "web", "units", 0], "nginx", "farshore_groups.web.units[0]: 'nginx' is not a unit's full name"),
    (["intent", "web", "rpo"], {"warn": 9, "critical": 3}, "farshore_groups.web.rpo: warn 9 and critical 3"),
    (
        ["intent", "web", "compress"],
        "zstd",
        "farshore_groups.web.compress: 'zstd' is not allowed; allowed: true, false",
    ),
    (["intent", "web", "verify"], "week", "farshore_groups.web.verify: 'week' is not a mapping"),
    (
        ["intent", "web", "verify"],
        {"every": "year"},
        "web.verify.every: 'year' is not allowed; allowed: never, day, week",
    ),
    (
        ["intent", "web", "verify"],
        {"contents": "yes"},
        "web.verify.contents: 'yes' is not allowed; allowed: true, false",
    ),
    (
        ["intent", "web", "verify"],
        {"rate": 20},
        "farshore_groups.web.verify.rate: 20 is not allowed; allowed: unlimited",
    ),
    (["intent", "web", "verify"], {"interval": 7}, "web.verify.interval: is not a known key; allowed: every, contents"),
    (["intent", "web", "verify"], {"from": 1320}, "web.verify.from: 1320 is not a time of day"),
    (["intent", "web", "owners"], "names", "farshore_groups.web.owners: 'names' is not allowed; allowed: number, name"),
    (["intent", "web", "owner_map"], {"users": {"a": "b"}}, "farshore_groups.web.owner_map: needs owners: name"),
    (["intent", "web", "owner_map"], {"user": {}}, "web.owner_map.user: is not a known key; allowed: users, groups"),
    (["intent", "web", "owner_map"], {"users": ["a"]}, "web.owner_map.users: ['a'] is not a mapping of names"),
    (["intent", "web", "bandwidth"], "5Mbit/s", "farshore_groups.web.bandwidth: '5Mbit/s' is not a mapping"),
    (["intent", "web", "bandwidth"], {"limit": "5mb"}, "web.bandwidth.limit: '5mb' is not allowed; allowed: unlimited"),
    (["intent", "web", "bandwidth"], {"limit": "0MB/s"}, "web.bandwidth.limit: '0MB/s' is not allowed"),
    (["intent", "web", "bandwidth"], {"limit": 20}, "farshore_groups.web.bandwidth.limit: 20 is not allowed"),
    (["intent", "web", "bandwidth"], {"burst": 1}, "web.bandwidth.burst: is not a known key; allowed: limit, schedule"),
    (["intent", "web", "bandwidth"], {"schedule": {}}, "web.bandwidth.schedule: {} is not allowed; a list"),
    (["intent", "web", "bandwidth"], {"schedule": [{}]}, "web.bandwidth.schedule[0].limit: is missing"),
    (["intent", "web", "bandwidth"], window(days="weekend"), "schedule[0].days: 'weekend' is not allowed; days (mon,"),
    (["intent", "web", "bandwidth"], window(to=1080), "schedule[0].to: 1080 is not a time of day"),
    (["intent", "web", "bandwidth"], window(to="00:00"), "schedule[0]: from 00:00 to 00:00 is no time at all"),
    (["intent", "web", "consistency"], "snapshot", "farshore_groups.web.consistency: 'snapshot' is not a mapping"),
    (["intent", "web", "consistency"], {"mod": "none"}, "web.consistency.mod: is not a known key; allowed: mode, snap"),
    (["intent", "web", "consistency"], {"mode": "lvm"}, "consistency.mode: 'lvm' is not allowed; allowed: none, snap"),
    (["intent", "web", "consistency"], {"interval": 0}, "consistency.interval: 0 is not in 0.1..86400 seconds"),
    (["intent", "web", "consistency"], {"mode": "snapshot", "freeze": "x"}, "thaw: is missing; freeze needs it"),
    (["intent", "web", "consistency"], {"freeze": "x", "thaw": "y"}, "consistency.mode: 'none' takes no freeze"),
    (["sites", "ldc", "network"], "10.1.0.0/99", "farshore_sites.ldc.network: '10.1.0.0/99' is not a network"),
    (["sites", "rbc", "network"], "10.1.0.0/16", "farshore_sites: the networks 10.1.0.0/24 and 10.1.0.0/16 overlap"),
    (["hostvars", "bak1", "farshore_address"], "10.9.0.1", "host bak1: farshore_address: 10.9.0.1 is not in"),
    (["hostvars", "web1"], {}, "host web1: farshore_address: None is not allowed"),
    (["groups", "rdrg"], [], "inventory group rdrg: has 0 hosts; exactly one is allowed"),
    (["groups", "backup_servers"], ["bak1", "web1"], "host web1: is in the inventory groups local_servers and backup"),
    (["intent"], {}, "farshore_groups: {} is not allowed"),
]


@pytest.mark.parametrize(("key", "value", "message"), MISTAKES, ids=lambda item: None)
def test_a_mistake_is_named(intent: ModuleType, inventory: Inventory, key: list[Any], value: Any, message: str) -> None:
    place: Any = inventory
    for step in key[:-1]:
        place = place[step]
    place[key[-1]] = value
    assert any(message in error for error in errors(intent, inventory)), errors(intent, inventory)


def test_both_ends_are_told_how_fast_to_send(intent: ModuleType, inventory: Inventory) -> None:
    bandwidth = window(days="mon-fri", to="18:00", **{"from": "08:00"})
    inventory["intent"]["web"].update(bandwidth=bandwidth, compress=False)
    assert errors(intent, inventory) == []
    for host in ("web1", "bak1"):
        group = intent.node_groups(inventory["intent"], host, inventory["hostvars"], "/replicas")["web"]
        assert (group["bandwidth"], group["compress"]) == (bandwidth, False)
    monitor = intent.monitor_groups(inventory["intent"], inventory["hostvars"])["web"]
    assert not {"bandwidth", "compress"} & set(monitor)


LIMITS: list[dict[str, Any]] = [
    {"max_size": "10GB", "min_age": "30s", "max_age": "90d", "one_filesystem": True},
    *({"max_size": size} for size in ("1B", "512 kB", "2TB", "", "0GB", "10G", "10%", "-1GB", "1.5GB", 10, None)),
    *({"min_age": age} for age in ("0", "30", "30s", "1.5h", "-1s", "", 30, None)),
    *({"max_age": age} for age in ("0", "90d", "90 d", "1w", True)),
    *({"min_age": "1h", "max_age": age} for age in ("1h", "60m", "59m", "61m", "0")),
    *({"one_filesystem": value} for value in (False, "yes", 1)),
    {"max_files": 5},
]


@pytest.mark.parametrize("keys", LIMITS, ids=str)
def test_preflight_and_agent_agree_on_the_limits_of_a_path(
    intent: ModuleType, inventory: Inventory, keys: dict[str, Any]
) -> None:
    config = pytest.importorskip("farshore.config")
    inventory["intent"]["web"]["paths"] = [{"path": "/srv/www", **keys}]
    found = errors(intent, inventory)
    try:
        config.parse({"source": "/srv/www", **keys}, config.PathConfig)
    except config.ConfigError:
        assert found and all(error.startswith("farshore_groups.web.paths[0].") for error in found)
    else:
        assert found == []
        for host in ("web1", "bak1"):
            group = intent.node_groups(inventory["intent"], host, inventory["hostvars"], "/replicas")["web"]
            (path,) = yaml.safe_load(yaml.dump(group))["paths"]
            assert config.parse(path, config.PathConfig) == config.PathConfig("/srv/www", "/srv/www", **keys)


CONSISTENCIES: list[dict[str, Any]] = [
    {},
    {"mode": "snapshot"},
    *({"mode": "snapshot", "snapshot": how} for how in ("auto", "btrfs", "reflink", "lvm", "", None)),
    *({"interval": seconds} for seconds in (0.1, 0.05, 86400, 86401, True, "5", None)),
    *({"timeout": seconds} for seconds in (0.1, 0, 3600, 3601, -1, "10")),
    *({"mode": mode, "freeze": "f", "thaw": "t"} for mode in ("none", "snapshot", "None", None)),
    *(
        {"mode": "snapshot", "freeze": freeze, "thaw": thaw}
        for freeze, thaw in (("f", ""), ("", "t"), ("", ""), (1, 1))
    ),
    {"mode": "snapshot", "thaw": "t"},
    {"freeze": "f", "thaw": "t"},
]


@pytest.mark.parametrize("consistency", CONSISTENCIES, ids=str)
def test_preflight_and_agent_agree_on_consistency(intent: ModuleType, inventory: Inventory, consistency: Any) -> None:
    config = pytest.importorskip("farshore.config")
    inventory["intent"]["web"]["consistency"] = consistency
    refused = bool(errors(intent, inventory))
    given = intent.node_groups(inventory["intent"], "web1", inventory["hostvars"], "/replicas")["web"]
    assert given.get("consistency", {}) == consistency
    try:
        config.parse(consistency, config.Consistency)
    except config.ConfigError:
        assert refused
    else:
        assert not refused


OWNER_MAPS = [
    {"alice": "bob"},
    {"alice": "bob", "bob": "alice"},
    {"alice": "carol", "bob": "carol"},
    {"EXAMPLE\\alice": "alice@example.org", "svc$": "_svc.x"},
    *({"alice": name} for name in ("", "#5", "~bob", "a:b", "a/b", "a\nb", "x" * 256)),
]


@pytest.mark.parametrize("names", OWNER_MAPS, ids=str)
def test_preflight_and_agent_agree_on_owners(intent: ModuleType, inventory: Inventory, names: Any) -> None:
    config = pytest.importorskip("farshore.config")
    inventory["intent"]["web"].update(owners="name", owner_map={"users": names})
    refused = bool(errors(intent, inventory))
    try:
        config.parse({"users": names}, config.OwnerMap)
    except config.ConfigError:
        assert refused
    else:
        assert not refused
        for host in ("web1", "bak1"):
            group = intent.node_groups(inventory["intent"], host, inventory["hostvars"], "/replicas")["web"]
            assert (group["owners"], group["owner_map"]) == ("name", {"users": names})


def test_times_of_day_survive_the_configuration_file(intent: ModuleType, inventory: Inventory) -> None:
    # 18:00 is a number to YAML, and 08:00 is not.
    inventory["intent"]["web"]["bandwidth"] = window(to="18:00", **{"from": "08:00"})
    group = intent.node_groups(inventory["intent"], "web1", inventory["hostvars"], "/replicas")["web"]
    assert yaml.safe_load(yaml.dump(group))["bandwidth"]["schedule"][0] == {
        "limit": "5Mbit/s", "from": "08:00", "to": "18:00",
    }  # fmt: skip


RATES = ["unlimited", "64kbit/s", "2.5 Mbit/s", "1GB/s", "63kbit/s", "0bit/s", "5", "5mbit/s", "-5Mbit/s", "5Mb/s", ""]
WINDOWS = [
    *({"limit": limit} for limit in RATES),
    *({"days": days} for days in ("mon", "fri-mon", "sat, sun", "mon-", "-mon", "", "mon-tue-wed", "Mon", "mon,")),
    *({"from": time} for time in ("00:00", "23:59", "24:00", "24:30", "8:00", "08:60", "18:00:00", "")),
    *({"from": start, "to": end} for start, end in (("22:00", "06:00"), ("08:00", "08:00"), ("00:00", "24:00"))),
]


@pytest.mark.parametrize("keys", WINDOWS, ids=str)
def test_preflight_and_agent_agree_on_the_schedule(intent: ModuleType, inventory: Inventory, keys: Any) -> None:
    config = pytest.importorskip("farshore.config")
    inventory["intent"]["web"]["bandwidth"] = window(**keys)
    refused = bool(errors(intent, inventory))
    try:
        config.parse(window(**keys), config.Bandwidth)
    except config.ConfigError:
        assert refused
    else:
        assert not refused


BRAKES = [
    {},
    *({"mode": mode} for mode in ("hold", "warn", "off", False, True, "stop", "", None, ["hold"])),
    *({"window": window} for window in (1, 0.5, 86400, 86401, "60", None, True)),
    *({"most_share": share} for share in (1, 100, 100.5, 0, -1, "20%", None)),
    *({"entropy_share": share} for share in (5, 0.99)),
    *({"least_files": files} for files in (1, 0, 2.5, True, "50")),
    {"most_files": 5},
]


@pytest.mark.parametrize("keys", BRAKES, ids=str)
def test_preflight_and_agent_agree_on_the_brake(intent: ModuleType, inventory: Inventory, keys: Any) -> None:
    config = pytest.importorskip("farshore.config")
    inventory["intent"]["web"]["brake"] = keys
    found = errors(intent, inventory)
    try:
        config.parse(keys, config.BrakeConfig)
    except config.ConfigError:
        assert found and all(error.startswith("farshore_groups.web.brake") for error in found)
    else:
        assert found == []


def test_both_ends_are_told_of_the_brake(intent: ModuleType, inventory: Inventory) -> None:
    # Each of them may be the replica. Without quotes, off is false to YAML.
    inventory["intent"]["web"]["brake"] = yaml.safe_load("{mode: off, window: 120}")
    assert errors(intent, inventory) == []
    for host in ("web1", "bak1"):
        group = intent.node_groups(inventory["intent"], host, inventory["hostvars"], "/replicas")["web"]
        assert yaml.safe_load(yaml.dump(group))["brake"] == {"mode": "off", "window": 120}
    del inventory["intent"]["web"]["brake"]
    assert "brake" not in intent.node_groups(inventory["intent"], "bak1", inventory["hostvars"], "/replicas")["web"]


def test_both_ends_are_told_how_to_verify(intent: ModuleType, inventory: Inventory) -> None:
    verify = {"every": "month", "rate": "5MB/s", "days": "sat,sun", "from": "22:00", "to": "06:00"}
    inventory["intent"]["web"]["verify"] = verify
    assert errors(intent, inventory) == []
    for host in ("web1", "bak1"):
        group = intent.node_groups(inventory["intent"], host, inventory["hostvars"], "/replicas")["web"]
        assert group["verify"] == verify
    assert "verify" not in intent.monitor_groups(inventory["intent"], inventory["hostvars"])["web"]


HISTORY = [
    {},
    *({"all": age} for age in ("0", "24h", "30m", "8d", "1w", "", 24, None)),
    *({"space": space} for space in ("20%", "90%", "91%", "50GB", "1 TB", "50", "-1%", 20, None)),
    {"all": "1h", "hourly": "2h", "daily": "3h"},
    {"all": "3h", "hourly": "2h", "daily": "1h"},
    {"all": "0", "hourly": "2h", "daily": "1h"},
    {"keep": "1h"},
]


@pytest.mark.parametrize("keys", HISTORY, ids=str)
def test_preflight_and_agent_agree_on_the_history(intent: ModuleType, inventory: Inventory, keys: Any) -> None:
    config = pytest.importorskip("farshore.config")
    inventory["intent"]["web"]["history"] = keys
    refused = bool(errors(intent, inventory))
    try:
        config.parse(keys, config.History)
    except config.ConfigError:
        assert refused
    else:
        assert not refused
        groups = intent.node_groups(inventory["intent"], "bak1", inventory["hostvars"], "/replicas")
        assert groups["web"].get("history", {}) == keys


VERIFY = [
    {},
    *({"every": every} for every in ("never", "day", "week", "month", "year", 7)),
    *({"contents": contents} for contents in (True, False, "no", 1)),
    *({"rate": rate} for rate in RATES),
    *({key: value for key, value in window.items() if key != "limit"} for window in WINDOWS),
]


@pytest.mark.parametrize("keys", VERIFY, ids=str)
def test_preflight_and_agent_agree_on_verification(intent: ModuleType, inventory: Inventory, keys: Any) -> None:
    config = pytest.importorskip("farshore.config")
    inventory["intent"]["web"]["verify"] = keys
    refused = bool(errors(intent, inventory))
    try:
        config.parse(keys, config.Verification)
    except config.ConfigError:
        assert refused
    else:
        assert not refused


def test_a_port_is_published_once(intent: ModuleType, two_servers: Inventory) -> None:
    two_servers["intent"]["db"]["services"][0]["port"] = 80
    assert any("port 80/tcp is published by group" in error for error in errors(intent, two_servers))


def test_paths_that_meet_on_a_host_are_refused(intent: ModuleType, inventory: Inventory) -> None:
    inventory["intent"]["images"] = copy.deepcopy(inventory["intent"]["web"])
    inventory["intent"]["images"].update(paths=["/srv/www/images"], services=[{"port": 81}])
    assert any("lie in each other on bak1" in error for error in errors(intent, inventory))


def test_what_is_computed_is_what_the_agent_reads(intent: ModuleType, two_servers: Inventory) -> None:
    config = pytest.importorskip("farshore.config")
    tls = {"ca": "/ca", "certificate": "/crt", "key": "/key"}
    groups, hostvars = two_servers["intent"], two_servers["hostvars"]
    groups["web"].update(bandwidth=window(**{"from": "22:00", "to": "06:00"}), compress=True)
    groups["web"].update(verify={"every": "week", "rate": "unlimited", "from": "22:00", "to": "06:00"})
    node = {"node": "bak1", "listen": {"address": "10.2.0.10"}, "tls": tls}
    node["groups"] = intent.node_groups(groups, "bak1", hostvars, "/replicas")
    assert set(config.parse(node, config.NodeConfig).groups) == {"db", "web"}
    monitor = {"node": "ldrg", "tls": tls, "gateway": {"public_address": "203.0.113.1", "lan_address": "10.1.0.1"}}
    monitor["groups"] = intent.monitor_groups(groups, hostvars)
    assert set(config.parse(monitor, config.MonitorConfig).groups) == {"db", "web"}


def test_the_status_is_a_table(intent: ModuleType) -> None:
    group = {
        "phase": "normal", "served_by": "local", "owner": "local", "epoch": 1, "reason": "all is well",
        "local": {"rpo": 0.25, "backlog_paths": 3}, "backup": None,
    }  # fmt: skip
    head, row = intent.status_table({"web": group})
    assert head.split() == ["GROUP", "PHASE", "SERVED", "BY", "OWNER", "EPOCH", "RPO", "BACKLOG", "WHY"]
    assert row.split() == ["web", "normal", "local", "local", "1", "0.2", "s", "3", "all", "is", "well"]
    group["backup"] = {"held": "too much"}
    assert intent.status_table({"web": group})[1].endswith("HELD on the backup server: too much; all is well")


def test_what_watches_a_group(intent: ModuleType, inventory: Inventory) -> None:
    inventory["intent"]["web"]["watch"] = {"engine": "fanotify"}
    assert errors(intent, inventory) == []
    groups = intent.node_groups(inventory["intent"], "web1", inventory["hostvars"], "/replicas")
    assert groups["web"]["watch"] == {"engine": "fanotify"}
    inventory["intent"]["web"]["watch"] = {"engine": "kqueue"}
    assert errors(intent, inventory) == [
        "farshore_groups.web.watch.engine: 'kqueue' is not allowed; allowed: auto, inotify, fanotify"
    ]
    inventory["intent"]["web"]["watch"] = {"mapped": "sometimes"}
    assert errors(intent, inventory) == [
        "farshore_groups.web.watch.mapped: 'sometimes' is not allowed; allowed: true, false"
    ]
    inventory["intent"]["web"]["watch"] = {"motor": "auto"}
    assert any("farshore_groups.web.watch.motor" in error for error in errors(intent, inventory))
