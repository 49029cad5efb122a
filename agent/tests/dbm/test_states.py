"""Whole states: a pair of nodes whose source reads snapshots."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filesystems import filesystem_or_skip
from nodes import Pair, free_ports, started, until
from trees import Mutator, differences

from farshore.cli.mirror import make_keys
from farshore.config import BrakeConfig, Consistency, Endpoint, NodeConfig, NodeGroup, NodeRef, PathConfig, Tls
from farshore.daemons.node import Node
from farshore.dbm.index import OPEN, Index
from farshore.dbm.planner import Planned, Planner
from farshore.dbm.replica import commit
from farshore.dbm.sender import Sender
from farshore.dbm.state import merged
from farshore.errors import NotInTime
from farshore.fmm.dirty import Dirty
from farshore.fmm.types import Kind

Made = Callable[..., Any]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with filesystem_or_skip("btrfs", tmp_path_factory.mktemp("disk")) as where:
        yield where


@asynccontextmanager
async def running(base: Path, trees: Path, consistency: Consistency) -> AsyncIterator[Pair]:
    """A pair whose local side, the owner, has its tree below ``trees``."""
    keys = base / "pki"
    make_keys(keys, ("local", "remote"))
    ports = dict(zip(("local", "remote"), free_ports(2), strict=True))

    def node(side: Any, other: str) -> Node:
        group = NodeGroup(
            side=side,
            peer=NodeRef(other, "127.0.0.1", ports[other]),
            paths=(PathConfig("/srv/www", str(trees / f"{side}-tree")),),
            consistency=consistency,
            # What changes in a test is most of a tree.
            brake=BrakeConfig("off"),
        )
        tls = Tls(keys / "ca.crt", keys / f"{side}.crt", keys / f"{side}.key")
        return Node(
            NodeConfig(side, Endpoint("127.0.0.1", ports[side]), tls, {"web": group}, state_dir=base / f"{side}-state")
        )

    async with started(Pair(trees, node("local", "remote"), node("remote", "local"), keys)) as made:
        yield made


@pytest.fixture
async def pair(disk: Path, tmp_path: Path) -> AsyncIterator[Pair]:
    async with running(tmp_path, place(disk, tmp_path), Consistency("snapshot", interval=0.2)) as made:
        yield made


def place(disk: Path, tmp_path: Path) -> Path:
    made = disk / tmp_path.name
    made.mkdir()
    return made


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Planned]:
    """The transactions that were sent."""
    found: list[Planned] = []
    close = Planner._close

    def noted(self: Planner, plan: Planned) -> None:
        close(self, plan)
        found.append(plan)

    monkeypatch.setattr(Planner, "_close", noted)
    return found


@contextmanager
def changing(step: Callable[[], None], pause: float = 0.0) -> Iterator[None]:
    """Something goes on changing in a thread of its own."""
    stop = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.wait(pause):
                step()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failed, failed


async def flush(pair: Pair) -> None:
    await pair.local.groups["web"].flush(60)


def left(pair: Pair) -> list[Path]:
    return [*pair.base.parent.glob(".farshore*"), *pair.local_tree.glob(".farshore*")]


@pytest.mark.parametrize("how", ["btrfs", "reflink"])
async def test_random_trees_become_equal(disk: Path, tmp_path: Path, how: Any) -> None:
    consistency = Consistency("snapshot", how, interval=0.1)
    async with running(tmp_path, place(disk, tmp_path), consistency) as pair:
        (pair.local_tree / "random").mkdir()
        mutator = Mutator(pair.local_tree / "random", 11)
        for _ in range(60):
            mutator.step()
        await pair.own("local", 1)
        await flush(pair)
        assert differences(pair.local_tree / "random", pair.remote_tree / "random") == []
        for _ in range(4):
            for _ in range(40):
                mutator.step()
                await asyncio.sleep(0.002)
            await flush(pair)
            assert differences(pair.local_tree / "random", pair.remote_tree / "random") == []
        replica = pair.remote.groups["web"]
        await until(lambda: replica._record.synced_once, "the replica was not told that it is in step")
    assert left(pair) == []


async def test_all_but_the_last_transaction_say_that_more_follows(pair: Pair, plans: list[Planned]) -> None:
    for number in range(2500):
        (pair.local_tree / f"f{number}").write_bytes(b"x" * number)
    (pair.local_tree / "large").write_bytes(os.urandom(3_000_000))
    await pair.own("local", 1)
    await flush(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []
    states = [list(group) for more, group in itertools.groupby(plans, lambda plan: plan.more) if more]
    assert len(plans) > 3
    assert not plans[-1].more
    # All of the first comparison is one state: nothing that changes anything comes after its end.
    assert len(states) == 1
    assert sum(plan.operations for plan in plans) == sum(
        plan.operations for plan in [*states[0], plans[len(states[0])]]
    )


async def test_one_change_is_one_transaction(pair: Pair, plans: list[Planned]) -> None:
    await pair.own("local", 1)
    await flush(pair)
    plans.clear()
    (pair.local_tree / "a").write_text("1")
    await flush(pair)
    assert [(plan.more, plan.operations > 0) for plan in plans] == [(False, True)]


async def test_what_changes_later_belongs_to_the_next_state(pair: Pair) -> None:
    """Each pair of files is written one after the other; a state never has more of the second than of the first."""
    tree = pair.local_tree
    for name in ("first", "second"):
        (tree / name).write_bytes(b"0" * 100_000)
    numbers = itertools.count(1)

    def step() -> None:
        body = b"%d" % next(numbers) * 100_000
        (tree / "first").write_bytes(body)
        (tree / "second").write_bytes(body)

    await pair.own("local", 1)
    await flush(pair)
    with changing(step, 0.01):
        sender = pair.local.groups["web"]._sender
        assert sender is not None
        seq = sender.seq
        await until(lambda: sender.seq > seq + 10, "states are sent under load")
        assert (await pair.local.status()).groups["web"].backlog_paths > 0
    await flush(pair)
    assert (pair.remote_tree / "first").read_bytes() == (pair.remote_tree / "second").read_bytes()
    assert differences(tree, pair.remote_tree) == []


async def test_rpo_tells_what_would_be_lost(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before all of a state is durable is anything of it counted as such."""
    await pair.own("local", 1)
    await flush(pair)
    group = pair.local.groups["web"]
    acknowledged: list[tuple[int, int]] = []
    settle = Sender._settle

    async def noted(self: Sender) -> None:
        await settle(self)
        if self._cycle is not None:
            acknowledged.append((len(self._cycle.own), group._dirty.count()))

    monkeypatch.setattr(Sender, "_settle", noted)
    (pair.local_tree / "large").write_bytes(os.urandom(4_000_000))
    for number in range(3000):
        (pair.local_tree / f"f{number}").write_bytes(b"x")
    await flush(pair)
    assert any(own > 1000 for own, _ in acknowledged)
    assert all(count >= own for own, count in acknowledged)
    await until(lambda: group._dirty.oldest() is None, "nothing is left")
    assert (await pair.local.status()).groups["web"].rpo == 0.0
    written = time.monotonic()
    (pair.local_tree / "f0").write_bytes(b"y")
    await until(lambda: group._dirty.oldest() is not None, "the change is seen")
    oldest = group._dirty.oldest()
    assert oldest is None or oldest >= written


async def test_a_flush_does_not_wait_for_its_time(disk: Path, tmp_path: Path) -> None:
    async with running(tmp_path, place(disk, tmp_path), Consistency("snapshot", interval=3600.0)) as pair:
        await pair.own("local", 1)
        await flush(pair)
        for number in range(3):
            (pair.local_tree / "a").write_text(str(number))
            await flush(pair)
            assert (pair.remote_tree / "a").read_text() == str(number)
        # Without one, it is not time yet.
        (pair.local_tree / "a").write_text("later")
        await asyncio.sleep(0.5)
        assert (pair.remote_tree / "a").read_text() == "2"
        # A switch ends with a state of its own.
        await pair.local.groups["web"].freeze(1, 60)
        assert (pair.remote_tree / "a").read_text() == "later"
        await pair.own("remote", 2)
        assert (await pair.remote.status()).groups["web"].owner == "remote"


async def test_under_load_a_flush_ends(pair: Pair) -> None:
    await pair.own("local", 1)
    numbers = itertools.count()
    with changing(lambda: (pair.local_tree / "a").write_text(f"{next(numbers):09}") and None, 0.001):
        for _ in range(5):
            (pair.local_tree / "b").write_text(before := str(time.monotonic()))
            await flush(pair)
            assert (pair.remote_tree / "b").read_text() == before


async def test_a_link_that_breaks_loses_nothing(pair: Pair) -> None:
    (pair.local_tree / "random").mkdir()
    mutator = Mutator(pair.local_tree / "random", 5)
    await pair.own("local", 1)
    await flush(pair)
    with changing(mutator.step, 0.002):
        for _ in range(8):
            await asyncio.sleep(0.15)
            session = pair.remote.groups["web"]._session
            if session is not None:
                session.cancel()
    await flush(pair)
    assert differences(pair.local_tree / "random", pair.remote_tree / "random") == []
    for side in ("local", "remote"):
        for _ in range(20):
            mutator.step()
        await pair.restart(side)
        await flush(pair)
        assert differences(pair.local_tree / "random", pair.remote_tree / "random") == []
    # With nothing to send, too, it is told that no state is open.
    sender = pair.local.groups["web"]._sender
    assert sender is not None
    await until(lambda: sender.in_step and not sender._open, "all is told")
    session = pair.remote.groups["web"]._session
    assert session is not None
    session.cancel()
    await until(lambda: not sender.connected, "the link is broken")
    await until(lambda: sender.in_step and not sender._open, "all is told once more")
    assert sender.held([(0, b"random")]) == set()


async def test_without_a_snapshot_nothing_is_sent_and_the_cause_is_told(disk: Path, tmp_path: Path) -> None:
    gate = tmp_path / "may"
    consistency = Consistency("snapshot", interval=0.1, freeze=f"echo not now; test -e {gate}", thaw="true")
    async with running(tmp_path, place(disk, tmp_path), consistency) as pair:
        (pair.local_tree / "a").write_text("1")
        await pair.own("local", 1)
        with pytest.raises(NotInTime, match="freeze hook of group web failed: not now"):
            await pair.local.groups["web"].flush(1.5)
        status = (await pair.local.status()).groups["web"]
        assert (status.state, status.in_step) == ("error", False)
        assert any("not now" in problem for problem in status.problems)
        assert not (pair.remote_tree / "a").exists()
        gate.touch()
        await flush(pair)
        assert (pair.remote_tree / "a").read_text() == "1"
        await until(lambda: not pair.local.groups["web"]._sender.stuck, "it goes on")  # type: ignore[union-attr]


async def test_a_missing_path_is_no_wish_to_empty_the_replica(pair: Pair) -> None:
    (pair.local_tree / "a").write_text("1")
    await pair.own("local", 1)
    await flush(pair)
    aside = pair.local_tree.with_name("aside")
    pair.local_tree.rename(aside)
    with pytest.raises(NotInTime, match="local-tree"):
        await pair.local.groups["web"].flush(2)
    group = pair.local.groups["web"]
    await until(lambda: group._state_and_reason()[0] == "error", "it is told")
    assert (pair.remote_tree / "a").read_text() == "1"
    aside.rename(pair.local_tree)
    (pair.local_tree / "b").write_text("2")
    await flush(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_who_takes_no_snapshots_any_more_completes_what_is_open(pair: Pair, plans: list[Planned]) -> None:
    (pair.local_tree / "a").write_text("1")
    await pair.own("local", 1)
    await flush(pair)
    config = pair.local.config
    await pair.local.stop()
    plans.clear()
    groups = {"web": replace(config.groups["web"], consistency=Consistency())}
    pair.local = Node(replace(config, groups=groups))
    await pair.local.start(None)
    await flush(pair)
    sender = pair.local.groups["web"]._sender
    assert sender is not None
    await until(lambda: bool(plans) and sender.seq >= plans[-1].seq and not sender._uncommitted, "it is told and noted")
    assert [(plan.more, plan.operations) for plan in plans] == [(False, 0)]
    await pair.local.stop()
    index = Index(config.state_dir / "groups" / "web" / "index.db")
    assert index.get_fact(OPEN) == b"0"
    index.close()
    pair.local = Node(replace(config, groups=groups))
    await pair.local.start(None)
    await flush(pair)
    assert len(plans) == 1


async def test_a_base_that_is_in_no_place_yet_is_none(pair: Pair, plans: list[Planned]) -> None:
    """A large file in a directory that moves in the same state: what it has now is not where it will be."""
    (pair.local_tree / "d").mkdir()
    body = bytearray(os.urandom(300_000))
    (pair.local_tree / "d" / "large").write_bytes(body)
    await pair.own("local", 1)
    await flush(pair)
    body[1000:1010] = b"0123456789"
    (pair.local_tree / "d" / "large").write_bytes(body)
    (pair.local_tree / "d").rename(pair.local_tree / "e")
    (pair.local_tree / "copy").write_bytes(body)
    await flush(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []


def test_what_is_told_twice_is_looked_at_once() -> None:
    own = [Dirty(0, b"d/f", Kind.MODIFIED, 1.0, 1), Dirty(0, b"", Kind.RESCAN, 1.0, 2)]
    later = [Dirty(0, b"d/f", Kind.ATTRIBUTES, 2.0, 3, frozenset({(1, 2)})), Dirty(0, b"d", Kind.CREATED, 2.0, 4)]
    found = merged(own, later)
    assert [(item.path, item.kind) for item in found] == [
        (b"", Kind.RESCAN),
        (b"d", Kind.CREATED),
        (b"d/f", Kind.MODIFIED | Kind.ATTRIBUTES),
    ]
    assert found[-1].inodes == frozenset({(1, 2)})


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While it is set, no state is ever told to be complete."""
    event = threading.Event()
    transaction, end_state = Planner.transaction, Sender._end_state

    def never_last(self: Planner, batch: Any, seq: int, more: Any = None) -> Planned:
        return transaction(self, batch, seq, (lambda plan: True) if event.is_set() else more)

    async def not_yet(self: Sender, *arguments: Any) -> None:
        if event.is_set():
            await asyncio.sleep(0.01)
        else:
            await end_state(self, *arguments)

    monkeypatch.setattr(Planner, "transaction", never_last)
    monkeypatch.setattr(Sender, "_end_state", not_yet)
    return event


async def half_sent(pair: Pair, held: threading.Event) -> None:
    """The replica has 1 everywhere, and all of the state with 2 but its end."""
    for name in ("a", "b"):
        (pair.local_tree / name).write_text("1")
    (pair.local_tree / "large").write_bytes(b"1" * 300_000)
    await pair.own("local", 1)
    await flush(pair)
    replica = pair.remote.groups["web"]
    await until(lambda: replica._record.synced_once, "the replica was not told that it is in step")
    held.set()
    for name in ("a", "b"):
        (pair.local_tree / name).write_text("2")
    (pair.local_tree / "large").write_bytes(b"1" * 300_000 + b"2")
    (pair.local_tree / "c").write_text("2")
    sender = pair.local.groups["web"]._sender
    assert sender is not None
    await until(
        lambda: sender._cycle is not None and not sender._cycle.left and sender._open and not sender._flights,
        "all of it but its end is durable",
    )


def has(pair: Pair, number: str) -> bool:
    tree = pair.remote_tree
    large = b"1" * 300_000 + (b"2" if number == "2" else b"")
    return (
        (tree / "a").read_text() == (tree / "b").read_text() == number
        and (tree / "large").read_bytes() == large
        and (tree / "c").exists() == (number == "2")
    )


async def test_an_incomplete_state_is_not_promoted(pair: Pair, held: threading.Event) -> None:
    await half_sent(pair, held)
    assert has(pair, "1")
    status = (await pair.local.status()).groups["web"]
    assert not status.in_step and status.rpo and status.backlog_paths
    sender = pair.local.groups["web"]._sender
    assert sender is not None and sender.held([(0, b"untouched")]) == {(0, b"untouched")}
    with pytest.raises(NotInTime):
        await pair.local.groups["web"].flush(0.3)
    await pair.local.stop()
    await pair.remote.groups["web"].set_owner("remote", 2, False)
    assert has(pair, "1")
    # And it does not come back: the other side gets what this one has.
    held.clear()
    pair.local = Node(pair.local.config)
    await pair.local.start(None)
    await pair.local.groups["web"].set_owner("remote", 2, False)
    await pair.remote.groups["web"].flush(60)
    assert differences(pair.local_tree, pair.remote_tree) == []
    assert has(pair, "1")
    # Home again: what was held then is not taken for a part of what comes now.
    await pair.remote.groups["web"].freeze(2, 60)
    await pair.own("local", 3)
    (pair.local_tree / "home").write_text("again")
    await flush(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []
    assert has(pair, "1")


async def test_a_state_may_be_larger_than_what_may_wait(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """And within it the replica is asked for signatures of its files."""
    monkeypatch.setattr(commit, "BACKLOG_BYTES", 200_000)
    monkeypatch.setattr(commit, "MEMORY_BYTES", 100_000)
    for number in range(6):
        (pair.local_tree / f"large{number}").write_bytes(os.urandom(200_000))
    await pair.own("local", 1)
    await flush(pair)
    await pair.local.stop()
    for each in (pair.local.config.state_dir / "groups" / "web").glob("index.db*"):
        each.unlink()
    for number in range(6):
        with (pair.local_tree / f"large{number}").open("r+b") as file:
            file.write(b"changed")
    for number in range(200):
        (pair.local_tree / f"small{number}").write_bytes(os.urandom(30_000))
    pair.local = Node(pair.local.config)
    await pair.local.start(None)
    await flush(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []
    sender = pair.local.groups["web"]._sender
    assert sender is not None and sender.sent_bytes < 200 * 30_000 + 6 * 200_000 // 2


@pytest.mark.parametrize("victims", [("local",), ("remote",), ("remote", "local")])
async def test_an_incomplete_state_is_completed(pair: Pair, held: threading.Event, victims: tuple[str, ...]) -> None:
    """By the next one, also when what was meant to end it never comes."""
    await half_sent(pair, held)
    for victim in victims:
        await pair.restart(victim)
        assert has(pair, "1")
    # Of what was sent some is as it was before.
    (pair.local_tree / "a").write_text("3")
    (pair.local_tree / "b").write_text("1")
    (pair.local_tree / "c").unlink()
    (pair.local_tree / "large").write_bytes(b"4" * 300_000)
    held.clear()
    await flush(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_a_comparison_in_full_forgets_an_incomplete_state(pair: Pair, held: threading.Event) -> None:
    """What the source learns of the replica's tree is all that it relies on from then on."""
    await half_sent(pair, held)
    await pair.local.stop()
    for each in (pair.local.config.state_dir / "groups" / "web").glob("index.db*"):
        each.unlink()
    for name in ("a", "b"):
        (pair.local_tree / name).write_text("1")
    (pair.local_tree / "large").write_bytes(b"1" * 300_000)
    (pair.local_tree / "c").unlink()
    held.clear()
    pair.local = Node(pair.local.config)
    await pair.local.start(None)
    await flush(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []
    assert has(pair, "1")


async def test_what_is_promoted_is_of_one_moment(pair: Pair) -> None:
    """Two files are written one after the other, each synced; the source dies at any moment."""
    tree = pair.local_tree

    def put(name: str, number: int) -> None:
        temporary = tree / f".{name}"
        with temporary.open("wb") as file:
            file.write(b"%d " % number + bytes(90_000))
            os.fsync(file.fileno())
        temporary.rename(tree / name)
        directory = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(directory)
        os.close(directory)

    numbers = itertools.count(1)

    def step() -> None:
        number = next(numbers)
        put("first", number)
        put("second", number)

    step()
    await pair.own("local", 1)
    await flush(pair)
    with changing(step):
        sender = pair.local.groups["web"]._sender
        assert sender is not None
        seq = sender.seq
        await until(lambda: sender.seq >= seq + 8, "states are sent under load")
        await pair.local.stop()
    await pair.remote.groups["web"].set_owner("remote", 2, False)
    first, second = (int((pair.remote_tree / name).read_bytes().split()[0]) for name in ("first", "second"))
    assert second <= first <= second + 1
    assert first > 1
    pair.local = Node(pair.local.config)
    await pair.local.start(None)
