"""The past of a group, as its administrator asks for it: on the replica, after a promotion, by the command."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from nodes import Mirror, Pair
from trees import differences

from farshore.cli.history import parse_when
from farshore.config import BrakeConfig
from farshore.dbm.replica.history import NotRemembered
from farshore.dbm.replica.exchange import CannotRestore
from farshore.dbm.replica.restore import When
from farshore.errors import UsageError

FILES = 400


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
