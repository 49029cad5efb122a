"""The inotify engine. The only file that knows pyinotify.

pyinotify gives the system calls and the constants. Two of its parts are not
used, because they would lose changes: its watch manager keeps a path per watch, which is wrong for
all of a subtree once a directory above was renamed, and its reader decodes names strictly, so that
one undecodable name ends it. Here a watch knows its parent and its own name, and names stay bytes.

How the map of watches stays true, although events tell of the past and the disk has moved on:

- A directory is known by its watch, not by its path: adding a watch again to the same inode gives
  the same number. So whatever a path leads to can be recognised, exactly, at any time.
- An event about a subdirectory is only a reason to look at that name now and make the map agree.
  Before that, the directory above is opened by the path that the map gives and recognised. Where it
  is not the right one, later events about that path are still to come: it is looked at again then.
- A watch is added first, then the directory is listed through the same descriptor. Each newly
  watched directory is reported as RESCAN, so what happened in it before the watch is covered.
- Trees are watched many directories at a time (``descent``). Each is opened in the one above, which
  was recognised by its watch.
- A directory that is gone from its place keeps its watches for a moment. When it turns up again, as
  after a rename, it is put back with all that hangs below; if not, its watches are removed.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import logging
import os
import struct
import termios
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farshore.fmm import kernel, mounts
from farshore.fmm.descent import ELSEWHERE, MOST, TOO_LARGE, Descent, Found
from farshore.fmm.engine import Engine
from farshore.fmm.mounts import Mount
from farshore.fmm.patterns import STAGING
from farshore.fmm.protected import (
    OTHER_FILESYSTEM,
    PARENT,
    REMEDIES,
    RESCAN,
    RESCAN_INTERVAL,
    ROOT_INTERVAL,
    Protected,
)
from farshore.fmm.scanner import ABSENT, open_beneath
from farshore.fmm.types import Kind, Root
from farshore.log import Log

with warnings.catch_warnings():
    # It imports asyncore, which is deprecated and which we do not use.
    warnings.simplefilter("ignore", DeprecationWarning)
    import pyinotify

# It installs a handler of its own on import; its records belong into our log.
logging.getLogger("pyinotify").handlers.clear()

log = Log(__name__)

_CREATE: int = pyinotify.IN_CREATE
_DELETE: int = pyinotify.IN_DELETE
_FROM: int = pyinotify.IN_MOVED_FROM
_TO: int = pyinotify.IN_MOVED_TO
_ATTRIB: int = pyinotify.IN_ATTRIB
_MODIFY: int = pyinotify.IN_MODIFY
# A file written through mmap reports nothing until it is unmapped and so finally closed.
_CLOSE: int = pyinotify.IN_CLOSE_WRITE
_ACCESS: int = pyinotify.IN_ACCESS
_ISDIR: int = pyinotify.IN_ISDIR
_IGNORED: int = pyinotify.IN_IGNORED
_UNMOUNT: int = pyinotify.IN_UNMOUNT
_OVERFLOW: int = pyinotify.IN_Q_OVERFLOW
_GONE: int = pyinotify.IN_DELETE_SELF | pyinotify.IN_MOVE_SELF | _UNMOUNT | _IGNORED
_ENTRY = _CREATE | _DELETE | _FROM | _TO
_EVENTS = _ENTRY | _ATTRIB | _MODIFY | _CLOSE | _ACCESS

# Symlinks are not followed by the way in which directories are opened (O_NOFOLLOW); IN_DONT_FOLLOW
# would make the kernel stop at /proc/self/fd's own link.
_MASK: int = (
    _ENTRY
    | _ATTRIB
    | _MODIFY
    | _CLOSE
    | pyinotify.IN_DELETE_SELF
    | pyinotify.IN_MOVE_SELF
    | pyinotify.IN_ONLYDIR
    # Else a directory that is watched again is not watched for a moment, and what happens in it then is lost.
    | pyinotify.IN_MASK_ADD
    | pyinotify.IN_EXCL_UNLINK
)

_KINDS = {
    _CREATE: Kind.CREATED,
    _DELETE: Kind.DELETED,
    _FROM: Kind.MOVED_FROM,
    _TO: Kind.MOVED_TO,
    _ATTRIB: Kind.ATTRIBUTES,
    _MODIFY: Kind.MODIFIED,
    _CLOSE: Kind.MODIFIED,
    _ACCESS: Kind.ATTRIBUTES,
}


class _Bits(dict[int, int]):
    """From an event's mask to the kinds of a hint; one event may carry several (a chown that truncates)."""

    def __missing__(self, mask: int) -> int:
        kinds = [kind.value for one, kind in _KINDS.items() if mask & one]
        self[mask] = sum(set(kinds)) or Kind.ATTRIBUTES.value
        return self[mask]


_BITS = _Bits()

# struct inotify_event (inotify(7)): wd, mask, cookie, length of the name with its padding.
_HEADER = struct.Struct("iIII")
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH_LIMIT = 4000

#: Seconds between two looks at everything because of mounts, which come and go by the dozen where containers run.
_MOUNTS_INTERVAL = 30.0

#: Seconds for which a directory that vanished from its place keeps its watches.
_GRACE = 1.0

_REMEDIES = REMEDIES | {
    errno.ENOSPC: "the limit on watches is reached ({watches}); raise it: sysctl -w fs.inotify.max_user_watches={more}",
}


class _Node:
    """A watched directory. ``owner``, ``base`` are where it lies, as of ``generation``."""

    __slots__ = ("base", "children", "generation", "name", "owner", "parent", "top_of", "unwatched", "wd")

    def __init__(self, wd: int) -> None:
        self.wd = wd
        self.parent: _Node | None = None
        self.name = b""
        self.children: dict[bytes, _Node] = {}
        #: Subdirectories that cannot be watched, each with the reason.
        self.unwatched: dict[bytes, str] | None = None
        #: The root whose own directory this is.
        self.top_of: _Watched | None = None
        self.generation = -1
        self.owner: _Watched | None = None
        self.base = b""


class _Watched(Protected):
    """A root, with its watches."""

    __slots__ = ("mounts", "parent_wd", "top")

    def __init__(self, index: int, root: Root) -> None:
        super().__init__(index, root)
        self.top: _Node | None = None
        #: What was mounted below it when that was looked at last.
        self.mounts: frozenset[Mount] = frozenset()
        self.parent_wd = -1

    @property
    def watched(self) -> bool:
        return self.top is not None or self.parent_wd >= 0


#: Directories that are watched at one go: where each lies, its path from the top of the walk, and names in it.
_Part = list[tuple[_Node, bytes, list[bytes]]]


@dataclass(slots=True)
class _Walk:
    """A descent from the directory ``top``, open as ``fd``."""

    top: _Node
    fd: int
    #: Directories, each with the names in it that are to be watched.
    waiting: list[tuple[_Node, list[bytes]]]
    #: The same, from which another walk must begin; None if the names are not known.
    far: list[tuple[_Node, list[bytes] | None]] = field(default_factory=list)
    #: Names under which something was found that is known in another place.
    known: list[tuple[_Node, bytes]] = field(default_factory=list)
    #: Watches of what is not where it should be.
    strays: list[int] = field(default_factory=list)


class InotifyWatcher(Engine[_Watched]):
    """Watches directory trees and single files with inotify (the Watcher protocol of ``types``).

    A hint of MOVED_FROM or DELETED for a directory carries RESCAN, as does each new directory: a
    RESCAN covers all that lies, or lay, below. ``read`` reports each path at most once per call, its
    kinds joined. An excluded entry that comes or goes is a change of the directory that holds it; one of
    our own staging files is not.

    What inotify cannot tell: writes through a mapping that is never unmapped (``Mapped`` finds those); a change
    through another hard link that came and went before anybody could look at it (else, such a change is reported for
    the name that was used only), or that was removed while somebody goes on writing to what he opened by it; changes
    that other machines make on a network filesystem, or on this one through a server in the kernel.

    ``reads`` also reports (as ATTRIBUTES) files that were only read. ``cookies`` is a directory of our own, by default
    a temporary one, for the changes by which ``drain`` proves that it has seen all. ``clock`` is a monotonic clock.
    Raises WatchError for roots that lie in each other and for patterns that are wrong.
    """

    name = "inotify"

    def __init__(
        self,
        roots: Sequence[Root],
        *,
        reads: bool = False,
        cookies: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__([_Watched(index, root) for index, root in enumerate(roots)], cookies, clock)
        # A renamed directory can keep its watches as they are only where no pattern could decide
        # otherwise under the new name.
        self._plain = all(root.plain for root in self._roots)
        self._mask = _MASK | (_ACCESS if reads else 0)
        self._system: Any = None
        #: This thread's, and its helper's.
        self._descents: tuple[Descent, ...] = ()
        self._cookie_wd = -1
        self._nodes: dict[int, _Node] = {}
        self._parents: dict[int, dict[bytes, _Watched]] = {}
        self._generation = 0
        #: Directories out of their place, each with the time at which it was lost sight of.
        self._orphans: dict[_Node, float] = {}
        #: Directories whose entries must be compared with the map once their path is right again.
        self._unsure: dict[_Node, None] = {}
        #: Directories with subdirectories that cannot be watched.
        self._short: dict[_Node, None] = {}
        self._exhausted = False
        self._next_mounts = 0.0

    # Events.

    def _pump(self) -> None:
        self._read()
        if self._unsure and not self._queued():
            self._resolve()
        now = self._clock()
        if now >= self._next_check or self._check_now:
            self._next_check = now + ROOT_INTERVAL
            self._check_roots()
            self._resolve()
            self._expire(now)
        if now >= self._next_rescan:
            self._next_rescan = now + RESCAN_INTERVAL
            self._retry_unwatched()

    def _settle_all(self) -> None:
        # Who asks must not wait.
        self._next_mounts = 0.0
        self._resolve()
        self._check_roots()
        self._doubt_lost()
        for node in self._unsure:
            owner = self._locate(node)
            if owner is not None:
                owner.mark(node.base[:-1], RESCAN)
        self._retry_unwatched()
        self._resolve()

    def _queued(self) -> int:
        if self._fd < 0:
            return 0
        size = array.array("i", [0])
        fcntl.ioctl(self._fd, termios.FIONREAD, size)
        return size[0]

    def _digest(self, data: bytes) -> None:
        position, end = 0, len(data)
        unpack, header = _HEADER.unpack_from, _HEADER.size
        nodes, parents = self._nodes, self._parents
        while position < end:
            wd, mask, _, length = unpack(data, position)
            position += header
            name = data[position : position + length].rstrip(b"\0") if length else b""
            position += length
            self._events += 1
            if parents and wd in parents:
                self._file_event(wd, mask, name)
            node = nodes.get(wd)
            if wd == self._cookie_wd:
                self._cookies.seen(name)
            if node is None:
                if mask & _OVERFLOW:
                    self._overflow()
                    return
                continue
            if mask & _GONE:
                self._gone(node, mask)
                continue
            owner = node.owner if node.generation == self._generation else self._locate(node)
            if owner is None:
                if mask & _ISDIR and mask & _ENTRY:
                    self._unsure[node] = None
                continue
            path = node.base + name if name else node.base[:-1]
            marks = owner.marks
            bits = _BITS[mask & _EVENTS]
            if mask & _ISDIR:
                if mask & _ENTRY:
                    self._directory_event(node, owner, name, bits)
                    continue
                if mask & _EVENTS == _ACCESS:
                    # Our own scans read directories.
                    continue
            known = marks.get(path)
            if known is None:
                if name.startswith(STAGING):
                    continue
                if owner.plain or owner.filter.allows(path, bool(mask & _ISDIR)):
                    marks[path] = bits
            elif known & bits != bits:
                marks[path] = known | bits
            if mask & _ENTRY:
                above = node.base[:-1]
                marks[above] = marks.get(above, 0) | PARENT

    def _directory_event(self, node: _Node, owner: _Watched, name: bytes, bits: int) -> None:
        path = node.base + name
        if name.startswith(STAGING):
            return
        if owner.filter.allows(path, True):
            owner.mark(path, bits | RESCAN)
        owner.mark(node.base[:-1], PARENT)
        self._settle(node, name)

    def _file_event(self, wd: int, mask: int, name: bytes) -> None:
        files = self._parents[wd]
        if mask & _IGNORED:
            for lost in list(files.values()):
                self._lose(lost)
        elif mask & _GONE:
            self._check_now = True
        root = files.get(name) if name else None
        if root is None:
            return
        root.mark(b"", _BITS[mask & _EVENTS])
        if mask & _ISDIR and mask & (_CREATE | _TO):
            self._check_now = True

    def _gone(self, node: _Node, mask: int) -> None:
        root = node.top_of
        if root is not None:
            if mask & _IGNORED:
                self._lose(root)
            root.mark(b"", RESCAN)
            self._check_now = True
        elif mask & _IGNORED:
            self._forget(node)
        elif mask & _UNMOUNT and node.parent is not None:
            # What lay under the mount is in sight again.
            owner = self._locate(node)
            if owner is not None:
                owner.mark(node.base[:-1], RESCAN)
            self._unsure[node.parent] = None

    def _directories(self) -> int:
        # Asked for with every read: not by a difference of sets, which would go through all of the larger one.
        return len(self._nodes) + sum(wd not in self._nodes for wd in self._parents)

    # The map of watches.

    def _locate(self, node: _Node) -> _Watched | None:
        """The root that ``node`` lies in, None while it is out of place; brings ``node.base`` up to date."""
        generation = self._generation
        chain = []
        at = node
        while at.generation != generation and at.parent is not None:
            chain.append(at)
            at = at.parent
        if at.generation != generation:
            at.generation, at.owner, at.base = generation, at.top_of, b""
        for below in reversed(chain):
            below.owner = at.owner
            below.base = at.base + below.name + b"/"
            below.generation = generation
            at = below
        return node.owner

    def _settle(self, node: _Node, name: bytes) -> None:
        """Make the map agree with what is called ``name`` in ``node`` now."""
        owner = self._locate(node)
        if owner is None:
            self._unsure[node] = None
            return
        if not owner.filter.allows(node.base + name, True):
            self._let_go(node, name)
            return
        fd = self._recognise(node)
        if fd is None:
            self._unsure[node] = None
            return
        try:
            self._enter(node, name, fd)
        finally:
            os.close(fd)

    def _enter(self, node: _Node, name: bytes, directory: int) -> bool:
        """Watch the directory ``name`` in ``node``, which is open as ``directory``, and all below it.

        True when watches were added, so that something may have been missed before.
        """
        fd = self._descend(node, name, directory)
        if fd is None:
            return False
        try:
            self._explore(node.children[name], fd)
        finally:
            os.close(fd)
        return True

    def _descend(self, node: _Node, name: bytes, directory: int) -> int | None:
        """Put the directory ``name`` in its place below ``node``; its descriptor if it is to be explored."""
        try:
            fd = os.open(name, _OPEN, dir_fd=directory)
        except OSError as error:
            if error.errno in ABSENT:
                self._let_go(node, name)
            else:
                self._give_up(node, name, self._reason(error))
            return None
        explore = False
        try:
            owner = self._locate(node)
            if owner is not None and owner.root.one_filesystem and os.fstat(fd).st_dev != owner.identity[0]:
                self._let_go(node, name)
                return None
            wd = self._add_watch(fd)
            found = self._nodes.get(wd)
            if found is None:
                found = self._nodes[wd] = _Node(wd)
                explore = True
            elif node.children.get(name) is found:
                pass
            elif not self._free(node, name, found):
                return None
            elif not self._plain:
                # Other patterns may apply in its new place: afresh.
                self._drop(found)
                found = _Node(self._add_watch(fd))
                self._nodes[found.wd] = found
                explore = True
            self._attach(node, name, found)
            return fd if explore else None
        except OSError as error:
            self._give_up(node, name, self._reason(error))
            return None
        finally:
            if not explore:
                os.close(fd)

    def _free(self, node: _Node, name: bytes, found: _Node) -> bool:
        """Whether ``found``, which is known elsewhere, can be moved to ``name`` in ``node``."""
        if found.parent is not None or found.top_of is not None:
            fd = self._recognise(found)
            if fd is not None:
                os.close(fd)
                self._give_up(node, name, "it is the same directory as another watched one (a bind mount?)")
                return False
        if found.top_of is not None:
            root = found.top_of
            self._lose(root)
            root.mark(b"", RESCAN)
            self._check_now = True
            # Its watch is gone, so that it will be a new directory when it is looked at again.
            self._unsure[node] = None
            return False
        above: _Node | None = node
        while above is not None:
            if above is found:
                # The map is behind: what it takes for an ancestor has moved. More events will tell.
                self._unsure[node] = None
                return False
            above = above.parent
        if found.parent is not None:
            # No event has told that it left its place: something else may be there.
            self._unsure[found.parent] = None
        return True

    def _explore(self, top: _Node, fd: int) -> None:
        """Watch every directory below ``top``, which is newly watched and open as ``fd``."""
        far: list[tuple[_Node, list[bytes] | None]] = [(top, None)]
        while far:
            node, names = far.pop()
            at = fd if node is top else self._recognise(node)
            if at is None:
                self._unsure[node] = None
                continue
            try:
                walk = _Walk(node, at, [(node, self._listing(node, at) if names is None else names)])
                self._go(walk)
            finally:
                if at != fd:
                    os.close(at)
            far += walk.far
            # Only now: while more are added elsewhere, what is taken back could be one of these.
            for wd in walk.strays:
                self._release(wd)
            for above, name in walk.known:
                self._settle(above, name)

    def _go(self, walk: _Walk) -> None:
        """Watch all that is ``waiting`` in a walk, and all below it; what needs a closer look is put aside there."""
        owner = self._locate(walk.top)
        device = owner.identity[0] if owner is not None and owner.root.one_filesystem else None
        mine, other = self._descents
        helper: ThreadPoolExecutor | None = None
        ahead: tuple[_Part, Future[list[tuple[int, list[Found]]]]] | None = None
        try:
            while True:
                part = self._next_part(walk)
                if part and walk.waiting and ahead is None:
                    # There is enough for two.
                    helper = helper or _hire()
                    if helper is not None:
                        ahead = part, helper.submit(other.watch, walk.fd, _wanted(part), device)
                        part = self._next_part(walk)
                if part:
                    self._take_part(walk, part, mine.watch(walk.fd, _wanted(part), device))
                elif ahead is None:
                    return
                if ahead is not None and (ahead[1].done() or not part):
                    self._take_part(walk, ahead[0], ahead[1].result())
                    ahead = None
        finally:
            if helper is not None:
                helper.shutdown()

    def _next_part(self, walk: _Walk) -> _Part:
        """The next directories that are to be watched; none when none are waiting."""
        part: _Part = []
        room = MOST
        while walk.waiting and room:
            node, names = walk.waiting.pop()
            if not names:
                continue
            if node.wd < 0 or self._locate(node) is None or not node.base.startswith(walk.top.base):
                self._unsure[node] = None
                continue
            path = node.base[len(walk.top.base) : -1]
            if len(path) > _PATH_LIMIT:
                walk.far.append((node, names))
                continue
            if len(names) > room:
                walk.waiting.append((node, names[room:]))
                names = names[:room]
            room -= len(names)
            part.append((node, path, names))
        return part

    def _take_part(self, walk: _Walk, part: _Part, result: list[tuple[int, list[Found]]]) -> None:
        """Put the directories that were watched in their places, and have those below them watched."""
        for (node, _, names), (wd, found) in zip(part, result, strict=True):
            if wd != node.wd:
                # Something else has its place by now.
                walk.strays.append(wd)
                self._unsure[node] = None
                continue
            for name, each in zip(names, found, strict=True):
                if each.wd < 0:
                    self._left_out(node, name, -each.wd)
                    continue
                child = self._nodes.get(each.wd)
                if child is not None:
                    if node.children.get(name) is not child:
                        # It is known in another place.
                        walk.known.append((node, name))
                    continue
                child = self._nodes[each.wd] = _Node(each.wd)
                self._attach(node, name, child)
                if each.problem == TOO_LARGE:
                    walk.far.append((child, None))
                elif each.problem:
                    self._left_out(node, name, each.problem)
                elif each.names:
                    walk.waiting.append((child, self._allowed(child, each.names)))

    def _left_out(self, node: _Node, name: bytes, code: int) -> None:
        """The directory ``name``, or what is below it, is not watched: an error's number, or ELSEWHERE, tells why."""
        if code == ELSEWHERE or code in ABSENT:
            self._let_go(node, name)
        else:
            self._exhausted |= code == errno.ENOSPC
            self._give_up(node, name, self._reason(OSError(code, os.strerror(code))))

    def _listing(self, node: _Node, fd: int) -> list[bytes]:
        """The subdirectories of ``node`` that are to be watched; raises OSError for a root only."""
        try:
            return self._subdirectories(node, fd)
        except OSError as error:
            if node.parent is None:
                raise
            self._give_up(node.parent, node.name, self._reason(error))
            return []

    def _allowed(self, node: _Node, names: list[bytes]) -> list[bytes]:
        """Those of the subdirectories of ``node`` that the root's patterns leave in."""
        if not names:
            return names
        owner = self._locate(node)
        if owner is None:
            self._unsure[node] = None
            return []
        return [name for name in names if owner.filter.allows(node.base + name, True)]

    def _subdirectories(self, node: _Node, fd: int) -> list[bytes]:
        names = []
        with os.scandir(fd) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        names.append(os.fsencode(entry.name))
        return self._allowed(node, names)

    def _recognise(self, node: _Node) -> int | None:
        """Open the path at which ``node`` should lie; None when something else or nothing is there."""
        owner = self._locate(node)
        if owner is None:
            return None
        path = node.base[:-1]
        try:
            if not path:
                fd = os.open(owner.path, _OPEN & ~os.O_NOFOLLOW)
            elif len(path) + len(owner.path) < _PATH_LIMIT:
                fd = os.open(owner.path + b"/" + path, _OPEN)
            else:
                fd = open_beneath(owner.path, path, _OPEN)
        except OSError:
            return None
        wd = -1
        try:
            wd = self._add_watch(fd)
        except OSError:
            pass
        finally:
            if wd != node.wd:
                os.close(fd)
        if wd == node.wd:
            return fd
        self._release(wd)
        return None

    def _resolve(self) -> None:
        """Compare the directories in doubt with the disk, now that their paths may be right."""
        for node in list(self._unsure):
            if self._unsure.pop(node, 0) is None and not self._reconcile(node) and node.wd >= 0:
                self._unsure[node] = None

    def _reconcile(self, node: _Node) -> bool:
        fd = self._recognise(node)
        if fd is None:
            return False
        try:
            names = set(self._subdirectories(node, fd))
            for name in [*node.children, *(node.unwatched or ())]:
                if name not in names:
                    self._let_go(node, name)
            for name in names:
                added = self._enter(node, name, fd)
                owner = self._locate(node)
                if added and owner is not None:
                    owner.mark(node.base + name, RESCAN)
        except OSError:
            return False
        finally:
            os.close(fd)
        return node not in self._unsure

    def _attach(self, node: _Node, name: bytes, child: _Node) -> None:
        current = node.children.get(name)
        if current is not child:
            if current is not None:
                self._detach(current)
            if child.parent is not None:
                self._detach(child)
            self._orphans.pop(child, None)
            child.parent, child.name = node, name
            node.children[name] = child
            if child.generation != -1:
                self._generation += 1
        self._got(node, name)

    def _detach(self, child: _Node) -> None:
        if child.parent is not None and child.parent.children.get(child.name) is child:
            del child.parent.children[child.name]
        child.parent = None
        self._orphans[child] = self._clock()
        self._generation += 1

    def _let_go(self, node: _Node, name: bytes) -> None:
        child = node.children.get(name)
        if child is not None:
            self._detach(child)
        self._got(node, name)

    def _give_up(self, node: _Node, name: bytes, reason: str) -> None:
        """The directory ``name`` cannot be watched now: it will be scanned instead."""
        self._let_go(node, name)
        if node.unwatched is None:
            node.unwatched = {}
        node.unwatched[name] = reason
        self._short[node] = None
        self._problems_changed = True

    def _got(self, node: _Node, name: bytes) -> None:
        if node.unwatched is not None and node.unwatched.pop(name, None) is not None and not node.unwatched:
            node.unwatched = None
            self._short.pop(node, None)
            self._problems_changed = True

    def _forget(self, node: _Node) -> None:
        """The kernel has dropped the watch of ``node``."""
        for child in list(node.children.values()):
            self._detach(child)
        self._detach(node)
        self._strike(node)

    def _drop(self, top: _Node) -> None:
        """Remove the watches of ``top`` and all below."""
        self._detach(top)
        pending = [top]
        while pending:
            node = pending.pop()
            pending.extend(node.children.values())
            wd = node.wd
            self._strike(node)
            self._release(wd)

    def _strike(self, node: _Node) -> None:
        self._nodes.pop(node.wd, None)
        self._orphans.pop(node, None)
        self._unsure.pop(node, None)
        self._problems_changed |= node in self._short
        self._short.pop(node, None)
        node.wd = -1
        node.children = {}
        node.parent = None
        node.generation = -1

    def _expire(self, now: float) -> None:
        """Give up directories that have not turned up again: they left the tree."""
        if self._orphans and not self._queued():
            for node, since in list(self._orphans.items()):
                if now - since >= _GRACE:
                    self._drop(node)

    def _retry_unwatched(self) -> None:
        # Where watches have run out, one look tells it for all of them.
        self._exhausted = False
        for node in list(self._short):
            for name in list(node.unwatched or ()):
                owner = self._locate(node)
                if owner is not None:
                    owner.mark(node.base + name, RESCAN)
                    if not self._exhausted:
                        self._settle(node, name)

    # Roots.

    def _unwatched_parts(self) -> dict[tuple[int, str], list[bytes]]:
        reasons: dict[tuple[int, str], list[bytes]] = {}
        for node in self._short:
            owner = self._locate(node)
            if owner is not None:
                for name, reason in (node.unwatched or {}).items():
                    reasons.setdefault((owner.index, reason), []).append(node.base + name)
        return reasons

    def _check_roots(self) -> None:
        now = self._clock()
        self._look_at_mounts()
        self._check_now = False
        if self._fd < 0:
            self._open()
            for root in self._roots:
                if root.watched:
                    root.mark(b"", RESCAN)
        if self._mounts_changed:
            self._check_mounts(now)
        for root in self._roots:
            if root.watched and not root.in_place():
                self._lose(root)
                root.mark(b"", RESCAN)
                root.rescan_at = now + RESCAN_INTERVAL
            if not root.watched:
                self._watch(root)
                if root.watched:
                    log.info("root is watched again", path=root.path)
                if root.watched or now >= root.rescan_at:
                    root.mark(b"", RESCAN)
                    root.rescan_at = now + RESCAN_INTERVAL

    def _check_mounts(self, now: float) -> None:
        """Begin again where something was mounted below a root, which no event tells, or is not any more.

        What lies there, and what was hidden and is in sight again, is in another place, or in none, for events that are
        still queued: so the map is not mended but made anew.
        """
        try:
            mounted = mounts.table()
        except OSError:
            # It is tried again with the next look.
            return
        changed = [root for root in self._roots if root.top is not None and _mounts_of(root, mounted) != root.mounts]
        if changed and now < self._next_mounts:
            return
        self._mounts_changed = False
        if changed:
            self._next_mounts = now + _MOUNTS_INTERVAL
            log.info("mounts below a root have changed; looking at everything again", path=changed[0].path)
            self._begin_again()

    def _watch(self, root: _Watched) -> None:
        """Watch ``root`` and all below it, or say in its ``problem`` why not."""
        self._problems_changed = True
        if self._fd < 0:
            return
        try:
            fd = self._open_root(root)
            try:
                wd = self._add_watch(fd)
                status = os.fstat(fd)
                root.identity = (status.st_dev, status.st_ino)
                if root.is_file:
                    root.parent_wd = wd
                    self._parents.setdefault(wd, {})[root.name] = root
                elif wd in self._nodes:
                    root.problem = "it lies in another watched path; watch it there only"
                    return
                else:
                    root.top = self._nodes[wd] = _Node(wd)
                    root.top.top_of = root
                    # First: what is mounted meanwhile is a change.
                    root.mounts = _mounts_of(root, mounts.table())
                    self._explore(root.top, fd)
            finally:
                os.close(fd)
        except OSError as error:
            reason = self._reason(error)
            self._unwatch(root)
            self._cannot_watch(root, reason)
        else:
            root.device = root.device or status.st_dev
            root.problem = None if root.device == status.st_dev else OTHER_FILESYSTEM

    def _open_root(self, root: _Watched) -> int:
        try:
            fd = os.open(root.path, _OPEN & ~os.O_NOFOLLOW)
        except OSError as error:
            # A file that was there and is not now may be on its way back: watch its name.
            if error.errno not in ABSENT or not (root.is_file or os.path.lexists(root.path)):
                raise
            fd = os.open(root.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            root.is_file = True
            return fd
        root.is_file = False
        return fd

    def _lose(self, root: _Watched) -> None:
        """``root`` is not where it was: stop watching it until it is there again."""
        self._unwatch(root)
        self._lost(root)

    def _unwatch(self, root: _Watched) -> None:
        self._problems_changed = True
        if root.top is not None:
            top, root.top = root.top, None
            top.top_of = None
            self._drop(top)
        if root.parent_wd >= 0:
            wd, root.parent_wd = root.parent_wd, -1
            files = self._parents[wd]
            del files[root.name]
            if not files:
                del self._parents[wd]
                self._release(wd)

    # The kernel.

    def _open(self) -> None:
        self._trouble = None
        self._problems_changed = True
        try:
            if self._system is None:
                self._system = pyinotify.INotifyWrapper.create()
                if self._system is None:
                    raise OSError(errno.ENOSYS, "pyinotify finds no inotify in the C library")
            if not os.path.isdir("/proc/self/fd"):
                raise OSError(errno.ENOENT, "/proc is not mounted")
            self._open_mount_table()
            fd: int = self._system.inotify_init()
            if fd < 0:
                code: int = self._system.get_errno()
                raise OSError(code, os.strerror(code))
        except OSError as error:
            trouble = f"inotify does not start: {error.strerror}"
            if error.errno == errno.EMFILE:
                limit = kernel.limit(self.name, "max_user_instances")
                trouble += (
                    f"; the limit on instances may be reached ({limit}); raise it: "
                    f"sysctl -w fs.inotify.max_user_instances={(limit or 128) * 4}"
                )
            self._cannot_start(trouble)
            return
        self._has_started()
        os.set_inheritable(fd, False)
        os.set_blocking(fd, False)
        self._fd = fd
        self._descents = Descent(fd, self._mask), Descent(fd, self._mask)
        self._watch_cookies()
        now = self._clock()
        self._next_check = now + ROOT_INTERVAL
        self._next_rescan = now + RESCAN_INTERVAL
        for root in self._roots:
            self._watch(root)
            root.rescan_at = now + RESCAN_INTERVAL

    def _watch_cookies(self) -> None:
        self._cookie_wd = -1
        self._has_proof = False
        if not self._cookies.prepare():
            return
        with contextlib.suppress(OSError):
            fd = os.open(self._cookies.path, _OPEN)
            try:
                self._cookie_wd = self._add_watch(fd)
                self._has_proof = True
            finally:
                os.close(fd)

    def _shut(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._descents = ()
        self._close_mount_table()
        for node in self._nodes.values():
            # Whoever still holds one of them sees that it is over.
            node.wd = -1
            node.parent = node.top_of = node.owner = None
            node.generation = -1
        # Cleared in place: a batch of events may be at work on them.
        self._nodes.clear()
        self._parents.clear()
        self._orphans.clear()
        self._unsure.clear()
        self._short.clear()
        self._check_now = False
        for root in self._roots:
            root.top = None
            root.parent_wd = -1
            root.problem = None

    def _add_watch(self, fd: int) -> int:
        """Watch the directory that is open as ``fd``; the same inode gives the same number again."""
        # Through the descriptor: pyinotify cannot pass names that are not UTF-8, and what is watched
        # is exactly what will be listed.
        wd: int = self._system.inotify_add_watch(self._fd, f"/proc/self/fd/{fd}", self._mask)
        if wd < 0:
            code: int = self._system.get_errno()
            self._exhausted = self._exhausted or code == errno.ENOSPC
            raise OSError(code, os.strerror(code))
        return wd

    def _release(self, wd: int) -> None:
        if wd >= 0 and wd not in self._nodes and wd not in self._parents and wd != self._cookie_wd:
            self._system.inotify_rm_watch(self._fd, wd)

    def _reason(self, error: OSError) -> str:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            return error.strerror or str(error)
        watches = kernel.limit(self.name, "max_user_watches")
        return remedy.format(watches=watches, more=max(524288, 4 * (watches or 0)))


def _mounts_of(root: _Watched, mounted: Sequence[Mount]) -> frozenset[Mount]:
    return mounts.below(os.path.realpath(root.path), mounted)


def _wanted(part: _Part) -> list[tuple[bytes, int, list[bytes]]]:
    return [(path, node.wd, names) for node, path, names in part]


def _hire() -> ThreadPoolExecutor | None:
    """Another thread, that runs already; None where there can be no more."""
    helper = ThreadPoolExecutor(1, thread_name_prefix="descent")
    try:
        helper.submit(int)
    except RuntimeError:
        helper.shutdown(cancel_futures=True)
        return None
    return helper
