"""Replicas that cannot keep everything: other filesystems, no rights, no space; told, and nothing is held up."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from acls import CAPABILITY, NAMED, acl
from filesystems import mounted
from nodes import Mirror, Pair, until
from trees import differences

from farshore.dbm.messages import Meta
from farshore.dbm.replica import metadata
from farshore.dbm.replica.stage import Staged
from farshore.dbm.replica.tree import Tree
from farshore.dbm.unkept import Unkept, texts
from farshore.fmm.types import FileKind, Root

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@contextmanager
def ext4(at: Path, *options: str, mount: str = "loop") -> Iterator[None]:
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("no mkfs.ext4")
    image = at.with_suffix(".image")
    with image.open("wb") as new:
        new.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", *options, str(image)], check=True)
    with mounted(at, "-o", mount, str(image)):
        (at / "lost+found").rmdir()
        yield


def lasting(tree: Path, there: Path) -> list[str]:
    """The differences, but for the stage: in a tree that is a filesystem, it lies within, and keeps the history."""
    return [line for line in differences(tree, there) if not line.startswith("b'.farshore-stage")]


async def in_step(pair: Pair) -> None:
    await pair.local.groups["web"].flush(60)


async def problems(pair: Pair, side: str = "local") -> list[str]:
    return (await getattr(pair, side).status()).groups["web"].problems


async def until_told(pair: Pair, *expected: str) -> None:
    """Wait until the source's status tells just this of the replica."""
    sender = pair.local.groups["web"]._sender
    assert sender is not None
    await until(lambda: sorted(texts(sender.unkept)) == sorted(expected), f"{texts(sender.unkept)} is told")
    assert sorted(await problems(pair)) == sorted(f"remote: {text}" for text in expected)


@needs_root
async def test_a_filesystem_without_attributes(pair: Pair) -> None:
    tree = pair.local_tree
    for name in ("a", "b", "c"):
        (tree / name).write_text("1")
        os.setxattr(tree / name, "user.note", b"1")
    os.setxattr(tree / "c", "security.NTACL", b"1")
    (tree / "plain").write_text("1")
    with mounted(pair.remote_tree, "-t", "ramfs", "none"):
        await pair.own("local", 1)
        await in_step(pair)
        there = pair.remote_tree
        user = "xattr user.* cannot be kept: Operation not supported"
        nt = f"xattr security.NTACL cannot be kept: Operation not supported ({there}/c)"
        await until_told(pair, f"{user} (3 files, e.g. {there}/a)", nt)
        assert (there / "c").read_text() == "1"
        # It is over for a file that has none any more, is gone, or is called otherwise.
        os.removexattr(tree / "c", "user.note")
        (tree / "a").unlink()
        (tree / "b").rename(tree / "e")
        await in_step(pair)
        await until_told(pair, f"{user} ({there}/e)", nt)
        # The replica's own status says it too, and after a restart of both.
        assert sorted(await problems(pair, "remote")) == sorted([f"{user} ({there}/e)", nt])
        await pair.local.stop()
        await pair.restart("remote")
        assert sorted(await problems(pair, "remote")) == sorted([f"{user} ({there}/e)", nt])
        pair.local = type(pair.local)(pair.local.config)
        await pair.local.start(None)
        await in_step(pair)
        await until_told(pair, f"{user} ({there}/e)", nt)
        for name, attribute in (("c", "security.NTACL"), ("e", "user.note")):
            os.removexattr(tree / name, attribute)
        await in_step(pair)
        await until_told(pair)
        assert lasting(tree, there) == []


@needs_root
async def test_without_its_acl_the_group_gets_no_more_rights(pair: Pair) -> None:
    tree, there = pair.local_tree, pair.remote_tree
    (tree / "f").write_text("1")
    (tree / "large").write_bytes(os.urandom(200_000))
    for name in ("f", "large"):
        os.setxattr(tree / name, "system.posix_acl_access", acl(*NAMED, group=0, mask=7))
    assert stat.S_IMODE((tree / "f").stat().st_mode) == 0o775
    with mounted(there, "-t", "ramfs", "none"):
        await pair.own("local", 1)
        await in_step(pair)
        for name in ("f", "large"):
            assert stat.S_IMODE((there / name).stat().st_mode) == 0o705
        what = "xattr system.posix_acl_access cannot be kept: Operation not supported"
        await until_told(pair, f"{what} (2 files, e.g. {there}/f)")
        os.chmod(tree / "f", 0o755)
        await in_step(pair)
        assert stat.S_IMODE((there / "f").stat().st_mode) == 0o705
        os.removexattr(tree / "f", "system.posix_acl_access")
        os.chmod(tree / "f", 0o664)
        await in_step(pair)
        assert stat.S_IMODE((there / "f").stat().st_mode) == 0o664
        await until_told(pair, f"{what} ({there}/large)")


@needs_root
async def test_a_comparison_ends_what_is_over(pair: Pair) -> None:
    (pair.local_tree / "f").write_text("1")
    os.setxattr(pair.local_tree / "f", "user.note", b"1")
    await pair.own("local", 1)
    await in_step(pair)
    await until(lambda: pair.remote.groups["web"]._record.synced_once, "the replica was not told")
    with mounted(pair.remote_tree, "-t", "ramfs", "none"):
        # Another tree than before: all is compared.
        await pair.restart("remote")
        await in_step(pair)
        await until((pair.remote_tree / "f").exists, "the tree was not filled again")
        text = "xattr user.* cannot be kept: Operation not supported"
        await until_told(pair, f"{text} ({pair.remote_tree}/f)")
        await until(lambda: pair.remote.groups["web"]._record.synced_once, "the replica was not told")
    await pair.restart("remote")
    assert len(await problems(pair, "remote")) == 1
    replica = pair.remote.groups["web"]
    await until(lambda: not replica._unkept, "it is still told")
    await until_told(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []


@needs_root
async def test_a_filesystem_with_coarse_times_that_end_in_2038(pair: Pair) -> None:
    tree = pair.local_tree
    for name, when in (("a", 5), ("b", 10**9 + 1), ("c", 2**33 * 10**9), ("d", -(2**40) * 10**9)):
        (tree / name).write_text("1")
        os.utime(tree / name, ns=(when, when))
    os.utime(tree, ns=(0, 10**9))
    with ext4(pair.remote_tree, "-I", "128"):
        await pair.own("local", 1)
        await in_step(pair)
        there = pair.remote_tree
        await until_told(
            pair,
            f"times cannot be kept exactly: the filesystem has coarser ones (2 files, e.g. {there}/a)",
            f"times cannot be kept: the filesystem has none so far away (2 files, e.g. {there}/c)"
            if (tree / "d").stat().st_mtime_ns != (there / "d").stat().st_mtime_ns
            else f"times cannot be kept: the filesystem has none so far away ({there}/c)",
        )
        for name in ("a", "b", "c", "d"):
            os.utime(tree / name, ns=(0, 10**9))
        await in_step(pair)
        await until_told(pair)
        assert lasting(tree, there) == []


@needs_root
async def test_attributes_that_have_no_room_hold_nothing_up(pair: Pair) -> None:
    tree, there = pair.local_tree, pair.remote_tree
    if Path("/dev/shm").stat().st_dev == tree.stat().st_dev:
        pytest.skip("needs a filesystem of its own")
    with mounted(tree):
        (tree / "f").write_text("1")
        try:
            os.setxattr(tree / "f", "user.large", b"x" * 50_000)
        except OSError:
            pytest.skip("no large attributes on tmpfs")
        os.setxattr(tree / "f", "user.small", b"1")
        with ext4(there):
            await pair.own("local", 1)
            await in_step(pair)
            await until_told(pair, f"xattr user.* cannot be kept: No space left on device ({there}/f)")
            assert (there / "f").read_text() == "1"
            assert os.getxattr(there / "f", "user.small") == b"1"
            os.setxattr(tree / "f", "user.large", b"fits")
            await in_step(pair)
            await until_told(pair)
            assert os.getxattr(there / "f", "user.large") == b"fits"


@needs_root
async def test_more_attributes_than_can_be_listed(pair: Pair) -> None:
    tree = pair.local_tree
    with mounted(tree):
        (tree / "f").write_text("1")
        try:
            for number in range(300):
                os.setxattr(tree / "f", "user." + "n" * 240 + str(number), b"v")
        except OSError:
            pytest.skip("not so many attributes on tmpfs")
        await pair.own("local", 1)
        await in_step(pair)
        assert (pair.remote_tree / "f").read_text() == "1"
        assert await problems(pair) == [f"it has more extended attributes than the system can list ({tree}/f)"]


@needs_root
async def test_hard_links_across_a_mount_become_copies(pair: Pair) -> None:
    tree, there = pair.local_tree, pair.remote_tree
    (tree / "d").mkdir()
    await pair.own("local", 1)
    await in_step(pair)
    with mounted(there / "d"):
        (tree / "f").write_bytes(os.urandom(200_000))
        os.chown(tree / "f", 1234, 2345)
        # Of two names that are new at once, either may be the link.
        await in_step(pair)
        os.link(tree / "f", tree / "d" / "g")
        await in_step(pair)
        assert (there / "d" / "g").read_bytes() == (tree / "f").read_bytes()
        assert (there / "d" / "g").stat().st_uid == 1234
        await until_told(pair, f"hard links cannot be kept, copies are: Invalid cross-device link ({there}/d/g)")
        with (tree / "f").open("ab") as file:
            file.write(b"more")
        await in_step(pair)
        assert (there / "d" / "g").read_bytes() == (there / "f").read_bytes() == (tree / "f").read_bytes()
        (tree / "d" / "g").unlink()
        await in_step(pair)
        text = "what lies on a filesystem that is mounted below a protected path has no history"
        await until_told(pair, f"{text} ({there}/d/)")


@needs_root
async def test_many_files_of_one_cause_are_one_line(pair: Pair) -> None:
    for number in range(312):
        path = pair.local_tree / f"{number:03}"
        path.touch()
        os.setxattr(path, "user.note", b"1")
    with mounted(pair.remote_tree, "-t", "ramfs", "none"):
        await pair.own("local", 1)
        await in_step(pair)
        text = "xattr user.* cannot be kept: Operation not supported"
        await until_told(pair, f"{text} (312 files, e.g. {pair.remote_tree}/000)")


FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, IMMUTABLE = 0x80086601, 0x40086602, 0x10


def set_flag(path: Path, flag: int, on: bool) -> None:
    """chattr."""
    handle = os.open(path, os.O_RDONLY)
    try:
        flags = int.from_bytes(fcntl.ioctl(handle, FS_IOC_GETFLAGS, bytes(8))[:4], "little")
        flags = flags | flag if on else flags & ~flag
        fcntl.ioctl(handle, FS_IOC_SETFLAGS, flags.to_bytes(8, "little"))
    except OSError as error:
        pytest.skip(f"no flags here: {error.strerror}")
    finally:
        os.close(handle)


@needs_root
async def test_flags_are_not_sent_and_those_of_the_replica_are_told_of(pair: Pair) -> None:
    f, there = pair.local_tree / "f", pair.remote_tree / "f"
    f.write_text("1")
    set_flag(f, IMMUTABLE, True)
    try:
        await pair.own("local", 1)
        await in_step(pair)
        assert there.read_text() == "1"
    finally:
        set_flag(f, IMMUTABLE, False)
    set_flag(there, IMMUTABLE, True)
    sender = pair.local.groups["web"]._sender
    assert sender is not None
    try:
        os.chmod(f, 0o600)
        await in_step(pair)
        await until(lambda: bool(sender.unkept), "it was not told")
        assert f"remote: mode cannot be kept: Operation not permitted ({there})" in await problems(pair)
        f.write_text("2")
        await until(lambda: "Operation not permitted" in sender.reason, "no reason is told")
        (pair.local_tree / "other").write_text("3")
    finally:
        set_flag(there, IMMUTABLE, False)
    await in_step(pair)
    await until_told(pair)
    assert differences(pair.local_tree, pair.remote_tree) == []


@needs_root
async def test_a_device_that_may_not_be_made_leaves_nothing_of_what_was_there(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*arguments: object, **keys: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    tree = pair.local_tree
    (tree / "x").write_text("1")
    await pair.own("local", 1)
    await in_step(pair)
    (tree / "x").unlink()
    os.mknod(tree / "x", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(tree / "y", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    monkeypatch.setattr(os, "mknod", forbidden)
    await in_step(pair)
    assert list(pair.remote_tree.iterdir()) == []
    await until_told(pair, f"character device cannot be made: not permitted (2 files, e.g. {pair.remote_tree}/x)")
    (tree / "x").unlink()
    os.chmod(tree / "y", 0o640)
    await in_step(pair)
    await until_told(pair, f"character device cannot be made: not permitted ({pair.remote_tree}/y)")
    monkeypatch.undo()
    os.chmod(tree / "y", 0o600)
    await in_step(pair)
    await until_told(pair)
    assert differences(tree, pair.remote_tree) == []


async def test_a_name_in_no_encoding_breaks_no_status(pair: Pair) -> None:
    from farshore.control import api, server

    name = os.fsencode(pair.local_tree) + b"/\xff\n"
    os.mkdir(name)
    group = pair.local.groups["web"]
    await pair.own("local", 1)
    await in_step(pair)
    assert group._sender is not None
    assert group._sender._planner is not None
    group._sender._planner._note(0, b"\xff\n", "content", "Input/output error")
    answer = await server.answer(pair.local.handle, api.StatusRequest(), server.LOCAL)
    assert b"/\\xff\\n" in answer


# --- without rights


def as_nobody(call: Callable[[], Any], groups: list[int]) -> Any:
    """What ``call`` returns in a process that is not root."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups(groups)
            os.setgid(65534)
            os.setuid(65534)
            os.write(writer, pickle.dumps(call()))
            os._exit(0)
        except BaseException as error:
            os.write(writer, pickle.dumps(error))
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        result = pickle.loads(answer.read())
    os.waitpid(child, 0)
    if isinstance(result, BaseException):
        raise result
    return result


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """A directory that nobody owns; pytest's own are root's alone."""
    base = Path(tempfile.mkdtemp())
    os.chown(base, 65534, 65534)
    yield base
    shutil.rmtree(base)


@needs_root
def test_what_is_not_root_keeps_what_it_may(nobodys: Path) -> None:
    base = nobodys
    when = 10**18

    def meta(mode: int, uid: int, gid: int, *xattrs: tuple[bytes, bytes]) -> Meta:
        return Meta(mode, uid, gid, when, when, list(xattrs))

    def call() -> tuple[dict[str, tuple[int, int, int, list[str]]], list[str]]:
        unkept = Unkept()
        tree = Tree(os.fsencode(base / "tree"), Root(b"/"), unkept)
        tree.make_directory(b"", meta(0o755, 65534, 65534))
        for name, given in {
            "setuid": meta(0o4755, 0, 65534),
            "own setuid": meta(0o4755, 65534, 65534),
            "setgid": meta(0o2755, 65534, 1),
            "own group": meta(0o2775, 65534, 7777),
            "read only": meta(0o400, 65534, 65534, (b"user.a", b"1")),
            "trusted": meta(0o644, 65534, 65534, (b"trusted.a", b"1")),
            "capability": meta(0o755, 65534, 65534, (b"security.capability", CAPABILITY)),
        }.items():
            handle = os.open(base / "tree" / name, os.O_RDWR | os.O_CREAT, 0o600)
            os.close(handle)
            tree.set_meta(os.fsencode(name), given)
            tree.set_meta(os.fsencode(name), given)
        directory = os.open(base / "tree", os.O_RDONLY | os.O_DIRECTORY)
        tree.make_node(
            Staged(directory, b"new"), b"device", meta(0o644, 65534, 65534), FileKind.CHARACTER_DEVICE, os.makedev(1, 3)
        )
        tree.set_meta(b"read only", meta(0o444, 65534, 65534, (b"user.a", b"2")))
        found = {}
        for path in (base / "tree").iterdir():
            status = path.stat()
            found[path.name] = (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, os.listxattr(path))
        tree.close()
        return found, texts(unkept.causes())

    found, told = as_nobody(call, [65534, 7777])
    me = 65534
    assert found == {
        "setuid": (0o755, me, me, []),
        "own setuid": (0o4755, me, me, []),
        "setgid": (0o755, me, me, []),
        "own group": (0o2775, me, 7777, []),
        "read only": (0o444, me, me, ["user.a"]),
        "trusted": (0o644, me, me, []),
        "capability": (0o755, me, me, []),
    }
    there = base / "tree"
    assert sorted(told) == sorted(
        [
            f"owner cannot be kept: Operation not permitted ({there}/setuid)",
            f"setuid bit cannot be kept: the owner it is meant for is not kept ({there}/setuid)",
            f"group cannot be kept: Operation not permitted ({there}/setgid)",
            f"setgid bit cannot be kept: the group it is meant for is not kept ({there}/setgid)",
            f"xattr trusted.* cannot be kept: Operation not permitted ({there}/trusted)",
            f"xattr security.capability cannot be kept: Operation not permitted ({there}/capability)",
            f"character device cannot be made: not permitted ({there}/device)",
        ]
    )
    assert os.getxattr(there / "read only", "user.a") == b"2"


@needs_root
def test_with_the_powers_of_the_unit_only(tmp_path: Path, mirror: Mirror) -> None:
    """CAP_SYS_ADMIN is not among them: who has it not sees no trusted.*, and may not write Samba's ACLs."""
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv")
    unit = Path(__file__).parents[3] / "roles" / "node" / "templates" / "farshore-node.service.j2"
    powers = next(line for line in unit.read_text().splitlines() if line.startswith("CapabilityBoundingSet="))
    names = [name.removeprefix("CAP_").lower() for name in powers.partition("=")[2].split() if name.startswith("CAP_")]
    keep = "-all," + ",".join(f"+{name}" for name in names)

    class Limited(Mirror):
        def command(self, *arguments: str) -> list[str]:
            return ["setpriv", f"--bounding-set={keep}", *super().command(*arguments)]

    limited = Limited(tmp_path, mirror.source)
    f = mirror.source / "f"
    f.write_text("1")
    os.chown(f, 1234, 2345)
    os.chmod(f, 0o6755)
    os.setxattr(f, "security.capability", CAPABILITY)
    os.setxattr(f, "system.posix_acl_access", acl(*NAMED))
    os.mknod(mirror.source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    try:
        limited.start()
        assert differences(mirror.source, limited.destination) == []
        os.setxattr(f, "security.NTACL", b"1")
        limited.flush()
        assert os.stat(limited.destination / "f").st_mode == os.stat(f).st_mode
        assert os.getxattr(limited.destination / "f", "security.capability") == CAPABILITY
        status = subprocess.run(
            [sys.executable, "-m", "farshore.cli", "status", "--state", str(limited.state)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert (
            f"xattr security.NTACL cannot be kept: Operation not permitted ({limited.destination}/f)" in status.stdout
        )
    finally:
        if limited.process is not None:
            limited.kill()


# --- the rules


@pytest.mark.parametrize(
    ("group", "mask", "mode", "rights"),
    [(0, 7, 0o770, 0), (5, 6, 0o760, 0o40), (7, 7, 0o770, 0o70), (7, 7, 0o740, 0o40)],
)
def test_the_groups_rights_by_an_acl(group: int, mask: int, mode: int, rights: int) -> None:
    assert metadata.group_rights(acl(*NAMED, group=group, mask=mask), mode) == rights


@pytest.mark.parametrize("value", [b"", b"\1\0\0\0", b"\2\0\0\0x", acl(*NAMED)[:-1]])
def test_what_is_no_acl_gives_no_rights(value: bytes) -> None:
    assert metadata.group_rights(value, 0o777) == 0
    if value:
        with pytest.raises(ValueError, match="ACL"):
            list(metadata.acl_entries(value))


def test_an_acl_is_read_and_written_alike() -> None:
    assert metadata.acl_value(list(metadata.acl_entries(acl(*NAMED)))) == acl(*NAMED)
