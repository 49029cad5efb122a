"""Is there anything to read on the Internet link? Packet captures, parsed without help.

Reads the classic pcap format of tcpdump, of either byte order, with microseconds or nanoseconds.
"""

from __future__ import annotations

import ipaddress
import mmap
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

_MAGIC = {0xA1B2C3D4, 0xA1B23C4D}
#: Link type: bytes before the network layer's header, and where in them its type is.
_LINKS = {1: (14, 12), 12: (0, None), 101: (0, None), 113: (16, 14), 276: (20, 0)}
_VLAN = (0x8100, 0x88A8)
_EXAMPLES = 20


class CaptureError(Exception):
    """The file is no capture that can be read."""


@dataclass(frozen=True, slots=True)
class Packet:
    """One frame's network layer. ``protocol`` is IP's; ports are 0 where there are none."""

    number: int
    source: bytes
    target: bytes
    protocol: int
    ports: tuple[int, int]
    data: bytes
    fragment: bool


@dataclass(frozen=True, slots=True)
class Findings:
    """What a capture shows. Gateway packets are those between the gateways' public addresses."""

    internet_packets: int = 0
    internet_bytes: int = 0
    plaintext_packets: int = 0
    private_packets: int = 0
    user_packets: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    examples: list[str] = field(default_factory=list)


def packets(file: IO[bytes]) -> Iterator[tuple[Packet | None, bool]]:
    """Each frame's packet (None for what is not IP), and whether the capture cut it short."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        order, link = _header(data)
        record = struct.Struct(order + "IIII")
        place, number, size = 24, 0, len(data)
        while place + 16 <= size:
            _, _, kept, length = record.unpack_from(data, place)
            place += 16
            if kept > 1 << 24:
                raise CaptureError(f"the record at {place - 16} says that it has {kept} bytes")
            number += 1
            yield _packet(number, data[place : place + kept], link), kept < length or place + kept > size
            place += kept


def _header(data: mmap.mmap) -> tuple[str, int]:
    if len(data) < 24:
        raise CaptureError("it is shorter than a capture's header")
    for order in "<>":
        magic, *_, link = struct.unpack_from(order + "IHHiIII", data)
        if magic in _MAGIC:
            if link & 0xFFFF not in _LINKS:
                raise CaptureError(f"link type {link} is not known")
            return order, link & 0xFFFF
    raise CaptureError("it is not in the pcap format (tcpdump -w writes that)")


def _packet(number: int, frame: bytes, link: int) -> Packet | None:
    place, where = _LINKS[link]
    if len(frame) <= place:
        return None
    if where is not None:
        kind = int.from_bytes(frame[where : where + 2], "big")
        while kind in _VLAN:
            kind = int.from_bytes(frame[place + 2 : place + 4], "big")
            place += 4
        if kind not in (0x0800, 0x86DD):
            return None
    ip = frame[place:]
    if len(ip) >= 20 and ip[0] >> 4 == 4:
        head = (ip[0] & 15) * 4
        fragment = bool(int.from_bytes(ip[6:8], "big") & 0x3FFF)
        first = not int.from_bytes(ip[6:8], "big") & 0x1FFF
        protocol, source, target, rest = ip[9], ip[12:16], ip[16:20], ip[head:]
    elif len(ip) >= 40 and ip[0] >> 4 == 6:
        fragment, first, protocol, source, target, rest = False, True, ip[6], ip[8:24], ip[24:40], ip[40:]
    else:
        return None
    ports = (0, 0)
    if first and protocol in (6, 17) and len(rest) >= 4:
        ports = (int.from_bytes(rest[:2], "big"), int.from_bytes(rest[2:4], "big"))
    return Packet(number, source, target, protocol, ports, rest, fragment)


def search(file: Path, gateways: Sequence[str], private: Sequence[str], needles: Sequence[bytes]) -> Findings:
    """Look for ``needles`` in what the two ``gateways`` sent each other, and for the ``private`` networks' addresses.

    A packet is counted as plaintext when it holds a needle, has an address of a private network, or is neither
    of the tunnel's (ESP, IKE) nor ICMP, which gateways use to report trouble. Raises CaptureError and OSError.
    """
    ends = {ipaddress.ip_address(address).packed for address in gateways}
    networks = [ipaddress.ip_network(network) for network in private]
    within: dict[bytes, bool] = {}
    kinds: Counter[str] = Counter()
    count: Counter[str] = Counter()
    examples: list[str] = []
    with open(file, "rb") as opened:
        for packet, cut in packets(opened):
            if packet is None:
                continue
            source, target = packet.source, packet.target
            inside = _inside(source, networks, within) or _inside(target, networks, within)
            if not inside and not (source in ends and target in ends):
                count["user"] += 1
                continue
            count["all"] += 1
            count["bytes"] += len(packet.data)
            count["cut"] += cut
            kind = "private address" if inside else _kind(packet)
            kinds[kind] += 1
            needle = next((n for n in needles if n in packet.data), None)
            count["private"] += inside
            if inside or needle or kind.startswith("other"):
                count["plain"] += 1
                if len(examples) < _EXAMPLES:
                    examples.append(_example(packet, kind, needle))
    return Findings(
        internet_packets=count["all"],
        internet_bytes=count["bytes"],
        plaintext_packets=count["plain"],
        private_packets=count["private"],
        user_packets=count["user"],
        kinds=dict(kinds.most_common()),
        truncated=count["cut"],
        examples=examples,
    )


def _inside(
    address: bytes, networks: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network], known: dict[bytes, bool]
) -> bool:
    if address not in known:
        known[address] = any(ipaddress.ip_address(address) in network for network in networks)
    return known[address]


def _kind(packet: Packet) -> str:
    if packet.protocol == 50:
        return "ESP"
    if packet.protocol == 17 and (packet.fragment and packet.ports == (0, 0)):
        return "fragment of UDP"
    if packet.protocol == 17 and {500, 4500} & set(packet.ports):
        if 4500 not in packet.ports or packet.data[8:12] == b"\0\0\0\0":
            return "IKE"
        return "NAT keepalive" if packet.data[8:] == b"\xff" else "ESP in UDP"
    if packet.protocol in (1, 58):
        return "ICMP"
    return f"other: protocol {packet.protocol}, ports {packet.ports[0]} and {packet.ports[1]}"


def _example(packet: Packet, kind: str, needle: bytes | None) -> str:
    source, target = (ipaddress.ip_address(address) for address in (packet.source, packet.target))
    holds = f" holds {needle.decode('utf-8', 'backslashreplace')!r}" if needle else ""
    return f"packet {packet.number}, {source} to {target}, {kind}{holds}"
