"""The past of a group, as its administrator asks for it: on the replica, after a promotion, by the command."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nodes import Mirror, Pair, until
from trees import differences

from farshore.cli.history import parse_when
from farshore.config import BrakeConfig
from farshore.dbm.messages import Meta
from farshore.dbm.replica import exchange, view
from farshore.dbm.replica.exchange import CannotRestore
from farshore.dbm.replica.history import NotRemembered
from farshore.dbm.replica.restore import When
from farshore.errors import UsageError

FILES = 5000


def encrypt(tree: Path) -> None:
    """What ransomware does: new content under another name, and the original is gone."""
    for path in sorted(tree.rglob("*")):
        if path.is_file():
            path.with_name(path.name + ".locked").write_bytes(os.urandom(path.stat().st_size))
            path.unlink()


def fill(tree: Path) -> None:
    for number in range(FILES):
        directory = tree / f"d{number % 7}"
        directory.mkdir(exist_ok=True)
        path = directory / f"f{number}"
        path.write_text(f"precious {number}\n" * (number % 50 + 1))
        os.utime(path, ns=(10**18 + number, 10**18 + number))
    os.link(tree / "d0" / "f0", tree / "d1" / "another name")
    (tree / "link").symlink_to("d0/f0")


async def test_a_ransomware_run_is_held_before_much_is_lost(pair: Pair, tmp_path: Path) -> None:
    for node in (pair.local, pair.remote):
        config: Any = node.groups["web"].config
        object.__setattr__(config, "brake", BrakeConfig())
    fill(pair.local_tree)
    await pair.own("local", 1)
    local, remote = pair.local.groups["web"], pair.remote.groups["web"]
    await local.flush(60)
    seq = (await local.status()).seq
    before = tmp_path / "good"
    await asyncio.to_thread(subprocess.run, ["cp", "-a", str(pair.local_tree), str(before)], check=True)
    encryption = asyncio.create_task(asyncio.to_thread(encrypt, pair.local_tree))
    await until(lambda: remote._applier is not None and remote._applier.held is not None, "held")
    await encryption
    await local.flush(60, durable=True)
    status = await remote.status()
    assert status.state == "held"
    assert "encrypted" in status.held or "rewritten or removed" in status.held
    originals = [path.relative_to(before) for path in before.rglob("*") if path.is_file() and not path.is_symlink()]
    unharmed = [
        path
        for path in originals
        if (pair.remote_tree / path).exists() and (pair.remote_tree / path).read_bytes() == (before / path).read_bytes()
    ]
    assert len(originals) == FILES + 1
    assert len(unharmed) > FILES * 0.9
    # What had passed until then comes back from the history; what is held is set aside with the promotion.
    await remote.set_owner("remote", 2, False)
    await remote.restore("", When(seq=seq), "")
    assert differences(before, pair.remote_tree) == []


async def test_a_ransomware_run_is_undone_bit_by_bit(pair: Pair, tmp_path: Path) -> None:
    for node in (pair.local, pair.remote):
        config: Any = node.groups["web"].config
        object.__setattr__(config, "brake", BrakeConfig("off"))
    fill(pair.local_tree)
    await pair.own("local", 1)
    local, remote = pair.local.groups["web"], pair.remote.groups["web"]
    await local.flush(60)
    before = tmp_path / "good"
    await asyncio.to_thread(subprocess.run, ["cp", "-a", str(pair.local_tree), str(before)], check=True)
    seq = (await local.status()).seq
    encrypt(pair.local_tree)
    await local.flush(60)
    assert not differences(pair.local_tree, pair.remote_tree)
    target = tmp_path / "restored"
    told = await remote.restore("", When(seq=seq), str(target))
    assert f"after transaction {seq}" in told
    assert differences(before, target / "remote-tree") == []
    # One file, and what its history says.
    answer = await remote.history(str(pair.remote_tree / "d0" / "f0"), 10)
    assert answer.versions[0].was == "file"
    await remote.restore(str(pair.remote_tree / "d0" / "f0"), When(seq=seq), str(tmp_path / "one"))
    assert (tmp_path / "one" / "f0").read_bytes() == (before / "d0" / "f0").read_bytes()
    with pytest.raises(CannotRestore, match="is there already"):
        await remote.restore("", When(seq=seq), str(target))
    with pytest.raises(CannotRestore, match="owns it"):
        await remote.restore("", When(seq=seq), "")
    with pytest.raises(CannotRestore, match="choose a directory apart"):
        await remote.restore("", When(seq=seq), str(pair.remote_tree / "x"))
    with pytest.raises(UsageError, match="does not lie in"):
        await remote.restore("/etc/passwd", When(seq=seq), str(tmp_path / "two"))
    with pytest.raises(NotRemembered, match="no transaction"):
        await remote.restore("", When(seq=10**6), str(tmp_path / "three"))
    # Promoted, it goes back in place, and what was there is kept.
    await remote.set_owner("remote", 2, False)
    told = await remote.restore("", When(seq=seq), "")
    assert "what was there is in" in told
    assert differences(before, pair.remote_tree) == []
    kept = Path(told.rpartition("what was there is in ")[2])
    assert len(list(kept.rglob("*.locked"))) == FILES + 1


async def test_what_others_changed_after_a_promotion_is_left_out(pair: Pair, tmp_path: Path) -> None:
    (pair.local_tree / "same").write_text("same")
    (pair.local_tree / "changed").write_text("old")
    await pair.own("local", 1)
    await pair.local.groups["web"].flush(60)
    (pair.local_tree / "late").write_text("late")
    await pair.local.groups["web"].flush(60)
    remote = pair.remote.groups["web"]
    await remote.set_owner("remote", 2, False)
    await asyncio.sleep(0.05)
    (pair.remote_tree / "changed").write_text("new")
    told = await remote.restore("", When(seq=1), str(tmp_path / "out"))
    assert "1 are not known any more and left out: changed" in told
    assert sorted(os.listdir(tmp_path / "out" / "remote-tree")) == ["same"]


def test_the_command(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / "f").write_text("one")
    mirror = Mirror(tmp_path, source, "--history")
    mirror.start()
    try:
        mirror.flush()
        (source / "f").write_text("two")
        mirror.flush()
        told = subprocess.run(
            mirror.command("history", "--state", str(mirror.state / "replica"), "mirror"),
            capture_output=True,
            text=True,
        )
        assert "every transaction" in told.stdout, told.stderr
        place = ["--state", str(mirror.state / "replica")]
        one = subprocess.run(
            mirror.command("history", *place, "mirror", str(mirror.destination / "f")),
            capture_output=True,
            text=True,
            check=True,
        )
        seq = one.stdout.split()[0]
        assert "a file of 3 B" in one.stdout.splitlines()[0]
        subprocess.run(
            mirror.command(
                "restore", *place, "mirror", str(mirror.destination / "f"), "--at", seq, "--to", str(tmp_path / "out")
            ),
            check=True,
        )
        assert (tmp_path / "out" / "f").read_text() == "one"
    finally:
        assert mirror.stop() == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("17", (17, None)),
        ("90m", (None, (1_000_000 - 5400) * 10**9)),
        ("2 h", (None, (1_000_000 - 7200) * 10**9)),
        ("3d", (None, (1_000_000 - 3 * 86400) * 10**9)),
    ],
)
def test_points_in_time(text: str, expected: tuple[int | None, int | None]) -> None:
    assert parse_when(text, 1_000_000) == expected


def test_local_times() -> None:
    seq, when = parse_when("2026-11-25 14:30", 0)
    assert seq is None
    assert when == int(time.mktime((2026, 11, 25, 14, 30, 0, 0, 0, -1))) * 10**9


@pytest.mark.parametrize("text", ["", "yesterday", "5w", "-3", "12:00", "h"])
def test_what_is_no_point_in_time_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="allowed: a transaction's number"):
        parse_when(text, 0)


# --- the exchange, cut off anywhere


class Killed(BaseException):
    """What no handler takes for an error."""


def dies_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException, after: bool) -> None:
    """Let rename number ``number`` of those that follow raise ``error``, before it is done or after."""
    rename = os.rename
    left = [number]

    def counted(old: Any, new: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] == -1 and not after:
            raise error
        rename(old, new, **options)
        if left[0] == -1 and after:
            raise error

    monkeypatch.setattr(os, "rename", counted)


class Bench:
    """Two roots, a tree and a file, with copies that are ready to take their place."""

    def __init__(self, base: Path, where: str) -> None:
        self.tree, self.file = base / "tree", base / "file"
        for directory in (self.tree, base / "new", self.tree / "both", base / "new" / "both"):
            directory.mkdir(parents=True)
        for name in ("gone", "same", ".farshore-own", "both/x"):
            (self.tree / name).write_text(f"old {name}")
        for name in ("came", "same", "both/y"):
            (base / "new" / name).write_text(f"new {name}")
        os.link(base / "new" / "came", base / "new" / "came too")
        self.file.write_text("old file")
        self.places = [(os.fsencode(self.tree), base / "0"), (os.fsencode(self.file), base / "1")]
        stages = {
            "state": (base / "0" / "stage", base / "1" / "stage"),
            "beside": (base / ".farshore-stage-tree", base / ".farshore-stage-file"),
            "within": (self.tree / ".farshore-stage", base / ".farshore-stage-file"),
        }[where]
        self.name = exchange.name_at("20261125-140000")
        self.works = []
        for (root, _), stage in zip(self.places, stages, strict=True):
            stage.mkdir(0o700, parents=True)
            self.works.append(exchange.begin(root, os.fsencode(stage), self.name))
        os.rename(base / "new", os.fsdecode(self.works[0].new))
        Path(os.fsdecode(self.works[1].new)).write_text("new file")
        os.utime(self.tree, ns=(10**18, 10**18))
        self.meta = Meta(0o750, os.getuid(), os.getgid(), 10**17, 10**17, [])
        for work, meta in zip(self.works, (self.meta, None), strict=True):
            exchange.make_ready(work, work.root, meta)

    def carry_out(self, or_nothing: bool) -> None:
        exchange.carry_out(self.places, self.name, (0, 1), or_nothing)

    def check_new(self) -> None:
        assert contents(self.tree) == {
            ".farshore-own": "old .farshore-own",
            "both/y": "new both/y",
            "came": "new came",
            "came too": "new came",
            "same": "new same",
        }
        assert self.file.read_text() == "new file"
        status = self.tree.stat()
        assert (status.st_mtime_ns, status.st_mode & 0o777) == (10**17, 0o750)
        before = Path(os.fsdecode(self.works[0].before))
        assert contents(before) == {"both/x": "old both/x", "gone": "old gone", "same": "old same"}
        assert Path(os.fsdecode(self.works[1].before)).read_text() == "old file"

    def check_old(self) -> None:
        assert contents(self.tree) == {
            ".farshore-own": "old .farshore-own",
            "both/x": "old both/x",
            "gone": "old gone",
            "same": "old same",
        }
        assert self.file.read_text() == "old file"
        assert self.tree.stat().st_mtime_ns == 10**18

    def left(self) -> list[list[str]]:
        """What lies in the work directories."""
        places = [os.fsdecode(work.directory) for work in self.works]
        return [sorted(os.listdir(place)) if os.path.exists(place) else [] for place in places]


def contents(tree: Path) -> dict[str, str]:
    found = {str(path.relative_to(tree)): path for path in tree.rglob("*") if path.is_file()}
    return {name: path.read_text() for name, path in found.items() if not name.startswith(".farshore-stage")}


RENAMES = 9


@pytest.mark.parametrize("where", ["state", "beside", "within"])
@pytest.mark.parametrize("after", [False, True])
def test_an_exchange_that_is_killed_anywhere_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, after: bool
) -> None:
    chance = random.Random(7)
    for number in range(RENAMES):
        bench = Bench(tmp_path / str(number), where)
        with monkeypatch.context() as patched:
            dies_at(patched, number, Killed(), after)
            with pytest.raises(Killed):
                bench.carry_out(True)
        if chance.random() < 0.5:
            # And once more while it is gone on with.
            with monkeypatch.context() as patched, contextlib.suppress(Killed):
                dies_at(patched, chance.randrange(RENAMES - number), Killed(), after)
                bench.carry_out(False)
        bench.carry_out(False)
        bench.check_new()
        # Nothing changes when it is done again, and what is kept stays when all else goes.
        bench.carry_out(False)
        bench.check_new()
        exchange.clear(bench.places, bench.name)
        assert "ready" in bench.left()[0]
        exchange.clear(bench.places)
        assert bench.left() == [["before"], ["before"]]
        bench.check_new()
        with pytest.raises(CannotRestore, match="is not found"):
            bench.carry_out(False)
    bench = Bench(tmp_path / "whole", where)
    dies_at(monkeypatch, RENAMES, Killed(), after)
    bench.carry_out(True)


def test_an_exchange_that_fails_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.EIO, "Input/output error")
    sync = exchange._sync
    for number in range(RENAMES + 2):
        bench = Bench(tmp_path / str(number), "state")
        with monkeypatch.context() as patched:
            if number < RENAMES:
                dies_at(patched, number, error, False)
            else:
                # Of the tree, or of the file, with all renames done.
                root = (bench.tree, bench.tree.parent)[number - RENAMES]

                def fail(*directories: bytes, root: Path = root) -> None:
                    if directories[0] == os.fsencode(root):
                        raise error
                    sync(*directories)

                patched.setattr(exchange, "_sync", fail)
            with pytest.raises(CannotRestore, match="Input/output error"):
                bench.carry_out(True)
        bench.check_old()
        exchange.clear(bench.places)
        assert bench.left() == [[], []]
        bench.check_old()


def test_what_came_while_an_exchange_was_cut_off_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, "state")
    with monkeypatch.context() as patched:
        # "both" is moved aside, and its successor not yet in place.
        dies_at(patched, 0, Killed(), True)
        with pytest.raises(Killed):
            bench.carry_out(True)
    (bench.tree / "both").write_text("somebody's")
    bench.carry_out(False)
    assert (bench.tree / "both" / "y").read_text() == "new both/y"
    before = Path(os.fsdecode(bench.works[0].before))
    assert (before / "both" / "x").read_text() == "old both/x"
    assert (before / "both.1").read_text() == "somebody's"


def test_a_mount_point_is_found_before_anything_is_exchanged() -> None:
    with pytest.raises(CannotRestore, match="is a mount point"):
        exchange.check_mounts(b"/", within=True)
    with pytest.raises(CannotRestore, match="is a mount point"):
        exchange.check_mounts(b"/proc", within=False)
    exchange.check_mounts(b"/proc/self", within=True)


# --- a promotion that goes back


async def two_states(pair: Pair) -> tuple[int, Path]:
    """A replica whose last state is a damaged one; returns the transaction of the good one, and a copy of it."""
    (pair.local_tree / "d").mkdir()
    for number in range(20):
        (pair.local_tree / "d" / f"f{number}").write_text(f"precious {number}")
    (pair.local_tree / "top").write_text("precious")
    await pair.own("local", 1)
    local = pair.local.groups["web"]
    await local.flush(60)
    await until(lambda: pair.remote.groups["web"]._record.synced_once, "in step")
    good = pair.base / "good"
    await asyncio.to_thread(subprocess.run, ["cp", "-a", str(pair.local_tree), str(good)], check=True)
    seq = (await local.status()).seq
    encrypt(pair.local_tree)
    await local.flush(60)
    return seq, good


def works(pair: Pair) -> list[Path]:
    return sorted((pair.base / "remote-state").rglob("restore-*"))


async def test_a_promotion_goes_back(pair: Pair) -> None:
    seq, good = await two_states(pair)
    local, remote = pair.local.groups["web"], pair.remote.groups["web"]
    told = await remote.restore_on_promotion(When(seq=seq))
    assert f"takes the state after transaction {seq} of 20" in told
    # It is on record.
    await pair.restart("remote")
    remote = pair.remote.groups["web"]
    status = await remote.status()
    assert status.back_to == seq
    assert 0 < time.time() - status.back_to_time < 60
    assert not (pair.remote_tree / "top").exists()
    await pair.own("remote", 2)
    assert differences(good, pair.remote_tree) == []
    status = await remote.status()
    assert status.back_to is None
    assert f"after transaction {seq}" in status.restored
    kept = Path(status.restored.rpartition("what was there is in ")[2])
    assert len(list(kept.rglob("*.locked"))) == 21
    await until(lambda: remote._in_step(), "in step")
    assert sorted(os.listdir(kept.parent)) == ["before"]
    # The other side gets this state, and the next promotion nothing but its last one.
    await remote.flush(60)
    assert differences(good, pair.local_tree) == []
    await pair.own("local", 3)
    await local.flush(60)
    assert (await remote.status()).restored == ""


async def test_it_can_be_taken_back(pair: Pair) -> None:
    seq, _ = await two_states(pair)
    local, remote = pair.local.groups["web"], pair.remote.groups["web"]
    with pytest.raises(CannotRestore, match="owns it already; restore it --in-place"):
        await local.restore_on_promotion(When(seq=seq))
    with pytest.raises(NotRemembered, match="no transaction"):
        await remote.restore_on_promotion(When(seq=10**6))
    with pytest.raises(NotRemembered):
        await remote.restore_on_promotion(When(time_ns=1))
    assert (await remote.status()).back_to is None
    await remote.restore_on_promotion(When(seq=seq))
    assert "takes its last state" in await remote.cancel_on_promotion()
    assert "nothing is to be restored" in await remote.cancel_on_promotion()
    await remote.set_owner("remote", 2, False)
    assert (pair.remote_tree / "top.locked").exists()
    assert works(pair) == []


async def test_a_state_that_is_forgotten_since_then_is_no_promotion(pair: Pair) -> None:
    seq, _ = await two_states(pair)
    remote = pair.remote.groups["web"]
    await remote.restore_on_promotion(When(seq=seq))
    assert remote._applier is not None
    await remote._in_worker(remote._applier.make_room)
    with pytest.raises(CannotRestore, match=f"state after transaction {seq}, and that fails: the history: is empty"):
        await remote.set_owner("remote", 2, False)
    assert not remote.owns
    assert (await remote.status()).back_to == seq
    await remote.cancel_on_promotion()
    await remote.set_owner("remote", 2, False)
    assert (pair.remote_tree / "top.locked").exists()


@pytest.mark.parametrize("step", ["copy", "exchange"])
async def test_a_promotion_whose_restore_fails_leaves_a_replica(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    seq, good = await two_states(pair)
    local, remote = pair.local.groups["web"], pair.remote.groups["web"]
    await remote.restore_on_promotion(When(seq=seq))
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*arguments: object) -> None:
        raise full

    with monkeypatch.context() as patched:
        if step == "copy":
            patched.setattr(view, "_copy_content", fail)
        else:
            patched.setattr(exchange, "give", fail)
        # As the monitor does, which asks again.
        for _ in range(2):
            with pytest.raises(CannotRestore, match=r"not promoted.*No space left.*--cancel"):
                await remote.set_owner("remote", 2, False)
            assert (remote.owns, remote.epoch) == (False, 1)
            assert differences(pair.local_tree, pair.remote_tree) == []
            status = await remote.status()
            assert (status.state, status.back_to, status.restored) == ("replica", seq, "")
            await remote._in_worker(lambda: None)
            assert works(pair) == []
        # It goes on as a replica.
        (pair.local_tree / "later").write_text("later")
        await local.flush(60)
        assert (pair.remote_tree / "later").read_text() == "later"
    await remote.set_owner("remote", 2, False)
    assert differences(good, pair.remote_tree) == []


@pytest.mark.parametrize("number", [0, 1, 2, 3])
@pytest.mark.parametrize("again", ["start", "order"])
async def test_a_promotion_that_is_cut_off_is_finished(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, number: int, again: str
) -> None:
    seq, good = await two_states(pair)
    remote = pair.remote.groups["web"]
    await remote.restore_on_promotion(When(seq=seq))
    with monkeypatch.context() as patched:
        # Nothing is taken back by somebody who is dead.
        carry_out = exchange.carry_out
        patched.setattr(exchange, "carry_out", lambda *arguments: carry_out(*arguments[:-1], False))
        exchanging(patched, number)
        with pytest.raises(CannotRestore, match="half done"):
            await remote.set_owner("remote", 2, False)
    status = await remote.status()
    assert status.state in ("error", "unconfirmed")
    assert any("half done" in problem for problem in status.problems)
    assert remote._sender is None
    if again == "start":
        await pair.restart("remote")
        remote = pair.remote.groups["web"]
    else:
        await remote.set_owner("remote", 2, False)
    assert remote._sender is not None
    assert differences(good, pair.remote_tree) == []
    status = await remote.status()
    kept = Path(status.restored.rpartition("what was there is in ")[2])
    assert len(list(kept.rglob("*.locked"))) == 21
    assert not any("half done" in problem for problem in status.problems)


def exchanging(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let rename number ``number`` of an exchange fail, and all that follow."""
    rename = os.rename
    left = [number]

    def counted(old: Any, new: Any, **options: Any) -> None:
        if isinstance(old, bytes) and (b"/new/" in old or b"/before/" in new):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EIO, "Input/output error")
        rename(old, new, **options)

    monkeypatch.setattr(os, "rename", counted)


async def test_a_promotion_that_is_over_before_it_is_done_is_given_up(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    seq, _ = await two_states(pair)
    remote = pair.remote.groups["web"]
    await remote.restore_on_promotion(When(seq=seq))
    copying = threading.Event()
    copy = view._copy_content

    def slow(source: bytes, target: bytes) -> None:
        copying.set()
        assert remote._ending.wait(30)
        copy(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(view, "_copy_content", slow)
        promotion = asyncio.create_task(remote.set_owner("remote", 2, False))
        await asyncio.to_thread(copying.wait, 30)
        assert "becomes the owner with the state" in (await remote.status()).reason
        # The monitor has lost its patience, and the local server has the group again.
        await remote.set_owner("local", 3, False)
        with pytest.raises(CannotRestore, match="the owner changes"):
            await promotion
    assert (remote.owns, remote.epoch) == (False, 3)
    assert (await remote.status()).back_to == seq
    assert works(pair) == []


async def test_what_is_held_stays_held_when_a_promotion_fails(pair: Pair) -> None:
    for node in (pair.local, pair.remote):
        config: Any = node.groups["web"].config
        object.__setattr__(config, "brake", BrakeConfig())
    for number in range(200):
        (pair.local_tree / f"f{number}").write_text(f"precious {number}\n" * 20)
    await pair.own("local", 1)
    local, remote = pair.local.groups["web"], pair.remote.groups["web"]
    await local.flush(60)
    await until(lambda: remote._record.synced_once, "in step")
    await remote.restore_on_promotion(When())
    remote._store(replace(remote._record, back_to=10**6))
    encrypt(pair.local_tree)
    await local.flush(60, durable=True)
    await until(lambda: remote._applier is not None and remote._applier.held is not None, "held")
    with pytest.raises(CannotRestore, match="not promoted"):
        await remote.set_owner("remote", 2, False)
    assert (await remote.status()).state == "held"
    await remote.approve()
    await local.flush(60)
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_copies_that_were_cut_off_are_removed(pair: Pair) -> None:
    seq, _ = await two_states(pair)
    remote = pair.remote.groups["web"]
    await remote.set_owner("remote", 2, False)
    stage = pair.base / "remote-state" / "groups" / "web" / "0" / "stage"
    (stage / "restore-1" / "new" / "d").mkdir(parents=True)
    (stage / "restore-2" / "before").mkdir(parents=True)
    (stage / "restore-2" / "before" / "kept").touch()
    (stage / "restore-3" / "new").mkdir(parents=True)
    (stage / "restore-3" / "ready").touch()
    await remote.restore("", When(seq=seq), "")
    assert [path.name for path in works(pair) if path.name[8:] in "123"] == ["restore-2"]
    assert (stage / "restore-2" / "before" / "kept").exists()
