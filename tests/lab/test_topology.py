"""What a topology file may say, and what an error about one tells."""

from __future__ import annotations

import copy
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from .paths import LabPaths
from .proc import LabError
from .topology import TopologyError, load, parse

TOPOLOGIES = sorted((Path(__file__).parent / "topologies").glob("*.yml"))

SMALL: dict[str, Any] = {
    "networks": {"inet": {"on_link": ["192.0.2.0/24", "203.0.113.0/24"]}, "ldc": {}},
    "hosts": {
        "gate": {
            "release": "bookworm",
            "interfaces": {
                "lan0": {"network": "ldc", "address": "10.1.0.1/24"},
                "inet0": {"network": "inet", "address": "203.0.113.1/24"},
            },
        },
        "web1": {
            "release": "trixie",
            "interfaces": {"lan0": {"network": "ldc", "address": "10.1.0.10/24"}},
            "gateway": "10.1.0.1",
        },
        "user": {
            "release": "bookworm",
            "interfaces": {"inet0": {"network": "inet", "address": "192.0.2.10/24"}},
        },
    },
}


def changed(path: str, value: object) -> dict[str, Any]:
    """SMALL with the value at a dotted path replaced, or removed when it is None."""
    data = copy.deepcopy(SMALL)
    *parents, last = path.split(".")
    node = data
    for name in parents:
        node = node[name]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return data


def test_a_topology_is_read_in_the_files_order() -> None:
    topology = parse(SMALL)

    assert list(topology.hosts) == ["gate", "web1", "user"]
    assert topology.management == IPv4Interface("172.31.255.1/24")
    assert topology.hosts["web1"].management == IPv4Interface("172.31.255.12/24")
    assert topology.hosts["web1"].interfaces[0].address == IPv4Interface("10.1.0.10/24")
    assert topology.networks["inet"].on_link == (IPv4Network("192.0.2.0/24"), IPv4Network("203.0.113.0/24"))


def test_internet_means_the_gateways_but_not_the_users() -> None:
    topology = parse(SMALL)

    assert [(host.name, interface) for host, interface in topology.links("internet")] == [("gate", "inet0")]
    assert [(host.name, interface) for host, interface in topology.links("user:inet0")] == [("user", "inet0")]


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("web1", r"link 'web1': web1 has web1:lan0"),
        ("web1:mgmt0", r"link 'web1:mgmt0': web1 has web1:lan0"),
        ("nobody:lan0", r"host 'nobody': this lab has gate, web1, user"),
    ],
)
def test_an_unknown_link_is_answered_with_the_known_ones(link: str, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        parse(SMALL).links(link)


def test_internet_is_no_link_where_no_host_is_a_gateway() -> None:
    with pytest.raises(TopologyError, match="no host of this lab joins a LAN"):
        parse(changed("hosts.gate", None)).links("internet")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("networks", None, r"topology\.networks: is missing"),
        ("hosts", {}, r"hosts: at least one is needed"),
        ("hosts", ["web1"], r"hosts: a mapping is needed, not \['web1'\]"),
        ("colour", "red", r"topology\.colour: unknown key; allowed are hosts, management, networks"),
        ("management", "172.31.255.0/29", r"management: 172\.31\.255\.0/29 is too small"),
        ("management", "172.31.255.1/24", r"management: 172\.31\.255\.1/24 has host bits set"),
        ("networks.mgmt", {}, r"networks\.mgmt: the lab makes this one itself"),
        ("networks.far-away", {}, r"networks: the name 'far-away' does not match"),
        ("networks.inet.on_link", "192.0.2.0/24", r"networks\.inet\.on_link: a list of prefixes is needed"),
        ("networks.inet.on_link", ["192.0.2.0/24", "x"], r"networks\.inet\.on_link\[1\]: "),
        ("hosts.web1.release", "buster", r"hosts\.web1\.release: 'buster' is not one of bookworm, trixie"),
        ("hosts.web1.release", None, r"hosts\.web1\.release: is missing"),
        ("hosts.web1.gatway", "10.1.0.1", r"hosts\.web1\.gatway: unknown key"),
        ("hosts.web1.gateway", "10.9.0.1", r"hosts\.web1\.gateway: 10\.9\.0\.1 is on none of the host's networks"),
        ("hosts.web1.gateway", "near", r"hosts\.web1\.gateway: .*'near'"),
        ("hosts.fabric", SMALL["hosts"]["user"], r"hosts\.fabric: the name is taken"),
        ("hosts.web-1", SMALL["hosts"]["user"], r"hosts: the name 'web-1' does not match"),
        ("hosts.web1.interfaces.mgmt0", {}, r"hosts\.web1\.interfaces\.mgmt0: the lab makes this one itself"),
        ("hosts.web1.interfaces.lan0.network", "wan", r"interfaces\.lan0\.network: 'wan' is not one of inet, ldc"),
        ("hosts.web1.interfaces.lan0.address", "10.1.0.10", r"lan0\.address: '10\.1\.0\.10' has no prefix length"),
        ("hosts.web1.interfaces.lan0.address", "10.1.0.300/24", r"lan0\.address: .*10\.1\.0\.300"),
        (
            "hosts.web1.interfaces.lan0.address",
            "10.1.0.1/24",
            r"hosts\.web1\.interfaces\.lan0\.address: 10\.1\.0\.1 is already hosts\.gate\.interfaces\.lan0\.address",
        ),
    ],
)
def test_an_error_names_the_key(path: str, value: object, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        parse(changed(path, value))


def test_an_error_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yml"
    with pytest.raises(TopologyError, match=r"mine\.yml: No such file"):
        load(file)
    file.write_text("hosts: [", encoding="utf-8")
    with pytest.raises(TopologyError, match=r"mine\.yml: not YAML"):
        load(file)
    file.write_text("hosts: {}", encoding="utf-8")
    with pytest.raises(TopologyError, match=r"mine\.yml: topology\.networks: is missing"):
        load(file)


@pytest.mark.parametrize("file", TOPOLOGIES, ids=lambda file: file.stem)
def test_the_topologies_in_the_repository_are_valid(file: Path) -> None:
    assert load(file).hosts


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a/b", "a_b", "x" * 31])
def test_a_labs_name_is_checked(name: str) -> None:
    with pytest.raises(LabError, match="lab name"):
        LabPaths(name)
