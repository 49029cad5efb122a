"""What a lab consists of: a topology file read into frozen dataclasses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any

import yaml

from .base import RELEASES
from .proc import LabError

INTERNET = "inet"
MANAGEMENT = "mgmt"
DEFAULT_MANAGEMENT = "172.31.255.0/24"

# The names become parts of interface names, which the kernel limits to 15 characters: "rdrg.inet0". Hosts have no
# hyphen, so that the last one in a namespace's name, fs-LAB-HOST, always ends the lab's name.
_HOST_NAME = re.compile(r"[a-z][a-z0-9]{0,8}")
_INTERFACE_NAME = re.compile(r"[a-z][a-z0-9]{0,4}")
_NETWORK_NAME = re.compile(r"[a-z][a-z0-9]{0,7}")
_FIRST_MANAGEMENT_HOST = 11


class TopologyError(LabError):
    """The topology file is wrong; the message starts with the key that is."""


@dataclass(frozen=True)
class Network:
    """An Ethernet segment; hosts on it reach every prefix in `on_link` without a router."""

    name: str
    on_link: tuple[IPv4Network, ...] = ()


@dataclass(frozen=True)
class Interface:
    """A host's connection to a network."""

    name: str
    network: str
    address: IPv4Interface


@dataclass(frozen=True)
class Host:
    """A machine of the lab; `management` is its address on the network that only carries SSH."""

    name: str
    release: str
    management: IPv4Interface
    interfaces: tuple[Interface, ...] = ()
    gateway: IPv4Address | None = None

    @property
    def is_gateway(self) -> bool:
        """Whether it joins a LAN to the Internet."""
        networks = {interface.network for interface in self.interfaces}
        return INTERNET in networks and len(networks) > 1


@dataclass(frozen=True)
class Topology:
    """Networks and hosts by name, in the file's order."""

    management: IPv4Interface
    networks: Mapping[str, Network] = field(default_factory=dict)
    hosts: Mapping[str, Host] = field(default_factory=dict)

    def host(self, name: str) -> Host:
        """The host called `name`; TopologyError lists the known ones."""
        if name not in self.hosts:
            raise TopologyError(f"host {name!r}: this lab has {', '.join(self.hosts)}")
        return self.hosts[name]

    def links(self, link: str) -> tuple[tuple[Host, str], ...]:
        """The (host, interface name) pairs that LINK stands for: `host:interface`, or `internet` for every gateway's.

        Management interfaces are no links: a lab that cut them could not be reached any more.
        """
        if link == "internet":
            found = tuple(
                (host, interface.name)
                for host in self.hosts.values()
                if host.is_gateway
                for interface in host.interfaces
                if interface.network == INTERNET
            )
            if not found:
                raise TopologyError("link 'internet': no host of this lab joins a LAN to it; say host:interface")
            return found
        name, _, interface_name = link.partition(":")
        host = self.host(name)
        names = [interface.name for interface in host.interfaces]
        if interface_name not in names:
            allowed = ", ".join(f"{name}:{interface}" for interface in names)
            raise TopologyError(f"link {link!r}: {name} has {allowed}; or say 'internet'")
        return ((host, interface_name),)


def load(path: Path) -> Topology:
    """Read and check a topology file; TopologyError names file and key."""
    try:
        return parse(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise TopologyError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise TopologyError(f"{path}: not YAML: {error}") from error
    except TopologyError as error:
        raise TopologyError(f"{path}: {error}") from error


def parse(data: object) -> Topology:
    """Check the content of a topology file; TopologyError names the key that is wrong."""
    top = _mapping(data, "topology", {"management", "networks", "hosts"}, {"networks", "hosts"})
    management = _network(top.get("management", DEFAULT_MANAGEMENT), "management")
    if management.num_addresses <= _FIRST_MANAGEMENT_HOST + 1:
        raise TopologyError(f"management: {management} is too small, take a /24")
    networks = {name: _parse_network(name, value) for name, value in _named(top["networks"], "networks", _NETWORK_NAME)}
    if MANAGEMENT in networks:
        raise TopologyError(f"networks.{MANAGEMENT}: the lab makes this one itself")
    hosts: dict[str, Host] = {}
    for index, (name, value) in enumerate(_named(top["hosts"], "hosts", _HOST_NAME)):
        own = _at(management, _FIRST_MANAGEMENT_HOST + index)
        hosts[name] = _parse_host(name, value, own, networks)
    if not hosts:
        raise TopologyError("hosts: at least one is needed")
    _check_unique_addresses(hosts)
    return Topology(management=_at(management, 1), networks=networks, hosts=hosts)


def _at(network: IPv4Network, index: int) -> IPv4Interface:
    if index >= network.num_addresses - 1:
        raise TopologyError(f"management: {network} has too few addresses for so many hosts")
    return IPv4Interface(f"{network[index]}/{network.prefixlen}")


def _parse_network(name: str, value: object) -> Network:
    key = f"networks.{name}"
    fields = _mapping(value, key, {"on_link"})
    on_link = fields.get("on_link", [])
    if not isinstance(on_link, list):
        raise TopologyError(f"{key}.on_link: a list of prefixes is needed, not {on_link!r}")
    return Network(name, tuple(_network(prefix, f"{key}.on_link[{i}]") for i, prefix in enumerate(on_link)))


def _parse_host(name: str, value: object, management: IPv4Interface, networks: Mapping[str, Network]) -> Host:
    key = f"hosts.{name}"
    if name == "fabric":
        raise TopologyError(f"{key}: the name is taken by the namespace of the bridges")
    fields = _mapping(value, key, {"release", "interfaces", "gateway"}, {"release", "interfaces"})
    release = fields["release"]
    if release not in RELEASES:
        raise TopologyError(f"{key}.release: {release!r} is not one of {', '.join(RELEASES)}")
    interfaces = tuple(
        _parse_interface(interface, entry, f"{key}.interfaces.{interface}", networks)
        for interface, entry in _named(fields["interfaces"], f"{key}.interfaces", _INTERFACE_NAME)
    )
    gateway = None
    if fields.get("gateway") is not None:
        try:
            gateway = IPv4Address(fields["gateway"])
        except ValueError as error:
            raise TopologyError(f"{key}.gateway: {error}") from error
        if not any(gateway in interface.address.network for interface in interfaces):
            raise TopologyError(f"{key}.gateway: {gateway} is on none of the host's networks")
    return Host(name, release, management, interfaces, gateway)


def _parse_interface(name: str, value: object, key: str, networks: Mapping[str, Network]) -> Interface:
    if name == "mgmt0":
        raise TopologyError(f"{key}: the lab makes this one itself")
    fields = _mapping(value, key, {"network", "address"}, {"network", "address"})
    if fields["network"] not in networks:
        raise TopologyError(f"{key}.network: {fields['network']!r} is not one of {', '.join(networks)}")
    text = fields["address"]
    try:
        address = IPv4Interface(text)
    except ValueError as error:
        raise TopologyError(f"{key}.address: {error}") from error
    if "/" not in str(text):
        raise TopologyError(f"{key}.address: {text!r} has no prefix length, such as /24")
    return Interface(name, fields["network"], address)


def _check_unique_addresses(hosts: Mapping[str, Host]) -> None:
    seen: dict[IPv4Address, str] = {}
    for host in hosts.values():
        for interface in host.interfaces:
            key = f"hosts.{host.name}.interfaces.{interface.name}.address"
            if interface.address.ip in seen:
                raise TopologyError(f"{key}: {interface.address.ip} is already {seen[interface.address.ip]}")
            seen[interface.address.ip] = key


def _network(value: object, key: str) -> IPv4Network:
    try:
        return IPv4Network(str(value))
    except ValueError as error:
        raise TopologyError(f"{key}: {error}") from error


def _named(value: object, key: str, pattern: re.Pattern[str]) -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict):
        raise TopologyError(f"{key}: a mapping is needed, not {value!r}")
    for name, entry in value.items():
        if not isinstance(name, str) or not pattern.fullmatch(name):
            raise TopologyError(f"{key}: the name {name!r} does not match {pattern.pattern}")
        yield name, entry


def _mapping(value: object, key: str, allowed: set[str], required: set[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TopologyError(f"{key}: a mapping is needed, not {value!r}")
    for name in value:
        if name not in allowed:
            raise TopologyError(f"{key}.{name}: unknown key; allowed are {', '.join(sorted(allowed))}")
    for name in sorted(required or set()):
        if name not in value:
            raise TopologyError(f"{key}.{name}: is missing")
    return value
