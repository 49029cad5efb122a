"""Mass changes between two nodes: held on the replica, approved, rejected, and what a promotion makes of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from nodes import Pair, until

from farshore.config import BrakeConfig
from farshore.dbm.group import NothingHeld
from farshore.errors import NotInTime

FILES = 200


def names(tree: Path) -> set[str]:
    return {path.name for path in tree.iterdir()}


async def filled(pair: Pair) -> None:
    """A group in step, with many files, and the brake as it is by default."""
    for node in (pair.local, pair.remote):
        config: Any = node.groups["web"].config
        object.__setattr__(config, "brake", BrakeConfig())
    for number in range(FILES):
        (pair.local_tree / f"f{number}").write_text(f"precious {number}\n" * 20)
    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)
    await until(lambda: pair.remote.groups["web"]._record.synced_once, "in step")


async def held(pair: Pair) -> None:
    """Everything is encrypted and renamed at the source; the replica holds it."""
    for number in range(FILES):
        path = pair.local_tree / f"f{number}"
        path.with_suffix(".locked").write_bytes(os.urandom(4000))
        path.unlink()
    await pair.local.groups["web"].flush(60, durable=True)
    remote = pair.remote.groups["web"]
    await until(lambda: remote._applier is not None and remote._applier.held is not None, "held")


async def test_a_mass_change_is_held_and_applied_when_it_is_approved(pair: Pair) -> None:
    await filled(pair)
    await held(pair)
    local, remote = pair.local.groups["web"], pair.remote.groups["web"]
    status = await remote.status()
    assert status.state == "held"
    assert "of" in status.held
    assert status.held_transactions > 0
    assert len([name for name in names(pair.remote_tree) if not name.endswith(".locked")]) > FILES * 0.7
    with pytest.raises(NotInTime, match="held"):
        await local.flush(0.3)
    # It is durable, also through a restart.
    await pair.restart("remote")
    remote = pair.remote.groups["web"]
    assert (await remote.status()).state == "held"
    await remote.approve()
    await until(lambda: names(pair.remote_tree) == names(pair.local_tree), "applied")
    await local.flush(60)
    with pytest.raises(NothingHeld):
        await remote.approve()


async def test_what_is_rejected_is_never_applied(pair: Pair) -> None:
    await filled(pair)
    await held(pair)
    local, remote = pair.local.groups["web"], pair.remote.groups["web"]
    before = names(pair.remote_tree)
    await remote.reject()
    assert (await remote.status()).state == "rejected"
    await until(lambda: local._sender is not None and "rejected" in local._sender.reason, "the source knows")
    # The administrator mends the source, and lets replication go on.
    for path in pair.local_tree.iterdir():
        path.unlink()
    for name in before:
        (pair.local_tree / name).write_bytes((pair.remote_tree / name).read_bytes())
    for number in range(FILES):
        (pair.local_tree / f"f{number}").write_text(f"precious {number}\n" * 20)
    for path in pair.local_tree.glob("*.locked"):
        path.unlink()
    await remote.approve()
    await until(lambda: names(pair.remote_tree) == {f"f{n}" for n in range(FILES)}, "compared anew")
    await local.flush(60)


async def test_a_promotion_takes_the_state_before_what_is_held(pair: Pair) -> None:
    await filled(pair)
    await held(pair)
    before = names(pair.remote_tree)
    remote = pair.remote.groups["web"]
    await remote.set_owner("remote", 2, False)
    assert names(pair.remote_tree) == before
    assert (await remote.status()).held == ""
    kept = list((pair.base / "remote-state" / "groups" / "web").glob("aside-journal-*/*.journal"))
    assert kept or list(pair.base.rglob("aside-journal-*/*.journal"))
