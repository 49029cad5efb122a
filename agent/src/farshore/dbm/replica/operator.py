"""Carry out single operations on the trees of a replica."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence

from farshore.dbm.messages import Copy, Link, MakeDir, MakeNode, MakeSymlink, Meta, Move, Patch, Put, Remove, SetMeta
from farshore.dbm.replica.leaves import LeafStore
from farshore.dbm.replica.stage import Stage, Staged
from farshore.dbm.replica.tree import BaseUnknown, Tree, exists
from farshore.dbm.replica.undo import Kept, Moved, Todo, Undo, WasDirectory
from farshore.errors import FarshoreError, UnsafePath
from farshore.fmm.types import FileKind


class Operator:
    """Carries out operations, each of which was looked up before (``undo``), in their order.

    One that was cut off may be carried out once more, as the first one then, and ends alike: ``Todo.again``.
    """

    def __init__(self, trees: Sequence[Tree], stages: Sequence[Stage], leaves: LeafStore) -> None:
        self._trees = trees
        self._stages = stages
        self._leaves = leaves
        #: Bytes of content that were put into the trees.
        self.bytes = 0
        #: Transactions up to here were staged by an earlier process: what it could not keep of them is not known.
        self.inherited = 0

    def carry_out(self, todo: Todo) -> None:
        """Raises BaseUnknown, UnsafePath, StateError, OSError."""
        operation = todo.operation
        root, path = operation.root, operation.path
        tree, stage = self._trees[root], self._stages[root]
        match operation:
            case Move():
                self._move(todo, operation)
                return
            case Remove():
                self._remove(todo)
                return
            case SetMeta(meta=meta):
                tree.set_meta(path, meta)
                return
            case MakeSymlink() if not path:
                # It would lead everything that follows to where the source likes.
                raise UnsafePath(path, "a root's place is not for a symbolic link")
            case Link(to=to) if not path and tree.is_link(to):
                raise UnsafePath(path, "a root's place is not for a symbolic link")
        self._make_way(todo, path, leave=not isinstance(operation, MakeDir))
        match operation:
            case MakeDir(meta=meta):
                tree.make_directory(path, meta)
            case Put(meta=meta, data=data):
                staged, handle = stage.create(meta.mode)
                with self._used(stage, staged):
                    self._fill(handle, tree, stage, meta, data)
                    tree.put(staged, path, meta)
                self.bytes += len(data)
            case Patch(meta=meta) | Copy(meta=meta):
                self._put_staged(todo, meta)
            case MakeSymlink(meta=meta, target=target):
                with self._named(stage) as staged:
                    tree.make_symlink(staged, path, meta, target)
            case MakeNode(meta=meta, kind=kind, rdev=rdev):
                with self._named(stage) as staged:
                    tree.make_node(staged, path, meta, FileKind(kind), rdev)
            case Link(to=to):
                with self._named(stage) as staged:
                    tree.link(staged, path, to)
            case _:
                raise AssertionError(type(operation).__name__)

    def took_effect(self, entries: Iterable[Undo], *, failed: bool) -> list[Undo]:
        """Of what operations would have changed, which were left out or never reached, what was changed all the same.

        ``failed``: they were tried, and ended with an error.
        """
        found = []
        for entry in entries:
            tree = self._trees[entry.root]
            try:
                match entry:
                    case Kept():
                        effect = exists(self._stages[entry.root].folder(entry.folder), entry.name)
                    case Moved():
                        gone = tree.status(entry.path) is None and tree.status(entry.to) is not None
                        effect = gone and not failed
                    case WasDirectory():
                        there = tree.status(entry.path)
                        effect = there is None or not stat.S_ISDIR(there.st_mode)
                    case _:
                        # Undoing what was not done changes nothing here.
                        effect = True
            except (FarshoreError, OSError):
                effect = not isinstance(entry, Moved)
            if effect:
                found.append(entry)
        return found

    def _make_way(self, todo: Todo, path: bytes, *, leave: bool) -> None:
        """Take what is at ``path`` to where it is kept, so that something else can be put there."""
        root = todo.operation.root
        tree, stage = self._trees[root], self._stages[root]
        kept = next((entry for entry in todo.undo if isinstance(entry, Kept) and entry.path == path), None)
        if kept is not None:
            tree.keep(path, stage.folder(kept.folder), kept.name, leave=leave)
        elif any(isinstance(entry, WasDirectory) and entry.path == path for entry in todo.undo):
            there = tree.status(path)
            if there is not None and stat.S_ISDIR(there.st_mode):
                tree.remove_directory(path)

    def _move(self, todo: Todo, operation: Move) -> None:
        tree = self._trees[operation.root]
        if not operation.path or not operation.to:
            raise BaseUnknown(operation.path, "a root cannot be moved")
        moved = next((entry for entry in todo.undo if isinstance(entry, Moved)), None)
        if todo.again and moved is not None and tree.status(operation.path) is None:
            # It was there when it was looked up.
            return
        self._make_way(todo, operation.to, leave=moved is not None and not moved.directory)
        tree.move(operation.path, operation.to)

    def _remove(self, todo: Todo) -> None:
        path = todo.operation.path
        tree, stage = self._trees[todo.operation.root], self._stages[todo.operation.root]
        if not path:
            raise BaseUnknown(path, "a root is never removed")
        kept = todo.kept
        if kept is not None:
            folder = stage.folder(kept.folder)
            if not todo.again or not (exists(folder, kept.name) or tree.status(path) is None):
                tree.keep(path, folder, kept.name, leave=False)
        elif todo.undo:
            self._make_way(todo, path, leave=False)
        else:
            tree.forget(path)

    @staticmethod
    def _fill(handle: int, tree: Tree, stage: Stage, meta: Meta, data: bytes) -> None:
        """Write a small content to a new staged file, and close it."""
        try:
            done = os.write(handle, data) if data else 0
            while done < len(data):
                done += os.write(handle, memoryview(data)[done:])
            tree.prepare(handle, meta, stage.birth)
        finally:
            os.close(handle)

    def _put_staged(self, todo: Todo, meta: Meta) -> None:
        """Put a large content into place."""
        assert todo.staged is not None
        root, path = todo.operation.root, todo.operation.path
        tree, stage = self._trees[root], self._stages[root]
        staged = stage.fixed(todo.staged.name)
        if exists(staged.directory, staged.name):
            tree.put(staged, path, meta)
        elif not todo.again:
            raise BaseUnknown(path, "its content is not in the stage any more")
        if todo.seq <= self.inherited:
            # What could not be kept is to be known.
            tree.set_meta(path, meta)
        placed = tree.status(path)
        if placed is not None:
            self._leaves.placed(placed)
            self.bytes += placed.st_size

    @contextlib.contextmanager
    def _named(self, stage: Stage) -> Iterator[Staged]:
        """A free name in the stage, which is free again afterwards."""
        staged = stage.name()
        with self._used(stage, staged):
            yield staged

    @staticmethod
    @contextlib.contextmanager
    def _used(stage: Stage, staged: Staged) -> Iterator[None]:
        """What is staged is placed, or it is removed."""
        try:
            yield
        except BaseException:
            stage.discard(staged)
            raise
        stage.placed(staged)
