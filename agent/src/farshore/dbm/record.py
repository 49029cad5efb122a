"""What a node remembers of a group across restarts: who owns it, at which epoch, and in which lineage."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from farshore import durable
from farshore.config import Side
from farshore.errors import StateError

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Record:
    """``epoch`` 0: nobody has said yet who owns the group.

    ``lineage`` (hex) names the history of this node's tree as a replica; a source that knows another compares in
    full. ``keep_aside``: until the first full comparison is done, what nobody else has is kept before it is
    overwritten. ``frozen``: the owner's units were stopped for a switch; ``was_in_step``: and everything was durable
    on the other side afterwards, so this tree equalled the other at that moment. ``roots``: what the replica's roots
    were when it was last in step, as ``Group`` marks them; with others, the tree is not the one that was filled.
    ``owner_since_ns``: the wall clock when this node became the owner; what others write to its tree since then is not
    in its history.

    ``back_to``: when this replica becomes the owner, its trees are first put back to the state after that transaction,
    which was reached at ``back_to_ns`` (0: not known); None: they stay. ``exchange``: the name of the work directories
    whose copies are taking the place of what is in the trees of the roots ``exchange_roots``, "" when none are: as long
    as that stands here, a tree may be a mixture. ``restored``: what was put in place since this node became the owner,
    in words.
    """

    epoch: int = 0
    owner: Side = "local"
    lineage: str = ""
    synced_once: bool = False
    keep_aside: bool = True
    frozen: bool = False
    was_in_step: bool = False
    roots: tuple[int, ...] = ()
    owner_since_ns: int = 0
    back_to: int | None = None
    back_to_ns: int = 0
    exchange: str = ""
    exchange_roots: tuple[int, ...] = ()
    restored: str = ""


def load(path: Path) -> Record:
    """Read a record, the default one when there is none; raises StateError when it is damaged."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return Record()
    except (OSError, ValueError) as error:
        raise StateError(str(path), f"is damaged: {error}") from error
    if not isinstance(data, dict) or data.pop("version", None) != _VERSION:
        raise StateError(str(path), f"is not of version {_VERSION}")
    try:
        return Record(**data | {name: tuple(data.get(name, ())) for name in ("roots", "exchange_roots")})
    except TypeError as error:
        raise StateError(str(path), f"is damaged: {error}") from error


def store(path: Path, record: Record) -> None:
    """Replace the record durably: after a crash it is the old one or the new one. Raises StateError."""
    durable.write(path, json.dumps(asdict(record) | {"version": _VERSION}).encode())
