"""What a name holds within a transaction that is being staged, as nothing of it is in the tree yet."""

from __future__ import annotations

from dataclasses import dataclass

from farshore.dbm.messages import Link, Move, Operation, Put
from farshore.dbm.replica.stage import Staged


@dataclass(frozen=True, slots=True)
class Before:
    """What the tree has at ``path`` before the transaction."""

    path: bytes


@dataclass(slots=True)
class _Made:
    """Operation ``number`` gave a name a content of its own, or that of another name; ``earlier`` did it before."""

    number: int
    what: Staged | bytes | Link
    earlier: _Made | None


class Within:
    """Follows contents through the operations of one transaction, for copies within it.

    Moves are followed backwards when a name is asked for: nothing has to be searched for what is below a directory.
    What is removed is not told from what is there, as nobody has reason to ask for it.
    """

    def __init__(self) -> None:
        self._count = 0
        self._made: dict[tuple[int, bytes], _Made] = {}
        self._moves: dict[int, list[tuple[int, Move]]] = {}

    def note(self, operation: Operation, staged: Staged | None) -> None:
        """``operation`` comes next; ``staged`` holds its content when that is not within it."""
        root = operation.root
        what: Staged | bytes | Link | None = staged
        if isinstance(operation, Put):
            what = operation.data
        elif isinstance(operation, Link):
            what = operation
        elif isinstance(operation, Move):
            self._moves.setdefault(root, []).append((self._count, operation))
        if what is not None:
            key = root, operation.path
            self._made[key] = _Made(self._count, what, self._made.get(key))
        self._count += 1

    def find(self, root: int, path: bytes) -> Staged | bytes | Before:
        """The content that the file at ``path`` has after all operations so far."""
        end = self._count
        for number, move in reversed(self._moves.get(root, [])):
            found, path = self._follow(root, path, number, end)
            if found is not None:
                return found
            if path == move.to or path.startswith(move.to + b"/"):
                path = move.path + path[len(move.to) :]
            end = number
        found, path = self._follow(root, path, -1, end)
        return Before(path) if found is None else found

    def _follow(self, root: int, path: bytes, after: int, end: int) -> tuple[Staged | bytes | None, bytes]:
        """What the operations between these two made of ``path``, without moves; else the name that it was before."""
        while True:
            made = self._made.get((root, path))
            while made is not None and made.number >= end:
                made = made.earlier
            if made is None or made.number < after:
                return None, path
            if not isinstance(made.what, Link):
                return made.what, path
            path, end = made.what.to, made.number
