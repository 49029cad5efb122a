"""The digests that two trees are compared by: pure functions of what lies in a directory.

A name's own digest covers kind, metadata and, where contents are compared, content; access times and the number of
links never count. A directory's digest covers the names in it and everything below. Names fall into buckets by their
hash, so that one name among a million costs neither side a list of all of them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import blake3
import msgspec

from farshore.dbm.index import Known, clamp_time
from farshore.dbm.messages import Item, Meta
from farshore.dbm.owners import Owners
from farshore.fmm.types import FileKind, Observed

#: Bytes of a digest. 128 bits: nobody gains by two things with one digest, as both sides are ours.
SIZE = 16
#: Directories with more names than this are told of in buckets first.
FEW_NAMES = 64
#: What stands for what a side does not know; another for each side, so that what neither knows is looked at.
UNKNOWN_HERE = b"?"
UNKNOWN_THERE = b"!"

_encoder = msgspec.msgpack.Encoder()
_HEAD = struct.Struct(">I?")
_DEVICES = (FileKind.CHARACTER_DEVICE, FileKind.BLOCK_DEVICE)


def own_digest(
    kind: FileKind,
    meta: Meta,
    size: int,
    rdev: int,
    target: bytes | None,
    content: bytes | None,
    whose: tuple[object, ...] | None = None,
) -> bytes:
    """The digest of what a name stands for; ``content`` is a file's, None when contents are not compared.

    ``whose`` is what ``Owners.whose`` says where owners go by name.
    """
    uid, gid, xattrs = (meta.uid, meta.gid, meta.xattrs) if whose is None else whose
    told = (
        int(kind),
        meta.mode,
        uid,
        gid,
        meta.mtime_ns,
        xattrs,
        size if kind is FileKind.FILE else 0,
        rdev if kind in _DEVICES else 0,
        target,
        content if kind is FileKind.FILE else None,
    )
    return blake3.blake3(_encoder.encode(told)).digest(SIZE)


def of_known(known: Known, content: bytes | None, owners: Owners | None = None) -> bytes:
    """The digest of what the index says that the replica has; ``owners``: they go by name."""
    meta = Meta(known.mode, known.uid, known.gid, 0, known.mtime_ns, list(known.xattrs))
    whose = None if owners is None else owners.whose(meta)
    return own_digest(known.kind, meta, known.size, known.rdev, known.target, content, whose)


def of_observed(seen: Observed, content: bytes | None, owners: Owners | None = None) -> bytes:
    """The digest of what was seen on the replica; ``owners``: they go by name."""
    meta = meta_of(seen)
    whose = None if owners is None else owners.whose(meta, listing=True)
    return own_digest(seen.kind, meta, seen.size, seen.rdev, seen.target, content, whose)


def meta_of(seen: Observed) -> Meta:
    """The metadata of what was seen, as it is told on the wire."""
    return Meta(seen.mode, seen.uid, seen.gid, clamp_time(seen.atime_ns), clamp_time(seen.mtime_ns), list(seen.xattrs))


def directory_digest(items: Iterable[Item]) -> bytes:
    """The digest of all that lies in a directory, in any order; every directory among it has its ``below``."""
    hasher = blake3.blake3()
    for item in sorted(items, key=_name):
        head = _HEAD.pack(len(item.name), item.below is not None)
        hasher.update(head + item.name + item.own + (item.below or b""))
    return hasher.digest(SIZE)


def bucket_of(name: bytes) -> int:
    """The bucket, of 256, that a name belongs to."""
    return blake3.blake3(name).digest(1)[0]


def buckets(items: Iterable[Item]) -> list[Item]:
    """The digests of a directory's buckets, as items; those that hold nothing are left out."""
    found: dict[int, list[Item]] = {}
    for item in items:
        found.setdefault(bucket_of(item.name), []).append(item)
    return [Item(bytes([number]), directory_digest(held), None) for number, held in sorted(found.items())]


def _name(item: Item) -> bytes:
    return item.name
