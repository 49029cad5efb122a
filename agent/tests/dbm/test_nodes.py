"""Two nodes: roles, epochs, recovery, and what a peer may not do."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from pathlib import Path
from typing import NoReturn

import pytest
from nodes import Pair, until
from trees import Mutator, differences

from farshore import tls
from farshore.config import NodeRef, Tls
from farshore.control import api, client, server
from farshore.dbm import sender, uploads, wire
from farshore.dbm.blocks import BlockWriter
from farshore.dbm.group import NothingHeld
from farshore.dbm.messages import (
    Ack,
    Applied,
    Begin,
    Commit,
    Hello,
    MakeSymlink,
    Meta,
    Nak,
    Put,
    Refused,
    Welcome,
)
from farshore.dbm.record import Record, load, store
from farshore.dbm.replica.build import Building
from farshore.dbm.replica.stage import Stage
from farshore.errors import FarshoreError, NotInTime, StaleEpoch, StateError
from farshore.fmm import Hint

META = Meta(0o644, os.getuid(), os.getgid(), 1, 1, [])


async def in_step(pair: Pair, side: str = "local") -> None:
    await getattr(pair, side).groups["web"].flush(60)


async def test_replicates_and_follows(pair: Pair) -> None:
    (pair.local_tree / "a").write_text("1")
    await pair.own("local", 1)
    await in_step(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []
    (pair.local_tree / "b").write_text("2")
    await in_step(pair)
    assert (pair.remote_tree / "b").read_text() == "2"
    status = await pair.local.status()
    group = status.groups["web"]
    assert (group.state, group.in_step, group.rpo, group.epoch) == ("replicating", True, 0.0, 1)
    # The replica is told a moment after the last acknowledgement.
    await until(lambda: pair.remote.groups["web"]._record.synced_once, "the replica was not told")
    remote = (await pair.remote.status()).groups["web"]
    assert (remote.state, remote.synced_once, remote.connected) == ("replica", True, True)


async def test_a_missing_path_is_never_in_step(pair: Pair) -> None:
    pair.local_tree.rmdir()
    await pair.own("local", 1)
    with pytest.raises(NotInTime, match=r"Cannot watch .*local-tree"):
        await pair.local.groups["web"].flush(3)
    assert not (await pair.remote.status()).groups["web"].synced_once
    pair.local_tree.mkdir()
    (pair.local_tree / "a").write_text("1")
    await in_step(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []
    replica = pair.remote.groups["web"]
    await until(lambda: replica._record.synced_once, "the replica was not told that it is in step")


async def test_nothing_is_sent_before_an_owner_was_named(pair: Pair) -> None:
    (pair.local_tree / "a").write_text("1")
    assert (await pair.local.status()).groups["web"].state == "unconfirmed"
    assert not pair.remote_tree.exists()


async def test_roles_change_and_data_flows_home(pair: Pair) -> None:
    mutator = Mutator(pair.local_tree, 3)
    for _ in range(80):
        mutator.step()
    await pair.own("local", 1)
    await in_step(pair)
    # The local server dies; its users write on the backup; it comes back with stale and damaged data.
    await pair.local.stop()
    await pair.remote.groups["web"].set_owner("remote", 2, False)
    away = Mutator(pair.remote_tree, 4)
    for _ in range(60):
        away.step()
    (pair.remote_tree / "written-away").write_text("new")
    for path in list(pair.local_tree.iterdir())[::2]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (pair.local_tree / "never-sent").write_text("only here")
    pair.local = type(pair.local)(pair.local.config)
    await pair.local.start(None)
    await pair.local.groups["web"].set_owner("remote", 2, False)
    await in_step(pair, "remote")
    assert differences(pair.local_tree, pair.remote_tree) == []
    aside = [p for p in (pair.base / "local-state").rglob("aside/**/never-sent") if p.is_file()]
    assert [p.read_text() for p in aside] == ["only here"]
    # Home again.
    await pair.remote.groups["web"].freeze(2, 30)
    await pair.own("local", 3)
    (pair.local_tree / "home").write_text("again")
    await in_step(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_a_server_back_from_the_dead_is_fenced(pair: Pair) -> None:
    (pair.local_tree / "a").write_text("1")
    await pair.own("local", 1)
    await in_step(pair)
    await pair.local.stop()
    await pair.remote.groups["web"].set_owner("remote", 2, False)
    (pair.remote_tree / "a").write_text("newer")
    pair.local = type(pair.local)(pair.local.config)
    await pair.local.start(None)
    group = pair.local.groups["web"]
    await until(lambda: group._state_and_reason()[0] == "fenced", "the stale owner was not fenced")
    assert (pair.remote_tree / "a").read_text() == "newer"


async def test_epochs_only_grow(pair: Pair) -> None:
    await pair.own("local", 5)
    with pytest.raises(StaleEpoch):
        await pair.local.groups["web"].set_owner("local", 4, False)
    with pytest.raises(Exception, match="belongs to the local side"):
        await pair.local.groups["web"].set_owner("remote", 5, False)
    await pair.restart("local")
    with pytest.raises(StaleEpoch):
        await pair.local.groups["web"].set_owner("remote", 4, False)


async def test_a_broken_connection_is_made_again(pair: Pair) -> None:
    await pair.own("local", 1)
    await in_step(pair)
    await pair.restart("remote")
    (pair.local_tree / "later").write_bytes(os.urandom(500_000))
    await in_step(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_a_replica_that_was_tampered_with_is_mended(pair: Pair) -> None:
    big = os.urandom(400_000)
    (pair.local_tree / "d").mkdir()
    (pair.local_tree / "d" / "big").write_bytes(big)
    (pair.local_tree / "d" / "moved").write_text("x")
    await pair.own("local", 1)
    await in_step(pair)
    shutil.rmtree(pair.remote_tree / "d")
    (pair.local_tree / "d" / "big").write_bytes(big + b"more")
    (pair.local_tree / "d" / "moved").rename(pair.local_tree / "moved")
    await in_step(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_a_replica_that_cannot_write_says_so_and_recovers(pair: Pair) -> None:
    await pair.own("local", 1)
    await in_step(pair)
    obstacle = pair.remote_tree / "x"
    group = pair.local.groups["web"]
    with pytest.MonkeyPatch.context() as patch:

        def full(self: Stage, *arguments: object) -> NoReturn:
            raise OSError(28, "No space left on device")

        patch.setattr(Stage, "create", full)
        (pair.local_tree / "x").write_text("1")
        await until(lambda: group._sender is not None and "No space left" in group._sender.stalled, "no reason")
        assert not obstacle.exists()
        with pytest.raises(NotInTime, match="No space left"):
            await group.flush(0.2)
        await group.flush(20.0, durable=True)
    await in_step(pair)
    assert obstacle.read_text() == "1"


# --- what a peer may not do


async def stream(pair: Pair, who: str, hello: Hello) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, object]:
    keys = Tls(pair.keys / "ca.crt", pair.keys / f"{who}.crt", pair.keys / f"{who}.key")
    reader, writer = await tls.connect(NodeRef("remote", "127.0.0.1", pair.remote.port), tls.client_context(keys))
    writer.write(wire.frame(hello))
    return reader, writer, await sender._CODEC.read(reader, "remote")


async def verdict_of(reader: asyncio.StreamReader) -> object:
    """What the replica says, in the end, of what it was sent: None when it ends the connection."""
    inbox = sender._Inbox(reader, "remote")
    answer = await inbox.next()
    while isinstance(answer, (Ack, Applied)) and not (isinstance(answer, Applied) and answer.seq):
        answer = await inbox.next()
    return answer


async def test_only_the_groups_own_source_is_welcome(pair: Pair) -> None:
    await pair.own("local", 1)
    _, writer, answer = await stream(pair, "stranger", Hello(wire.PROTOCOL, "web", 1, ["/srv/www"]))
    assert isinstance(answer, Refused)
    writer.close()
    _, writer, answer = await stream(pair, "local", Hello(wire.PROTOCOL, "other", 1, ["/srv/www"]))
    assert isinstance(answer, Refused)
    writer.close()
    _, writer, answer = await stream(pair, "local", Hello(wire.PROTOCOL, "web", 1, ["/etc"]))
    assert isinstance(answer, Refused)
    writer.close()


@pytest.mark.parametrize(
    "path",
    [
        b"../out",
        b"/etc/x",
        b"a/../../out",
        b"a//b",
        b".",
        b"a\0b",
        b"x" * 300,
        b"link/out",
        b"a/./b",
        b".farshore-stage",
        b"a/.farshore-x",
    ],
)
async def test_no_path_leads_out_of_the_root(pair: Pair, path: bytes) -> None:
    await pair.own("local", 1)
    await in_step(pair)
    outside = pair.base / "outside"
    outside.mkdir()
    (pair.remote_tree / "link").symlink_to(outside)
    before = {p: p.lstat().st_mtime_ns for p in pair.base.rglob("*") if "state" not in str(p)}
    reader, writer, answer = await stream(pair, "local", Hello(wire.PROTOCOL, "web", 1, ["/srv/www"]))
    assert isinstance(answer, Welcome)
    seq = answer.started + 1
    await BlockWriter(writer).send([wire.frame(m) for m in (Begin(1, seq), Put(0, path, META, b"evil"), Commit(seq))])
    assert isinstance(await verdict_of(reader), Nak | None)
    assert {p: p.lstat().st_mtime_ns for p in pair.base.rglob("*") if "state" not in str(p)} == before
    writer.close()


async def test_a_symlink_made_in_the_same_transaction_is_not_followed(pair: Pair) -> None:
    await pair.own("local", 1)
    await in_step(pair)
    outside = pair.base / "outside"
    outside.mkdir()
    reader, writer, welcome = await stream(pair, "local", Hello(wire.PROTOCOL, "web", 1, ["/srv/www"]))
    assert isinstance(welcome, Welcome)
    seq = welcome.started + 1
    messages = (
        Begin(1, seq),
        MakeSymlink(0, b"door", META, os.fsencode(outside)),
        Put(0, b"door/evil", META, b"evil"),
        Commit(seq),
    )
    await BlockWriter(writer).send([wire.frame(message) for message in messages])
    assert isinstance(await verdict_of(reader), Nak)
    assert list(outside.iterdir()) == []
    writer.close()


@pytest.mark.parametrize(
    "junk",
    [b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", b"\x00\x00\x00\x02\x92\x01", os.urandom(64)],
)
async def test_junk_ends_only_its_own_connection(pair: Pair, junk: bytes) -> None:
    await pair.own("local", 1)
    await in_step(pair)
    keys = Tls(pair.keys / "ca.crt", pair.keys / "stranger.crt", pair.keys / "stranger.key")
    reader, writer = await tls.connect(NodeRef("remote", "127.0.0.1", pair.remote.port), tls.client_context(keys))
    writer.write(junk)
    writer.write_eof() if writer.can_write_eof() else None
    async with asyncio.timeout(60):
        assert await reader.read() == b""
    writer.close()
    (pair.local_tree / "still").write_text("works")
    await in_step(pair)
    assert (pair.remote_tree / "still").read_text() == "works"


async def test_only_gateways_name_owners(pair: Pair) -> None:
    async def ask(who: str, request: api.Request) -> object:
        keys = Tls(pair.keys / "ca.crt", pair.keys / f"{who}.crt", pair.keys / f"{who}.key")
        ref = NodeRef("remote", "127.0.0.1", pair.remote.port)
        return await client.ask_peer(ref, tls.client_context(keys), request, 30)

    order = api.SetOwner("web", "local", 1, False)
    with pytest.raises(client.RequestFailed, match="is for gateways"):
        await ask("local", order)
    assert isinstance(await ask("gateway", order), api.Done)
    with pytest.raises(client.RequestFailed, match="local administrator"):
        await ask("gateway", api.Pause("web"))
    for decision in (api.Approve("web"), api.Reject("web")):
        with pytest.raises(client.RequestFailed, match="local administrator"):
            await ask("gateway", decision)
        with pytest.raises(NothingHeld, match="nothing is held"):
            await pair.remote.handle(decision, server.LOCAL)
    with pytest.raises(client.RequestFailed, match="known: web"):
        await ask("gateway", api.SetOwner("nope", "local", 1))


def test_a_damaged_record_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    path = tmp_path / "group.json"
    assert load(path) == Record()
    record = Record(7, "remote", "ab", True, False, True)
    store(path, record)
    assert load(path) == record
    path.write_text("{")
    with pytest.raises(StateError, match="damaged"):
        load(path)


async def test_a_switch_in_good_order_reads_no_contents_again(pair: Pair) -> None:
    for number in range(5):
        (pair.local_tree / str(number)).write_bytes(os.urandom(70_000))
    os.link(pair.local_tree / "0", pair.local_tree / "linked")
    await pair.own("local", 1)
    await in_step(pair)
    await pair.local.groups["web"].freeze(1, 60)
    sent = pair.remote.groups["web"]
    await pair.own("remote", 2)
    assert (await pair.local.status()).groups["web"].synced_once
    (pair.remote_tree / "1").write_bytes(b"changed after the switch" * 5000)
    (pair.remote_tree / "2").unlink()
    await in_step(pair, "remote")
    assert differences(pair.local_tree, pair.remote_tree) == []
    assert sent._sender is not None
    assert sent._sender.sent_bytes < 400_000


async def test_a_freeze_that_did_not_finish_is_no_good_order(pair: Pair) -> None:
    await pair.own("local", 1)
    await in_step(pair)
    await pair.remote.stop()
    (pair.local_tree / "late").write_text("not sent")
    with pytest.raises(NotInTime):
        await pair.local.groups["web"].freeze(1, 1)
    await pair.local.groups["web"].set_owner("remote", 2, False)
    status = (await pair.local.status()).groups["web"]
    assert not status.synced_once
    pair.remote = type(pair.remote)(pair.remote.config)
    await pair.remote.start(None)


async def test_a_replica_tree_that_was_lost_is_filled_again(pair: Pair) -> None:
    (pair.local_tree / "a").write_text("1")
    await pair.own("local", 1)
    await in_step(pair)
    replica = pair.remote.groups["web"]
    await until(lambda: replica._record.synced_once, "not told")
    await pair.remote.stop()
    shutil.rmtree(pair.remote_tree)
    pair.remote = type(pair.remote)(pair.remote.config)
    await pair.remote.start(None)
    sender_of = pair.local.groups["web"]
    await until(lambda: (pair.remote_tree / "a").exists(), "the lost tree was not filled again")
    await in_step(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []
    assert sender_of.owns


async def test_a_fenced_node_takes_no_orders_of_the_old_epoch(pair: Pair) -> None:
    await pair.own("local", 1)
    await in_step(pair)
    await pair.local.stop()
    await pair.remote.groups["web"].set_owner("remote", 2, False)
    pair.local = type(pair.local)(pair.local.config)
    await pair.local.start(None)
    group = pair.local.groups["web"]
    await until(lambda: group._state_and_reason()[0] == "fenced", "the stale owner was not fenced")
    with pytest.raises(StaleEpoch):
        await group.set_owner("local", 1, False)
    with pytest.raises(StaleEpoch):
        await group.thaw(1)


async def test_roles_change_while_a_path_is_missing(pair: Pair) -> None:
    pair.local_tree.rmdir()
    await pair.own("local", 1)
    group = pair.local.groups["web"]
    with pytest.raises(FarshoreError):
        await group.pause()
    await group.set_owner("remote", 2, False)
    assert (await pair.local.status()).groups["web"].owner == "remote"


async def test_a_protected_path_that_is_a_link_to_a_file_is_a_problem(pair: Pair) -> None:
    pair.local_tree.rmdir()
    (pair.base / "elsewhere").write_text("x")
    pair.local_tree.symlink_to(pair.base / "elsewhere")
    await pair.own("local", 1)
    with pytest.raises(NotInTime, match="symbolic link"):
        await pair.local.groups["web"].flush(5)
    assert not pair.remote_tree.exists()


async def test_a_large_file_on_its_way_to_the_disk_holds_up_no_small_one(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "SMALL", 1 << 20)
    gate, held_up = threading.Event(), threading.Event()
    sync = Building.sync

    def held(self: Building) -> None:
        held_up.set()
        assert gate.wait(60)
        sync(self)

    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)
    monkeypatch.setattr(Building, "sync", held)
    (pair.local_tree / "large").write_bytes(os.urandom(3 << 20))
    try:
        await until(held_up.is_set, "the large file was not built")
        for number in range(3):
            (pair.local_tree / f"small{number}").write_text("s")
            await until((pair.remote_tree / f"small{number}").exists, "a small file did not arrive")
        assert not (pair.remote_tree / "large").exists()
    finally:
        gate.set()
    await pair.local.groups["web"].flush(60)
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_a_moved_directory_is_not_sent_anew_though_its_old_place_is_looked_at_first(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pair.local_tree / "old" / "deep").mkdir(parents=True)
    for number in range(50):
        (pair.local_tree / "old" / "deep" / str(number)).write_bytes(os.urandom(20_000))
    (pair.local_tree / "large").write_bytes(os.urandom(200_000))
    await pair.own("local", 1)
    await in_step(pair)
    group = pair.local.groups["web"]
    assert group._feed is not None and group._sender is not None
    # The watcher tells of what left a good while before it tells of where it went.
    real, late = group._feed._watcher.read, []

    def read(timeout: float) -> list[Hint]:
        hints = list(real(min(timeout, 0.2))) + late[:]
        late[:] = [hint for hint in hints if hint.path in (b"new", b"renamed") and hint not in late]
        return [hint for hint in hints if hint not in late]

    monkeypatch.setattr(group._feed._watcher, "read", read)
    before = group._sender.sent_bytes
    # Something changes all the time: what is missed must not wait for a moment of rest.
    stop = asyncio.Event()

    async def scribble() -> None:
        while not stop.is_set():
            (pair.local_tree / "busy").write_text(str(time.monotonic()))
            await asyncio.sleep(0.002)

    scribbling = asyncio.create_task(scribble())
    try:
        os.rename(pair.local_tree / "old", pair.local_tree / "new")
        os.rename(pair.local_tree / "large", pair.local_tree / "renamed")
        old, large = pair.remote_tree / "old", pair.remote_tree / "large"
        await until(lambda: not (old.exists() or large.exists()), "what was moved is still there")
        assert (pair.remote_tree / "new" / "deep" / "49").exists() and (pair.remote_tree / "renamed").exists()
        shutil.rmtree(pair.local_tree / "new")
        await until(lambda: not (pair.remote_tree / "new").exists(), "what was removed is still there")
    finally:
        stop.set()
        await scribbling
    await in_step(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []
    assert group._sender.sent_bytes - before < 500_000  # of 1.2 MB


async def test_a_pause_that_fails_leaves_the_group_as_it_was(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    await pair.own("local", 1)
    await in_step(pair)
    group = pair.local.groups["web"]
    assert group._feed is not None

    def fail() -> None:
        raise FarshoreError("the watcher fails")

    with monkeypatch.context() as patch:
        patch.setattr(group._feed._watcher, "pause", fail)
        with pytest.raises(FarshoreError, match="the watcher fails"):
            await group.pause()
    (pair.local_tree / "a").write_text("1")
    await in_step(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []
