"""Compare two trees by everything that a replica must keep, and change a tree at random."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

#: What the tests skip when the two sides can't agree on it: directories' sizes and all inode numbers.
_Entry = tuple[object, ...]
_KEPT = ("user.", "trusted.", "security.", "system.posix")
#: What each host labels by itself.
_OWN = ("security.selinux", "security.ima", "security.evm")


def _any(path: bytes, is_directory: bool) -> bool:
    return True


def describe(
    top: str | os.PathLike[str],
    *,
    times_of_directories: bool = True,
    allows: Callable[[bytes, bool], bool] = _any,
) -> dict[bytes, _Entry]:
    """Every path below ``top`` (b"" is ``top``): type, mode, owner, time, content, target, xattrs, link set.

    ``allows`` tells of a path, and of whether it is a directory, whether it counts.
    """
    root = os.fsencode(top)
    found: dict[bytes, _Entry] = {}
    names_of: dict[tuple[int, int], list[bytes]] = {}
    paths = [
        path for path in _paths(root) if not path or allows(path, stat.S_ISDIR(os.lstat(root + b"/" + path).st_mode))
    ]
    for path in paths:
        status = os.lstat(root + b"/" + path if path else root)
        if not stat.S_ISDIR(status.st_mode):
            names_of.setdefault((status.st_dev, status.st_ino), []).append(path)
    for path in paths:
        full = root + b"/" + path if path else root
        status = os.lstat(full)
        kind = stat.S_IFMT(status.st_mode)
        content: object = None
        links: object = None
        xattrs = sorted(
            (n, os.getxattr(full, n, follow_symlinks=False))
            for n in os.listxattr(full, follow_symlinks=False)
            if n.startswith(_KEPT) and n not in _OWN
        )
        if kind not in (stat.S_IFDIR, stat.S_IFCHR, stat.S_IFBLK):
            links = sorted(names_of[status.st_dev, status.st_ino])
        if kind == stat.S_IFREG:
            content = Path(os.fsdecode(full)).read_bytes()
        elif kind == stat.S_IFLNK:
            content = os.readlink(full)
        found[path] = (
            kind,
            stat.S_IMODE(status.st_mode),
            status.st_uid,
            status.st_gid,
            status.st_mtime_ns if times_of_directories or kind != stat.S_IFDIR else 0,
            status.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
            content,
            links,
            xattrs,
        )
    return found


def differences(
    left: str | os.PathLike[str],
    right: str | os.PathLike[str],
    *,
    times_of_directories: bool = True,
    allows: Callable[[bytes, bool], bool] = _any,
) -> list[str]:
    """One line for each path at which the trees differ, naming what does; empty when they are identical."""
    a, b = (describe(top, times_of_directories=times_of_directories, allows=allows) for top in (left, right))
    # Sockets live and die with their server: no replica has them.
    a = {path: entry for path, entry in a.items() if entry[0] != stat.S_IFSOCK}
    fields = ("type", "mode", "uid", "gid", "mtime", "rdev", "content", "links", "xattrs")
    lines = []
    for path in sorted(set(a) | set(b)):
        if path not in a or path not in b:
            lines.append(f"{path!r} only {'left' if path in a else 'right'}")
            continue
        wrong = [
            f"{name} {str(x)[:60]} / {str(y)[:60]}"
            for name, x, y in zip(fields, a[path], b[path], strict=True)
            if x != y
        ]
        if wrong:
            lines.append(f"{path!r}: {'; '.join(wrong)}")
    return lines


def _paths(root: bytes) -> Iterator[bytes]:
    yield b""
    if not os.path.isdir(root) or os.path.islink(root):
        return
    for directory, names, files in os.walk(root):
        for name in names + files:
            yield os.path.relpath(os.path.join(directory, name), root)


class Mutator:
    """Random changes of all kinds below ``root``, repeatable by ``seed``."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root = root
        self._random = random.Random(seed)
        self._count = 0

    def step(self) -> None:
        """One change; one that does not apply to what it happens to hit is no change."""
        often = [self._write, self._rename]
        once = [self._write, self._append, self._patch, self._large, self._truncate, self._mkdir, self._rename]
        more = [self._unlink, self._rmtree, self._chmod, self._chown, self._link, self._symlink, self._fifo]
        last = [self._xattr, self._utime, self._replace, self._insert]
        action = self._random.choice([*often, *once, *more, *last])
        try:
            action()
        except (OSError, ValueError):
            return

    def _all(self, kind: int | None = None) -> list[Path]:
        found = []
        for directory, names, files in os.walk(self._root):
            for name in names + files:
                path = Path(directory, name)
                if kind is None or stat.S_IFMT(path.lstat().st_mode) == kind:
                    found.append(path)
        return found

    def _pick(self, kind: int | None = None) -> Path:
        found = self._all(kind)
        if not found:
            raise ValueError
        return self._random.choice(found)

    def _new(self) -> Path:
        self._count += 1
        directories = [self._root, *self._all(stat.S_IFDIR)]
        weird = self._random.choice(["", " x", "\n", "é", "\udcff", '"', "'", "-", "*"])
        return self._random.choice(directories) / f"{weird}n{self._count}"

    def _bytes(self, most: int) -> bytes:
        return self._random.randbytes(self._random.randrange(most))

    def _write(self) -> None:
        self._new().write_bytes(self._bytes(20_000))

    def _large(self) -> None:
        self._new().write_bytes(self._random.randbytes(self._random.randrange(60_000, 400_000)))

    def _append(self) -> None:
        with self._pick(stat.S_IFREG).open("ab") as file:
            file.write(self._bytes(9000))

    def _patch(self) -> None:
        path = self._pick(stat.S_IFREG)
        with path.open("r+b") as file:
            file.seek(self._random.randrange(path.stat().st_size + 1))
            file.write(self._bytes(5000))

    def _insert(self) -> None:
        path = self._pick(stat.S_IFREG)
        data = path.read_bytes()
        at = self._random.randrange(len(data) + 1)
        path.write_bytes(data[:at] + self._bytes(50) + data[at:])

    def _truncate(self) -> None:
        path = self._pick(stat.S_IFREG)
        os.truncate(path, self._random.randrange(path.stat().st_size + 5000))

    def _mkdir(self) -> None:
        path = self._new()
        path.mkdir()
        for i in range(self._random.randrange(4)):
            (path / f"f{i}").write_bytes(self._bytes(100))

    def _rename(self) -> None:
        source = self._pick()
        target = self._random.choice([self._new(), self._pick()])
        source.rename(target)

    def _replace(self) -> None:
        target = self._pick(stat.S_IFREG)
        temporary = target.with_name(".tmp-save")
        temporary.write_bytes(self._bytes(120_000))
        temporary.replace(target)

    def _unlink(self) -> None:
        self._pick(stat.S_IFREG).unlink()

    def _rmtree(self) -> None:
        import shutil

        if self._random.random() < 0.3:
            shutil.rmtree(self._pick(stat.S_IFDIR))

    def _chmod(self) -> None:
        path = self._pick()
        if not path.is_symlink():
            path.chmod(self._random.choice([0o600, 0o644, 0o755, 0o700, 0o4755]) | (0o700 if path.is_dir() else 0))

    def _chown(self) -> None:
        if os.geteuid() == 0:
            os.lchown(self._pick(), self._random.randrange(3000), self._random.randrange(3000))

    def _link(self) -> None:
        os.link(self._pick(stat.S_IFREG), self._new())

    def _symlink(self) -> None:
        self._new().symlink_to(self._random.choice(["nowhere", "/etc/passwd", "../..", "n1"]))

    def _fifo(self) -> None:
        os.mkfifo(self._new())

    def _xattr(self) -> None:
        os.setxattr(self._pick(stat.S_IFREG), b"user.note", self._bytes(30))

    def _utime(self) -> None:
        path = self._pick()
        os.utime(path, ns=(1, self._random.randrange(2**60)), follow_symlinks=False)
