"""What the scanner says about real files."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from pathlib import Path

import pytest
from msgspec.structs import replace

from farshore.errors import UnsafePath
from farshore.fmm import FileKind, Observed, Root
from farshore.fmm.patterns import Filter
from farshore.fmm.scanner import list_directory, observe, observe_directory, open_beneath, walk

ALL = Filter(Root(b"/"))
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def top(tmp_path: Path) -> bytes:
    return os.fsencode(tmp_path)


def fail(path: bytes, error: OSError) -> None:
    raise AssertionError((path, error))


def see(top: bytes | int, path: bytes) -> Observed:
    found = observe(top, 3, path)
    assert found is not None
    assert found.root == 3
    assert found.path == path
    return found


def test_file(top: bytes) -> None:
    with open(top + b"/f", "wb") as file:
        file.write(b"x" * 5000)
    os.link(top + b"/f", top + b"/g")
    os.chmod(top + b"/f", 0o4751)
    os.utime(top + b"/f", ns=(1_000_000_001, 2_000_000_002))
    status = os.lstat(top + b"/f")
    found = see(top, b"f")
    assert found == Observed(
        root=3,
        path=b"f",
        kind=FileKind.FILE,
        mode=0o4751,
        uid=status.st_uid,
        gid=status.st_gid,
        size=5000,
        atime_ns=1_000_000_001,
        mtime_ns=2_000_000_002,
        ctime_ns=status.st_ctime_ns,
        dev=status.st_dev,
        ino=status.st_ino,
        nlink=2,
        rdev=0,
        blocks=status.st_blocks,
        target=None,
        xattrs=(),
    )


def test_symlinks_are_told_of_not_followed(top: bytes) -> None:
    os.mkdir(top + b"/d")
    os.mkdir(top + b"/d/below")
    os.symlink(b"d", top + b"/link")
    os.symlink(b"\xff\n nowhere", top + b"/dangling")
    assert see(top, b"link").kind is FileKind.SYMLINK
    assert see(top, b"link").target == b"d"
    assert see(top, b"dangling").target == b"\xff\n nowhere"
    assert observe(top, 0, b"link/below") is None
    with pytest.raises(OSError):
        open_beneath(top, b"link/below", os.O_RDONLY)
    with pytest.raises(OSError):
        open_beneath(top, b"link", os.O_RDONLY)


def test_special_files(top: bytes) -> None:
    os.mkfifo(top + b"/fifo")
    assert see(top, b"fifo").kind is FileKind.FIFO
    with socket.socket(socket.AF_UNIX) as server:
        fd = os.open(top, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{fd}/socket")
        os.close(fd)
    assert see(top, b"socket").kind is FileKind.SOCKET


@needs_root
def test_devices(top: bytes) -> None:
    os.mknod(top + b"/null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(top + b"/loop", stat.S_IFBLK | 0o600, os.makedev(7, 0))
    assert (see(top, b"null").kind, see(top, b"null").rdev) == (FileKind.CHARACTER_DEVICE, os.makedev(1, 3))
    assert see(top, b"loop").kind is FileKind.BLOCK_DEVICE


def test_absent(top: bytes) -> None:
    open(top + b"/f", "wb").close()
    assert observe(top, 0, b"no") is None
    assert observe(top, 0, b"no/no") is None
    assert observe(top, 0, b"f/no") is None
    assert observe(top + b"/no", 0, b"") is None


@pytest.mark.parametrize("path", [b"..", b"a/../b", b"/a", b"a/", b"a//b", b"./a"])
def test_paths_that_could_leave_the_root_are_refused(top: bytes, path: bytes) -> None:
    with pytest.raises(UnsafePath):
        observe(top, 0, path)


def test_root_as_path_descriptor_link_and_file(top: bytes) -> None:
    os.mkdir(top + b"/d")
    open(top + b"/d/f", "wb").close()
    os.symlink(b"d", top + b"/link")
    os.symlink(b"nowhere", top + b"/dangling")
    fd = os.open(top + b"/d", os.O_RDONLY)
    try:
        assert see(fd, b"") == see(top + b"/d", b"") == see(top + b"/link", b"")
        assert see(fd, b"f") == see(top + b"/link", b"f")
    finally:
        os.close(fd)
    assert see(top + b"/d/f", b"").kind is FileKind.FILE
    assert observe(top + b"/d/f", 0, b"x") is None
    assert see(top + b"/dangling", b"").kind is FileKind.SYMLINK


def set_xattr(path: bytes, name: str, value: bytes) -> None:
    try:
        os.setxattr(path, name, value)
    except OSError as error:
        pytest.skip(f"no {name} here: {error.strerror}")


def test_user_xattrs_are_sorted(top: bytes) -> None:
    open(top + b"/f", "wb").close()
    os.mkdir(top + b"/d")
    for path in (b"/f", b"/d"):
        set_xattr(top + path, "user.b", b"2\0")
        set_xattr(top + path, "user.a", b"")
        assert see(top, path[1:]).xattrs == ((b"user.a", b""), (b"user.b", b"2\0"))


@needs_root
def test_what_a_host_computes_by_itself_is_left_out(top: bytes) -> None:
    open(top + b"/f", "wb").close()
    os.symlink(b"f", top + b"/l")
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    set_xattr(top + b"/f", "trusted.x", b"1")
    set_xattr(top + b"/f", "security.selinux", b"host:label")
    set_xattr(top + b"/f", "trusted.overlay.origin", b"handle")
    set_xattr(top + b"/f", "security.capability", capability)
    assert see(top, b"f").xattrs == ((b"security.capability", capability), (b"trusted.x", b"1"))
    os.setxattr(top + b"/l", "trusted.y", b"2", follow_symlinks=False)
    assert see(top, b"l").xattrs == ((b"trusted.y", b"2"),)


def test_more_attributes_than_can_be_listed_hide_nothing_else(top: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    open(top + b"/f", "wb").close()

    def too_many(path: bytes) -> list[str]:
        raise OSError(7, "Argument list too long")

    monkeypatch.setattr(os, "listxattr", too_many)
    assert (see(top, b"f").xattrs, see(top, b"f").unlisted) == ((), True)


def test_acls_are_kept(top: bytes) -> None:
    os.mkdir(top + b"/d")
    # Version 2, then (tag, permissions, id): user::rwx user:1:rwx group::r-x mask::rwx other::r-x
    entries = [(1, 7, -1), (2, 7, 1), (4, 5, -1), (0x10, 7, -1), (0x20, 5, -1)]
    acl = b"\2\0\0\0" + b"".join(
        tag.to_bytes(2, "little") + mode.to_bytes(2, "little") + (who & 0xFFFFFFFF).to_bytes(4, "little")
        for tag, mode, who in entries
    )
    set_xattr(top + b"/d", "system.posix_acl_access", acl)
    set_xattr(top + b"/d", "system.posix_acl_default", acl)
    assert see(top, b"d").xattrs == ((b"system.posix_acl_access", acl), (b"system.posix_acl_default", acl))


def test_xattr_that_vanishes_meanwhile_is_left_out(top: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    open(top + b"/f", "wb").close()
    monkeypatch.setattr(os, "listxattr", lambda path: ["user.gone"])
    assert see(top, b"f").xattrs == ()


def test_walk_gives_parents_before_children_and_any_name(top: bytes) -> None:
    for path in (b"/a/b/c", b"/\xff\n/d"):
        os.makedirs(top + path)
    for path in (b"/a/b/c/f", b"/\xff\n/d/\xfe", b"/x"):
        open(top + path, "wb").close()
    os.symlink(b"a", top + b"/link")
    found = list(walk(top, 0, b"", ALL, fail))
    paths = [seen.path for seen in found]
    assert sorted(paths) == sorted(
        [b"", b"a", b"a/b", b"a/b/c", b"a/b/c/f", b"\xff\n", b"\xff\n/d", b"\xff\n/d/\xfe", b"link", b"x"]
    )
    for path in paths[1:]:
        assert paths.index(path.rpartition(b"/")[0]) < paths.index(path)
    assert [seen.path for seen in walk(top, 0, b"a/b/c", ALL, fail)] == [b"a/b/c", b"a/b/c/f"]
    assert [seen.path for seen in walk(top, 0, b"x", ALL, fail)] == [b"x"]
    assert list(walk(top, 0, b"no", ALL, fail)) == []
    # Listing a directory and reading a link may change their access times.
    again = [replace(see(top, path), root=0, atime_ns=0) for path in paths]
    assert [replace(seen, atime_ns=0) for seen in found] == again


def test_walk_and_list_obey_the_filter(top: bytes) -> None:
    for path in (b"/cache/keep", b"/cache/other", b"/a", b"/.farshore-1"):
        os.makedirs(top + path)
        open(top + path + b"/f", "wb").close()
    chosen = Filter(Root(top, ("cache/keep/",), ("cache/",)))
    paths = {seen.path for seen in walk(top, 0, b"", chosen, fail)}
    assert paths == {b"", b"a", b"a/f", b"cache", b"cache/keep", b"cache/keep/f"}
    assert set(list_directory(top, b"", chosen)) == {(b"a", True), (b"cache", True)}
    assert set(list_directory(top, b"cache", chosen)) == {(b"keep", True)}
    assert list(list_directory(top, b"a", chosen)) == [(b"f", False)]
    with pytest.raises(FileNotFoundError):
        list(list_directory(top, b"no", chosen))
    with pytest.raises(NotADirectoryError):
        list(list_directory(top, b"a/f", chosen))


def test_a_directory_is_observed_by_itself(top: bytes) -> None:
    os.makedirs(top + b"/d/e/f")
    for name in (b"d/a", b"d/b.tmp", b"d/e/c", b"d/.farshore-x"):
        open(top + b"/" + name, "w").close()
    os.symlink(b"e", top + b"/d/link")
    patterns = Filter(Root(top, exclude=("*.tmp",)))

    def observed(path: bytes) -> list[tuple[int, bytes, FileKind]]:
        found = observe_directory(top, 3, path, patterns, fail)
        return sorted((each.root, each.path, each.kind) for each in found)

    assert observed(b"d") == [
        (3, b"d/a", FileKind.FILE),
        (3, b"d/e", FileKind.DIRECTORY),
        (3, b"d/link", FileKind.SYMLINK),
    ]
    assert observed(b"") == [(3, b"d", FileKind.DIRECTORY)]
    # Neither what is gone, nor what is no directory, nor what a link leads to holds anything.
    assert observed(b"gone") == observed(b"d/a") == observed(b"d/link") == []


def test_walk_deeper_than_a_path_may_be_long(top: bytes) -> None:
    name = b"d" * 200
    here = os.open(top, os.O_RDONLY)
    for _ in range(60):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open(b"f", os.O_CREAT, dir_fd=here))
    os.close(here)
    found = list(walk(top, 0, b"", ALL, fail))
    assert len(found) == 62
    assert found[-1].path.endswith(b"/f")
    assert observe(top, 0, found[-1].path) == found[-1]
    shutil.rmtree(top)


def test_walk_survives_what_vanishes(top: bytes) -> None:
    for n in range(50):
        os.makedirs(top + b"/d%d/e" % n)
        open(top + b"/d%d/f" % n, "wb").close()
    seen = 0
    for _ in walk(top, 0, b"", ALL, fail):
        seen += 1
        if seen == 10:
            for n in range(50):
                shutil.rmtree(top + b"/d%d" % n)
    assert seen >= 10


def test_what_cannot_be_read_is_reported(top: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    os.makedirs(top + b"/a/b")
    os.makedirs(top + b"/c")
    open(top + b"/c/f", "wb").close()
    real = os.open

    def refuse(path: bytes, flags: int, *args: int, dir_fd: int | None = None) -> int:
        if path == b"a" and not flags & os.O_PATH:
            raise PermissionError(13, "Permission denied")
        if path == b"f":
            raise OSError(5, "Input/output error")
        return real(path, flags, *args, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)
    problems: dict[bytes, OSError] = {}
    found = [seen.path for seen in walk(top, 0, b"", ALL, problems.__setitem__)]
    assert sorted(found) == [b"", b"a", b"c"]
    assert {path: error.errno for path, error in problems.items()} == {b"a": 13, b"c/f": 5}
    with pytest.raises(OSError):
        observe(top, 0, b"c/f")
    with pytest.raises(PermissionError):
        list(list_directory(top, b"a", ALL))


def test_no_descriptor_leaks(top: bytes) -> None:
    os.makedirs(top + b"/a/b")
    os.symlink(b"x", top + b"/l")
    before = len(os.listdir("/proc/self/fd"))
    for path in (b"a", b"a/b", b"l", b"no", b"l/x", b"a/no/x"):
        observe(top, 0, path)
    for _ in walk(top, 0, b"", ALL, fail):
        break
    list(walk(top, 0, b"", ALL, fail))
    assert len(os.listdir("/proc/self/fd")) == before
