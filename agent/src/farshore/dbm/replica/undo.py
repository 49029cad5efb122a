"""What operations are about to overwrite, remove or move, looked up and written down before they are applied.

That serves twice. After a crash it tells what an operation found that was cut off, so that applying it once more ends
alike; and it is the history: undoing it in reverse order leads to what the tree was before.

Operations are taken in slices: so many that none meets what another one of its slice has changed, as all of a slice
is looked up, and made durable, at once.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Protocol

import msgspec

from farshore.dbm.messages import Link, MakeDir, Meta, Move, Operation, Remove, SetMeta
from farshore.dbm.replica.stage import Staged

#: Operations in a slice, at most: what is looked up must fit into memory.
MOST = 20_000


class _Undo(msgspec.Struct, frozen=True, array_like=True, tag_field="t", forbid_unknown_fields=True):
    """``op`` is the operation's number in its transaction."""

    op: int
    root: int
    path: bytes


class Absent(_Undo, frozen=True, tag="n"):
    """Nothing was at ``path``."""


class Kept(_Undo, frozen=True, tag="k"):
    """What was at ``path`` is in the stage now, as ``name`` in ``folder``.

    ``kind`` is its type as in st_mode, ``size``, ``mtime_ns``, ``blocks`` (of 512 bytes) and ``links`` are what lstat
    told; a directory has one link.
    """

    folder: bytes
    name: bytes
    kind: int
    size: int
    mtime_ns: int
    blocks: int
    links: int


class WasDirectory(_Undo, frozen=True, tag="d"):
    """An empty directory was at ``path``."""

    meta: Meta


class WasMeta(_Undo, frozen=True, tag="a"):
    """What is at ``path``, of this device and inode, had this metadata; ``links``: so many names, at least."""

    meta: Meta
    device: int
    inode: int
    links: int


class Times(_Undo, frozen=True, tag="t"):
    """The directory at ``path``, in which names change, had these times."""

    atime_ns: int
    mtime_ns: int


class Moved(_Undo, frozen=True, tag="m"):
    """What is at ``to`` was at ``path``."""

    to: bytes
    directory: bool


Undo = Absent | Kept | WasDirectory | WasMeta | Times | Moved


class Step(msgspec.Struct, frozen=True, array_like=True):
    """What the operations ``first`` to ``last``, exclusive, of transaction ``seq`` found, in their order.

    ``time_ns`` is the wall clock when the transaction was made durable.
    """

    seq: int
    time_ns: int
    first: int
    last: int
    entries: list[Undo]
    #: It stands for several, and what they found in between is not known any more.
    merged: bool = False
    #: These operations were left out, or never reached: ``entries`` is what took effect all the same, instead of what
    #: was told of them before.
    undone: bool = False


@dataclass(slots=True)
class Todo:
    """An operation to be applied, and what it finds.

    ``count``: how manieth it is after the mark. ``known``: it was looked up before a crash; ``again``: it may have been
    carried out then; ``done``: it was.
    """

    seq: int
    time_ns: int
    number: int
    count: int
    operation: Operation
    staged: Staged | None
    undo: list[Undo] = field(default_factory=list)
    known: bool = False
    again: bool = False
    done: bool = False

    @property
    def kept(self) -> Kept | None:
        """What it takes away."""
        return next((entry for entry in self.undo if isinstance(entry, Kept)), None)


class Look(Protocol):
    """What can be asked of a tree; raises OSError, UnsafePath."""

    def status(self, path: bytes) -> os.stat_result | None:
        """The lstat of what is at ``path``, None when nothing is."""

    def metadata(self, path: bytes, status: os.stat_result) -> Meta:
        """Its metadata."""

    def is_empty(self, path: bytes) -> bool:
        """Whether the directory at ``path`` is empty."""


def name_of(seq: int, number: int) -> bytes:
    """The name under which what operation ``number`` of transaction ``seq`` takes away is kept."""
    return b"%x.%x" % (seq, number)


class _Meets(Exception):
    """An operation meets what its slice changes."""


@dataclass(frozen=True, slots=True)
class _Touched:
    """What a slice has done at a path: in transaction ``seq``; ``origin`` is where that lies now, None when it is new.

    ``replaced``: something else is there than before; ``moved_here``: and it is nowhere else.
    """

    seq: int
    origin: bytes | None
    replaced: bool = False
    moved_here: bool = False


_Path = tuple[int, bytes]


class Slicer:
    """Cuts operations into slices and looks up what each finds. ``folder`` names where things are kept now."""

    def __init__(self, looks: Sequence[Look], folder: Callable[[], bytes]) -> None:
        self._looks = looks
        self._folder = folder
        #: What this slice changes, by root and path.
        self._touched: dict[_Path, _Touched] = {}
        #: The directories that it lies in, at any depth.
        self._above: set[_Path] = set()
        #: Directories that this slice makes.
        self._made: set[_Path] = set()
        self._timed: set[_Path] = set()
        #: By device and inode, files of several names whose metadata it changes: the transaction that does.
        self._inodes: dict[tuple[int, int], int] = {}

    def slice(self, todos: Sequence[Todo]) -> int:
        """How many of ``todos``, at least one, are the next slice; they are given what they find.

        One that moves or takes away a directory is a slice of its own. Raises nothing: what cannot be looked up is told
        when it is applied.
        """
        for each in (self._touched, self._above, self._made, self._timed, self._inodes):
            each.clear()
        for count, todo in enumerate(todos):
            if count and (count >= MOST or todo.known != todos[0].known):
                return count
            if todo.known:
                continue
            if count and self._meets(todo.seq, todo.operation):
                return count
            try:
                self._look(todo)
            except _Meets:
                todo.undo.clear()
                return count
            except Exception:
                # It will fail in the same way when it is applied, and be told then.
                todo.undo.clear()
            if any(map(_is_of_directory, todo.undo)):
                if count:
                    todo.undo.clear()
                    return count
                return 1
            self._note_above(todo.operation.root, todo.operation.path)
        return len(todos)

    def _meets(self, seq: int, operation: Operation) -> bool:
        """Whether an operation meets what this slice changes, so that a look at the tree now would be wrong."""
        root, path = operation.root, operation.path
        here = root, path
        mine = self._touched.get(here)
        if mine is not None and (mine.seq != seq or isinstance(operation, (Move, Remove))):
            return True
        if isinstance(operation, Move):
            to = root, operation.to
            if to in self._touched or to in self._above:
                return True
        if isinstance(operation, Link):
            linked = self._touched.get((root, operation.to))
            if linked is not None and linked.seq != seq:
                return True
        if not isinstance(operation, (MakeDir, SetMeta)) and (
            here in self._above or (mine is not None and mine.moved_here)
        ):
            return True
        parent = self._touched.get((root, path.rpartition(b"/")[0])) if path else None
        return parent is not None and parent.seq != seq

    def _note_above(self, root: int, path: bytes) -> None:
        above = self._above
        while path:
            path = path.rpartition(b"/")[0]
            if (root, path) in above:
                return
            above.add((root, path))

    def _look(self, todo: Todo) -> None:
        operation = todo.operation
        root, path, look = operation.root, operation.path, self._looks[operation.root]
        here = root, path
        before = self._touched.get(here)
        if isinstance(operation, SetMeta):
            if before is None or before.origin is not None:
                self._note_meta(todo, look, path if before is None or before.origin is None else before.origin)
            if before is None:
                self._touched[here] = _Touched(todo.seq, path)
            return
        there = None if path and (root, path.rpartition(b"/")[0]) in self._made else look.status(path)
        if isinstance(operation, MakeDir):
            if before is not None:
                return
            if there is not None and stat.S_ISDIR(there.st_mode):
                self._note_meta(todo, look, path)
                self._touched[here] = _Touched(todo.seq, path)
                return
            self._made.add(here)
        elif before is not None and before.replaced:
            # Put there by this very transaction: what was there before is noted.
            self._touched[here] = _Touched(todo.seq, self._origin(operation), replaced=True)
            return
        if isinstance(operation, Move):
            if there is None:
                return
            self._take_away(todo, look, operation.to, look.status(operation.to), replaced=True)
            todo.undo.append(Moved(todo.number, root, path, operation.to, stat.S_ISDIR(there.st_mode)))
            self._note_times(todo, look, operation.to)
            self._touched[root, operation.to] = _Touched(todo.seq, path, replaced=True, moved_here=True)
            self._note_above(root, operation.to)
        elif isinstance(operation, Remove):
            if there is None:
                return
            self._take_away(todo, look, path, there, replaced=False)
        elif there is None:
            todo.undo.append(Absent(todo.number, root, path))
        elif isinstance(operation, Link) and self._is_linked(look, operation, there):
            self._touched[here] = before or _Touched(todo.seq, path)
            return
        else:
            self._take_away(todo, look, path, there, replaced=True)
        self._note_times(todo, look, path)
        self._touched[here] = _Touched(todo.seq, self._origin(operation), replaced=True)

    def _origin(self, operation: Operation) -> bytes | None:
        """Where that is now what an operation puts at its path; None when it is new."""
        if not isinstance(operation, Link):
            return None
        linked = self._touched.get((operation.root, operation.to))
        return operation.to if linked is None else linked.origin

    def _is_linked(self, look: Look, operation: Link, there: os.stat_result) -> bool:
        if (operation.root, operation.to) in self._touched:
            # What is there now is not what it will be a name of.
            return False
        other = look.status(operation.to)
        return other is not None and (other.st_dev, other.st_ino) == (there.st_dev, there.st_ino)

    def _take_away(self, todo: Todo, look: Look, path: bytes, there: os.stat_result | None, *, replaced: bool) -> None:
        root = todo.operation.root
        if there is None:
            if replaced:
                todo.undo.append(Absent(todo.number, root, path))
            return
        if stat.S_ISDIR(there.st_mode) and look.is_empty(path):
            todo.undo.append(WasDirectory(todo.number, root, path, look.metadata(path, there)))
            return
        if stat.S_ISDIR(there.st_mode):
            # Who is not root may have to give himself rights on it first.
            meta = look.metadata(path, there)
            todo.undo.append(WasMeta(todo.number, root, path, meta, there.st_dev, there.st_ino, 1))
        todo.undo.append(
            Kept(
                todo.number,
                root,
                path,
                self._folder(),
                name_of(todo.seq, todo.number),
                stat.S_IFMT(there.st_mode),
                there.st_size,
                there.st_mtime_ns,
                there.st_blocks,
                _names(there),
            )
        )

    def _note_meta(self, todo: Todo, look: Look, origin: bytes) -> None:
        """Note the metadata of what an operation changes, which is at ``origin`` now."""
        there = look.status(origin)
        if there is None:
            return
        operation = todo.operation
        identity = there.st_dev, there.st_ino
        if self._inodes.get(identity, todo.seq) != todo.seq:
            raise _Meets
        # Whoever has another name by then may have it still when this one is gone.
        names = _names(there) if origin == operation.path else max(_names(there), 2)
        if names > 1:
            self._inodes[identity] = todo.seq
        meta = look.metadata(origin, there)
        todo.undo.append(WasMeta(todo.number, operation.root, operation.path, meta, *identity, names))

    def _note_times(self, todo: Todo, look: Look, path: bytes) -> None:
        """The times of the directory that ``path`` lies in, once for each transaction."""
        root, parent = todo.operation.root, path.rpartition(b"/")[0]
        key = root, parent
        if not path or key in self._timed or key in self._made:
            return
        self._timed.add(key)
        there = look.status(parent)
        if there is not None:
            # Undone last, so it comes first.
            todo.undo.insert(0, Times(todo.number, root, parent, there.st_atime_ns, there.st_mtime_ns))


def _is_of_directory(entry: Undo) -> bool:
    """Whether a directory is moved, or taken away with what is in it: then all paths below it mean something else."""
    return (isinstance(entry, Moved) and entry.directory) or (isinstance(entry, Kept) and stat.S_ISDIR(entry.kind))


def _names(there: os.stat_result) -> int:
    """How many names an object has; a directory has one."""
    return 1 if stat.S_ISDIR(there.st_mode) else there.st_nlink


def steps(todos: Iterable[Todo]) -> list[Step]:
    """What is to be written down of a slice."""
    found = []
    for seq, group in groupby(todos, attrgetter("seq")):
        of_seq = list(group)
        first, last = of_seq[0], of_seq[-1]
        entries = [entry for todo in of_seq for entry in todo.undo]
        found.append(Step(seq, first.time_ns, first.number, last.number + 1, entries))
    return found
