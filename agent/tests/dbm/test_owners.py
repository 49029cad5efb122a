"""Owners by name: translated there and back, without an account as well, and never to somebody else."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from acls import acl
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import Pair, free_ports, until
from replicas import Replica, stream, upload

from farshore.cli.mirror import make_keys
from farshore.config import ConfigError, NodeConfig, OwnerMap, parse
from farshore.control import api, client
from farshore.dbm import owners as owning
from farshore.dbm.messages import Ack, Begin, Commit, Entry, Meta, Names, Patch, Put, Remove, SetMeta
from farshore.dbm.owners import FIRST_SUBSTITUTE, NOBODY_EQUALS, Arriving, Kind, Leaving, Owners, OwnersDiffer
from farshore.dbm.unkept import texts
from farshore.errors import ProtocolError, StateError

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


class Table:
    """The accounts of a host, as a table; users and groups alike."""

    def __init__(self, **accounts: int) -> None:
        self.accounts = accounts
        self.asked = 0

    def name(self, kind: Kind, number: int) -> str | None:
        self.asked += 1
        return next((name for name, each in self.accounts.items() if each == number), None)

    def number(self, kind: Kind, name: str) -> int | None:
        self.asked += 1
        return self.accounts.get(name)


def meta(uid: int, gid: int, *xattrs: tuple[bytes, bytes]) -> Meta:
    return Meta(0o644, uid, gid, 1, 1, list(xattrs))


def same(names: dict[str, str]) -> OwnerMap:
    return OwnerMap(names, names)


class Ends:
    """The two sides of a group, and what one says to the other."""

    def __init__(self, base: Path, local: Table, remote: Table, names: dict[str, str] | None = None) -> None:
        self.clock = 0.0
        self.local = Owners("local", same(names or {}), base / "local.json", local, lambda: self.clock)
        self.remote = Owners("remote", same(names or {}), base / "remote.json", remote, lambda: self.clock)

    @staticmethod
    def carry(source: Owners, replica: Owners, *metas: Meta) -> list[Meta]:
        """What the replica gives files that have ``metas`` at the source, over a new connection."""
        leaving, arriving = Leaving(source), Arriving(replica)
        for each in metas:
            leaving.use(each)
        for names in leaving.told():
            arriving.learn(names)
        found = [arriving.translated(SetMeta(0, b"%d" % i, each)).meta for i, each in enumerate(metas)]
        arriving.store()
        return found

    @staticmethod
    def list_back(replica: Owners, source: Owners, *metas: Meta) -> list[Meta]:
        """What the source learns of the replica's files in a full comparison."""
        entries = [Entry(0, b"%d" % i, 1, each, 0, 1, 0, None, None) for i, each in enumerate(metas)]
        arriving = Arriving(source)
        for names in Leaving(replica).listed(entries, lambda root, path: path):
            arriving.learn(names)
        return [entry.meta for entry in arriving.listed(entries)]


def test_by_name_there_and_back(tmp_path: Path) -> None:
    ends = Ends(tmp_path, Table(root=0, alice=1001, bob=1002), Table(root=0, alice=2001, bob=1001))
    mine = [meta(1001, 1002), meta(0, 0), meta(1002, 1001)]
    there = ends.carry(ends.local, ends.remote, *mine)
    assert there == [meta(2001, 1001), meta(0, 0), meta(1001, 2001)]
    assert ends.list_back(ends.remote, ends.local, *there) == mine
    assert ends.carry(ends.remote, ends.local, *there) == mine
    assert not ends.remote.unkept


def test_by_map_there_and_back(tmp_path: Path) -> None:
    ends = Ends(tmp_path, Table(alice=1001, www=33), Table(bob=5001, nginx=101), {"alice": "bob", "www": "nginx"})
    there = ends.carry(ends.local, ends.remote, meta(1001, 33))
    assert there == [meta(5001, 101)]
    assert ends.list_back(ends.remote, ends.local, *there) == [meta(1001, 33)]
    assert ends.carry(ends.remote, ends.local, *there) == [meta(1001, 33)]


def test_a_name_that_the_map_gives_to_another_stays_apart(tmp_path: Path) -> None:
    """Local alice is bob there; local bob and the other side's alice are somebody else each."""
    ends = Ends(tmp_path, Table(alice=1001, bob=1002), Table(alice=1, bob=2), {"alice": "bob"})
    there = ends.carry(ends.local, ends.remote, meta(1001, 1002))
    assert there == [meta(2, 1002)]
    assert ends.carry(ends.remote, ends.local, meta(2, 1002), meta(1, 1)) == [meta(1001, 1002), meta(1, 1)]
    assert ends.carry(ends.local, ends.remote, meta(1, 1)) == [meta(1, 1)]


def test_acls_are_translated(tmp_path: Path) -> None:
    ends = Ends(tmp_path, Table(alice=1001, bob=1002, root=0), Table(alice=2001, bob=2002, root=0))
    for name in (b"system.posix_acl_access", b"system.posix_acl_default"):
        mine = meta(0, 0, (name, acl((2, 6, 1002), (2, 4, 1001), (8, 6, 1001))), (b"user.a", b"\1"))
        there = ends.carry(ends.local, ends.remote, mine)
        assert there == [meta(0, 0, (name, acl((2, 6, 2002), (2, 4, 2001), (8, 6, 2001))), (b"user.a", b"\1"))]
        assert ends.list_back(ends.remote, ends.local, *there) == [mine]
    junk = meta(0, 0, (b"system.posix_acl_access", b"junk"))
    assert ends.carry(ends.local, ends.remote, junk) == [junk]


def test_who_is_unknown_keeps_a_free_number_and_is_known_on_the_way_back(tmp_path: Path) -> None:
    ends = Ends(tmp_path, Table(alice=1001), Table(bob=2002))
    there = ends.carry(ends.local, ends.remote, meta(1001, 1001))
    assert there == [meta(1001, 1001)]
    assert texts(ends.remote.unkept.causes()) == [
        "user alice is not known here: number 1001 is kept (0)",
        "group alice is not known here: number 1001 is kept (0)",
    ]
    # Meanwhile alice has got another number at home.
    later = Ends(tmp_path, Table(alice=7), Table(bob=2002))
    assert later.carry(later.remote, later.local, *there) == [meta(7, 7)]
    assert later.list_back(later.remote, later.local, *there) == [meta(7, 7)]


def test_who_is_unknown_never_gets_anothers_number(tmp_path: Path) -> None:
    ends = Ends(tmp_path, Table(alice=1001, carol=1002), Table(bob=1001))
    there = ends.carry(ends.local, ends.remote, meta(1001, 1001), meta(1002, 1002))
    substitute = FIRST_SUBSTITUTE
    assert there == [meta(substitute, substitute), meta(1002, 1002)]
    assert f"user alice is not known here: number {substitute} is given, as 1001 is bob's (0)" in texts(
        ends.remote.unkept.causes()
    )
    assert ends.carry(ends.local, ends.remote, meta(1001, 1001)) == [meta(substitute, substitute)]
    again = Ends(tmp_path, Table(alice=1001, carol=1002), Table(bob=1001))
    assert again.carry(again.remote, again.local, *there) == [meta(1001, 1001), meta(1002, 1002)]
    assert again.list_back(again.remote, again.local, *there) == [meta(1001, 1001), meta(1002, 1002)]


def test_a_number_without_an_account_is_nobodys_there_either(tmp_path: Path) -> None:
    ends = Ends(tmp_path, Table(), Table(carol=1500))
    there = ends.carry(ends.local, ends.remote, meta(1500, 1501))
    assert there == [meta(FIRST_SUBSTITUTE, 1501)]
    assert texts(ends.remote.unkept.causes()) == [
        f"user number 1500 is not known here: number {FIRST_SUBSTITUTE} is given, as 1500 is carol's (0)"
    ]
    assert ends.carry(ends.remote, ends.local, *there) == [meta(1500, 1501)]
    assert ends.list_back(ends.remote, ends.local, *there) == [meta(1500, 1501)]


def test_an_account_that_is_made_later_gets_its_files(tmp_path: Path) -> None:
    accounts = Table(bob=2002)
    ends = Ends(tmp_path, Table(alice=1001), accounts)
    old = ends.carry(ends.local, ends.remote, meta(1001, 1001))
    accounts.accounts["alice"] = 2001
    ends.clock += 2 * owning.TRUST_SECONDS
    assert ends.carry(ends.local, ends.remote, meta(1001, 1001)) == [meta(2001, 2001)]
    # A comparison finds those that have the number from before; but whose they are is not forgotten.
    assert ends.list_back(ends.remote, ends.local, *old) == [meta(NOBODY_EQUALS, NOBODY_EQUALS)]
    assert ends.carry(ends.remote, ends.local, *old) == [meta(1001, 1001)]


def test_an_account_that_takes_a_kept_number_does_not_take_the_files(tmp_path: Path) -> None:
    accounts = Table(bob=2002)
    ends = Ends(tmp_path, Table(alice=1001), accounts)
    assert ends.carry(ends.local, ends.remote, meta(1001, 1001)) == [meta(1001, 1001)]
    accounts.accounts["eve"] = 1001
    ends.clock += 2 * owning.TRUST_SECONDS
    assert ends.carry(ends.local, ends.remote, meta(1001, 1001)) == [meta(FIRST_SUBSTITUTE, FIRST_SUBSTITUTE)]


def test_a_directory_service_that_fails_changes_nothing(tmp_path: Path) -> None:
    there = Table(alice=2001)
    ends = Ends(tmp_path, Table(alice=1001), there)
    leaving, arriving = Leaving(ends.local), Arriving(ends.remote)
    leaving.use(meta(1001, 1001))
    (names, more) = leaving.told()
    arriving.learn(names)
    arriving.learn(more)
    operation = SetMeta(0, b"f", meta(1001, 1001))
    assert arriving.translated(operation).meta == meta(2001, 2001)
    there.accounts.clear()
    ends.clock += 2 * owning.TRUST_SECONDS
    assert arriving.translated(operation).meta == meta(2001, 2001)
    there.accounts["alice"] = 3001
    ends.clock += 2 * owning.TRUST_SECONDS
    assert arriving.translated(operation).meta == meta(3001, 3001)


def test_a_name_is_told_once_and_again_when_it_is_another(tmp_path: Path) -> None:
    accounts = Table(alice=1001)
    ends = Ends(tmp_path, accounts, Table())
    leaving = Leaving(ends.local)
    leaving.use(meta(1001, 0))
    assert leaving.told() == [Names({1001: "alice"}, {}), Names({}, {0: "#0"})]
    asked = accounts.asked
    for _ in range(100):
        leaving.use(meta(1001, 0))
    assert (leaving.told(), accounts.asked) == ([], asked)
    ends.clock += 2 * owning.TRUST_SECONDS
    leaving.use(meta(1001, 0))
    assert leaving.told() == []
    accounts.accounts = {"alicia": 1001}
    ends.clock += 2 * owning.TRUST_SECONDS
    leaving.use(meta(1001, 0))
    assert leaving.told() == [Names({1001: "alicia"}, {})]


def test_what_was_reported_of_a_file_ends_with_it(tmp_path: Path) -> None:
    ends = Ends(tmp_path, Table(alice=1001, root=0), Table(root=0))
    arriving = Arriving(ends.remote)
    arriving.learn(Names({1001: "alice", 0: "#0"}, {0: "#0"}))
    for name in (b"a", b"b"):
        arriving.translated(SetMeta(0, name, meta(1001, 0)))
    assert texts(ends.remote.unkept.causes()) == ["user alice is not known here: number 1001 is kept (2 files, e.g. a)"]
    arriving.translated(SetMeta(0, b"a", meta(0, 0)))
    arriving.translated(Remove(0, b"b"))
    assert not ends.remote.unkept


@pytest.mark.parametrize(
    "who", ["", "#", "#x", "#-1", "#4294967295", "#99999999999", "~", "~#1", "a\0b", "x" * 300, "#١"]
)
def test_nobody_is_called_so(tmp_path: Path, who: str) -> None:
    arriving = Arriving(Ends(tmp_path, Table(), Table()).remote)
    with pytest.raises(ProtocolError):
        arriving.learn(Names({5: who}, {}))
    with pytest.raises(ProtocolError):
        arriving.learn(Names({}, {NOBODY_EQUALS: "alice"}))
    with pytest.raises(ProtocolError):
        arriving.learn(Names({-1: "alice"}, {}))


def test_both_sides_must_agree(tmp_path: Path) -> None:
    ends = Ends(tmp_path, Table(), Table())
    with pytest.raises(OwnersDiffer, match="by name there and by number here"):
        Arriving(None).learn(Names({}, {}))
    with pytest.raises(OwnersDiffer, match="by number there and by name here"):
        Arriving(ends.remote).translated(SetMeta(0, b"f", meta(1, 1)))
    leaving, operation = Leaving(None), SetMeta(0, b"f", meta(1, 1))
    leaving.use(operation.meta)
    assert leaving.told() == leaving.listed([], lambda root, path: path) == []
    assert Arriving(None).translated(operation) is operation


def test_too_many_are_an_error_not_a_flood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owning, "_MOST_TOLD", 10)
    monkeypatch.setattr(owning, "_MOST_KEPT", 3)
    ends = Ends(tmp_path, Table(), Table())
    with pytest.raises(ProtocolError):
        Arriving(ends.remote).learn(Names({number: f"n{number}" for number in range(1, 12)}, {}))
    for number in range(1, 4):
        ends.remote.number("user", f"n{number}", number)
    with pytest.raises(StateError, match="more than 3"):
        ends.remote.number("user", "n4", 4)


def test_what_is_written_down_is_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "owners.json"
    for text in ("{", "[]", '{"version": 2}', '{"version": 1}', '{"version": 1, "users": {"a": "x"}, "groups": {}}'):
        path.write_text(text)
        with pytest.raises(StateError):
            Owners("local", OwnerMap(), path, Table())


def test_the_systems_own_accounts() -> None:
    system = owning.SystemAccounts()
    assert (system.name("user", 0), system.number("user", "root")) == ("root", 0)
    assert (system.name("group", 0), system.number("group", "root")) == ("root", 0)
    assert system.name("user", 4_000_000_000) is None
    assert system.name("group", 2**40) is None
    assert system.number("user", "nobody-is-called-so") is None
    assert system.number("group", "a\0b") is None


NAMES = [f"n{i}" for i in range(6)]
TABLES = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 8), max_size=6).filter(
    lambda table: len(set(table.values())) == len(table)
)


@settings(deadline=None)
@given(
    TABLES,
    TABLES,
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(NAMES)).filter(
        lambda names: len(set(names.values())) == len(names)
    ),
)
def test_everybody_comes_home(
    tmp_path_factory: pytest.TempPathFactory, local: dict[str, int], remote: dict[str, int], names: dict[str, str]
) -> None:
    """Whatever accounts there are and however they are called: no two become one, and the way back is the way there."""
    ends = Ends(tmp_path_factory.mktemp("owners"), Table(**local), Table(**remote), names)
    mine = [meta(number, number) for number in range(10)]
    for source, replica, accounts in (
        (ends.local, ends.remote, remote),
        (ends.remote, ends.local, local),
    ):
        there = ends.carry(source, replica, *mine)
        assert len({each.uid for each in there}) == len(mine)
        assert ends.list_back(replica, source, *there) == mine
        assert ends.carry(replica, source, *there) == mine
        assert there[0] == mine[0]
        # Only who is meant gets the number of an account.
        for before, after in zip(mine, there, strict=True):
            if after.uid in accounts.values():
                assert replica.identity("user", after.uid) == source.identity("user", before.uid)


# --- two nodes


def give(pair: Pair, local: Table, remote: Table, names: dict[str, str] | None = None) -> None:
    """Let the pair's owners go by name, by these accounts."""
    for side, node, table in (("local", pair.local, local), ("remote", pair.remote, remote)):
        path = pair.base / f"{side}-state" / "groups" / "web" / "owners.json"
        node.groups["web"]._owners = Owners(side, same(names or {}), path, table)  # type: ignore[arg-type]


def whose(tree: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.lstat().st_uid, path.lstat().st_gid) for path in tree.iterdir()}


@needs_root
async def test_two_nodes_with_other_numbers(pair: Pair) -> None:
    local = Table(root=0, alice=1001, bob=1002, lost=1003, taken=1004)
    remote = Table(root=0, alice=1002, robert=1001, other=1004)
    give(pair, local, remote, {"bob": "robert"})
    tree, there = pair.local_tree, pair.remote_tree
    (tree / "alices").write_text("1")
    (tree / "bobs").write_bytes(os.urandom(200_000))
    (tree / "lost").mkdir()
    (tree / "taken").symlink_to("x")
    os.mkfifo(tree / "unnamed")
    for name, number in (("alices", 1001), ("bobs", 1002), ("lost", 1003), ("taken", 1004), ("unnamed", 1005)):
        os.chown(tree / name, number, number, follow_symlinks=False)
    os.setxattr(tree / "alices", "system.posix_acl_access", acl((2, 6, 1002), (8, 6, 1001)))
    home = whose(tree)
    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)
    away = {"alices": 1002, "bobs": 1001, "lost": 1003, "taken": FIRST_SUBSTITUTE, "unnamed": 1005}
    assert whose(there) == {name: (number, number) for name, number in away.items()}
    assert os.getxattr(there / "alices", "system.posix_acl_access") == acl((2, 6, 1001), (8, 6, 1002))
    sender = pair.local.groups["web"]._sender
    assert sender is not None
    await until(lambda: len(sender.unkept) == 4, "what is not known was not told")
    told = (await pair.local.status()).groups["web"].problems
    assert f"remote: user lost is not known here: number 1003 is kept ({there}/lost)" in told
    assert (
        f"remote: user taken is not known here: number {FIRST_SUBSTITUTE} is given, as 1004 is other's ({there}/taken)"
        in told
    )
    # The backup takes over; its accounts change some files, and everybody comes home.
    await pair.local.groups["web"].freeze(1, 60)
    await pair.own("remote", 2)
    (there / "new").write_text("2")
    os.chown(there / "new", 1001, 1004)
    os.chown(there / "alices", 1001, 1002)
    (there / "lost").rename(there / "lost again")
    await pair.remote.groups["web"].flush(60)
    # "other" is nobody at home: the number is taken's there.
    home |= {"new": (1002, FIRST_SUBSTITUTE), "alices": (1002, 1001), "lost again": home.pop("lost")}
    assert whose(tree) == home
    assert os.getxattr(tree / "alices", "system.posix_acl_access") == acl((2, 6, 1002), (8, 6, 1001))
    # And once more, with all that each side has learnt only on its disk.
    await pair.remote.groups["web"].freeze(2, 60)
    await pair.restart("remote")
    await pair.restart("local")
    give(pair, local, remote, {"bob": "robert"})
    await pair.own("local", 3)
    await pair.local.groups["web"].flush(60)
    assert whose(tree) == home
    again = {name: (number, number) for name, number in away.items()}
    again |= {"new": (1001, 1004), "alices": (1001, 1002), "lost again": again.pop("lost")}
    assert whose(there) == again


@needs_root
async def test_verification_knows_who_is_called_otherwise(pair: Pair) -> None:
    local = Table(root=0, alice=1001, bob=1002, lost=1003, taken=1004)
    remote = Table(root=0, alice=1002, robert=1001, other=1004)
    give(pair, local, remote, {"bob": "robert"})
    tree, there = pair.local_tree, pair.remote_tree
    for number in (1001, 1002, 1003, 1004, 1005):
        (tree / f"{number}").write_text("1")
        os.chown(tree / f"{number}", number, number)
    os.setxattr(tree / "1001", "system.posix_acl_access", acl((2, 6, 1002), (2, 4, 1004), (8, 6, 1001)))
    await pair.own("local", 1)
    group = pair.local.groups["web"]
    await group.flush(60)
    right = whose(there)

    async def verified() -> api.VerificationReport:
        run = group.verify(True, True, False, 0.0)
        sender = group._sender
        assert sender is not None and sender.verifier is not None
        verifier = sender.verifier
        await until(lambda: verifier.status().run != run, "the verification did not end")
        last = verifier.status().last
        assert last is not None and last.run == run
        return last

    report = await verified()
    assert (report.result, report.drifts) == ("clean", [])
    os.chown(there / "1002", 1002, 1001)
    os.setxattr(there / "1001", "system.posix_acl_access", acl((2, 6, 1002), (8, 6, 1001)))
    report = await verified()
    assert report.result == "repaired"
    assert {(Path(each.path).name, *each.differences) for each in report.drifts} == {
        ("1001", "attributes"),
        ("1002", "owner"),
    }
    assert whose(there) == right
    assert (await verified()).result == "clean"


@needs_root
def test_what_was_accepted_before_a_crash_has_the_right_owner(tmp_path: Path) -> None:
    """What is applied anew has no connection on which anybody would say whom a number means."""
    replica = Replica(tmp_path)
    replica.root.mkdir(exist_ok=True)
    try:
        path = tmp_path / "owners.json"
        replica.applier.owners = Owners("remote", OwnerMap(), path, Table(root=0, alice=1002, bob=1001))
        strange = (b"strange.x", b"v")
        replica.source.put(
            Names({1001: "alice", 1003: "lost"}, {1001: "alice", 1003: "lost"}),
            *upload(1, b"large", stream(b"x" * 100_000)),
            Begin(1, replica.begin()),
            Put(0, b"small", meta(1001, 1001), b"x"),
            Patch(0, b"large", meta(1003, 1001, strange), 1),
            Commit(1, more=True),
        )
        while not isinstance(replica.source.read(), Ack):
            pass
        assert list(replica.root.iterdir()) == []
        replica.close()
        assert "lost" in path.read_text()
        replica.open()
        assert isinstance(replica.send(), Ack)
        assert whose(replica.root) == {"small": (1002, 1002), "large": (1003, 1002)}
        # What could not be kept when it was staged is known all the same.
        assert [cause.text.partition(" cannot")[0] for cause in replica.source.unkept] == ["xattr strange.*"]
    finally:
        replica.finish()


@needs_root
async def test_a_comparison_changes_nothing_that_is_right(pair: Pair) -> None:
    give(pair, Table(root=0, alice=1001, bob=1002), Table(root=0, alice=1002, bob=1001))
    for number in range(50):
        (pair.local_tree / f"{number}").write_text("1")
        os.chown(pair.local_tree / f"{number}", 1001 + number % 2, 1002)
    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)
    before = {path.name: path.stat().st_ctime_ns for path in pair.remote_tree.iterdir()}
    # A replica of another history, with the same files.
    await pair.local.stop()
    (pair.base / "local-state" / "groups" / "web" / "index.db").unlink()
    pair.local = type(pair.local)(pair.local.config)
    path = pair.base / "local-state" / "groups" / "web" / "owners.json"
    pair.local.groups["web"]._owners = Owners("local", OwnerMap(), path, Table(root=0, alice=1001, bob=1002))
    await pair.local.start(None)
    await pair.local.groups["web"].flush(60)
    assert {path.name: path.stat().st_ctime_ns for path in pair.remote_tree.iterdir()} == before


@needs_root
async def test_another_setting_holds_for_what_is_there_too(pair: Pair) -> None:
    (pair.local_tree / "f").write_text("1")
    os.chown(pair.local_tree / "f", 1001, 1001)
    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)
    assert whose(pair.remote_tree) == {"f": (1001, 1001)}
    for names in ({}, {"alice": "bob"}):
        await pair.local.stop()
        await pair.remote.stop()
        for side in ("remote", "local"):
            setattr(pair, side, type(pair.local)(getattr(pair, side).config))
        give(pair, Table(root=0, alice=1001), Table(root=0, alice=2001, bob=2002), names)
        await pair.remote.start(None)
        await pair.local.start(None)
        await pair.local.groups["web"].flush(60)
        number = 2002 if names else 2001
        assert whose(pair.remote_tree) == {"f": (number, number)}


@pytest.mark.parametrize("by_name", ["local", "remote"])
async def test_two_nodes_that_disagree_say_so(pair: Pair, by_name: str) -> None:
    (pair.local_tree / "f").write_text("1")
    give(pair, Table(), Table())
    other = pair.remote if by_name == "local" else pair.local
    other.groups["web"]._owners = None
    await pair.own("local", 1)
    sender = pair.local.groups["web"]._sender
    assert sender is not None
    await until(lambda: "must be the same on both sides" in sender.reason, f"{sender.reason!r} is told")


# --- as it is configured


def test_what_may_be_configured() -> None:
    def config(**group: Any) -> NodeConfig:
        peer = {"node": "b", "address": "10.0.0.1"}
        base = {"side": "local", "peer": peer, "paths": [{"source": "/x"}]}
        tls = {"ca": "/a", "certificate": "/b", "key": "/c"}
        listen = {"address": "10.0.0.2"}
        return parse({"node": "a", "listen": listen, "tls": tls, "groups": {"web": base | group}}, NodeConfig)

    assert config().groups["web"].owners == "number"
    users = {"alice": "bob", "EXAMPLE\\carol": "carol@example.org", "_apt": "svc.apt$"}
    found = config(owners="name", owner_map={"users": users}).groups["web"]
    assert (found.owners, found.owner_map) == ("name", OwnerMap(users, {}))
    for wrong, why in (
        ({"owners": "names"}, "allowed: 'number', 'name'"),
        ({"owner_map": {"users": {"a": "b"}}}, "needs owners: name"),
        ({"owners": "name", "owner_map": {"users": {"a": "c", "b": "c"}}}, "both 'a' and 'b' are 'c' there"),
        ({"owners": "name", "owner_map": {"groups": {"a": "#5"}}}, "'#5' is not the name"),
        ({"owners": "name", "owner_map": {"groups": {"": "a"}}}, "is not the name"),
        ({"owners": "name", "owner_map": {"users": {1000: "a"}}}, "quotes make it one"),
        ({"owners": "name", "owner_map": {"user": {}}}, "allowed: users, groups"),
    ):
        with pytest.raises(ConfigError, match=why):
            config(**wrong)


def can_unshare() -> bool:
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


def daemon(base: Path) -> subprocess.Popen[bytes]:
    """``farshore-node`` on a host with the accounts in ``base``."""
    code = "import sys; from farshore.daemons.node import main; sys.exit(main())"
    script = (
        f"mount --bind {base}/passwd /etc/passwd && mount --bind {base}/group /etc/group && "
        f"exec {sys.executable} -c '{code}' --config {base}/node.yml"
    )
    return subprocess.Popen(["unshare", "-m", "sh", "-c", script])


@needs_root
async def test_two_hosts_with_other_accounts(tmp_path: Path) -> None:
    """Two daemons, each with /etc/passwd and /etc/group of its own, as on two hosts."""
    if not can_unshare():
        pytest.skip("no mount namespaces here")
    keys = tmp_path / "pki"
    make_keys(keys, ("local", "remote"))
    ports = dict(zip(("local", "remote"), free_ports(2), strict=True))
    accounts = {"local": {"alice": 3001, "www-data": 3002}, "remote": {"bob": 4001, "www-data": 3001}}
    processes = []
    sockets: dict[str, Path] = {}
    try:
        for side, other in (("remote", "local"), ("local", "remote")):
            base = tmp_path / side
            (base / "tree").mkdir(parents=True)
            lines = [("root", 0), *accounts[side].items()]
            (base / "passwd").write_text("".join(f"{n}:x:{i}:{i}::/nonexistent:/bin/false\n" for n, i in lines))
            (base / "group").write_text("".join(f"{n}:x:{i}:\n" for n, i in lines))
            config = {
                "node": side,
                "listen": {"address": "127.0.0.1", "port": ports[side]},
                "tls": {"ca": f"{keys}/ca.crt", "certificate": f"{keys}/{side}.crt", "key": f"{keys}/{side}.key"},
                "state_dir": f"{base}/state",
                "runtime_dir": f"{base}/run",
                "groups": {
                    "web": {
                        "side": side,
                        "peer": {"node": other, "address": "127.0.0.1", "port": ports[other]},
                        "paths": [{"source": "/srv/www", "path": f"{base}/tree"}],
                        "owners": "name",
                        "owner_map": {"users": {"alice": "bob"}, "groups": {"alice": "bob"}},
                    }
                },
            }
            (base / "node.yml").write_text(yaml.safe_dump(config))
            processes.append(daemon(base))
            sockets[side] = base / "run" / client.NODE_SOCKET

        async def ask(side: str, request: api.Request) -> api.Answer:
            return await client.ask_socket(sockets[side], request, 60)

        async def own(owner: Any, epoch: int) -> None:
            for side in ("remote", "local") if owner == "local" else ("local", "remote"):
                await ask(side, api.SetOwner("web", owner, epoch, False))
            await ask(owner, api.Flush(60, "web"))

        await until(lambda: all(path.exists() for path in sockets.values()), "the daemons did not start")
        tree, there = tmp_path / "local" / "tree", tmp_path / "remote" / "tree"
        for name, uid, gid in (("alices", 3001, 3002), ("web", 3002, 3001), ("roots", 0, 0)):
            (tree / name).write_text(name)
            os.chown(tree / name, uid, gid)
        home = whose(tree)
        await own("local", 1)
        assert whose(there) == {"alices": (4001, 3001), "web": (3001, 4001), "roots": (0, 0)}
        (there / "new").write_text("written away")
        os.chown(there / "new", 4001, 4001)
        await own("remote", 2)
        assert whose(tree) == home | {"new": (3001, 3001)}
        answer = await ask("local", api.StatusRequest())
        assert isinstance(answer, api.NodeStatus)
        assert [text for text in answer.groups["web"].problems if "not known" in text] == []
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            await asyncio.to_thread(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(30)
