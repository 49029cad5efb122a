"""Verification between two nodes: what is found, what is repaired, what it costs, and what it must not do."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import blake3
import msgspec
import pytest
from filesystems import mounted
from nodes import GENEROUS, Pair, until
from trees import Mutator, differences

from farshore.control import api, server
from farshore.control.api import VerificationReport, VerificationStatus
from farshore.dbm import wire
from farshore.dbm.index import Index
from farshore.dbm.planner import Planner
from farshore.dbm.replica.tree import Tree
from farshore.dbm.sender import Sender
from farshore.dbm.verify.reading import ContentReader
from farshore.dbm.verify.verifier import Verifier
from farshore.errors import FarshoreError
from farshore.fmm.feed import Feed


async def settled(pair: Pair) -> None:
    await pair.local.groups["web"].flush(GENEROUS)


async def verify(
    pair: Pair, *, contents: bool = True, repair: bool = True, from_source: bool = False
) -> VerificationReport:
    """One verification, from the request to the report."""
    group = pair.local.groups["web"]
    run = group.verify(contents, repair, from_source, 0.0)
    return await ended(pair, run)


async def ended(pair: Pair, run: str) -> VerificationReport:
    return await ended_on(pair, "local", run)


async def ended_on(pair: Pair, side: str, run: str) -> VerificationReport:
    """The report of a run, when it has ended."""

    def report() -> VerificationReport | None:
        sender = getattr(pair, side).groups["web"]._sender
        return None if sender is None or sender.verifier is None else sender.verifier.status().last

    def is_there() -> bool:
        last = report()
        return last is not None and last.run == run

    await until(is_there, "the verification did not end")
    last = report()
    assert last is not None
    return last


def flip(path: Path, at: int = 0) -> None:
    """Change a byte, and leave no trace of it in the times that can be set."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


async def filled(pair: Pair) -> None:
    for directory in ("a", "b", "b/c"):
        (pair.local_tree / directory).mkdir()
        for number in range(5):
            (pair.local_tree / directory / f"f{number}").write_bytes(os.urandom(1000 + number))
    (pair.local_tree / "big").write_bytes(os.urandom(3_000_000))
    (pair.local_tree / "link").symlink_to("a/f0")
    await pair.own("local", 1)
    await settled(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_equal_trees_are_clean(pair: Pair) -> None:
    await filled(pair)
    report = await verify(pair)
    assert (report.result, report.reason, report.findings, report.drifts) == ("clean", "", {}, [])
    assert report.read_source == report.read_replica > 3_000_000
    assert report.paths == 20


async def test_a_flipped_byte_on_the_replica_is_found_and_repaired(pair: Pair) -> None:
    await filled(pair)
    flip(pair.remote_tree / "b/c/f3", 500)
    flip(pair.remote_tree / "big", 1_234_567)
    report = await verify(pair)
    assert report.result == "repaired", report
    assert {(Path(each.path).name, each.finding, *each.differences, each.repaired) for each in report.drifts} == {
        ("f3", "replica", "content", True),
        ("big", "replica", "content", True),
    }
    assert differences(pair.local_tree, pair.remote_tree) == []


# --- drift on the replica


async def test_whatever_differs_on_the_replica_is_found_and_repaired(pair: Pair) -> None:
    await filled(pair)
    there = pair.remote_tree
    (there / "a/f0").unlink()
    (there / "a/f1").chmod(0o600)
    os.setxattr(there / "a/f2", b"user.note", b"x")
    os.utime(there / "a/f3", ns=(1, 12345))
    (there / "a/f4").unlink()
    (there / "a/f4").mkdir()
    (there / "a/f4/deep").write_text("x")
    (there / "new").write_text("only there")
    (there / "newdir/x").mkdir(parents=True)
    (there / "newdir/x/y").write_text("only there")
    shutil.rmtree(there / "b/c")
    (there / "link").unlink()
    (there / "link").symlink_to("elsewhere")
    with (there / "big").open("ab") as file:
        file.write(b"more")
    there.chmod(0o700)
    report = await verify(pair)
    assert report.result == "repaired", report
    assert differences(pair.local_tree, there) == []
    found = {Path(each.path).name: each for each in report.drifts}
    assert {each.finding for each in report.drifts} == {"replica"}
    assert found["f0"].differences == ["missing"]
    assert found["f1"].differences == ["mode"]
    assert found["f2"].differences == ["attributes"]
    assert found["f3"].differences == ["time"]
    assert found["f4"].differences == ["kind"]
    assert found["new"].differences == found["newdir"].differences == ["extra"]
    assert found["c"].differences == ["missing"]
    assert found["link"].differences == ["time", "target"]
    assert found["big"].differences == ["time", "content"]
    assert "mode" in found["local-tree"].differences
    # What lies in what is missing is not told of on its own.
    assert "deep" not in found
    assert (await verify(pair)).result == "clean"


async def test_names_of_one_file_stay_so(pair: Pair) -> None:
    (pair.local_tree / "one").write_bytes(os.urandom(100_000))
    os.link(pair.local_tree / "one", pair.local_tree / "two")
    await pair.own("local", 1)
    await settled(pair)
    flip(pair.remote_tree / "one", 5)
    report = await verify(pair)
    assert (report.result, report.findings) == ("repaired", {"replica": 2})
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_a_path_that_is_a_single_file_is_verified(pair: Pair) -> None:
    pair.local_tree.rmdir()
    pair.local_tree.write_bytes(os.urandom(200_000))
    await pair.own("local", 1)
    await settled(pair)
    assert (await verify(pair)).result == "clean"
    flip(pair.remote_tree, 100_000)
    pair.remote_tree.chmod(0o600)
    report = await verify(pair)
    assert (report.result, report.drifts[0].differences) == ("repaired", ["mode", "content"])
    assert report.drifts[0].path == str(pair.local_tree)
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_metadata_alone_are_compared_without_reading(pair: Pair) -> None:
    await filled(pair)
    flip(pair.remote_tree / "a/f0")
    report = await verify(pair, contents=False)
    assert (report.result, report.read_source, report.read_replica) == ("clean", 0, 0)
    (pair.remote_tree / "a/f1").chmod(0o600)
    report = await verify(pair, contents=False)
    assert (report.result, report.findings) == ("repaired", {"replica": 1})
    # What differs is read all the same, on the replica once more when it was repaired.
    size = (pair.local_tree / "a/f1").stat().st_size
    assert (report.read_source, report.read_replica) == (size, 2 * size)


async def test_what_is_not_to_be_repaired_is_told_and_stays(pair: Pair) -> None:
    await filled(pair)
    flip(pair.remote_tree / "a/f0")
    damaged = (pair.remote_tree / "a/f0").read_bytes()
    report = await verify(pair, repair=False)
    assert (report.result, report.unrepaired, report.drifts[0].repaired) == ("drift", 1, False)
    assert (pair.remote_tree / "a/f0").read_bytes() == damaged
    assert (await verify(pair)).result == "repaired"
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_what_is_excluded_is_nobodys_business(pair: Pair) -> None:
    await filled(pair)
    (pair.local_tree / "a/x.tmp").write_text("here")
    (pair.remote_tree / "b/y.tmp").write_text("there")
    before = (pair.remote_tree / "b").stat()
    os.utime(pair.remote_tree / "b", ns=(before.st_atime_ns, (pair.local_tree / "b").stat().st_mtime_ns))
    await settled(pair)
    report = await verify(pair)
    assert report.result in ("clean", "repaired")
    assert (pair.remote_tree / "b/y.tmp").read_text() == "there"
    assert not any(each.path.endswith(".tmp") for each in report.drifts)


async def test_what_cannot_be_kept_there_is_told_as_not_repaired(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(pair)
    (pair.remote_tree / "a/f0").chmod(0o600)
    # As on a filesystem without modes.
    monkeypatch.setattr(Tree, "prepare", lambda *arguments: None)
    monkeypatch.setattr(Tree, "_apply_meta", lambda *arguments: None)
    report = await verify(pair)
    assert report.result == "drift"
    named = {Path(each.path).name: each for each in report.drifts}
    assert (named["f0"].differences, named["f0"].repaired) == (["mode"], False)


async def test_what_the_replicas_disk_cannot_read_is_sent_anew(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(pair)
    remote = pair.remote.groups["web"]
    assert remote._applier is not None
    # Pins that go would change the times.
    await remote._in_worker(remote._applier.checkpoint)
    # With their times, as the inodes' numbers may be given to what is sent anew.
    bad = {((status := (pair.remote_tree / name).stat()).st_ino, status.st_ctime_ns) for name in ("a/f2", "big")}
    read = ContentReader._read

    def broken(self: ContentReader, file: Any, status: os.stat_result) -> tuple[int, bytes]:
        if (status.st_ino, status.st_ctime_ns) in bad:
            raise OSError(5, "Input/output error")
        return read(self, file, status)

    monkeypatch.setattr(ContentReader, "_read", broken)
    report = await verify(pair)
    assert report.result == "repaired", report
    assert {Path(each.path).name: each.differences for each in report.drifts} == {
        "f2": ["unreadable"],
        "big": ["unreadable"],
    }
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_what_is_too_long_to_be_replicated_is_no_matter(pair: Pair) -> None:
    await filled(pair)
    for tree in (pair.local_tree, pair.remote_tree):
        here = os.open(tree, os.O_RDONLY)
        for _ in range(25):
            os.mkdir(b"d" * 200, dir_fd=here)
            below = os.open(b"d" * 200, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(os.open(b"f", os.O_CREAT, dir_fd=here))
        os.close(here)
        if tree == pair.local_tree:
            await settled(pair)
            shutil.rmtree(pair.remote_tree / ("d" * 200))
    report = await verify(pair)
    assert report.result == "repaired", report
    assert (await verify(pair)).result == "clean"
    (pair.remote_tree / "a/f0").unlink()
    assert (await verify(pair)).result == "repaired"


# --- what it costs


async def test_the_cost_on_the_wire_follows_the_differences(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for directory in range(20):
        (pair.local_tree / f"d{directory}").mkdir()
        for number in range(25):
            (pair.local_tree / f"d{directory}" / f"a-file-with-a-name-{number}").write_bytes(b"%d" % number)
    (pair.local_tree / "wide").mkdir()
    for number in range(1500):
        (pair.local_tree / "wide" / f"another-file-with-a-name-{number}").write_bytes(b"%d" % number)
    await pair.own("local", 1)
    await settled(pair)
    told: list[object] = []
    asked: list[bytes] = []
    answered, send = Verifier.answered, Sender.send

    def count_answers(self: Verifier, message: Any) -> None:
        told.append(message)
        answered(self, message)

    async def count_questions(self: Sender, frames: list[bytes]) -> None:
        asked.extend(frames)
        await send(self, frames)

    monkeypatch.setattr(Verifier, "answered", count_answers)
    monkeypatch.setattr(Sender, "send", count_questions)

    async def cost() -> tuple[int, int]:
        told.clear()
        asked.clear()
        await verify(pair)
        return len(told) + len(asked), sum(map(len, asked)) + sum(len(wire.frame(message)) for message in told)

    frames, size = await cost()
    # The survey, one Look at the root, and the answers.
    assert frames <= 8 and size < 1000, (frames, size)
    flip(pair.remote_tree / "d7/a-file-with-a-name-3")
    frames, size = await cost()
    assert frames < 40 and size < 6000, (frames, size)
    flip(pair.remote_tree / "wide/another-file-with-a-name-1234")
    frames, size = await cost()
    # 256 buckets' digests; a list of all names would be well above 100 kB.
    assert frames < 40 and size < 16_000, (frames, size)
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_reading_keeps_to_its_rate(pair: Pair) -> None:
    await filled(pair)
    group = pair.local.groups["web"]
    started = time.monotonic()
    report = await ended(pair, group.verify(True, True, False, 2e6))
    assert report.result == "clean"
    assert time.monotonic() - started > 3e6 / 2e6 * 0.8


# --- changes under way


async def test_changes_under_way_are_no_drift(pair: Pair) -> None:
    mutator = Mutator(pair.local_tree, 11)
    for _ in range(100):
        mutator.step()
    await pair.own("local", 1)
    await settled(pair)
    stop = threading.Event()

    def change() -> None:
        while not stop.wait(0.005):
            mutator.step()

    changing = asyncio.create_task(asyncio.to_thread(change))
    try:
        reports = [await verify(pair) for _ in range(3)]
    finally:
        stop.set()
        await changing
    for report in reports:
        assert set(report.findings) <= {"unseen"}, report
        assert report.result in ("clean", "repaired"), report
    await settled(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []
    assert (await verify(pair)).result == "clean"


async def test_drift_is_found_while_other_files_change(pair: Pair) -> None:
    await filled(pair)
    flip(pair.remote_tree / "b/c/f1")
    stop = threading.Event()

    def change() -> None:
        number = 0
        while not stop.wait(0.003):
            number += 1
            (pair.local_tree / f"a/new{number % 50}").write_bytes(os.urandom(2000))

    changing = asyncio.create_task(asyncio.to_thread(change))
    try:
        report = await verify(pair)
    finally:
        stop.set()
        await changing
    assert [(Path(each.path).name, each.finding) for each in report.drifts if each.finding != "unseen"] == [
        ("f1", "replica")
    ]
    await settled(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_a_change_without_an_event_is_found_and_sent(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(pair)
    with monkeypatch.context() as deaf:
        deaf.setattr(Feed, "_mark", lambda self, hints: None)
        await settled(pair)  # The call that the feed's thread is in would still be heard.
        (pair.local_tree / "a/f0").write_bytes(b"changed")
        (pair.local_tree / "a/f1").unlink()
        (pair.local_tree / "a/born").write_bytes(b"new")
        await settled(pair)
    assert differences(pair.local_tree, pair.remote_tree) != []
    report = await verify(pair)
    assert report.result == "repaired", report
    assert set(report.findings) == {"unseen"}
    assert {Path(each.path).name for each in report.drifts} >= {"f0", "f1", "born"}
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_a_pause_is_respected(pair: Pair) -> None:
    await filled(pair)
    group = pair.local.groups["web"]
    await group.pause()
    (pair.local_tree / "a/f0").write_bytes(b"meanwhile")
    flip(pair.remote_tree / "a/f1")
    there = {name: (pair.remote_tree / name).read_bytes() for name in ("a/f0", "a/f1")}
    run_name = group.verify(True, True, False, 0.0)
    await asyncio.sleep(1.5)
    status = (await pair.local.status()).groups["web"].verification
    assert status is not None and (status.run, status.phase) == (run_name, "waiting")
    assert {name: (pair.remote_tree / name).read_bytes() for name in there} == there
    await group.resume()
    assert (await ended(pair, run_name)).result == "repaired"
    await settled(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []


# --- damage on the source


async def rotten(pair: Pair, size: int) -> tuple[Path, bytes, bytes]:
    """A file whose content on the source is not what was acknowledged, though its times and size are.

    A change of the disk itself can't be had here: instead, the index and the replica are given another content, as if
    that had been the file's when it was sent. Returns where the file is on the replica, that content, and the other.
    """
    content = os.urandom(size)
    (pair.local_tree / "f").write_bytes(content)
    await asyncio.sleep(0.1)  # The index must not take the file for one that is still being written.
    await pair.own("local", 1)
    await settled(pair)
    good = os.urandom(size)
    copy = pair.remote_tree / "f"
    before = copy.stat()
    copy.write_bytes(good)
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    sender = pair.local.groups["web"]._sender
    assert sender is not None

    def change(index: Index, planner: Planner) -> None:
        known = index.get(0, b"f")
        assert known is not None and known.ctime_ns
        index.put(msgspec.structs.replace(known, digest=blake3.blake3(good).digest()))
        index.set_signature(0, b"f", None)

    await sender.with_index(change)
    return copy, good, content


@pytest.mark.parametrize("size", [1000, 500_000])
async def test_damage_on_the_source_is_told_and_not_sent(pair: Pair, size: int) -> None:
    copy, good, content = await rotten(pair, size)
    for _ in range(2):
        report = await verify(pair)
        assert (report.result, report.unrepaired, report.findings) == ("drift", 1, {"untraced": 1}), report
        assert report.drifts[0].path == str(pair.local_tree / "f")
        assert copy.read_bytes() == good
    # Not even together with what is to be repaired at the same path.
    copy.chmod(0o600)
    report = await verify(pair)
    assert (report.result, report.findings) == ("drift", {"untraced": 1})
    assert copy.read_bytes() == good
    # The administrator knows that it is no damage.
    report = await verify(pair, from_source=True)
    assert (report.result, report.findings) == ("repaired", {"untraced": 1}), report
    assert copy.read_bytes() == content
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_what_the_sources_disk_cannot_read_is_not_compared(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(pair)
    bad = (pair.local_tree / "a/f2").stat().st_ino
    read = ContentReader._read

    def broken(self: ContentReader, file: Any, status: os.stat_result) -> tuple[int, bytes]:
        if status.st_ino == bad:
            raise OSError(5, "Input/output error")
        return read(self, file, status)

    monkeypatch.setattr(ContentReader, "_read", broken)
    good = (pair.remote_tree / "a/f2").read_bytes()
    (pair.remote_tree / "a/f2").chmod(0o600)
    report = await verify(pair)
    assert (report.result, report.busy, report.findings) == ("clean", 1, {})
    assert (pair.remote_tree / "a/f2").read_bytes() == good


async def test_a_good_copy_that_is_brought_back_ends_it(pair: Pair) -> None:
    copy, good, _ = await rotten(pair, 1000)
    assert (await verify(pair)).result == "drift"
    shutil.copyfile(copy, pair.local_tree / "f")
    await settled(pair)
    assert (await verify(pair)).result == "clean"
    assert copy.read_bytes() == good == (pair.local_tree / "f").read_bytes()


async def test_an_index_that_is_wrong_is_put_right(pair: Pair) -> None:
    await filled(pair)
    await asyncio.sleep(0.1)
    sender = pair.local.groups["web"]._sender
    assert sender is not None

    def change(index: Index, planner: Planner) -> None:
        for path in (b"a/f0", b"big"):
            known = index.get(0, path)
            assert known is not None
            index.put(msgspec.structs.replace(known, digest=b"x" * 32))
        index.remove(0, b"b/c")
        index.commit()

    await sender.with_index(change)
    report = await verify(pair)
    assert report.result == "repaired", report
    assert {Path(each.path).name: each.finding for each in report.drifts}["f0"] == "index"
    assert {Path(each.path).name: each.finding for each in report.drifts}["big"] == "index"
    assert differences(pair.local_tree, pair.remote_tree) == []
    assert (await verify(pair)).result == "clean"


# --- interruptions


async def test_what_was_read_before_an_interruption_is_not_read_again(pair: Pair) -> None:
    for number in range(40):
        (pair.local_tree / f"f{number:02}").write_bytes(os.urandom(100_000))
    await pair.own("local", 1)
    await settled(pair)
    group = pair.local.groups["web"]
    run = group.verify(True, True, False, 1e6)

    def status() -> VerificationStatus:
        sender = pair.local.groups["web"]._sender
        assert sender is not None and sender.verifier is not None
        return sender.verifier.status()

    def far(least: int) -> Callable[[], bool]:
        return lambda: status().read_source >= least and status().run == run

    await until(far(1_000_000), "it did not begin")
    await pair.restart("remote")
    await until(far(2_000_000), "it did not go on after the replica's restart")
    await pair.restart("local")
    await until(lambda: pair.local.groups["web"]._sender is not None, "the source did not start")
    report = await ended(pair, run)
    assert report.result == "clean", report
    # A file that was being read when it was interrupted is read once more.
    assert 4_000_000 <= report.read_source <= 4_400_000
    assert report.read_replica <= 4_800_000


async def test_a_change_of_owner_does_not_wait_for_it(pair: Pair) -> None:
    (pair.local_tree / "big").write_bytes(os.urandom(5_000_000))
    await pair.own("local", 1)
    await settled(pair)
    run = pair.local.groups["web"].verify(True, True, False, 1e4)
    sender = pair.local.groups["web"]._sender
    assert sender is not None and sender.verifier is not None
    verifier = sender.verifier
    await until(lambda: verifier.status().read_source > 0, "it did not begin")
    async with asyncio.timeout(20):
        await pair.own("remote", 2)
        await pair.remote.groups["web"].flush(15)
    assert differences(pair.local_tree, pair.remote_tree) == []
    # The other way round, it works as well.
    report = await ended_on(pair, "remote", pair.remote.groups["web"].verify(True, True, False, 0.0))
    assert report.result == "clean"
    # And what was given up is told when this side owns the group again.
    await pair.own("local", 3)
    await settled(pair)
    sender = pair.local.groups["web"]._sender
    assert sender is not None and sender.verifier is not None
    last = sender.verifier.status().last
    assert last is not None and (last.run, last.result) == (run, "failed")
    assert "owner" in last.reason


# --- asking for it


async def test_the_same_is_joined_and_another_refused(pair: Pair) -> None:
    with pytest.raises(FarshoreError, match="owned by"):
        pair.remote.groups["web"].verify(True, True, False, None)
    await filled(pair)
    group = pair.local.groups["web"]
    run = group.verify(True, True, False, None)
    assert group.verify(True, True, False, 5.0) == run
    with pytest.raises(FarshoreError, match="under way"):
        group.verify(False, True, False, None)
    assert (await ended(pair, run)).result == "clean"
    assert group.verify(True, True, False, None) != run


async def test_it_is_asked_for_over_the_control_api(pair: Pair) -> None:
    await filled(pair)
    answer = await pair.local.handle(api.Verify("web"), server.LOCAL)
    assert isinstance(answer, api.Done)
    await ended(pair, answer.detail)
    status = (await pair.local.status()).groups["web"].verification
    assert status is not None and status.last is not None
    assert (status.run, status.last.result, status.last.scheduled) == ("", "clean", False)
    assert status.due is not None and status.due > time.time()
    with pytest.raises(FarshoreError, match="is for gateways"):
        await pair.local.handle(api.Verify("web"), "stranger")
    with pytest.raises(FarshoreError, match="rate"):
        await pair.local.handle(api.Verify("web", rate=-1.0), server.LOCAL)


async def test_one_that_is_due_begins_by_itself(pair: Pair) -> None:
    (pair.base / "local-state/groups/web/verify.json").write_text('{"since": 0.0, "version": 1}')
    (pair.local_tree / "a").write_text("1")
    await pair.own("local", 1)
    sender = pair.local.groups["web"]._sender
    assert sender is not None and sender.verifier is not None
    verifier = sender.verifier
    await until(lambda: verifier.status().last is not None, "it did not begin")
    last = verifier.status().last
    assert last is not None and (last.scheduled, last.contents, last.result) == (True, True, "clean")


async def test_a_survey_that_fails_there_does_no_harm(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(pair)

    def full(*arguments: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("farshore.dbm.replica.survey.Store", full)
        report = await verify(pair)
    assert report.result == "failed" and "No space left" in report.reason
    (pair.local_tree / "later").write_text("x")
    await settled(pair)
    assert (await verify(pair)).result == "clean"


# --- a disk that forgets

needs_loop = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("losetup", "mkfs.ext4", "filefrag"))),
    reason="needs root and loop devices",
)


@needs_loop
async def test_bits_that_rot_on_the_sources_disk_are_told_and_not_sent(tmp_path: Path, pair: Pair) -> None:
    """A block of the disk changes below the filesystem: no event, no time, no size tells of it."""
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    run("mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", str(image))
    with mounted(pair.local_tree, "-o", "loop", str(image)):
        (pair.local_tree / "lost+found").rmdir()
        good = os.urandom(8192)
        (pair.local_tree / "f").write_bytes(good)
        os.sync()
        await asyncio.sleep(0.1)
        await pair.own("local", 1)
        await settled(pair)
        with (pair.local_tree / "f").open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        extent = run("filefrag", "-v", "-b4096", str(pair.local_tree / "f")).splitlines()[3]
        block = int(extent.split(":")[2].split("..")[0])
        with image.open("r+b") as disk:
            disk.seek(block * 4096 + 100)
            disk.write(bytes([good[100] ^ 1]))
        report = await verify(pair)
        assert (pair.local_tree / "f").read_bytes() != good, "the disk still has what it had"
        assert (report.result, report.findings) == ("drift", {"untraced": 1}), report
        assert report.drifts[0].path == str(pair.local_tree / "f")
        assert (pair.remote_tree / "f").read_bytes() == good


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
