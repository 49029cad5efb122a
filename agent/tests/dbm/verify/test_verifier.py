"""Verification between two nodes: what is found, what is repaired, what it costs, and what it must not do."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from nodes import GENEROUS, Pair, until
from trees import differences

from farshore.control.api import VerificationReport


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
    def report() -> VerificationReport | None:
        sender = pair.local.groups["web"]._sender
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
