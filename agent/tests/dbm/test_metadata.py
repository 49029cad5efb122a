"""Every kind of metadata, on its whole way: made with a file, changed later, and taken away again."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from acls import CAPABILITY, NAMED, acl
from nodes import Pair
from trees import differences

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give most of it")

SECOND = 10**9
Step = Callable[[bytes], None]


def file(size: int = 10) -> Step:
    def make(path: bytes) -> None:
        with open(path, "wb") as new:
            new.write(os.urandom(size))

    return make


def then(*steps: Step) -> Step:
    def all_of_them(path: bytes) -> None:
        for step in steps:
            step(path)

    return all_of_them


def mode(bits: int) -> Step:
    return lambda path: os.chmod(path, bits)


def owner(uid: int, gid: int) -> Step:
    return lambda path: os.chown(path, uid, gid, follow_symlinks=False)


def times(seconds: int, nanoseconds: int = 0) -> Step:
    when = seconds * SECOND + nanoseconds
    return lambda path: os.utime(path, ns=(when, when), follow_symlinks=False)


def attribute(name: str, value: bytes) -> Step:
    return lambda path: os.setxattr(path, name, value, follow_symlinks=False)


def without(name: str) -> Step:
    return lambda path: os.removexattr(path, name, follow_symlinks=False)


def link_to(target: bytes) -> Step:
    return lambda path: os.symlink(target, path)


def node(kind: int, device: int = 0) -> Step:
    return lambda path: os.mknod(path, kind | 0o640, device)


def append(path: bytes) -> None:
    with open(path, "ab") as old:
        old.write(b"more")


def nothing(path: bytes) -> None:
    pass


def child(*steps: Step) -> Step:
    """Do it with something in the directory at ``path``."""

    def do(path: bytes) -> None:
        for step in steps:
            step(path + b"/child")

    return do


def many_attributes(path: bytes) -> None:
    for number in range(60):
        os.setxattr(path, f"user.{number:03}", b"%d" % number)


def fewer_attributes(path: bytes) -> None:
    for number in range(0, 60, 2):
        os.removexattr(path, f"user.{number:03}")
    os.setxattr(path, "user.001", b"other")


@dataclass(frozen=True)
class Case:
    name: str
    make: Step
    change: Step
    undo: Step = nothing


CASES = [
    Case("mode", then(file(), mode(0o640)), mode(0o707), mode(0)),
    Case("large file's mode", then(file(200_000), mode(0o640)), mode(0o4711), mode(0)),
    Case("setuid", then(file(), owner(1234, 2345), mode(0o4755)), mode(0o6755), mode(0o755)),
    Case(
        "setuid through chown",
        then(file(), owner(1234, 2345), mode(0o6755)),
        then(owner(2345, 1234), mode(0o6755)),
        owner(1, 1),
    ),
    Case("setuid that a write takes away", then(file(), mode(0o4755)), then(append, mode(0o755)), mode(0o6777)),
    Case("sticky directory", then(os.mkdir, mode(0o1777)), mode(0o777), mode(0o1770)),
    Case("setgid directory", then(os.mkdir, owner(0, 2345), mode(0o2775)), child(file()), mode(0o775)),
    Case("owner", then(file(), owner(1234, 2345)), owner(65534, 65534), owner(0, 0)),
    Case("owner with a large number", then(file(), owner(2**32 - 2, 2**31)), owner(2**31 + 5, 2**32 - 2), owner(0, 0)),
    Case("owner of a symlink", then(link_to(b"nowhere"), owner(1234, 2345)), owner(5, 6), owner(0, 0)),
    Case("owner of a directory", then(os.mkdir, owner(1234, 2345)), owner(5, 6), child(file())),
    Case("time before 1970", then(file(), times(-1, 999_999_999)), times(-(2**31)), times(-1)),
    Case("time after 2038", then(file(), times(2**31, 1)), times(2**32, 123_456_789), times(2**33 + 7, 5)),
    Case("time of a symlink", then(link_to(b"x"), times(5, 7)), times(-5, 7), times(2**32, 1)),
    Case("time of a directory", then(os.mkdir, times(5, 7)), then(child(file()), times(6, 8)), child(os.unlink)),
    Case("time of a fifo", then(os.mkfifo, times(5, 7)), times(-5, 7), times(2**32, 1)),
    Case("user attribute", then(file(), attribute("user.a", b"1")), attribute("user.a", b""), without("user.a")),
    Case(
        "user attribute of a large file",
        then(file(200_000), attribute("user.a", b"1")),
        attribute("user.a", b"\0\xff"),
        without("user.a"),
    ),
    Case(
        "user attribute of a directory",
        then(os.mkdir, attribute("user.a", b"1")),
        attribute("user.a", b"2"),
        without("user.a"),
    ),
    Case(
        "user attribute of another's sticky directory",
        then(os.mkdir, owner(1234, 2345), mode(0o1777), attribute("user.a", b"1")),
        attribute("user.a", b"2"),
        without("user.a"),
    ),
    Case(
        "user attribute of a file that nobody may write",
        then(file(), attribute("user.a", b"1"), mode(0o400)),
        attribute("user.a", b"2"),
        without("user.a"),
    ),
    Case(
        "attribute with the longest name",
        then(file(), attribute("user." + "n" * 250, b"1")),
        attribute("user." + "n" * 250, b"2"),
        without("user." + "n" * 250),
    ),
    Case(
        "attribute with a large value",
        then(file(), attribute("user.a", b"x" * 3000)),
        attribute("user.a", b"y" * 3500),
        attribute("user.a", b"z" * 10),
    ),
    Case("many attributes", then(file(), many_attributes), fewer_attributes),
    Case("trusted", then(file(), attribute("trusted.a", b"1")), attribute("trusted.a", b"2"), without("trusted.a")),
    Case(
        "trusted on a symlink",
        then(link_to(b"/etc/passwd"), attribute("trusted.a", b"1")),
        attribute("trusted.a", b"2"),
        without("trusted.a"),
    ),
    Case("trusted on a fifo", then(os.mkfifo, attribute("trusted.a", b"1")), without("trusted.a")),
    Case("overlay's opaque", then(os.mkdir, attribute("trusted.overlay.opaque", b"y")), nothing),
    Case(
        "Samba's ACL",
        then(file(), attribute("security.NTACL", b"1")),
        attribute("security.NTACL", b"2"),
        without("security.NTACL"),
    ),
    Case(
        "ACL",
        then(file(), attribute("system.posix_acl_access", acl(*NAMED))),
        attribute("system.posix_acl_access", acl(NAMED[0], group=0, mask=6)),
        without("system.posix_acl_access"),
    ),
    Case(
        "ACL of a large file",
        then(file(200_000), attribute("system.posix_acl_access", acl(*NAMED))),
        mode(0o750),
        without("system.posix_acl_access"),
    ),
    Case("ACL of a fifo", then(os.mkfifo, attribute("system.posix_acl_access", acl(*NAMED))), mode(0o600)),
    Case(
        "ACL with setgid",
        then(file(), owner(1, 2), attribute("system.posix_acl_access", acl(*NAMED)), mode(0o2775)),
        then(owner(3, 4), mode(0o6771)),
        without("system.posix_acl_access"),
    ),
    Case(
        "default ACL",
        then(os.mkdir, attribute("system.posix_acl_default", acl(*NAMED)), child(file())),
        child(os.unlink, os.mkdir, child(file())),
        without("system.posix_acl_default"),
    ),
    Case(
        "default ACL that came later",
        then(os.mkdir, child(file())),
        attribute("system.posix_acl_default", acl(*NAMED)),
        child(os.unlink, os.mkfifo),
    ),
    Case(
        "capability",
        then(file(), attribute("security.capability", CAPABILITY)),
        attribute("security.capability", CAPABILITY[:4] + b"\1" + CAPABILITY[5:]),
        without("security.capability"),
    ),
    Case(
        "capability through chown",
        then(file(), owner(1, 2), attribute("security.capability", CAPABILITY)),
        then(owner(3, 4), attribute("security.capability", CAPABILITY)),
        owner(5, 6),
    ),
    Case("capability that a write takes away", then(file(), attribute("security.capability", CAPABILITY)), append),
    Case("capability of a large file", then(file(200_000), attribute("security.capability", CAPABILITY)), append),
    Case("fifo", then(os.mkfifo, mode(0o622)), mode(0o4644), then(os.unlink, file())),
    Case("character device", node(stat.S_IFCHR, os.makedev(1, 3)), mode(0o600), then(os.unlink, os.mkdir)),
    Case(
        "block device",
        node(stat.S_IFBLK, os.makedev(7, 250)),
        then(os.unlink, node(stat.S_IFBLK, os.makedev(259, 70_000))),
        then(os.unlink, node(stat.S_IFCHR, os.makedev(0, 0))),
    ),
    Case("symlink", link_to(b"\xff\n" * 100), then(os.unlink, link_to(b"../x")), then(os.unlink, os.mkdir)),
    Case("longest symlink", link_to(b"t" * 4095), then(os.unlink, link_to(b"t" * 4000))),
]


async def in_step(pair: Pair) -> None:
    await pair.local.groups["web"].flush(60)


def wrong(pair: Pair) -> list[str]:
    return differences(pair.local_tree, pair.remote_tree)


def place(pair: Pair, number: int) -> bytes:
    return os.fsencode(pair.local_tree) + b"/%02d" % number


async def problems(pair: Pair, side: str = "local") -> list[str]:
    node = getattr(pair, side)
    return (await node.status()).groups["web"].problems


@pytest.mark.parametrize("way", ["followed", "renamed", "linked", "compared"])
async def test_every_kind_of_metadata(pair: Pair, way: str) -> None:
    """``way``: what else happens to each. Each case has a directory of its own, so that all share one pair."""
    before = {}
    if way != "compared":
        await pair.own("local", 1)
        await in_step(pair)
    for number, case in enumerate(CASES):
        os.mkdir(place(pair, number))
        case.make(place(pair, number) + b"/it")
    if way == "compared":
        await pair.own("local", 1)
    await in_step(pair)
    assert wrong(pair) == []
    for step in ("change", "undo"):
        if way == "compared":
            # Both nodes go on as if nothing were known.
            await pair.local.stop()
            (pair.base / "local-state" / "groups" / "web" / "index.db").unlink()
        for number, case in enumerate(CASES):
            it = place(pair, number) + b"/it"
            other = place(pair, number) + b"/other"
            before[case.name] = os.lstat(it)
            if way == "linked" and not os.path.isdir(it) and step == "change":
                os.link(it, other, follow_symlinks=False)
            getattr(case, step)(it)
            if way == "renamed":
                os.rename(it, other)
                if step == "change":
                    os.rename(other, it + b"\n\xff")
                    os.rename(it + b"\n\xff", it)
        if way == "compared":
            pair.local = type(pair.local)(pair.local.config)
            await pair.local.start(None)
        await in_step(pair)
        assert wrong(pair) == [], step
        if way == "renamed":
            for number in range(len(CASES)):
                if os.path.lexists(place(pair, number) + b"/other"):
                    os.rename(place(pair, number) + b"/other", place(pair, number) + b"/it")
            await in_step(pair)
            assert wrong(pair) == [], step
    assert await problems(pair) == await problems(pair, "remote") == []


async def test_flags_and_sockets_are_not_kept_and_hold_nothing_up(pair: Pair) -> None:
    await pair.own("local", 1)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(pair.local_tree / "socket"))
        (pair.local_tree / "f").write_text("1")
        await in_step(pair)
    assert sorted(os.listdir(pair.remote_tree)) == ["f"]
    assert await problems(pair) == []


async def test_hard_link_sets_are_kept(pair: Pair) -> None:
    tree = pair.local_tree
    await pair.own("local", 1)
    (tree / "f").write_bytes(b"1")
    (tree / "large").write_bytes(os.urandom(200_000))
    (tree / "symlink").symlink_to("nowhere")
    os.mkfifo(tree / "fifo")
    (tree / "d").mkdir()
    names = ("f", "large", "symlink", "fifo")
    for name in names:
        for number in range(3):
            os.link(tree / name, tree / "d" / f"{name}{number}", follow_symlinks=False)
    await in_step(pair)
    assert wrong(pair) == []
    # One name is another object of the same looks, one is renamed, one is gone, and all have another owner.
    for name in names:
        there = tree / "d" / f"{name}0"
        status = there.lstat()
        content = there.read_bytes() if name in ("f", "large") else b""
        there.unlink()
        if name == "symlink":
            there.symlink_to("nowhere")
        elif name == "fifo":
            os.mkfifo(there)
        else:
            there.write_bytes(content)
        os.utime(there, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
        (tree / "d" / f"{name}1").rename(tree / f"{name}-renamed")
        (tree / "d" / f"{name}2").unlink()
        os.chown(tree / name, 1234, 2345, follow_symlinks=False)
    await in_step(pair)
    assert wrong(pair) == []
    # The other side finds them as they are, too, and changes them.
    await pair.own("remote", 2)
    await pair.remote.groups["web"].flush(60)
    assert wrong(pair) == []
    for name in names:
        os.link(pair.remote_tree / name, pair.remote_tree / f"{name}-again", follow_symlinks=False)
    await pair.remote.groups["web"].flush(60)
    assert wrong(pair) == []


def holes(path: Path) -> list[tuple[int, int]]:
    """The ranges of a file that hold nothing."""
    found = []
    handle = os.open(path, os.O_RDONLY)
    try:
        size, at = os.fstat(handle).st_size, 0
        while at < size:
            start = os.lseek(handle, at, os.SEEK_HOLE)
            try:
                at = os.lseek(handle, start, os.SEEK_DATA)
            except OSError:
                at = size
            if start < at:
                found.append((start, at))
    finally:
        os.close(handle)
    return found


def punch(path: Path, start: int, length: int) -> None:
    from farshore.dbm.replica.build import _KEEP_SIZE, _PUNCH_HOLE, _libc

    handle = os.open(path, os.O_RDWR)
    try:
        assert _libc.fallocate(handle, _KEEP_SIZE | _PUNCH_HOLE, start, length) == 0
    finally:
        os.close(handle)


MIB = 1 << 20


async def test_sparse_files_stay_sparse(pair: Pair) -> None:
    tree = pair.local_tree
    await pair.own("local", 1)
    for name, data_at in (("start", 3 * MIB), ("middle", 0), ("end", 0)):
        with (tree / name).open("wb") as new:
            new.seek(data_at)
            new.write(os.urandom(MIB))
            if name == "middle":
                new.seek(3 * MIB)
                new.write(os.urandom(MIB))
            new.truncate(4 * MIB)
    (tree / "full").write_bytes(os.urandom(4 * MIB))
    (tree / "only a hole").touch()
    os.truncate(tree / "only a hole", 64 * MIB)
    await in_step(pair)

    def alike() -> None:
        assert wrong(pair) == []
        for path in tree.iterdir():
            assert holes(pair.remote_tree / path.name) == holes(path), path.name
            assert abs((pair.remote_tree / path.name).stat().st_blocks - path.stat().st_blocks) <= 64, path.name

    alike()
    # Through a delta, a copy, a hole that is punched later, one that is filled, and a size that only grows.
    (tree / "copy").touch()
    with (tree / "middle").open("rb") as old, (tree / "copy").open("r+b") as new:
        new.write(old.read(MIB))
        new.truncate(3 * MIB)
        old.seek(3 * MIB)
        new.seek(3 * MIB)
        new.write(old.read())
    with (tree / "start").open("r+b") as old:
        old.seek(3 * MIB + 5000)
        old.write(b"other")
    punch(tree / "full", MIB, MIB)
    with (tree / "end").open("r+b") as old:
        old.seek(2 * MIB)
        old.write(os.urandom(MIB))
    os.truncate(tree / "middle", 16 * MIB)
    (tree / "only a hole").rename(tree / "moved hole")
    os.truncate(tree / "moved hole", 128 * MIB)
    await in_step(pair)
    alike()


async def test_names_of_any_bytes_and_lengths(pair: Pair) -> None:
    top = os.fsencode(pair.local_tree)
    await pair.own("local", 1)
    names = [bytes([byte]) * 3 for byte in range(1, 256) if byte not in b"/."]
    names += [b"\xff" * 255, b"\n", b"a\nb", b" ", b"-", b"*", b"\\", b"\xed\xa0\x80", b"...", b"n" * 255, b".\n"]
    for name in names:
        file()(top + b"/" + name)
        os.link(top + b"/" + name, top + b"/" + (name + b"2")[-255:]) if len(name) < 255 else None
    # The longest path that there may be, 4096 bytes without a final NUL, is longer than the system's calls take.
    here = os.open(top, os.O_RDONLY)
    for _ in range(15):
        os.mkdir(b"d" * 255, dir_fd=here)
        below = os.open(b"d" * 255, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    try:
        for name in (b"s" * 255, b"L" * 255):
            handle = os.open(name, os.O_WRONLY | os.O_CREAT, dir_fd=here)
            os.write(handle, b"deep" if name[:1] == b"s" else os.urandom(200_000))
            os.setxattr(handle, "user.a", b"1")
            os.close(handle)
        os.symlink(b"x", b"l" * 255, dir_fd=here)
    finally:
        os.close(here)
    await in_step(pair)
    there = os.open(pair.remote_tree, os.O_RDONLY)
    for _ in range(15):
        below = os.open(b"d" * 255, os.O_RDONLY, dir_fd=there)
        os.close(there)
        there = below
    assert sorted(os.listdir(there)) == ["L" * 255, "l" * 255, "s" * 255]
    handle = os.open(b"s" * 255, os.O_RDONLY, dir_fd=there)
    assert (os.read(handle, 100), os.getxattr(handle, "user.a")) == (b"deep", b"1")
    os.close(handle)
    os.close(there)
    assert sorted(os.listdir(top)) == sorted(os.listdir(os.fsencode(pair.remote_tree)))
    assert await problems(pair) == []
