"""Which roots the state of a group is of, by their numbers, and the way to others.

All that a node keeps of a group, as its replica and as its source, names the protected paths by their numbers. When the
configuration has others, or the same in another order, the replica's state is brought along: what was acknowledged is
applied to the paths that it was for, and the history is rewritten with the new numbers. What the paths that are gone
had of it goes, while their files stay. A source's index is made anew, by a full comparison.

A crash in the middle leaves the old numbers with the old state, or a change that ``finish`` completes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

from farshore import durable
from farshore.dbm.replica.paths import remove_tree
from farshore.dbm.replica.stage import places
from farshore.dbm.verify.reading import forget
from farshore.errors import StateError
from farshore.fmm.types import Root

_FILE = "roots.json"
_VERSION = 1
#: The history with the new numbers, until it takes the old one's place.
NEW_HISTORY = "history.new"
_SURVEY = "survey.db"

#: The roots of a group: the name of each on both sides, and where it lies here.
Roots = list[tuple[str, Root]]


class _Root(msgspec.Struct, frozen=True):
    source: str
    path: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_size: int = 0
    min_age: int = 0
    max_age: int = 0
    one_filesystem: bool = False


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``following``: the roots that take the place of ``roots``; ``apart``: no directory is named by a number now."""

    version: int
    roots: list[_Root]
    following: list[_Root] | None = None
    apart: bool = False


def load(state: Path) -> Roots | None:
    """The roots that a state directory is of; None when it does not say so. Raises StateError."""
    file = _load(state)
    return None if file is None else _plain(file.roots)


def store(state: Path, roots: Roots) -> None:
    """The state is of these roots. Raises StateError."""
    _store(state, _File(_VERSION, _kept(roots)))


def differ(old: Roots, new: Roots) -> bool:
    """Whether a number stands for another path in ``new`` than in ``old``; their patterns don't count."""
    return _keys(old) != _keys(new)


def mapping(old: Roots, new: Roots) -> dict[int, int]:
    """The new number of each old root that is still there."""
    numbers = {key: number for number, key in enumerate(_keys(new))}
    return {number: numbers[key] for number, key in enumerate(_keys(old)) if key in numbers}


def change(state: Path, old: Roots, new: Roots) -> None:
    """Make the state that is of ``old`` one of ``new``: nothing waits in its journal, and ``NEW_HISTORY`` is there.

    Raises StateError, OSError; then ``finish`` goes on.
    """
    _store(state, _File(_VERSION, _kept(old), _kept(new)))
    finish(state)


def finish(state: Path) -> None:
    """Complete a change that was cut off, if one was. Raises StateError, OSError."""
    file = _load(state)
    if file is None or file.following is None:
        return
    old, new = _plain(file.roots), _plain(file.following)
    if not file.apart:
        for number in range(len(old)):
            with contextlib.suppress(FileNotFoundError):
                os.rename(state / str(number), _apart(state, number))
        durable.sync_directory(state)
        _store(state, _File(_VERSION, file.roots, file.following, True))
    numbers = mapping(old, new)
    for number, (_, root) in enumerate(old):
        here = _apart(state, number)
        if number not in numbers:
            for place in places(root.path, here):
                _remove(place)
            _remove(os.fsencode(here))
        elif here.exists():
            os.rename(here, state / str(numbers[number]))
    if (state / NEW_HISTORY).exists():
        shutil.rmtree(state / "history", ignore_errors=True)
        os.rename(state / NEW_HISTORY, state / "history")
    (state / "doubts").unlink(missing_ok=True)
    forget(state / _SURVEY)
    durable.sync_directory(state)
    store(state, new)


def names_of(roots: Roots) -> bytes:
    """The names of roots in their order, as an index has them."""
    return msgspec.json.encode([source.rstrip("/") for source, _ in roots])


def _apart(state: Path, number: int) -> Path:
    return state / f"root-{number}"


def _remove(place: bytes) -> None:
    """Remove a stage; what cannot be removed is in nobody's way."""
    with contextlib.suppress(OSError):
        above = os.open(os.path.dirname(place), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            remove_tree(above, os.path.basename(place))
        finally:
            os.close(above)


def _keys(roots: Roots) -> list[tuple[str, bytes]]:
    return [(source.rstrip("/"), root.path) for source, root in roots]


def _kept(roots: Sequence[tuple[str, Root]]) -> list[_Root]:
    return [_Root(source, os.fsdecode(root.path), *_rules(root)) for source, root in roots]


def _plain(roots: Sequence[_Root]) -> Roots:
    return [(each.source, Root(os.fsencode(each.path), *_rules(each))) for each in roots]


def _rules(root: Root | _Root) -> tuple[tuple[str, ...], tuple[str, ...], int, int, int, bool]:
    """What of a root is protected, in the order of the fields of both."""
    return root.include, root.exclude, root.max_size, root.min_age, root.max_age, root.one_filesystem


def _load(state: Path) -> _File | None:
    path = state / _FILE
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise StateError(path, f"is damaged: {error}") from error
    if file.version != _VERSION:
        raise StateError(path, f"is of version {file.version}; this program knows {_VERSION}")
    return file


def _store(state: Path, file: _File) -> None:
    durable.write(state / _FILE, msgspec.json.encode(file))
