"""What the limits of a path leave alone, between two nodes, on the way back, and in a verification."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from filesystems import mounted
from nodes import Pair, running_pair, until
from trees import differences

from farshore.daemons.node import Node

DAY = 86_400
LARGE = b"x" * 100_001


def age(path: Path, seconds: float) -> None:
    """Have a file be as old as that."""
    then = time.time() - seconds
    os.utime(path, (then, then), follow_symlinks=False)


def names(tree: Path) -> list[str]:
    return sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))


async def limited(pair: Pair, **keys: Any) -> None:
    """Start both nodes again, with limits on their one path."""
    for side in ("local", "remote"):
        node: Node = getattr(pair, side)
        group = node.config.groups["web"]
        paths = (dataclasses.replace(group.paths[0], **keys),)
        node.config = dataclasses.replace(node.config, groups={"web": dataclasses.replace(group, paths=paths)})
        await pair.restart(side)


async def problems(pair: Pair, side: str = "local") -> list[str]:
    node: Node = getattr(pair, side)
    return (await node.groups["web"].status()).problems


async def flush(pair: Pair, side: str = "local") -> None:
    node: Node = getattr(pair, side)
    await node.groups["web"].flush(60)


async def verified(pair: Pair, side: str = "local") -> Any:
    """Verify with all contents; returns the report."""
    node: Node = getattr(pair, side)
    group = node.groups["web"]
    run = group.verify(True, True, False, 0)

    def last() -> Any:
        assert group._sender is not None and group._sender.verifier is not None
        return group._sender.verifier.status().last

    await until(lambda: last() is not None and last().run == run, "the verification ends")
    return last()


# --- too large


async def test_what_is_too_large_is_left_alone_until_it_is_not(pair: Pair) -> None:
    await limited(pair, max_size="100kB")
    (pair.local_tree / "small").write_bytes(LARGE[1:])
    (pair.local_tree / "large").write_bytes(LARGE)
    (pair.local_tree / "grows").write_bytes(b"one")
    await pair.own("local", 1)
    await flush(pair)
    assert names(pair.remote_tree) == ["grows", "small"]
    where = pair.local_tree / "large"
    assert await problems(pair) == [f"is larger than max_size 100kB; not protected ({where})"]
    (pair.local_tree / "grows").write_bytes(LARGE)
    await flush(pair)
    assert (pair.remote_tree / "grows").read_bytes() == b"one"
    assert "100kB; not protected (2 files, e.g. " in (await problems(pair))[0]
    report = await verified(pair)
    assert (report.result, report.findings) == ("clean", {})
    (pair.local_tree / "grows").write_bytes(b"two")
    (pair.local_tree / "large").write_bytes(b"small by now")
    await flush(pair)
    assert await problems(pair) == []
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_a_new_limit_keeps_what_the_replica_has(pair: Pair) -> None:
    (pair.local_tree / "d" / "e").mkdir(parents=True)
    for name in ("large", "gone", "shrinks", "d/e/large", "d/e/small", "d/small", "moved"):
        (pair.local_tree / name).write_bytes(LARGE if not name.endswith("small") else b"x")
    await pair.own("local", 1)
    await flush(pair)
    await limited(pair, max_size="100kB")
    await flush(pair)
    (pair.local_tree / "gone").unlink()
    (pair.local_tree / "large").write_bytes(LARGE + b"changed")
    (pair.local_tree / "shrinks").write_bytes(b"x")
    (pair.local_tree / "moved").rename(pair.local_tree / "renamed")
    shutil.rmtree(pair.local_tree / "d")
    await flush(pair)
    assert names(pair.remote_tree) == ["d", "d/e", "d/e/large", "gone", "large", "renamed", "shrinks"]
    assert (pair.remote_tree / "large").read_bytes() == (pair.remote_tree / "renamed").read_bytes() == LARGE
    assert (pair.remote_tree / "shrinks").read_bytes() == b"x"
    told = await problems(pair)
    assert (
        f"gone here; the replica's copy is larger than max_size 100kB, and is kept (2 files, e.g. {pair.local_tree}"
        in ("\n".join(told))
    )
    report = await verified(pair)
    assert (report.result, report.findings) == ("clean", {})
    # What comes back in their place.
    (pair.local_tree / "d").write_bytes(b"a file")
    (pair.local_tree / "new").mkdir()
    (pair.local_tree / "new" / "f").write_bytes(b"x")
    await flush(pair)
    assert names(pair.remote_tree / "d") == ["e", "e/large"]
    assert "the replica has a directory there with files that the limits leave alone" in "\n".join(await problems(pair))
    (pair.local_tree / "d").unlink()
    (pair.local_tree / "new").rename(pair.local_tree / "d")
    await flush(pair)
    assert names(pair.remote_tree / "d") == ["e", "e/large", "f"]
    assert (await verified(pair)).result == "clean"


async def test_a_file_within_the_limits_goes_as_ever(pair: Pair) -> None:
    await limited(pair, max_size="100kB", max_age="1d")
    for name in ("a", "b", "c"):
        (pair.local_tree / name).write_bytes(b"x")
    await pair.own("local", 1)
    await flush(pair)
    (pair.local_tree / "a").unlink()
    (pair.local_tree / "b").write_bytes(LARGE)
    await flush(pair)
    (pair.local_tree / "b").unlink()
    await flush(pair)
    assert names(pair.remote_tree) == ["c"]


async def test_the_way_back_leaves_alone_what_was_never_sent(pair: Pair) -> None:
    await limited(pair, max_size="100kB", max_age="30d")
    for name in ("large", "old", "both", "d/large", "d/x", "small"):
        (pair.local_tree / name).parent.mkdir(exist_ok=True)
        (pair.local_tree / name).write_bytes(LARGE if name.endswith("large") or name == "both" else name.encode())
    age(pair.local_tree / "old", 40 * DAY)
    await pair.own("local", 1)
    await flush(pair)
    assert names(pair.remote_tree) == ["d", "d/x", "small"]
    await pair.own("remote", 2)
    (pair.remote_tree / "both").write_bytes(b"small here")
    (pair.remote_tree / "small").write_bytes(b"changed")
    shutil.rmtree(pair.remote_tree / "d")
    await flush(pair, "remote")
    assert names(pair.local_tree) == ["both", "d", "d/large", "large", "old", "small"]
    assert (pair.local_tree / "both").read_bytes() == LARGE, "nobody else has it"
    assert (pair.local_tree / "small").read_bytes() == b"changed"
    told = "\n".join(await problems(pair, "remote"))
    assert "the replica has a file there that is larger than max_size, and is not overwritten; not protected" in told
    report = await verified(pair, "remote")
    assert (report.result, report.findings) == ("clean", {})
    await pair.own("local", 3)
    await flush(pair)
    assert (await verified(pair)).result == "clean"
    assert names(pair.remote_tree) == ["both", "d", "small"]


async def test_a_single_file_has_limits_too(tmp_path: Path) -> None:
    async with running_pair(tmp_path) as pair:
        pair.local_tree.rmdir()
        pair.local_tree.write_bytes(b"one")
        await limited(pair, max_size="100kB")
        await pair.own("local", 1)
        await flush(pair)
        assert pair.remote_tree.read_bytes() == b"one"
        pair.local_tree.write_bytes(LARGE)
        await flush(pair)
        assert pair.remote_tree.read_bytes() == b"one"
        assert await problems(pair) == [f"is larger than max_size 100kB; not protected ({pair.local_tree})"]
        pair.local_tree.write_bytes(b"two")
        await flush(pair)
        assert pair.remote_tree.read_bytes() == b"two"
        assert await problems(pair) == []


# --- too young, too old


async def test_what_is_too_young_is_sent_when_it_is_old_enough(pair: Pair) -> None:
    await limited(pair, min_age="3s")
    (pair.local_tree / "old").write_bytes(b"old")
    age(pair.local_tree / "old", 60)
    await pair.own("local", 1)
    await flush(pair)
    assert names(pair.remote_tree) == ["old"]
    began = time.monotonic()
    (pair.local_tree / "young").write_bytes(b"young")
    (pair.local_tree / "future").write_bytes(b"future")
    age(pair.local_tree / "future", -1e6)
    (pair.local_tree / "old").write_bytes(b"changed")
    await flush(pair)
    if time.monotonic() - began < 2.5:  # else the machine is too slow to tell
        assert (pair.remote_tree / "old").read_bytes() == b"old"
        assert names(pair.remote_tree) == ["old"]
    assert await problems(pair) == []
    assert pair.local.groups["web"]._in_step()
    await until(lambda: names(pair.remote_tree) == ["future", "old", "young"], "all are old enough")
    await until(lambda: (pair.remote_tree / "old").read_bytes() == b"changed", "so is the change")
    assert time.monotonic() - began > 2.5
    await flush(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []


async def test_what_is_too_young_is_not_forgotten_while_nobody_is_there(pair: Pair) -> None:
    await limited(pair, min_age="2s")
    await pair.own("local", 1)
    await flush(pair)
    (pair.local_tree / "young").write_bytes(b"young")
    await flush(pair)
    await pair.restart("remote")
    await until(lambda: names(pair.remote_tree) == ["young"], "it comes after the connection was made again")
    (pair.local_tree / "younger").write_bytes(b"younger")
    await flush(pair)
    await pair.restart("local")
    await until(lambda: names(pair.remote_tree) == ["young", "younger"], "it comes after a restart")


async def test_a_verification_says_nothing_of_what_is_too_young(pair: Pair) -> None:
    await limited(pair, min_age="1h")
    (pair.local_tree / "f").write_bytes(b"x")
    (pair.local_tree / "same").write_bytes(b"x")
    for name in ("f", "same"):
        age(pair.local_tree / name, 2 * 3600)
    await pair.own("local", 1)
    await flush(pair)
    (pair.local_tree / "f").write_bytes(b"changed")
    (pair.local_tree / "new").write_bytes(b"new")
    await flush(pair)
    report = await verified(pair)
    assert (report.result, report.busy, report.findings) == ("clean", 0, {})
    assert (pair.remote_tree / "f").read_bytes() == b"x"
    (pair.remote_tree / "same").unlink()
    assert (await verified(pair)).findings == {"replica": 2}, "the file, and its directory's time"
    assert (pair.remote_tree / "same").exists()


async def test_what_is_too_old_is_left_alone(pair: Pair) -> None:
    await limited(pair, max_age="90d")
    for name in ("new", "old", "ages"):
        (pair.local_tree / name).write_bytes(name.encode())
    age(pair.local_tree / "old", 91 * DAY)
    await pair.own("local", 1)
    await flush(pair)
    assert names(pair.remote_tree) == ["ages", "new"]
    assert await problems(pair) == [f"is older than max_age 90d; not protected ({pair.local_tree}/old)"]
    age(pair.local_tree / "ages", 91 * DAY)
    (pair.local_tree / "old").write_bytes(b"new again")
    await flush(pair)
    assert (pair.remote_tree / "old").read_bytes() == b"new again"
    assert (await verified(pair)).result == "clean"
    (pair.local_tree / "ages").unlink()
    await flush(pair)
    assert names(pair.remote_tree) == ["new", "old"], "what it was when it was sent was young enough"


# --- one filesystem


@pytest.fixture
async def crossing(pair: Pair) -> AsyncIterator[Pair]:
    """A pair that keeps to one filesystem; the local tree has another one at ``d/mnt``."""
    place = pair.local_tree / "d" / "mnt"
    place.mkdir(parents=True)
    with mounted(place):
        (place / "sub").mkdir()
        (place / "sub" / "other").write_bytes(b"other")
        (pair.local_tree / "d" / "f").write_bytes(b"x")
        await limited(pair, one_filesystem=True)
        yield pair


async def test_a_mount_point_is_an_empty_directory_on_the_replica(crossing: Pair) -> None:
    place = crossing.local_tree / "d" / "mnt"
    place.chmod(0o711)
    await crossing.own("local", 1)
    await flush(crossing)
    assert names(crossing.remote_tree) == ["d", "d/f", "d/mnt"]
    assert (crossing.remote_tree / "d" / "mnt").stat().st_mode & 0o777 == 0o711
    told = await problems(crossing)
    assert len(told) == 1 and told[0].startswith("is the mount point of another filesystem") and str(place) in told[0]
    (place / "later").write_bytes(b"x")
    (place / "sub" / "other").unlink()
    await flush(crossing)
    assert names(crossing.remote_tree) == ["d", "d/f", "d/mnt"]
    report = await verified(crossing)
    assert (report.result, report.findings) == ("clean", {})


async def test_what_the_replica_has_at_a_mount_point_stays(pair: Pair) -> None:
    (pair.local_tree / "mnt" / "sub").mkdir(parents=True)
    (pair.local_tree / "mnt" / "sub" / "f").write_bytes(b"x")
    await pair.own("local", 1)
    await flush(pair)
    with mounted(pair.local_tree / "mnt"):
        await limited(pair, one_filesystem=True)
        await flush(pair)
        assert names(pair.remote_tree) == ["mnt", "mnt/sub", "mnt/sub/f"]
        report = await verified(pair)
        assert (report.result, report.findings) == ("clean", {})
        assert names(pair.remote_tree) == ["mnt", "mnt/sub", "mnt/sub/f"]


async def test_the_way_back_leaves_another_filesystem_alone(crossing: Pair) -> None:
    await crossing.own("local", 1)
    await flush(crossing)
    await crossing.own("remote", 2)
    (crossing.remote_tree / "d" / "mnt" / "new").write_bytes(b"not for the mount")
    (crossing.remote_tree / "d" / "f").write_bytes(b"changed")
    await flush(crossing, "remote")
    assert (crossing.local_tree / "d" / "f").read_bytes() == b"changed"
    place = crossing.local_tree / "d" / "mnt"
    assert (place / "sub" / "other").read_bytes() == b"other"
    shutil.rmtree(crossing.remote_tree / "d")
    await flush(crossing, "remote")
    assert (place / "sub" / "other").read_bytes() == b"other"
    assert not (crossing.local_tree / "d" / "f").exists()
    assert "the replica has another filesystem mounted there" in "\n".join(await problems(crossing, "remote"))
    assert (await verified(crossing, "remote")).result == "clean"
