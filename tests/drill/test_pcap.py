"""Captures made by hand, of every shape that tcpdump writes."""

from __future__ import annotations

import ipaddress
import struct
from pathlib import Path

import pytest
from farshore_drill import pcap

GATEWAYS = ("203.0.113.1", "198.51.100.1")
NETWORKS = ("10.1.0.0/24", "10.2.0.0/24")
MARKER = b"farshore-0123456789abcdef"


def ip(source: str, target: str, protocol: int, payload: bytes, offset: int = 0) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 1, offset, 64, protocol, 0)
    return head + ipaddress.ip_address(source).packed + ipaddress.ip_address(target).packed + payload


def udp(source: int, target: int, payload: bytes) -> bytes:
    return struct.pack(">HHHH", source, target, 8 + len(payload), 0) + payload


def ethernet(packet: bytes, kind: int = 0x0800, tag: bytes = b"") -> bytes:
    return b"\xaa" * 12 + tag + kind.to_bytes(2, "big") + packet


def write(path: Path, frames: list[bytes], order: str = "<", magic: int = 0xA1B2C3D4, link: int = 1) -> Path:
    data = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 262144, link)
    for frame in frames:
        data += struct.pack(order + "IIII", 1, 2, len(frame), len(frame)) + frame
    path.write_bytes(data)
    return path


def between(payload: bytes, protocol: int = 17) -> bytes:
    return ethernet(ip(*GATEWAYS, protocol, payload))


def search(path: Path) -> pcap.Findings:
    return pcap.search(path, GATEWAYS, NETWORKS, [MARKER, b"PUT /docs/"])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("magic", [0xA1B2C3D4, 0xA1B23C4D])
def test_ciphertext_is_told_from_plaintext(tmp_path: Path, order: str, magic: int) -> None:
    frames = [
        between(udp(4500, 4500, b"\x01\x02\x03\x04" + b"cipher" * 50)),
        between(udp(4500, 4500, b"\0\0\0\0" + b"ike")),
        between(udp(500, 500, b"ike")),
        between(udp(4500, 4500, b"\xff")),
        between(b"\x01\x02\x03\x04cipher", 50),
        ethernet(ip("192.0.2.10", GATEWAYS[0], 6, b"\0\x50\0\x50PUT /docs/1 " + MARKER)),
        ethernet(b"who has", 0x0806),
    ]
    found = search(write(tmp_path / "x.pcap", frames, order, magic))
    assert found.kinds == {"IKE": 2, "ESP in UDP": 1, "NAT keepalive": 1, "ESP": 1}
    assert (found.internet_packets, found.plaintext_packets, found.user_packets) == (5, 0, 1)
    assert found.truncated == 0


@pytest.mark.parametrize(
    "frame",
    [
        between(udp(4500, 4500, b"\x01\x02\x03\x04 not encrypted: " + MARKER)),
        between(b"\x1e\xd4\x1e\xd4 tcp without a tunnel", 6),
        ethernet(ip("10.1.0.10", "10.2.0.10", 6, b"\0\x50\0\x50")),
        ethernet(ip("10.1.0.10", "192.0.2.10", 6, b"\0\x50\0\x50")),
        ethernet(ip(*GATEWAYS, 6, b"\0\x50\0\x50PUT /docs/1"), tag=b"\x81\x00\x00\x07"),
        between(b"rest of a fragment " + MARKER, 17),
    ],
)
def test_what_can_be_read_is_found(tmp_path: Path, frame: bytes) -> None:
    found = search(write(tmp_path / "x.pcap", [frame]))
    assert (found.internet_packets, found.plaintext_packets, len(found.examples)) == (1, 1, 1)


def test_other_links_than_ethernet_are_read(tmp_path: Path) -> None:
    packet = ip(*GATEWAYS, 17, udp(500, 500, MARKER))
    assert search(write(tmp_path / "raw", [packet], link=101)).plaintext_packets == 1
    cooked = bytes(14) + b"\x08\x00" + packet
    assert search(write(tmp_path / "cooked", [cooked], link=113)).plaintext_packets == 1
    second = b"\x08\x00" + bytes(18) + packet
    assert search(write(tmp_path / "second", [second], link=276)).plaintext_packets == 1


def test_a_fragment_of_the_tunnel_is_no_plaintext(tmp_path: Path) -> None:
    frame = ethernet(ip(*GATEWAYS, 17, b"cipher" * 10, offset=100))
    found = search(write(tmp_path / "x.pcap", [frame]))
    assert (found.kinds, found.plaintext_packets) == ({"fragment of UDP": 1}, 0)


def test_a_capture_that_was_cut_short_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pcap", [between(udp(500, 500, b"a" * 100))])
    path.write_bytes(path.read_bytes()[:-20])
    assert search(path).truncated == 1


@pytest.mark.parametrize("data", [b"short", b"\x0a\x0d\x0d\x0a" + bytes(60)])
def test_what_is_no_capture_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.pcap"
    path.write_bytes(data)
    with pytest.raises(pcap.CaptureError):
        search(path)
