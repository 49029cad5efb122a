"""Give an object of the replica its metadata, and tell what of it cannot be kept.

The order matters: a change of owner takes setuid, setgid and capabilities away, and an ACL brings a mode with it. So
the owner comes first, then attributes, then the mode, and at last the times. What cannot be kept gives nobody rights
that the source did not give: without its owner a program is not setuid, as it would be for another one, and without its
ACL the group has the rights that the ACL gave the group, not those of the mask.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator

from farshore.dbm.messages import Meta
from farshore.fmm.attributes import ACL_ACCESS, is_replicated, label

#: What says that this system, filesystem or process cannot hold it, today or tomorrow.
_CANNOT = frozenset(
    {
        errno.EPERM,
        errno.EACCES,
        errno.ENOTSUP,
        errno.EINVAL,
        errno.ENOSYS,
        # Values and lists of attributes have limits, and ext4 has little space for all of a file's.
        errno.E2BIG,
        errno.ERANGE,
    }
)
_SPECIAL = stat.S_ISUID | stat.S_ISGID
_SECOND = 1_000_000_000
#: Where filesystems begin to differ in what times they hold (XFS without bigtime, ext4 with small inodes).
_PLAIN_TIMES = 1 << 31
# linux/posix_acl_xattr.h, linux/posix_acl.h
_ACL_VERSION = 2
_ACL_HEAD = struct.Struct("<I")
_ACL_ENTRY = struct.Struct("<HHI")
ACL_USER, ACL_GROUP_OBJ, ACL_GROUP, ACL_MASK = 0x02, 0x04, 0x08, 0x10

Where = int | bytes
Tell = Callable[[str], None]


class Clock:
    """What is known of the times that filesystems hold, by device; None stands for the stage's."""

    def __init__(self) -> None:
        self._fine: set[int | None] = set()

    def is_exact(self, device: int | None, time_ns: int) -> bool:
        """Whether the filesystem surely keeps this time as it is."""
        return device in self._fine and 0 <= time_ns // _SECOND < _PLAIN_TIMES

    def saw(self, device: int | None, time_ns: int) -> None:
        """The filesystem kept this time as it is; one with odd nanoseconds shows that it keeps all."""
        if time_ns % 10:
            self._fine.add(device)


def give(
    where: Where,
    meta: Meta,
    tell: Tell,
    clock: Clock,
    *,
    owner: tuple[int, int] | None,
    mode: int | None,
    bare: bool,
    link: bool = False,
    device: int | None = None,
) -> None:
    """Give the object at ``where`` (a descriptor, or a path that leads to the object itself) the metadata ``meta``.

    ``owner`` and ``mode``: what it has; None when that is not known. ``bare``: it has no attributes. ``link``: it is a
    symbolic link. ``tell`` is called with each cause for which something is not kept. Raises OSError for what may
    well be kept at another time.
    """
    wanted = meta.mode
    if owner != (meta.uid, meta.gid):
        mode = None
        wanted = _give_owner(where, meta, tell, owner)
    if meta.xattrs or not bare:
        changed, lost_acl = _give_attributes(where, meta, tell, bare)
        if changed:
            mode = None
        if lost_acl is not None:
            wanted = wanted & ~stat.S_IRWXG | group_rights(lost_acl, wanted)
    if not link and mode != wanted:
        _give_mode(where, wanted, tell)
    _give_times(where, meta, tell, clock, device)


def acl_entries(value: bytes) -> Iterator[tuple[int, int, int]]:
    """The entries of an ACL as (tag, permissions, id); raises ValueError when it is none."""
    if len(value) < _ACL_HEAD.size or _ACL_HEAD.unpack_from(value) != (_ACL_VERSION,):
        raise ValueError("no ACL of version 2")
    if (len(value) - _ACL_HEAD.size) % _ACL_ENTRY.size:
        raise ValueError("an ACL that ends within an entry")
    return _ACL_ENTRY.iter_unpack(value[_ACL_HEAD.size :])


def acl_value(entries: list[tuple[int, int, int]]) -> bytes:
    """The inverse of ``acl_entries``."""
    return _ACL_HEAD.pack(_ACL_VERSION) + b"".join(_ACL_ENTRY.pack(*entry) for entry in entries)


def group_rights(acl: bytes, mode: int) -> int:
    """The mode bits that the owning group has by an access ACL, whose mask stands in their place in ``mode``."""
    group, mask = 0, 7
    try:
        for tag, permissions, _ in acl_entries(acl):
            if tag == ACL_GROUP_OBJ:
                group = permissions
            elif tag == ACL_MASK:
                mask = permissions
    except ValueError:
        return 0
    return (group & mask & 7) << 3 & mode


def _give_owner(where: Where, meta: Meta, tell: Tell, owner: tuple[int, int] | None) -> int:
    """Returns the mode that may be given to what has this owner now."""
    try:
        os.chown(where, meta.uid, meta.gid)
        return meta.mode
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        cause = error
    # Who is not root may give a file to another group that he belongs to.
    if owner is None:
        status = os.stat(where)
        owner = status.st_uid, status.st_gid
    wanted = meta.mode
    directory = stat.S_ISDIR(os.stat(where).st_mode)
    if owner[1] != meta.gid and not _try_group(where, meta.gid):
        tell(_text("group", cause))
        if not directory and wanted & stat.S_ISGID:
            wanted &= ~stat.S_ISGID
            tell("setgid bit cannot be kept: the group it is meant for is not kept")
    if owner[0] != meta.uid:
        tell(_text("owner", cause))
        if not directory and wanted & stat.S_ISUID:
            wanted &= ~stat.S_ISUID
            tell("setuid bit cannot be kept: the owner it is meant for is not kept")
    return wanted


def _try_group(where: Where, gid: int) -> bool:
    try:
        os.chown(where, -1, gid)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return False
    return True


def _give_mode(where: Where, mode: int, tell: Tell) -> None:
    try:
        os.chmod(where, mode)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        tell(_text("mode", error))
        return
    # The kernel drops setgid without a word where we do not belong to the group.
    if mode & _SPECIAL and stat.S_IMODE(os.stat(where).st_mode) & _SPECIAL != mode & _SPECIAL:
        tell("setuid or setgid bit cannot be kept: Operation not permitted")


def _give_attributes(where: Where, meta: Meta, tell: Tell, bare: bool) -> tuple[bool, bytes | None]:
    """Returns whether the mode may be another one now, and the access ACL if it could not be kept."""
    there = set() if bare else _listed(where, tell)
    wanted = dict(meta.xattrs)
    changing = _Changing(where, tell)
    for name in sorted(there - set(wanted)):
        if is_replicated(name):
            changing.remove(name)
    for name, value in wanted.items():
        if not is_replicated(name):
            tell(f"{label(name)} cannot be kept: it is not one that is replicated")
        elif not (name in there and _value(where, name) == value):
            changing.set(name, value)
    return changing.mode_changed, wanted[ACL_ACCESS] if ACL_ACCESS in changing.lost and ACL_ACCESS in wanted else None


def _listed(where: Where, tell: Tell) -> set[bytes]:
    try:
        return {os.fsencode(name) for name in os.listxattr(where)}
    except OSError as error:
        # Where there are no attributes, none is to be removed.
        if error.errno not in _CANNOT:
            raise
        if error.errno != errno.ENOTSUP:
            tell(_text("what extended attributes there are", error))
        return set()


def _value(where: Where, name: bytes) -> bytes | None:
    try:
        return os.getxattr(where, name)
    except OSError:
        return None


class _Changing:
    """Changes of the attributes of one object."""

    def __init__(self, where: Where, tell: Tell) -> None:
        self._where = where
        self._tell = tell
        self._widened = os.geteuid() == 0
        self.mode_changed = False
        #: Those that could not be changed.
        self.lost: set[bytes] = set()

    def remove(self, name: bytes) -> None:
        """Take an attribute away."""
        try:
            self._do(name, lambda: os.removexattr(self._where, name))
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise

    def set(self, name: bytes, value: bytes) -> None:
        """Set an attribute."""
        self._do(name, lambda: os.setxattr(self._where, name, value))

    def _do(self, name: bytes, change: Callable[[], None]) -> None:
        self.mode_changed |= name == ACL_ACCESS
        try:
            try:
                change()
            except PermissionError as error:
                if error.errno != errno.EACCES or self._widened:
                    raise
                self._widen()
                change()
        except OSError as error:
            if error.errno not in _CANNOT and not (error.errno == errno.ENOSPC and self._has_room()):
                raise
            self.lost.add(name)
            self._tell(_text(label(name), error))

    def _widen(self) -> None:
        """Who is not root needs the right to write for ``user.*``; the mode that is wanted comes afterwards."""
        self._widened = self.mode_changed = True
        status = os.stat(self._where)
        if status.st_uid == os.geteuid():
            os.chmod(self._where, stat.S_IMODE(status.st_mode) | stat.S_IRUSR | stat.S_IWUSR)

    def _has_room(self) -> bool:
        """Whether it is only the space for a file's attributes that is full, not the disk, where room can be made."""
        status = os.statvfs(self._where)
        return status.f_bavail > 0 or status.f_blocks == 0


def _give_times(where: Where, meta: Meta, tell: Tell, clock: Clock, device: int | None) -> None:
    try:
        os.utime(where, ns=(meta.atime_ns, meta.mtime_ns))
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        tell(_text("times", error))
        return
    if clock.is_exact(device, meta.mtime_ns):
        return
    # The system takes any time, and keeps the nearest that the filesystem has.
    kept = os.stat(where).st_mtime_ns
    if kept == meta.mtime_ns:
        clock.saw(device, kept)
    elif abs(kept - meta.mtime_ns) < 2 * _SECOND:
        tell("times cannot be kept exactly: the filesystem has coarser ones")
    else:
        tell("times cannot be kept: the filesystem has none so far away")


def _text(what: str, error: OSError) -> str:
    return f"{what} cannot be kept: {error.strerror}"
