"""The system calls of fanotify and of file handles, which Python's library lacks, and the events that they give.

fanotify(7), fanotify_init(2), fanotify_mark(2), open_by_handle_at(2); the numbers are those of linux/fanotify.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from typing import Any

ACCESS = 0x1
MODIFY = 0x2
ATTRIB = 0x4
CLOSE_WRITE = 0x8
CREATE = 0x100
DELETE = 0x200
OVERFLOW = 0x4000
#: Linux 5.17: old and new place in one event.
RENAME = 0x10000000
ON_DIRECTORY = 0x40000000
ON_CHILD = 0x08000000

_CLOEXEC = 0x1
_NONBLOCK = 0x2
_UNLIMITED_MARKS = 0x20
_REPORT_DIR_FID = 0x400
_REPORT_NAME = 0x800
_MARK_ADD = 0x1
_MARK_FILESYSTEM = 0x100
_AT_FDCWD = -100
_FOLLOW = 0x400
_MOST_HANDLE = 128

_FID_WITH_NAME = 2
_OLD = 10
_NEW = 12
# struct fanotify_event_metadata: length of the event, version, reserved, length of this, mask, descriptor, process.
_METADATA = struct.Struct("=IBBHQii")
# struct fanotify_event_info_header and what begins struct fanotify_event_info_fid: type, padding, length, fsid,
# bytes of the handle; then follow its type, the handle and the name.
_INFO = struct.Struct("=BBH8sI")
#: Where struct file_handle begins in it.
_HANDLE_AT = 12
_HANDLE_HEADER = 8

#: A directory, as the filesystem knows it: the filesystem's number and a ``struct file_handle``; and a name in it.
Entry = tuple[bytes, bytes, bytes]

_libc: Any = ctypes.CDLL(None, use_errno=True)
_MISSING = OSError(38, os.strerror(38))


def _call(name: str, *types: Any) -> Any:
    try:
        function = getattr(_libc, name)
    except AttributeError:
        return None
    function.argtypes = types
    function.restype = ctypes.c_int
    return function


_init = _call("fanotify_init", ctypes.c_uint, ctypes.c_uint)
_mark = _call("fanotify_mark", ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)
_name_handle = _call(
    "name_to_handle_at",
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_int),
    ctypes.c_int,
)
_open_handle = _call("open_by_handle_at", ctypes.c_int, ctypes.c_char_p, ctypes.c_int)


def _checked(function: Any, *arguments: object) -> int:
    if function is None:
        raise _MISSING
    result: int = function(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def create() -> int:
    """A new group whose events name the directory and the entry; a descriptor that does not block. Raises OSError."""
    flags = _CLOEXEC | _NONBLOCK | _UNLIMITED_MARKS | _REPORT_DIR_FID | _REPORT_NAME
    return _checked(_init, flags, os.O_RDONLY | os.O_CLOEXEC)


def mark_filesystem(group: int, path: bytes, mask: int) -> None:
    """Have everything reported that happens on the filesystem on which ``path`` lies. Raises OSError."""
    _checked(_mark, group, _MARK_ADD | _MARK_FILESYSTEM, mask, _AT_FDCWD, path)


def mark_directory(group: int, path: bytes, mask: int) -> None:
    """Have what happens to the entries of one directory reported. Raises OSError."""
    _checked(_mark, group, _MARK_ADD, mask, _AT_FDCWD, path)


def open_handle(mount: int, handle: bytes) -> int:
    """A descriptor (O_PATH) of what ``handle`` stands for, seen through the mount that ``mount`` lies on.

    Raises OSError: ESTALE when it is gone, or of another filesystem.
    """
    return _checked(_open_handle, mount, handle, os.O_PATH | os.O_CLOEXEC)


def handle_of(path: bytes) -> bytes:
    """The handle of what is at ``path``: another one for whatever gets the same inode later. Raises OSError."""
    room = ctypes.create_string_buffer(_MOST_HANDLE.to_bytes(4, sys.byteorder), _HANDLE_HEADER + _MOST_HANDLE)
    mount = ctypes.c_int()
    _checked(_name_handle, _AT_FDCWD, path, room, ctypes.byref(mount), _FOLLOW)
    return room.raw[: _HANDLE_HEADER + int.from_bytes(room.raw[:4], sys.byteorder)]


def events(data: bytes) -> Iterator[tuple[int, Entry | None, Entry | None]]:
    """The events in what was read: the mask, where it happened (of a rename: before), and where a rename led to."""
    position, end = 0, len(data)
    metadata, info = _METADATA.unpack_from, _INFO.unpack_from
    first = _METADATA.size
    while position + first <= end:
        length, _, _, offset, mask, _, _ = metadata(data, position)
        if length < first:
            return
        at, stop = position + offset, position + length
        where: Entry | None = None
        to: Entry | None = None
        while at < stop:
            kind, _, size, fsid, count = info(data, at)
            name_at = at + _HANDLE_AT + _HANDLE_HEADER + count
            entry = (fsid, data[at + _HANDLE_AT : name_at], data[name_at : at + size].rstrip(b"\0"))
            if kind == _NEW:
                to = entry
            elif kind in (_FID_WITH_NAME, _OLD):
                where = entry
            if not size:
                return
            at += size
        yield mask, where, to
        position = stop


def marked_devices(group: int) -> set[int]:
    """The devices whose filesystems ``group`` has marks on; those of what was unmounted are gone. Raises OSError."""
    found = set()
    with open(f"/proc/self/fdinfo/{group}") as lines:
        for line in lines:
            if line.startswith("fanotify sdev:"):
                number = int(line.split()[1].removeprefix("sdev:"), 16)
                # The kernel's own form: 12 bits of the major number, 20 of the minor.
                found.add(os.makedev(number >> 20, number & 0xFFFFF))
    return found


def filesystem_of(path: bytes | int) -> bytes:
    """The number by which events name the filesystem on which ``path`` lies. Raises OSError."""
    return (os.statvfs(path).f_fsid & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")
