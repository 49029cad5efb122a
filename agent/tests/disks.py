"""Disks whose power can be cut: a real filesystem on a loop device, whose backing file is a FUSE file of ours.

    ext4 or XFS  ->  loop device  ->  FUSE file  ->  a process of ours, with the image in memory

The loop driver turns a flush of its device (and what the block layer makes of FUA) into an fsync of its file. So the
process behind it knows what a disk with a volatile cache knows: the writes since the last flush, in their order. When
the power goes, what was flushed is on the platter; of what came since, any part may be, whole sectors as a unit:
``Machine.restore`` decides by lot.

The protocol is spoken directly, as a file of one name needs six of its calls: no library has to be there.
Needs root, /dev/fuse and a loop device. Linux's include/uapi/linux/fuse.h and loop.h say what the structures are.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import random
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_HEAD = struct.Struct("<IIQQIIIHH")
_REPLY = struct.Struct("<IiQ")
_TRANSFER = struct.Struct("<QQIIQII")
_ATTRIBUTES = struct.Struct("<QIIQQQQQQIIIIIIIIII")
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _WRITE, _STATFS, _RELEASE = 1, 2, 3, 14, 15, 16, 17, 18
_FSYNC, _FLUSH, _INIT, _DESTROY, _BATCH_FORGET = 20, 25, 26, 38, 42
_FOREVER = 1 << 31
_BIG_WRITES, _MAX_PAGES = 1 << 5, 1 << 22
#: Past the kernel's cache: the image may change behind it, when the power is cut.
_DIRECT_IO = 1
_MOST = 1 << 20
_PAGE = 4096

_MNT_DETACH = 2
_MS_PRIVATE, _MS_REC = 1 << 18, 1 << 14
_CLONE_NEWNS = 0x20000
#: XFS_IOC_GOINGDOWN and EXT4_IOC_SHUTDOWN, and to do it without writing anything.
_GOING_DOWN, _NO_LOG_FLUSH = 0x8004587D, 2
_LOOP_CONFIGURE, _LOOP_CLR_FD, _LOOP_CTL_GET_FREE = 0x4C0A, 0x4C01, 0x4C82
_LOOP_CONFIG = struct.Struct("<II52xI176x64x")
_LOOP_MAJOR = 7
_DIRECT_LOOP = 16
#: sync_file_range(2): wait for what is under way, begin with the rest, and wait for that.
_WRITE_AND_WAIT = 7
_SECONDS = 60.0


class Unavailable(Exception):
    """This machine cannot have such disks; the message says why."""


class Unmountable(OSError):
    """The filesystem did not come back after the power did."""


class DisksEnded(OSError):
    """The process behind the disks is not there any more, or does not answer; the message names its log."""


@dataclass(frozen=True)
class Filesystem:
    """What is on a disk: ``sector`` is the unit (bytes) that a disk writes whole or not at all."""

    name: str
    kind: str
    size: int
    sector: int
    make: tuple[str, ...]
    options: str = "defaults"
    #: Whether the loop driver reads and writes its file with O_DIRECT; flushes pass either way.
    direct: bool = False


#: Small journals, so that they wrap around and are written back often. A disk with 512-byte sectors may tear a block:
#: ext4's journal mends that, XFS wants sectors of the size it was made with.
FILESYSTEMS = {
    each.name: each
    for each in (
        Filesystem(
            "ext4", "ext4", 384 << 20, 512, ("-q", "-E", "nodiscard,lazy_itable_init=0", "-N", "8192", "-J", "size=8")
        ),
        # Without the help for programs that rename without a sync, and with commits once a second.
        Filesystem(
            "ext4-strict",
            "ext4",
            384 << 20,
            _PAGE,
            ("-q", "-E", "nodiscard,lazy_itable_init=0", "-N", "8192", "-J", "size=8"),
            "noauto_da_alloc,commit=1",
        ),
        Filesystem("xfs", "xfs", 384 << 20, _PAGE, ("-q", "-K"), direct=True),
    )
}


@dataclass
class Survived:
    """What was on the platter of the unflushed writes, after a cut."""

    #: "nothing", "all", "prefix", "writes" (any of them) or "sectors" (any sectors of them).
    lot: str
    writes: int = 0
    bytes: int = 0
    kept_bytes: int = 0
    #: Writes of which a part is there.
    torn: int = 0


def why_not(kind: str = "ext4") -> str:
    """Why this machine cannot have such disks with this filesystem; "" when it can."""
    if os.geteuid() != 0:
        return "disks whose power is cut need root"
    for device in ("/dev/fuse", "/dev/loop-control"):
        try:
            os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            return f"{device}: {error.strerror}"
    if not shutil.which(f"mkfs.{kind}"):
        return f"mkfs.{kind} is not installed"
    return ""


def write_back(device: int) -> bool:
    """Have what was written to a block device's handle reach the disk, without a flush; returns whether it did."""
    return bool(_libc.sync_file_range(device, 0, 0, _WRITE_AND_WAIT) == 0)


def wait_until(condition: Callable[[], bool], seconds: float = _SECONDS) -> None:
    """Wait for a condition; raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.005)


def enter_namespace() -> None:
    """Give this process mounts of its own: whatever ends it, they end with it. Raises Unavailable."""
    if _libc.unshare(_CLONE_NEWNS) or _libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
        raise Unavailable(f"no mount namespace: {os.strerror(ctypes.get_errno())}")


class Machine:
    """Some disks that lose power together, each with a filesystem that is mounted at ``mounts[number]``.

    Cut with ``freeze`` (from now on nothing is answered, so nothing more is promised), kill what runs there, then
    ``fail`` and ``unmount``; ``restore`` decides what survived, and ``mount`` brings it up again. The mounts belong to
    this process's mount namespace; ``close`` takes back everything, as does the end of this process, whatever caused
    it. Calls raise OSError.
    """

    def __init__(self, base: Path, filesystem: Filesystem, count: int = 1, lies: bool = False) -> None:
        """Make ``count`` empty disks below ``base``; ``lies``: they flush nothing and say they did.

        Raises Unavailable.
        """
        self.filesystem = filesystem
        self.mounts = [base / f"mount{number}" for number in range(count)]
        self._log = base / "disks.log"
        self._files = [base / f"image{number}" for number in range(count)]
        self._loops: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        try:
            base.mkdir(parents=True, exist_ok=True)
            for file, mount in zip(self._files, self.mounts, strict=True):
                file.touch()
                mount.mkdir()
            self._attach(lies)
            for number in range(count):
                self._loops.append(self._make_loop(self._files[number]))
                device = self.device(number)
                self._run("mkfs." + filesystem.kind, *filesystem.make, device)
            self._ask("know", self._loops, [os.fsencode(mount) for mount in self.mounts])
            self.mount()
        except BaseException:
            self.close()
            raise

    # --- life

    def _attach(self, lies: bool) -> None:
        fuses = []
        try:
            for file in self._files:
                fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
                fuses.append(fuse)
                options = f"fd={fuse},rootmode={stat.S_IFREG | 0o600:o},user_id=0,group_id=0"
                if _libc.mount(b"farshore-disk", os.fsencode(file), b"fuse", 0, options.encode()):
                    raise Unavailable(f"mounting a FUSE file: {os.strerror(ctypes.get_errno())}")
            ours, theirs = Pipe()
            with theirs, self._log.open("ab") as log:
                handles = [theirs.fileno(), *fuses]
                self._process = subprocess.Popen(
                    [sys.executable, __file__, str(self.filesystem.size), str(int(lies)), *map(str, handles)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=handles,
                    # Ctrl-C is for the one who cuts; this process ends after it, and cleans up.
                    start_new_session=True,
                )
            self._control: Connection = ours
        finally:
            for fuse in fuses:
                os.close(fuse)

    def _make_loop(self, file: Path) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        backing = os.open(file, flags)
        try:
            with _opened("/dev/loop-control", flags) as control:
                for _ in range(100):
                    number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
                    config = bytearray(
                        _LOOP_CONFIG.pack(backing, self.filesystem.sector, _DIRECT_LOOP * self.filesystem.direct)
                    )
                    try:
                        with _opened(_loop_path(number), flags) as loop:
                            fcntl.ioctl(loop, _LOOP_CONFIGURE, config)
                            return number
                    except OSError as error:
                        # Somebody was faster.
                        if error.errno != errno.EBUSY:
                            raise Unavailable(f"a loop device: {error.strerror}") from error
            raise Unavailable("a loop device: all are busy")
        except OSError as error:
            raise Unavailable(f"a loop device: {error.strerror}") from error
        finally:
            os.close(backing)

    def device(self, number: int = 0) -> str:
        """The path of a disk's block device; it stays the same through all cuts."""
        return _loop_path(self._loops[number])

    def close(self) -> None:
        """Take back everything. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            # It knows what is to be taken back. Children may have the pipe open still, so its end is not enough.
            with contextlib.suppress(OSError):
                self._control.send(("end",))
            self._control.close()
            try:
                process.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for file in self._files:
            while _libc.umount2(os.fsencode(file), _MNT_DETACH) == 0:
                pass

    # --- the power

    def mount(self) -> bool:
        """Mount all filesystems; False when the disks froze meanwhile: the power went during recovery.

        Raises Unmountable.
        """
        for number, where in enumerate(self.mounts):
            command = [
                "mount",
                "-t",
                self.filesystem.kind,
                "-o",
                self.filesystem.options,
                self.device(number),
                str(where),
            ]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            while process.poll() is None:
                if self.frozen:
                    self.fail()
                    process.wait(_SECONDS)
                    return False
                time.sleep(0.002)
            output = process.communicate()[0]
            if self.frozen:
                return False
            if process.returncode:
                raise Unmountable(f"{self.device(number)} of {where}: {output.strip()}")
        return True

    def freeze(self) -> None:
        """The power goes: from now on nothing is answered."""
        self._ask("freeze")

    def freeze_at(self, what: str, count: int) -> None:
        """Freeze before the ``count``-th "write" or "flush" from now on; 0 for never."""
        self._ask("freeze_at", what, count)

    @property
    def frozen(self) -> bool:
        """Whether the power is gone."""
        return bool(self._ask("frozen"))

    def fail(self) -> None:
        """After a freeze, when nobody is left to see it: all that waits ends with an error."""
        self._ask("fail")
        for where in self.mounts:
            # Else the filesystem tries to write all that is left, in vain but for long.
            with contextlib.suppress(OSError), _opened(where, os.O_RDONLY | os.O_CLOEXEC) as handle:
                if os.fstat(handle).st_dev in self._devices():
                    fcntl.ioctl(handle, _GOING_DOWN, struct.pack("=I", _NO_LOG_FLUSH))

    def unmount(self) -> None:
        """Take the dead filesystems away; waits until whoever was using them is gone."""
        deadline = time.monotonic() + _SECONDS
        for where in self.mounts:
            while _libc.umount2(os.fsencode(where), 0):
                code = ctypes.get_errno()
                if code == errno.EINVAL:
                    break  # nothing is mounted there
                if code != errno.EBUSY or time.monotonic() > deadline:
                    raise OSError(code, os.strerror(code), str(where))
                time.sleep(0.01)

    def restore(self, seed: int) -> Survived:
        """Decide by lot what is on the platter of the writes that no flush had followed; the power is back.

        All disks of the machine have the same kind of lot; what is returned is the sum over them.
        """
        for number in range(len(self._loops)):
            _forget_cache(self.device(number))
        return Survived(*self._ask("restore", seed, self.filesystem.sector))

    def counts(self) -> dict[str, int]:
        """How many writes and flushes there were since the power came."""
        counted: dict[str, int] = self._ask("counts")
        return counted

    def sync(self) -> None:
        """Write back all filesystems."""
        for where in self.mounts:
            with _opened(where, os.O_RDONLY | os.O_CLOEXEC) as handle:
                _libc.syncfs(handle)

    def save(self, directory: Path) -> None:
        """Write the disks' images as they are now to files in ``directory``, to be mounted from there."""
        directory.mkdir(parents=True, exist_ok=True)
        self._ask("save", [str(directory / f"disk{number}.img") for number in range(len(self._files))])

    # ---

    def _devices(self) -> set[int]:
        return {os.makedev(_LOOP_MAJOR, number) for number in self._loops}

    def _ask(self, *request: Any) -> Any:
        try:
            self._control.send(request)
            if not self._control.poll(_SECONDS):
                raise DisksEnded(f"the disks do not answer; see {self._log}")
            return self._control.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise DisksEnded(f"the process behind the disks has ended; see {self._log}") from None

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"{' '.join(command)}: {done.stdout.strip()}")


# --- the process behind the disks


@dataclass
class _Disk:
    """An image, and what was written since the last flush: where, what, and what was there before."""

    fuse: int
    image: int
    size: int
    unflushed: list[tuple[int, bytes, bytes]] = field(default_factory=list)

    def write(self, at: int, data: bytes) -> None:
        self.unflushed.append((at, data, os.pread(self.image, len(data), at)))
        os.pwrite(self.image, data, at)

    def restore(self, lot: str, chance: random.Random, sector: int, survived: Survived) -> None:
        """Take back what did not survive."""
        writes, self.unflushed = self.unflushed, []
        for at, _, before in reversed(writes):
            os.pwrite(self.image, before, at)
        share = chance.choice([0.1, 0.5, 0.9])
        end = chance.randrange(len(writes) + 1)
        for number, (at, data, _) in enumerate(writes):
            survived.writes += 1
            survived.bytes += len(data)
            kept = 0
            for start in range(0, len(data), sector if lot == "sectors" else len(data)):
                if (
                    lot == "all"
                    or (lot == "prefix" and number < end)
                    or (lot in ("writes", "sectors") and chance.random() < share)
                ):
                    part = data[start : start + sector] if lot == "sectors" else data
                    os.pwrite(self.image, part, at + start)
                    kept += len(part)
            survived.kept_bytes += kept
            survived.torn += 0 < kept < len(data)


class _Server:
    """Answers the kernel and the one who cuts, until the latter is gone."""

    def __init__(self, control: Connection, fuses: list[int], size: int, lies: bool) -> None:
        self._control = control
        self._lies = lies
        self._disks = {}
        for fuse in fuses:
            image = os.memfd_create("farshore-disk")
            os.ftruncate(image, size)
            self._disks[fuse] = _Disk(fuse, image, size)
        self._buffer = bytearray(_MOST + _PAGE)
        self._frozen = self._failing = False
        self._held: list[tuple[int, int]] = []
        self._counts = {"write": 0, "flush": 0}
        self._freeze_at: tuple[str, int] = ("", 0)
        self._loops: list[int] = []
        self._mounts: list[bytes] = []

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Serve until the pipe's other end is closed, or ``until`` says so."""
        poll = select.poll()
        for fuse in self._disks:
            poll.register(fuse, select.POLLIN)
        poll.register(self._control, select.POLLIN)
        while not until():
            for handle, _ in poll.poll(100):
                if handle == self._control.fileno():
                    try:
                        request = self._control.recv()
                    except (EOFError, ConnectionResetError):
                        return
                    if request == ("end",):
                        return
                    self._control.send(getattr(self, "ask_" + request[0])(*request[1:]))
                elif not self._take(handle):
                    poll.unregister(handle)

    def take_back(self) -> None:
        """Whoever used the disks is gone: leave nothing of them behind."""
        self._frozen = self._failing = True
        self._release()
        # What is taken back may ask the disks, so they are served meanwhile.
        thread = threading.Thread(target=self._take_back, daemon=True)
        thread.start()
        self._control, _other = Pipe()  # which stays open, and says nothing
        deadline = time.monotonic() + _SECONDS / 2
        self.run(lambda: not thread.is_alive() or time.monotonic() > deadline)

    def _take_back(self) -> None:
        for mount in self._mounts:
            with contextlib.suppress(OSError), _opened(mount, os.O_RDONLY | os.O_CLOEXEC) as handle:
                if os.major(os.fstat(handle).st_dev) == _LOOP_MAJOR:
                    fcntl.ioctl(handle, _GOING_DOWN, struct.pack("=I", _NO_LOG_FLUSH))
            _libc.umount2(mount, _MNT_DETACH)
        for number in self._loops:
            with contextlib.suppress(OSError), _opened(_loop_path(number), os.O_RDWR | os.O_CLOEXEC) as loop:
                fcntl.ioctl(loop, _LOOP_CLR_FD)

    # --- what is asked

    def ask_know(self, loops: list[int], mounts: list[bytes]) -> None:
        self._loops, self._mounts = loops, mounts

    def ask_freeze(self) -> None:
        self._frozen = True

    def ask_freeze_at(self, what: str, count: int) -> None:
        self._freeze_at = what, count

    def ask_frozen(self) -> bool:
        return self._frozen

    def ask_fail(self) -> None:
        self._frozen = self._failing = True
        self._release()

    def ask_restore(self, seed: int, sector: int) -> tuple[Any, ...]:
        chance = random.Random(seed)
        survived = Survived(chance.choice(["nothing", "all", "prefix", "writes", "writes", "sectors", "sectors"]))
        for disk in self._disks.values():
            disk.restore(survived.lot, chance, sector, survived)
        self._frozen = self._failing = False
        self._freeze_at = "", 0
        self._counts = dict.fromkeys(self._counts, 0)
        return astuple(survived)

    def ask_counts(self) -> dict[str, int]:
        return self._counts

    def ask_save(self, files: list[str]) -> None:
        for disk, name in zip(self._disks.values(), files, strict=True):
            with open(name, "wb") as file:
                for at in range(0, disk.size, _MOST):
                    if (data := os.pread(disk.image, _MOST, at)).strip(b"\0"):
                        os.pwrite(file.fileno(), data, at)
                file.truncate(disk.size)

    # --- what the kernel asks

    def _take(self, fuse: int) -> bool:
        """One request; False when there will be no more."""
        try:
            length = os.readv(fuse, [self._buffer])
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EINTR, errno.ENOENT)
        _, opcode, unique, *_ = _HEAD.unpack_from(self._buffer)
        body = memoryview(self._buffer)[_HEAD.size : length]
        if opcode in (_READ, _WRITE, _FSYNC):
            self._count(opcode)
            if self._failing:
                self._reply(fuse, unique, error=errno.EIO)
            elif self._frozen:
                self._held.append((fuse, unique))
            else:
                self._transfer(self._disks[fuse], unique, opcode, body)
        elif opcode not in (_FORGET, _BATCH_FORGET):
            self._answer(self._disks[fuse], unique, opcode, body)
        return True

    def _count(self, opcode: int) -> None:
        what = {_WRITE: "write", _FSYNC: "flush"}.get(opcode)
        if what is None or self._frozen:
            return
        self._counts[what] += 1
        awaited, left = self._freeze_at
        if awaited == what and left:
            self._freeze_at = awaited, left - 1
            self._frozen = left == 1

    def _transfer(self, disk: _Disk, unique: int, opcode: int, body: memoryview) -> None:
        if opcode == _FSYNC:
            if not self._lies:
                disk.unflushed.clear()
            self._reply(disk.fuse, unique)
            return
        _, at, size, *_ = _TRANSFER.unpack_from(body)
        if opcode == _READ:
            self._reply(disk.fuse, unique, os.pread(disk.image, size, at))
        elif at + size > disk.size:
            self._reply(disk.fuse, unique, error=errno.ENOSPC)
        else:
            disk.write(at, bytes(body[_TRANSFER.size : _TRANSFER.size + size]))
            self._reply(disk.fuse, unique, struct.pack("<II", size, 0))

    def _answer(self, disk: _Disk, unique: int, opcode: int, body: memoryview) -> None:
        match opcode:
            case 26:  # _INIT
                _, _, ahead, flags = struct.unpack_from("<IIII", body)
                flags &= _BIG_WRITES | _MAX_PAGES
                most = struct.pack("<IIIIHHIIHHIII", 7, 31, ahead, flags, 64, 48, _MOST, 1, _MOST // _PAGE, 0, 0, 0, 0)
                self._reply(disk.fuse, unique, most.ljust(64, b"\0"))
            case 3:  # _GETATTR
                mode = stat.S_IFREG | 0o600
                ids = (0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, _PAGE, 0)
                attributes = (1, disk.size, disk.size // 512, *ids)
                self._reply(disk.fuse, unique, _ATTRIBUTES.pack(_FOREVER, 0, 0, *attributes))
            case 14:  # _OPEN
                self._reply(disk.fuse, unique, struct.pack("<QII", 0, _DIRECT_IO, 0))
            case 17:  # _STATFS
                self._reply(disk.fuse, unique, struct.pack("<QQQQQIIII24x", 0, 0, 0, 0, 0, _PAGE, 255, _PAGE, 0))
            case 18 | 25 | 38:  # _RELEASE, _FLUSH (close), _DESTROY
                self._reply(disk.fuse, unique)
            case _:
                self._reply(disk.fuse, unique, error=errno.ENOSYS)

    def _release(self) -> None:
        held, self._held = self._held, []
        for fuse, unique in held:
            self._reply(fuse, unique, error=errno.EIO)

    @staticmethod
    def _reply(fuse: int, unique: int, data: bytes = b"", error: int = 0) -> None:
        # Whoever asked may be gone.
        with contextlib.suppress(OSError):
            os.writev(fuse, [_REPLY.pack(_REPLY.size + len(data), -error, unique), data])


def _serve(size: str, lies: str, control: str, *fuses: str) -> None:
    """Be the process behind the disks."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    server = _Server(Connection(int(control)), [int(fuse) for fuse in fuses], int(size), bool(int(lies)))
    server.run()
    server.take_back()


def _forget_cache(device: str) -> None:
    """Nothing that was read from the device before is remembered."""
    with contextlib.suppress(OSError), _opened(device, os.O_RDONLY | os.O_CLOEXEC) as handle:
        fcntl.ioctl(handle, 0x1261)  # BLKFLSBUF


def _loop_path(number: int) -> str:
    path = f"/dev/loop{number}"
    if not os.path.exists(path):
        # A container's /dev may be older than the device.
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(_LOOP_MAJOR, number))
    return path


@contextlib.contextmanager
def _opened(path: str | bytes | Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags)
    try:
        yield handle
    finally:
        os.close(handle)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
