"""A pair of nodes, and a mirror."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from nodes import Mirror, Pair, free_ports
from replicas import Replica

from farshore.cli.mirror import make_keys
from farshore.config import Endpoint, NodeConfig, NodeGroup, NodeRef, PathConfig, Tls
from farshore.daemons.node import Node


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """Both nodes run; nobody owns the group yet."""
    keys = tmp_path / "pki"
    make_keys(keys, ("local", "remote", "stranger", "gateway"))
    ports = dict(zip(("local", "remote"), free_ports(2), strict=True))

    def node(side: Any, other: str) -> Node:
        group = NodeGroup(
            side=side,
            peer=NodeRef(other, "127.0.0.1", ports[other]),
            paths=(PathConfig("/srv/www", str(tmp_path / f"{side}-tree"), exclude=("*.tmp",)),),
        )
        tls = Tls(keys / "ca.crt", keys / f"{side}.crt", keys / f"{side}.key")
        return Node(
            NodeConfig(
                side,
                Endpoint("127.0.0.1", ports[side]),
                tls,
                {"web": group},
                gateways=("gateway",),
                state_dir=tmp_path / f"{side}-state",
            )
        )

    made = Pair(tmp_path, node("local", "remote"), node("remote", "local"), keys)
    made.local_tree.mkdir()
    await made.local.start(None)
    await made.remote.start(None)
    try:
        yield made
    finally:
        await made.local.stop()
        await made.remote.stop()


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    """A mirror of ``tmp_path/src`` that was not started yet."""
    source = tmp_path / "src"
    source.mkdir()
    made = Mirror(tmp_path, source)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Replica]:
    (tmp_path / "root").mkdir()
    made = Replica(tmp_path)
    yield made
    made.finish()
