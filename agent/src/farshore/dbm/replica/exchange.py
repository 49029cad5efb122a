"""Put copies in the place of what is in the trees, which is kept. Cut off anywhere, it can be gone on with.

A copy is made as ``new`` in a work directory on the filesystem of its root. When it is whole and durable, a file
``ready`` beside it says what goes where; then names are exchanged, one by one, and what was there comes into
``before``. Which exchange is to be carried out stands on the group's record, so that those of several roots, and a
promotion, are one: what is ready and not on record was never begun, and what is on record is finished before anybody
watches the trees or serves them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from farshore import durable
from farshore.dbm.messages import Meta
from farshore.dbm.replica.paths import PREFIX, mounts, remove_tree
from farshore.dbm.replica.stage import places
from farshore.dbm.replica.tree import syncfs
from farshore.dbm.replica.view import give
from farshore.errors import FarshoreError
from farshore.log import Log

_log = Log(__name__)
_WORK = b"restore-"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

#: A root and the directory of its state, for each root of a group.
Places = Sequence[tuple[bytes, Path]]


class CannotRestore(FarshoreError):
    """{0}: {1}"""

    exit_code = 36


class _Ready(msgspec.Struct, frozen=True, array_like=True):
    """``new`` takes the place of ``place``; or its ``names`` take that of all names in ``place``, which then gets
    ``meta``."""

    place: bytes
    names: list[bytes] | None
    meta: Meta | None


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[_Ready] = msgspec.msgpack.Decoder(_Ready)


@dataclass(frozen=True, slots=True)
class Work:
    """The work directory of one root."""

    root: bytes
    directory: bytes

    @property
    def name(self) -> str:
        """Its last name, which is the same for all roots."""
        return os.fsdecode(os.path.basename(self.directory))

    @property
    def new(self) -> bytes:
        """The copy."""
        return self.directory + b"/new"

    @property
    def before(self) -> bytes:
        """What was there."""
        return self.directory + b"/before"

    @property
    def ready(self) -> bytes:
        """What goes where."""
        return self.directory + b"/ready"


def name_at(stamp: str) -> str:
    """The name of work directories that are made at a time; another one each time."""
    return f"{os.fsdecode(_WORK)}{stamp}-{os.urandom(2).hex()}"


def begin(root: bytes, place: bytes, name: str) -> Work:
    """Make a work directory in a stage's place; raises OSError."""
    work = Work(root, place + b"/" + os.fsencode(name))
    os.mkdir(work.directory, 0o700)
    return work


def make_ready(work: Work, place: bytes, meta: Meta | None) -> None:
    """The copy is whole: make it durable, and say that it takes the place of ``place``.

    A directory that is the root stays, and gets the copy's names and ``meta``. Raises CannotRestore, StateError and
    OSError.
    """
    names = None
    if place == work.root and os.path.isdir(place) and os.path.isdir(work.new):
        names = sorted(name for name in map(os.fsencode, os.listdir(work.new)) if not name.startswith(PREFIX))
    check_mounts(place, within=names is not None)
    handle = os.open(work.directory, _DIRECTORY)
    try:
        syncfs(handle)
    finally:
        os.close(handle)
    durable.write(Path(os.fsdecode(work.ready)), _encoder.encode(_Ready(place, names, meta)))


def carry_out(roots: Places, name: str, numbers: Sequence[int], or_nothing: bool) -> None:
    """Exchange, or go on with it, for the roots ``numbers``; what is done already is left alone.

    With ``or_nothing``, what was exchanged is taken back when it cannot go on. Raises CannotRestore when nothing has
    changed, and OSError.
    """
    works = [_find(*roots[number], name) for number in numbers if number < len(roots)]
    orders: list[_Ready] = []
    done: list[tuple[bytes, bytes]] = []
    times: dict[bytes, os.stat_result] = {}
    try:
        orders += [_read(work) for work in works]
        times |= {work.root: os.stat(work.root) for work in works if os.path.isdir(work.root)}
        for work, ready in zip(works, orders, strict=True):
            _exchange(work, ready, done)
    except OSError as error:
        if not or_nothing:
            raise
        for old, new in reversed(done):
            os.rename(new, old)
        for work in works:
            with contextlib.suppress(OSError):
                os.rmdir(work.before)
        for root, status in times.items():
            os.utime(root, ns=(status.st_atime_ns, status.st_mtime_ns))
        raise CannotRestore(os.fsdecode(error.filename or works[0].root), error.strerror) from error


def clear(roots: Places, but: str = "") -> None:
    """Remove what is left of all exchanges other than the one named ``but``: all that is not kept for somebody."""
    for root, state in roots:
        for place in places(root, state):
            for work in _works(root, place):
                if work.name != but:
                    try:
                        _clear(work, place)
                    except OSError as error:
                        _log.warning("what is left of a restore cannot be removed", place=work.name, reason=error)


def _works(root: bytes, place: bytes) -> Iterator[Work]:
    for name in map(os.fsencode, os.listdir(place)):
        if name.startswith(_WORK):
            yield Work(root, place + b"/" + name)


def _find(root: bytes, state: Path, name: str) -> Work:
    for place in places(root, state):
        work = Work(root, place + b"/" + os.fsencode(name))
        if os.path.lexists(work.ready):
            return work
    raise CannotRestore(os.fsdecode(root), f"{name} is not found; is its filesystem mounted?")


def _read(work: Work) -> _Ready:
    handle = os.open(work.ready, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        data = file.read()
        owner = os.fstat(handle).st_uid
    try:
        ready = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise CannotRestore(os.fsdecode(work.ready), f"is damaged: {error}") from error
    if owner != os.geteuid() or not (ready.place + b"/").startswith(work.root + b"/"):
        raise CannotRestore(os.fsdecode(work.ready), "is not of this node")
    return ready


def _exchange(work: Work, ready: _Ready, done: list[tuple[bytes, bytes]]) -> None:
    def move(old: bytes, new: bytes) -> None:
        os.rename(old, new)
        done.append((old, new))

    def swap(new: bytes, place: bytes, before: bytes) -> None:
        # What is no longer in ``new`` is in its place already.
        if os.path.lexists(new):
            if os.path.lexists(place):
                move(place, _free(before))
            move(new, place)

    place = ready.place
    if ready.names is None:
        swap(work.new, place, work.before)
        _sync(os.path.dirname(place), work.directory)
        return
    with contextlib.suppress(FileExistsError):
        os.mkdir(work.before, 0o700)
    for name in ready.names:
        swap(work.new + b"/" + name, place + b"/" + name, work.before + b"/" + name)
    wanted = set(ready.names)
    for name in map(os.fsencode, os.listdir(place)):
        if name not in wanted and not name.startswith(PREFIX):
            move(place + b"/" + name, _free(work.before + b"/" + name))
    if ready.meta is not None:
        give(place, ready.meta)
    _sync(place, work.before, work.new, work.directory)


def _free(path: bytes) -> bytes:
    """``path``, or a name like it that nothing has: somebody made one anew while the exchange was cut off."""
    chosen, number = path, 1
    while os.path.lexists(chosen):
        chosen = b"%s.%d" % (path, number)
        number += 1
    return chosen


def _sync(*directories: bytes) -> None:
    for directory in directories:
        durable.sync_directory(Path(os.fsdecode(directory)))


def _clear(work: Work, place: bytes) -> None:
    with contextlib.suppress(OSError):
        # Only if it is empty.
        os.rmdir(work.before)
    above = os.open(place, _DIRECTORY)
    try:
        if not os.path.lexists(work.before):
            remove_tree(above, os.path.basename(work.directory))
        elif os.path.lexists(work.ready):
            here = os.open(os.path.basename(work.directory), _DIRECTORY, dir_fd=above)
            try:
                _remove(here, b"new")
                os.unlink(b"ready", dir_fd=here)
                os.fsync(here)
            finally:
                os.close(here)
    finally:
        os.close(above)


def _remove(directory: int, name: bytes) -> None:
    try:
        status = os.lstat(name, dir_fd=directory)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(status.st_mode):
        remove_tree(directory, name)
    else:
        os.unlink(name, dir_fd=directory)


def check_mounts(place: bytes, *, within: bool) -> None:
    """Raises CannotRestore when ``place``, or a name ``within`` it, is a mount point, which cannot be renamed."""
    real = os.path.realpath(place)
    for point in mounts():
        if point == real if not within else os.path.dirname(point) == real and point != real:
            raise CannotRestore(os.fsdecode(point), "is a mount point, which cannot be exchanged")
