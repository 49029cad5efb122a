"""Snapshots of a group's roots at the source, with the hooks around them.

At most one snapshot exists at a time. Where snapshots are put is written down before the first one is made, and that
somebody is frozen before it happens: a process that starts after another one died finds both, wakes whoever still
waits, and removes what was left behind. All of it blocks; calls belong to one thread, ``Snapshots.thread``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import signal
import stat
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from farshore import durable
from farshore.config import Consistency
from farshore.errors import FarshoreError, HookFailed, StateError
from farshore.fmm import scanner
from farshore.fmm.limits import Boundaries
from farshore.fmm.patterns import STAGING, Filter
from farshore.fmm.types import FileKind, Root
from farshore.fmm.view import Catalogue, Elsewhere, View
from farshore.log import Log

_log = Log(__name__)
_VERSION = 1
_PLACE = STAGING + b"snapshots-"
#: A thaw that fails is tried again so many times, and once more before the next snapshot.
_THAW_TRIES = 3
_THAW_PAUSE = 0.5
_TOLD = 300
# From linux/fs.h and linux/btrfs.h.
_FICLONE = 0x40049409
_SNAP_CREATE_V2 = 0x50009417
_SNAP_DESTROY = 0x5000940F
_GET_SUBVOL_ROOTREF = 0xD000943D
_INO_LOOKUP_USER = 0xD000943E
_SUBVOL_RDONLY = 1 << 1
_ARGUMENTS = 4096
_SUBVOLUME_INODE = 256
_CANNOT_CLONE = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS})
#: A file that changes while it is copied is copied again so many times.
_COPY_TRIES = 3

Check = Callable[[], None]


class SnapshotFailed(FarshoreError):
    """No snapshot: {0}"""


class Snapshots:
    """Takes and removes the snapshots of ``roots``; remembers in the directory ``state`` what must be undone."""

    def __init__(self, group: str, config: Consistency, roots: Sequence[Root], state: Path) -> None:
        self.config = config
        self._group = group
        self._roots = list(roots)
        self._places_path = state / "snapshots.json"
        self._frozen_path = state / "frozen.json"
        self._waking = threading.Lock()
        self._problem = ""
        self._notice = ""
        #: The one thread in which everything here happens.
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=f"snapshot-{group}")
        #: Seconds for which writers stood still for the last snapshot.
        self.frozen_seconds = 0.0

    def problems(self) -> list[str]:
        """What could not be undone, and what keeps a snapshot from being of one moment."""
        return [text for text in (self._notice, self._problem) if text]

    def recover(self) -> None:
        """Wake whom a process froze that died, and remove what it left behind; what fails is a problem, no error."""
        try:
            self._thaw()
            self.close()
        except FarshoreError as error:
            self._problem = str(error)
            _log.error("snapshots", error, group=self._group)

    def take(self) -> View:
        """Freeze, take a snapshot, thaw; returns the view of it. Raises SnapshotFailed, HookFailed or StateError."""
        self._problem = ""
        # A process, or a cycle, that ended in the middle may have left it so.
        self._thaw()
        self.drop()
        method = self._method()
        if not self.config.freeze:
            return method(lambda: None)
        began = time.monotonic()
        overdue = threading.Event()
        durable.write(self._frozen_path, json.dumps({"thaw": self.config.thaw}).encode())

        def wake() -> None:
            overdue.set()
            with contextlib.suppress(FarshoreError):
                self._thaw()

        def check() -> None:
            if overdue.is_set():
                raise SnapshotFailed(
                    f"it was not done within the {self.config.timeout:g} s that writers may stand still"
                )

        timer = threading.Timer(self.config.timeout, wake)
        try:
            self._hook("freeze", self.config.freeze)
            timer.start()
            view = method(check)
            check()
        finally:
            timer.cancel()
            self._thaw()
            self.frozen_seconds = time.monotonic() - began
        return view

    def drop(self) -> None:
        """Remove the snapshot, if there is one. Raises SnapshotFailed."""
        for place in self._places():
            _empty(place)

    def try_drop(self) -> None:
        """As ``drop``; what cannot be removed is a problem."""
        try:
            self.drop()
        except FarshoreError as error:
            self._problem = str(error)
            _log.error("snapshots", error, group=self._group)

    def close(self) -> None:
        """Remove everything that was made here. Raises SnapshotFailed or StateError."""
        places = self._places()
        for place in places:
            _empty(place)
            with contextlib.suppress(FileNotFoundError), _leaving_time(os.path.dirname(place)):
                os.rmdir(place)
        if places:
            self._note_places(self._token(), [])

    # --- hooks

    def _hook(self, name: str, command: str) -> None:
        """Run a shell command; raises HookFailed with the end of what it said."""
        what = f"{name} hook of group {self._group}"
        # A file and not a pipe: what a hook leaves running must not hold us up.
        with tempfile.TemporaryFile() as out:
            try:
                process = subprocess.Popen(
                    ["/bin/sh", "-c", command],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                    env={**os.environ, "FARSHORE_GROUP": self._group},
                )
            except OSError as error:
                raise HookFailed(what, error.strerror or str(error)) from None
            try:
                code = process.wait(self.config.timeout)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise HookFailed(what, f"not done within {self.config.timeout:g} s") from None
            if code:
                out.seek(0, os.SEEK_END)
                out.seek(max(0, out.tell() - _TOLD))
                said = out.read().decode(errors="replace").strip()
                raise HookFailed(what, said or f"exit code {code}")

    def _thaw(self) -> None:
        """Wake whoever was frozen, if anybody was. Raises HookFailed when they may still stand still."""
        with self._waking:
            try:
                noted = json.loads(self._frozen_path.read_bytes())
                command = str(noted["thaw"])
            except FileNotFoundError:
                return
            except (OSError, ValueError, KeyError, TypeError):
                command = self.config.thaw
            for left in reversed(range(_THAW_TRIES)):
                try:
                    if command:
                        self._hook("thaw", command)
                    break
                except HookFailed as error:
                    _log.error("thaw", error, group=self._group)
                    self._problem = f"{error}; what was frozen may still stand still"
                    if not left:
                        raise
                    time.sleep(_THAW_PAUSE)
            self._problem = ""
            with contextlib.suppress(OSError):
                self._frozen_path.unlink()

    # --- places

    def _read(self) -> tuple[str, list[bytes]]:
        try:
            data = json.loads(self._places_path.read_bytes())
            return str(data["token"]), [os.fsencode(place) for place in data["places"]]
        except FileNotFoundError:
            return "", []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(str(self._places_path), f"is damaged: {error}") from error

    def _places(self) -> list[bytes]:
        return self._read()[1]

    def _token(self) -> str:
        """Part of every place's name, so that two nodes on one filesystem never meet."""
        return self._read()[0] or secrets.token_hex(4)

    def _note_places(self, token: str, places: Sequence[bytes]) -> None:
        data = {"version": _VERSION, "token": token, "places": [os.fsdecode(place) for place in places]}
        durable.write(self._places_path, json.dumps(data).encode())

    def _make_place(self, directory: bytes) -> bytes:
        """A directory of ours in ``directory``, which is known from now on."""
        token, places = self._token(), self._places()
        place = os.path.join(directory, _PLACE + token.encode())
        if place not in places:
            self._note_places(token, [*places, place])
        with contextlib.suppress(FileExistsError), _leaving_time(directory):
            os.mkdir(place, 0o700)
        return place

    # --- methods

    def _method(self) -> Callable[[Check], View]:
        """How to take a snapshot of all roots; all that can be found out before anybody is frozen is checked."""
        paths = [self._real(root) for root in self._roots]
        self._notice = ""
        wanted = self.config.snapshot
        if wanted in ("auto", "btrfs"):
            others = [path for path in paths if not _is_btrfs(path)]
            if not others:
                return self._btrfs(paths)
            if wanted == "btrfs":
                raise SnapshotFailed(f"{os.fsdecode(others[0])} is not on btrfs")
        return self._reflink(paths)

    @staticmethod
    def _real(root: Root) -> bytes:
        try:
            return os.path.realpath(root.path, strict=True)
        except OSError as error:
            raise SnapshotFailed(f"{os.fsdecode(root.path)}: {error.strerror}") from None

    def _btrfs(self, paths: Sequence[bytes]) -> Callable[[Check], View]:
        tops = [_subvolume(path) for path in paths]
        places = {top: self._make_place(top) for top in sorted(set(tops))}
        if len(places) > 1 and not self.config.freeze:
            self._notice = (
                f"the paths lie in {len(places)} subvolumes, and nothing freezes who writes to them meanwhile"
            )
        for root, path, top in zip(self._roots, paths, tops, strict=True):
            _check_whole(root, path, top)

        def take(check: Check) -> View:
            taken_ns = time.time_ns()
            devices = {}
            for top, place in places.items():
                check()
                _create(top, place)
                devices[os.stat(os.path.join(place, b"0")).st_dev] = os.stat(top).st_dev
            # What was made in between, too, must not be missing.
            for root, path, top in zip(self._roots, paths, tops, strict=True):
                _check_whole(root, path, top)
            return Elsewhere(
                [
                    Root(os.path.normpath(os.path.join(places[top], b"0", os.path.relpath(path, top))))
                    for path, top in zip(paths, tops, strict=True)
                ],
                devices,
                taken_ns,
            )

        return _as_failure(take)

    def _reflink(self, paths: Sequence[bytes]) -> Callable[[Check], View]:
        places = [self._make_place(path if os.path.isdir(path) else os.path.dirname(path)) for path in paths]
        filters = [Filter(root) for root in self._roots]
        if not self.config.freeze:
            self._notice = "files are copied one after the other, and nothing freezes who writes to them meanwhile"

        def take(check: Check) -> View:
            catalogue = Catalogue(time.time_ns())
            boundaries = Boundaries(self._roots)
            for number, (path, place, filter) in enumerate(zip(paths, places, filters, strict=True)):
                _Copying(catalogue, number, path, place, filter, boundaries, check).run()
            return catalogue

        return _as_failure(take)


def _as_failure(take: Callable[[Check], View]) -> Callable[[Check], View]:
    def called(check: Check) -> View:
        try:
            return take(check)
        except OSError as error:
            name = f"{os.fsdecode(error.filename)}: " if error.filename else ""
            raise SnapshotFailed(f"{name}{error.strerror or error}") from error

    return called


@contextlib.contextmanager
def _leaving_time(directory: bytes):  # type: ignore[no-untyped-def]
    """What we make in a protected directory does not show in its modification time."""
    before = os.stat(directory)
    yield
    with contextlib.suppress(OSError):
        os.utime(directory, ns=(before.st_atime_ns, before.st_mtime_ns))


def _empty(place: bytes) -> None:
    """Remove all that is in a place of ours. Raises SnapshotFailed."""
    try:
        with os.scandir(place) as entries:
            names = [(entry.name, entry.inode()) for entry in entries]
        for name, _ in names:
            path = os.path.join(place, name)
            if os.lstat(path).st_ino == _SUBVOLUME_INODE and _is_btrfs(path):
                _destroy(place, name)
            else:
                shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise SnapshotFailed(f"{os.fsdecode(place)}: what is there cannot be removed: {error.strerror}") from error


# --- btrfs


def _is_btrfs(path: bytes) -> bool:
    handle = os.open(path if os.path.isdir(path) else os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(handle, _GET_SUBVOL_ROOTREF, bytearray(_ARGUMENTS))
    except OSError as error:
        # EOVERFLOW: it is, and has more subvolumes than one call tells.
        return error.errno == errno.EOVERFLOW
    finally:
        os.close(handle)
    return True


def _subvolume(path: bytes) -> bytes:
    """The top of the subvolume that ``path`` lies in."""
    device = os.stat(path).st_dev
    here = path if os.path.isdir(path) else os.path.dirname(path)
    while True:
        status = os.stat(here)
        if status.st_dev == device and status.st_ino == _SUBVOLUME_INODE:
            return here
        if status.st_dev != device or here == b"/":
            raise SnapshotFailed(f"{os.fsdecode(path)}: the top of its btrfs subvolume is not mounted")
        here = os.path.dirname(here)


def _create(top: bytes, place: bytes) -> None:
    """A read-only snapshot of the subvolume at ``top``, as ``0`` in ``place``."""
    source = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        where = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            head = struct.pack("=qQQ4Q", source, 0, _SUBVOL_RDONLY, 0, 0, 0, 0) + b"0"
            fcntl.ioctl(where, _SNAP_CREATE_V2, bytearray(head.ljust(_ARGUMENTS, b"\0")))
        finally:
            os.close(where)
    finally:
        os.close(source)


def _destroy(place: bytes, name: bytes) -> None:
    where = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        head = struct.pack("=q", 0) + name
        fcntl.ioctl(where, _SNAP_DESTROY, bytearray(head.ljust(_ARGUMENTS, b"\0")))
    finally:
        os.close(where)


def _check_whole(root: Root, path: bytes, top: bytes) -> None:
    """Raises SnapshotFailed when something protected lies in a subvolume or a filesystem of its own.

    In a snapshot its place is empty, which must not be taken for its removal; with ``one_filesystem`` it is not.
    """
    if root.one_filesystem:
        return
    filter = Filter(root)
    for other, what in [*((each, "subvolume") for each in _nested(top)), *((each, "mount") for each in _mounts())]:
        if other.startswith(path + b"/") and filter.allows(other[len(path) + 1 :], True):
            raise SnapshotFailed(
                f"{os.fsdecode(other)} is a {what} of its own below {os.fsdecode(root.path)}, which a snapshot does "
                "not hold; exclude it, or protect it as a path of its own"
            )


def _nested(top: bytes) -> list[bytes]:
    """The subvolumes that lie directly in the one at ``top``, but for ours."""
    found = []
    handle = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        least = 0
        while True:
            answer = bytearray(struct.pack("=Q", least).ljust(_ARGUMENTS, b"\0"))
            more = False
            try:
                fcntl.ioctl(handle, _GET_SUBVOL_ROOTREF, answer)
            except OSError as error:
                if error.errno != errno.EOVERFLOW:
                    raise
                more = True
            count = answer[8 + 255 * 16]
            for number in range(count):
                tree, directory = struct.unpack_from("=QQ", answer, 8 + 16 * number)
                least = tree + 1
                if (below := _named(handle, tree, directory)) is not None:
                    found.append(os.path.join(top, below))
            if not (more and count):
                break
    finally:
        os.close(handle)
    return [path for path in found if STAGING not in path]


def _named(handle: int, tree: int, directory: int) -> bytes | None:
    """The path of a nested subvolume below the directory ``handle``; None when it is gone."""
    answer = bytearray(struct.pack("=QQ", directory, tree).ljust(_ARGUMENTS, b"\0"))
    try:
        fcntl.ioctl(handle, _INO_LOOKUP_USER, answer)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    name = bytes(answer[16:272]).partition(b"\0")[0]
    return bytes(answer[272:]).partition(b"\0")[0] + name


def _mounts() -> list[bytes]:
    """Where something is mounted."""
    with open("/proc/self/mountinfo", "rb") as file:
        return [line.split()[4].decode("unicode_escape").encode("latin-1") for line in file]


# --- copies that share their blocks


class _Copying:
    """Fills a catalogue with one root, in the order of directories first."""

    def __init__(
        self,
        catalogue: Catalogue,
        root: int,
        path: bytes,
        place: bytes,
        filter: Filter,
        boundaries: Boundaries,
        check: Check,
    ) -> None:
        self._catalogue = catalogue
        self._root = root
        self._path = path
        self._place = os.path.join(place, b"%d" % root)
        self._filter = filter
        self._boundaries = boundaries
        self._check = check
        self._count = 0
        self._directories = scanner.Directories(path)

    def run(self) -> None:
        """Raises SnapshotFailed, and OSError when nothing can be copied at all."""
        os.mkdir(self._place, 0o700)
        try:
            self._one(b"")
            pending = [b""] if os.path.isdir(self._path) else []
            while pending:
                directory = pending.pop()
                try:
                    names = sorted(scanner.list_directory(self._path, directory, self._filter))
                except OSError as error:
                    if error.errno not in scanner.ABSENT:
                        self._catalogue.add_unknown(self._root, directory, error)
                    continue
                for name, is_directory in names:
                    below = directory + b"/" + name if directory else name
                    self._check()
                    if self._one(below) and is_directory and self._boundaries.mount_of(self._root, below) is None:
                        pending.append(below)
        finally:
            self._directories.forget()

    def _one(self, path: bytes) -> bool:
        """Take over one path; False when nothing is there, or nothing is known of it."""
        try:
            status = os.stat(self._path) if not path else scanner.look(self._directories, path)
            if status is None:
                return False
            if stat.S_ISREG(status.st_mode):
                return self._file(path, status)
            seen = scanner.observe(self._path, self._root, path)
        except SnapshotFailed:
            raise
        except OSError as error:
            self._catalogue.add_unknown(self._root, path, error)
            return False
        if seen is None or seen.kind is FileKind.FILE:
            return False
        self._catalogue.add(status, seen)
        return True

    def _file(self, path: bytes, status: os.stat_result) -> bool:
        try:
            source = scanner.open_file(self._directories, path) if path else scanner.open_file_beneath(self._path, path)
        except OSError as error:
            if error.errno in scanner.ABSENT:
                return False
            seen = scanner.observe(self._path, self._root, path)
            if seen is not None and seen.kind is FileKind.FILE:
                self._catalogue.add(status, seen)
                self._catalogue.copied(status, error.errno or errno.EIO)
            return seen is not None
        try:
            status = os.fstat(source)
            for _ in range(_COPY_TRIES):
                seen = scanner.observed(status, self._root, path, source)
                if self._catalogue.has_copy(status):
                    break
                copy = self._clone(source)
                now = os.fstat(source)
                if (now.st_ctime_ns, now.st_size) == (status.st_ctime_ns, status.st_size):
                    self._catalogue.copied(status, copy)
                    break
                status = now
            else:
                # It never rests, and what was copied last is as good as what comes next.
                self._catalogue.copied(status, copy)
                seen = scanner.observed(status, self._root, path, source)
        finally:
            os.close(source)
        self._catalogue.add(status, seen)
        return True

    def _clone(self, source: int) -> bytes:
        self._count += 1
        name = os.path.join(self._place, b"%d" % self._count)
        target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.ioctl(target, _FICLONE, source)
        except OSError as error:
            if error.errno in _CANNOT_CLONE:
                raise SnapshotFailed(
                    f"the filesystem of {os.fsdecode(self._path)} can neither take snapshots nor copy by reference; "
                    "btrfs can, and XFS with reflink=1"
                ) from None
            raise
        finally:
            os.close(target)
        return name
