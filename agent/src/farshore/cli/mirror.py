"""``farshore mirror``: both ends on this machine, the same code path as between two hosts."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import ipaddress
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

from farshore.config import PathConfig
from farshore.errors import NotInTime, UsageError

_GROUP = "mirror"
_HOST = "127.0.0.1"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "mirror",
        help="keep a tree on this machine identical to another",
        description="Makes DST identical to SRC, then follows every change until SIGTERM. Prints 'ready' when DST is "
        "in step for the first time. Source and replica talk over TLS on the loopback with throwaway keys, "
        "just as two hosts do; no setup, and no root, is needed. What is only in DST is removed, after a copy was "
        "put into DIR. 'farshore flush --state DIR' and 'farshore status --state DIR' work meanwhile.",
    )
    parser.add_argument("--state", type=Path, required=True, metavar="DIR", help="where the index and the keys live")
    parser.add_argument("--once", action="store_true", help="end when DST is in step")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="gitignore pattern")
    parser.add_argument("--include", action="append", default=[], metavar="PATTERN", help="exception to an exclude")
    parser.add_argument("--max-size", default="", metavar="SIZE", help="leave larger files alone, e.g. 10GB")
    parser.add_argument("--min-age", default="0", metavar="AGE", help="send what was not changed for so long, e.g. 30s")
    parser.add_argument("--max-age", default="0", metavar="AGE", help="leave older files alone, e.g. 90d")
    parser.add_argument("--one-filesystem", action="store_true", help="leave what is mounted below SRC alone")
    parser.add_argument(
        "--history",
        action="store_true",
        help="remember what DST was; 'farshore history --state DIR/replica mirror' tells what there is",
    )
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("destination", metavar="DST")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Mirror until told to stop; raises UsageError for paths that cannot be mirrored."""
    source, destination, state = (
        os.path.abspath(path) for path in (arguments.source, arguments.destination, arguments.state)
    )
    if not os.path.lexists(source):
        raise UsageError(f"SRC {source} does not exist")
    real = [os.path.realpath(path) for path in (source, destination, state)]
    for name, path, other, others in (
        ("DST", real[1], "SRC", real[0]),
        ("SRC", real[0], "DST", real[1]),
        ("the state directory", real[2], "SRC", real[0]),
        ("the state directory", real[2], "DST", real[1]),
    ):
        if path == others or path.startswith(others.rstrip("/") + "/"):
            raise UsageError(f"{name} {path} lies in {other} {others}; the two must be apart")
    path = PathConfig(
        "/mirror",
        source,
        tuple(arguments.include),
        tuple(arguments.exclude),
        arguments.max_size,
        arguments.min_age,
        arguments.max_age,
        arguments.one_filesystem,
    )
    path.validate("SRC")
    return asyncio.run(_mirror(path, destination, Path(state), once=arguments.once, history=arguments.history))


async def _mirror(path: PathConfig, destination: str, state: Path, *, once: bool, history: bool = False) -> int:
    from farshore.config import BrakeConfig, Endpoint, History, NodeConfig, NodeGroup, NodeRef, Tls
    from farshore.control import client
    from farshore.daemons.node import Node

    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    _claim(state, path.path, destination)
    make_keys(state / "pki", ("source", "replica"))

    def config(name: str, peer: str, peer_port: int, path: PathConfig) -> NodeConfig:
        keys = Tls(state / "pki/ca.crt", state / f"pki/{name}.crt", state / f"pki/{name}.key")
        group = NodeGroup(
            side="local" if name == "source" else "remote",
            peer=NodeRef(peer, _HOST, peer_port),
            paths=(path,),
            # Whoever asks for a mirror wants what is there, whatever becomes of it.
            brake=BrakeConfig("off"),
            history=History() if history else History("0", "0", "0"),
        )
        return NodeConfig(name, Endpoint(_HOST, 0), keys, {_GROUP: group}, state_dir=state / name)

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    replica = Node(config("replica", "source", 0, replace(path, path=destination)))
    origin: Node | None = None
    try:
        await replica.start(state / "replica" / client.NODE_SOCKET)
        origin = Node(config("source", "replica", replica.port, path))
        await origin.start(state / client.NODE_SOCKET)
        await replica.groups[_GROUP].set_owner("local", 1, False)
        await origin.groups[_GROUP].set_owner("local", 1, False)
        if not await _until_in_step(origin, stop):
            return 1 if once else 0
        print("ready", flush=True)
        if not once:
            await stop.wait()
        return 0
    finally:
        if origin is not None:
            await origin.stop()
        await replica.stop()


async def _until_in_step(origin: object, stop: asyncio.Event) -> bool:
    """Wait for the first full sync; False when told to stop before."""
    from farshore.daemons.node import Node

    assert isinstance(origin, Node)
    group = origin.groups[_GROUP]
    while not stop.is_set():
        try:
            await group.flush(1.0)
        except NotInTime:
            continue
        return True
    return False


def _claim(state: Path, source: str, destination: str) -> None:
    """A state directory belongs to one pair of trees: with another pair, what it remembers would be wrong."""
    pair = f"{source}\n{destination}\n".encode("utf-8", "surrogateescape")
    file = state / "pair"
    if not file.exists():
        file.write_bytes(pair)
    elif file.read_bytes() != pair:
        before = " to ".join(map(repr, file.read_text(errors="surrogateescape").split("\n")[:2]))
        raise UsageError(f"the state directory {state} belongs to the mirror from {before}; choose another")


def make_keys(directory: Path, names: tuple[str, ...]) -> None:
    """A throwaway CA and a certificate for each name; valid for ten years, used on this machine only."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    if (directory / "complete").exists():
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, mode=0o700)
    now = datetime.datetime.now(datetime.UTC)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "farshore mirror, throwaway")])

    def certificate(
        subject: x509.Name, key: ec.EllipticCurvePrivateKey, *extensions: tuple[x509.ExtensionType, bool]
    ) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=3650))
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    _write_private(
        directory / "ca.crt",
        certificate(ca_name, ca_key, (x509.BasicConstraints(True, 0), True), (ca_id, False), (usage, True)),
    )
    issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id)
    for name in names:
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name), x509.IPAddress(ipaddress.ip_address(_HOST))])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        _write_private(
            directory / f"{name}.crt",
            certificate(
                subject, key, (x509.BasicConstraints(False, None), True), (alternatives, False), (issuer, False)
            ),
        )
        _write_private(
            directory / f"{name}.key",
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )
    (directory / "complete").touch()


def _write_private(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
