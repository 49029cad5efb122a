"""What operations are about to overwrite, remove or move, looked up and written down before they are applied.

That serves twice. After a crash it tells what an operation found when it was applied for the first time, so that
applying it again ends alike; and it is the history: undoing it in reverse order leads to what the tree was before.

Operations are taken in slices: so many that none meets what another one of its slice has changed, as all of a slice
is looked up, and made durable, at once.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
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
    """What is at ``path``, of this device and inode, had this metadata."""

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


@dataclass(slots=True)
class Todo:
    """An operation to be applied, and what it finds.

    ``again``: it may have been applied before a crash; ``superseded``: it was, and a later operation has taken away
    what it put there. ``directory``: the lstat of the directory that it moves, or of the one that it takes away with
    all that is in it.
    """

    seq: int
    time_ns: int
    number: int
    operation: Operation
    staged: Staged | None
    undo: list[Undo] = field(default_factory=list)
    again: bool = False
    directory: os.stat_result | None = None
    superseded: bool = False

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


class Slicer:
    """Cuts operations into slices and looks up what each finds. ``folder`` names where things are kept now."""

    def __init__(self, looks: Sequence[Look], folder: Callable[[], bytes]) -> None:
        self._looks = looks
        self._folder = folder
        #: What this slice changes, by root and path: the transaction that did, and whether it has a new object there.
        self._touched: dict[tuple[int, bytes], tuple[int, bool]] = {}
        self._made: set[tuple[int, bytes]] = set()
        self._timed: set[tuple[int, bytes]] = set()

    def slice(self, todos: Sequence[Todo]) -> int:
        """How many of ``todos``, at least one, are the next slice; they are given what they find.

        One that moves or takes away a directory is a slice of its own. Raises nothing: what cannot be looked up is told
        when it is applied.
        """
        self._touched.clear()
        self._made.clear()
        self._timed.clear()
        for count, todo in enumerate(todos):
            if count and (count >= MOST or todo.again != todos[0].again):
                return count
            if todo.again:
                continue
            operation = todo.operation
            if self._meets(todo.seq, operation):
                return count
            try:
                self._look(todo)
            except Exception:
                # It will fail in the same way when it is applied, and be told then.
                todo.undo.clear()
            if todo.directory is not None:
                if count:
                    todo.undo.clear()
                    todo.directory = None
                    return count
                return 1
        return len(todos)

    def _meets(self, seq: int, operation: Operation) -> bool:
        """Whether an operation meets what this slice changes, so that a look at the tree now would be wrong."""
        touched = self._touched
        if not touched:
            return False
        root, path = operation.root, operation.path
        mine = touched.get((root, path))
        if mine is not None and (mine[0] != seq or isinstance(operation, (Move, Remove))):
            return True
        if isinstance(operation, Move) and (root, operation.to) in touched:
            return True
        parent = touched.get((root, path.rpartition(b"/")[0])) if path else None
        return parent is not None and parent[0] != seq

    def _look(self, todo: Todo) -> None:
        operation = todo.operation
        root, path, look = operation.root, operation.path, self._looks[operation.root]
        before = self._touched.get((root, path))
        if isinstance(operation, SetMeta):
            if before is None:
                self._note_meta(todo, look, path)
                self._touched[root, path] = (todo.seq, False)
            return
        parent = path.rpartition(b"/")[0]
        fresh = bool(path) and (root, parent) in self._made
        there = None if fresh else look.status(path)
        if isinstance(operation, MakeDir):
            if before is not None:
                return
            if there is not None and stat.S_ISDIR(there.st_mode):
                self._note_meta(todo, look, path)
                self._touched[root, path] = (todo.seq, False)
                return
            self._made.add((root, path))
        elif before is not None and before[1]:
            # Made by this very transaction: what was there before is noted.
            return
        if isinstance(operation, Move):
            if there is None:
                return
            self._take_away(todo, look, operation.to, look.status(operation.to), replaced=True)
            directory = stat.S_ISDIR(there.st_mode)
            if directory:
                todo.directory = there
            todo.undo.append(Moved(todo.number, root, path, operation.to, directory))
            self._note_times(todo, look, operation.to)
            self._touched[root, operation.to] = (todo.seq, True)
        elif isinstance(operation, Remove):
            if there is None:
                return
            self._take_away(todo, look, path, there, replaced=False)
        elif there is None:
            todo.undo.append(Absent(todo.number, root, path))
        elif not isinstance(operation, Link) or not self._is_linked(look, operation, there):
            self._take_away(todo, look, path, there, replaced=True)
        self._note_times(todo, look, path)
        self._touched[root, path] = (todo.seq, True)

    @staticmethod
    def _is_linked(look: Look, operation: Link, there: os.stat_result) -> bool:
        other = look.status(operation.to)
        return other is not None and (other.st_dev, other.st_ino) == (there.st_dev, there.st_ino)

    def _take_away(self, todo: Todo, look: Look, path: bytes, there: os.stat_result | None, *, replaced: bool) -> None:
        root = todo.operation.root
        if there is None:
            if replaced:
                todo.undo.append(Absent(todo.number, root, path))
            return
        if stat.S_ISDIR(there.st_mode):
            if look.is_empty(path):
                todo.undo.append(WasDirectory(todo.number, root, path, look.metadata(path, there)))
                return
            todo.directory = there
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

    def _note_meta(self, todo: Todo, look: Look, path: bytes) -> None:
        there = look.status(path)
        if there is not None:
            meta = look.metadata(path, there)
            todo.undo.append(
                WasMeta(todo.number, todo.operation.root, path, meta, there.st_dev, there.st_ino, _names(there))
            )

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


def _names(there: os.stat_result) -> int:
    """How many names an object has; a directory has one."""
    return 1 if stat.S_ISDIR(there.st_mode) else there.st_nlink


def steps(todos: Iterable[Todo]) -> list[Step]:
    """What is to be written down of a slice."""
    found: list[Step] = []
    for todo in todos:
        if found and found[-1].seq == todo.seq:
            last = found[-1]
            found[-1] = Step(last.seq, last.time_ns, last.first, todo.number + 1, last.entries)
            last.entries.extend(todo.undo)
        else:
            found.append(Step(todo.seq, todo.time_ns, todo.number, todo.number + 1, list(todo.undo)))
    return found
