"""Owners by name: a file of alice's here is alice's there, whatever numbers the two hosts have given her.

On the wire, operations hold the numbers of the side that sends them, so that they stay small; before a number is used
for the first time, ``Names`` tells whom it stands for: an *identity*, which is the account's name on the local side
(``owner_map`` is applied on the remote side alone, on the way in and on the way out), or ``#1500`` for a number that
has no account.

An identity without an account on the receiving side gets a number that no account has there: its own if it is free,
else one from a range of ours. That is written down, so that the way back gives the file to whom it belonged.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import msgspec

from farshore import durable
from farshore.config import OwnerMap, Side
from farshore.dbm.messages import (
    Copy,
    Entry,
    Link,
    MakeDir,
    MakeNode,
    MakeSymlink,
    Meta,
    Move,
    Names,
    Operation,
    Patch,
    Put,
    Remove,
    SetMeta,
)
from farshore.dbm.replica.metadata import ACL_GROUP, ACL_USER, acl_entries, acl_value
from farshore.dbm.unkept import Unkept, shown
from farshore.errors import FarshoreError, ProtocolError, StateError
from farshore.fmm.attributes import ACL_ACCESS, ACL_DEFAULT

#: Answers of the system's accounts are believed for so many seconds.
TRUST_SECONDS = 60.0
#: Numbers for identities without an account whose own number is taken: a range that no distribution, systemd or
#: container runtime uses (systemd's UIDS-GIDS.md: 1879048192..2147483647 is unused).
FIRST_SUBSTITUTE = 1_900_000_000
LAST_SUBSTITUTE = 2_100_000_000
#: What no file has as its owner: (uid_t)-1.
NOBODY_EQUALS = (1 << 32) - 1
_MOST_CACHED = 50_000
#: Identities without an account that are written down, and numbers that one connection may tell of, of each kind.
_MOST_KEPT = 1 << 16
_MOST_TOLD = 1 << 18
_NAMES_PER_FRAME = 1000
_LONGEST = 256
_VERSION = 1

Kind = Literal["user", "group"]
_KINDS: tuple[Kind, Kind] = ("user", "group")
_WITH_META = (MakeDir, Put, Patch, Copy, MakeSymlink, MakeNode, SetMeta)
_K = TypeVar("_K")
_V = TypeVar("_V")
_O = TypeVar("_O", bound=Operation)


class OwnersDiffer(FarshoreError):
    """owners go by {0} there and by {1} here; `owners` must be the same on both sides"""


class Accounts(Protocol):
    """The accounts of a host. Each call may block for as long as a directory service takes."""

    def name(self, kind: Kind, number: int) -> str | None:
        """The name of the user or group with this number."""

    def number(self, kind: Kind, name: str) -> int | None:
        """The number of the user or group of this name."""


class SystemAccounts:
    """What the name service switch knows: files, LDAP, SSSD."""

    def name(self, kind: Kind, number: int) -> str | None:
        """The name of the user or group with this number."""
        try:
            return pwd.getpwuid(number).pw_name if kind == "user" else grp.getgrgid(number).gr_name
        except (KeyError, OverflowError):
            return None

    def number(self, kind: Kind, name: str) -> int | None:
        """The number of the user or group of this name."""
        try:
            return pwd.getpwnam(name).pw_uid if kind == "user" else grp.getgrnam(name).gr_gid
        except (KeyError, ValueError):
            return None


class CachedAccounts:
    """Asks ``accounts`` at most once in TRUST_SECONDS for the same.

    Who was known once stays known: the system says of an account that it cannot look up now that there is none.
    """

    def __init__(self, accounts: Accounts, now: Callable[[], float]) -> None:
        self._accounts = accounts
        self._now = now
        self._names: dict[tuple[Kind, int], tuple[float, str | None]] = {}
        self._numbers: dict[tuple[Kind, str], tuple[float, int | None]] = {}

    def name(self, kind: Kind, number: int) -> str | None:
        """The name of the user or group with this number."""
        return self._look(self._names, (kind, number), lambda: self._accounts.name(kind, number))

    def number(self, kind: Kind, name: str) -> int | None:
        """The number of the user or group of this name."""
        return self._look(self._numbers, (kind, name), lambda: self._accounts.number(kind, name))

    def _look(self, cache: dict[_K, tuple[float, _V | None]], key: _K, ask: Callable[[], _V | None]) -> _V | None:
        now = self._now()
        until, answer = cache.get(key, (-1.0, None))
        if now >= until:
            found = ask()
            answer = answer if found is None else found
            if len(cache) >= _MOST_CACHED:
                cache.clear()
            cache[key] = now + TRUST_SECONDS, answer
        return answer


class Owners:
    """How one node of a group translates owners. Any thread may call, but none that must not block.

    ``path`` is where it keeps the numbers that it gave to identities without an account; raises StateError when what
    is there is damaged.
    """

    def __init__(
        self,
        side: Side,
        owner_map: OwnerMap,
        path: Path,
        accounts: Accounts | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.now = now
        #: Files of owners that have no account here.
        self.unkept = Unkept(path.with_name("unkept-owners"))
        self._accounts = CachedAccounts(accounts or SystemAccounts(), now)
        self._lock = threading.Lock()
        self._path = path
        # By kind: what an identity is called here, and the reverse. On the local side all are called what they are.
        maps = {"user": owner_map.users, "group": owner_map.groups} if side == "remote" else {}
        self._here: dict[Kind, Mapping[str, str]] = {kind: maps.get(kind, {}) for kind in _KINDS}
        self._there = {kind: {here: there for there, here in self._here[kind].items()} for kind in _KINDS}
        self._remote = side == "remote"
        self._kept: dict[Kind, dict[str, int]] = {kind: {} for kind in _KINDS}
        #: What a comparison was made by: with another, owners may be others.
        self.mark = json.dumps([side, owner_map.users, owner_map.groups], sort_keys=True).encode()
        self._load()
        self._whose = {kind: {number: who for who, number in self._kept[kind].items()} for kind in _KINDS}
        self._changed = False

    # --- the way out

    def identity(self, kind: Kind, number: int) -> str:
        """Whom a number stands for here."""
        name = self._accounts.name(kind, number) if number else None
        with self._lock:
            kept = self._whose[kind].get(number)
        if name is None:
            # An account always owns its number; this one is of somebody else, or nobody.
            return kept if kept is not None else f"#{number}"
        if name in self._there[kind]:
            return self._there[kind][name]
        if name in self._here[kind]:
            # On the other side, this name is somebody's who is called otherwise here.
            return f"~{name}"
        return name if _is_name(name) else f"#{number}"

    def whose(self, meta: Meta, *, listing: bool = False) -> tuple[object, ...]:
        """Owner, group and attributes as both sides call them, for comparing what has other numbers on each.

        ``listing``: a number that its identity would not be given now is like no other, see ``Leaving.listed``.
        """

        def who(kind: Kind, number: int) -> str:
            identity = self.identity(kind, number)
            return f"!{number}" if listing and self.find(kind, identity) != number else identity

        attributes = [
            (name, _acl_of(value, who) if name in (ACL_ACCESS, ACL_DEFAULT) else value) for name, value in meta.xattrs
        ]
        return who("user", meta.uid), who("group", meta.gid), attributes

    # --- the way in

    def find(self, kind: Kind, identity: str) -> int | None:
        """The number of an identity here, None when it has none yet."""
        number = self._account(kind, identity)
        if number is not None:
            return number
        with self._lock:
            kept = self._kept[kind].get(identity)
            if kept is None and identity.startswith("#") and int(identity[1:]) not in self._whose[kind]:
                kept = int(identity[1:])
        return kept if kept is not None and self._is_free(kind, kept) else None

    def number(self, kind: Kind, identity: str, said: int) -> tuple[int, str | None]:
        """The number of an identity here, which has number ``said`` there; and the cause if it has no account here."""
        number = self._account(kind, identity)
        if number is not None:
            return number, None
        found = self.find(kind, identity)
        if found is None:
            found = self._give(kind, identity, said)
        if identity == f"#{found}":
            return found, None
        return found, self._cause(kind, identity, said, found)

    def _account(self, kind: Kind, identity: str) -> int | None:
        if identity.startswith("#"):
            return 0 if identity == "#0" else None
        if identity.startswith("~"):
            return self._accounts.number(kind, identity[1:]) if self._remote else None
        name = self._here[kind].get(identity)
        if name is None:
            if identity in self._there[kind]:
                # The account of this name is another one's.
                return None
            name = identity
        return self._accounts.number(kind, name)

    def _cause(self, kind: Kind, identity: str, said: int, found: int) -> str:
        who = f"{kind} {identity}" if not identity.startswith("#") else f"{kind} number {identity[1:]}"
        if found == said:
            return f"{who} is not known here: number {found} is kept"
        owner = self._accounts.name(kind, said)
        taken = f"{said} is {shown(os.fsencode(owner))}'s" if owner is not None else f"{said} is taken"
        return f"{who} is not known here: number {found} is given, as {taken}"

    def _give(self, kind: Kind, identity: str, said: int) -> int:
        """Give an identity a number that nobody has here."""
        with self._lock:
            whose = self._whose[kind]
            before = self._kept[kind].pop(identity, None)
            if before is not None:
                del whose[before]
            if len(whose) >= _MOST_KEPT:
                raise StateError(str(self._path), f"more than {_MOST_KEPT} {kind}s have no account here")
            number = said
            if whose.get(number, identity) != identity or not self._is_free(kind, number):
                number = max((FIRST_SUBSTITUTE, *(n + 1 for n in whose if FIRST_SUBSTITUTE <= n < LAST_SUBSTITUTE)))
                while not self._is_free(kind, number):
                    number += 1
            self._kept[kind][identity] = number
            whose[number] = identity
            self._changed = True
            return number

    def _is_free(self, kind: Kind, number: int) -> bool:
        return 0 < number < NOBODY_EQUALS and self._accounts.name(kind, number) is None

    # --- between runs

    def store(self) -> None:
        """Make the numbers that were given durable; raises StateError."""
        with self._lock:
            if not self._changed:
                return
            data = {"version": _VERSION, "users": self._kept["user"], "groups": self._kept["group"]}
            durable.write(self._path, json.dumps(data, indent=1).encode())
            self._changed = False

    def _load(self) -> None:
        try:
            data = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise StateError(str(self._path), f"is damaged: {error}") from error
        if not isinstance(data, dict) or data.get("version") != _VERSION:
            raise StateError(str(self._path), f"is not of version {_VERSION}")
        try:
            for kind in _KINDS:
                self._kept[kind] = msgspec.convert(data[f"{kind}s"], dict[str, int])
        except (KeyError, msgspec.ValidationError) as error:
            raise StateError(str(self._path), f"is damaged: {error}") from error


class Leaving:
    """Tells one connection whom the numbers stand for that are used on it; None: owners go by number."""

    def __init__(self, owners: Owners | None) -> None:
        self._owners = owners
        self._told: dict[Kind, dict[int, str | None]] = {kind: {} for kind in _KINDS}
        # Those that were looked up lately.
        self._fresh: set[tuple[Kind, int]] = set()
        self._until = 0.0
        self._new: dict[Kind, dict[int, str]] = {kind: {} for kind in _KINDS}

    def use(self, meta: Meta) -> None:
        """These numbers are about to be sent."""
        if self._owners is not None:
            self._use(self._owners, meta, listing=False)

    def told(self) -> list[Names]:
        """What must be sent before what was used: nothing, mostly."""
        if not (self._new["user"] or self._new["group"]):
            return []
        parts = []
        for kind in _KINDS:
            for part in _parts(self._new[kind]):
                parts.append(Names(part, {}) if kind == "user" else Names({}, part))
            self._new[kind] = {}
        return parts

    def listed(self, entries: list[Entry], place: Callable[[int, bytes], bytes]) -> list[Names]:
        """What must be sent before the replica's ``entries``.

        A number that its identity would not be given now is not told: what has it is to be set anew. ``place`` says
        where a path of a root is.
        """
        owners = self._owners
        if owners is None:
            return []
        for entry in entries:
            self._use(owners, entry.meta, listing=True)
            causes = []
            for kind, number in numbers(entry.meta):
                who = self._told[kind].get(number)
                if who is not None:
                    found, cause = owners.number(kind, who, number)
                    causes += [cause] if cause is not None and found == number else []
            for cause in causes:
                owners.unkept.note(place(entry.root, entry.path), cause)
        return self.told()

    def _use(self, owners: Owners, meta: Meta, *, listing: bool) -> None:
        now = owners.now()
        if now >= self._until:
            self._until = now + TRUST_SECONDS
            self._fresh.clear()
        for key in numbers(meta):
            if key not in self._fresh:
                self._fresh.add(key)
                self._look(owners, *key, listing=listing)

    def _look(self, owners: Owners, kind: Kind, number: int, *, listing: bool) -> None:
        who: str | None = owners.identity(kind, number)
        if listing and who is not None and owners.find(kind, who) != number:
            who = None
        if self._told[kind].get(number) != who and who is not None:
            self._new[kind][number] = who
        self._told[kind][number] = who


class Arriving:
    """Translates what comes over one connection; None: owners go by number, and nothing is translated."""

    def __init__(self, owners: Owners | None, place: Callable[[int, bytes], bytes] = lambda root, path: path) -> None:
        self._owners = owners
        self._place = place
        self._who: dict[Kind, dict[int, str]] = {kind: {} for kind in _KINDS}
        self._cache: dict[tuple[Kind, int], tuple[int, str | None]] = {}
        self._until = 0.0

    def learn(self, names: Names) -> None:
        """The other side tells whom numbers stand for; raises OwnersDiffer and ProtocolError."""
        if self._owners is None:
            raise OwnersDiffer("name", "number")
        told_of: dict[Kind, dict[int, str]] = {"user": names.users, "group": names.groups}
        for kind, told in told_of.items():
            for number, who in told.items():
                if not (0 <= number < NOBODY_EQUALS and _is_identity(who)):
                    raise ProtocolError("the peer", f"{who!r} is nobody who could have number {number}")
                self._who[kind][number] = who
                self._cache.pop((kind, number), None)
            if len(self._who[kind]) > _MOST_TOLD:
                raise ProtocolError("the peer", f"more than {_MOST_TOLD} {kind}s")

    def translated(self, operation: _O) -> _O:
        """The operation with this side's numbers; raises OwnersDiffer when it has one that was not told."""
        owners = self._owners
        if owners is None:
            return operation
        if not isinstance(operation, _WITH_META):
            self._note_place(owners, operation)
            return operation
        causes: list[str] = []

        def here(kind: Kind, number: int) -> int:
            found, cause = self._number(owners, kind, number)
            if cause is not None:
                causes.append(cause)
            return found

        meta = changed(operation.meta, here)
        if causes or owners.unkept:
            owners.unkept.settle(self._place(operation.root, operation.path), causes)
        return operation if meta is operation.meta else msgspec.structs.replace(operation, meta=meta)

    def listed(self, entries: list[Entry]) -> list[Entry]:
        """The replica's entries with the source's numbers; NOBODY_EQUALS where the owner is to be set anew."""
        owners = self._owners
        if owners is None:
            return entries

        def here(kind: Kind, number: int) -> int:
            who = self._who[kind].get(number)
            found = None if who is None else owners.find(kind, who)
            return NOBODY_EQUALS if found is None else found

        return [msgspec.structs.replace(entry, meta=changed(entry.meta, here)) for entry in entries]

    def store(self) -> None:
        """Make durable what the translation of what follows back will need; raises StateError."""
        if self._owners is not None:
            self._owners.store()

    def _number(self, owners: Owners, kind: Kind, number: int) -> tuple[int, str | None]:
        now = owners.now()
        if now >= self._until:
            self._until = now + TRUST_SECONDS
            self._cache.clear()
        found = self._cache.get((kind, number))
        if found is None:
            who = self._who[kind].get(number)
            if who is None:
                raise OwnersDiffer("number", "name")
            found = self._cache[kind, number] = owners.number(kind, who, number)
        return found

    def _note_place(self, owners: Owners, operation: Operation) -> None:
        if not owners.unkept:
            return
        path = self._place(operation.root, operation.path)
        if isinstance(operation, Remove):
            owners.unkept.gone(path, below=True)
        elif isinstance(operation, Link):
            owners.unkept.linked(path, self._place(operation.root, operation.to))
        elif isinstance(operation, Move):
            owners.unkept.moved(path, self._place(operation.root, operation.to), below=True)


def numbers(meta: Meta) -> Iterator[tuple[Kind, int]]:
    """The owners that a path's metadata names, those of its ACLs included."""
    yield "user", meta.uid
    yield "group", meta.gid
    for name, value in meta.xattrs:
        if name in (ACL_ACCESS, ACL_DEFAULT):
            try:
                for tag, _, number in acl_entries(value):
                    if tag == ACL_USER:
                        yield "user", number
                    elif tag == ACL_GROUP:
                        yield "group", number
            except (ValueError, struct.error):
                continue


def changed(meta: Meta, here: Callable[[Kind, int], int]) -> Meta:
    """The metadata with other numbers; itself when they are the same."""
    uid, gid = here("user", meta.uid), here("group", meta.gid)
    xattrs = meta.xattrs
    if any(name in (ACL_ACCESS, ACL_DEFAULT) for name, _ in xattrs):
        xattrs = [
            (name, _changed_acl(value, here) if name in (ACL_ACCESS, ACL_DEFAULT) else value) for name, value in xattrs
        ]
    if (uid, gid) == (meta.uid, meta.gid) and xattrs == meta.xattrs:
        return meta
    return msgspec.structs.replace(meta, uid=uid, gid=gid, xattrs=xattrs)


def _changed_acl(value: bytes, here: Callable[[Kind, int], int]) -> bytes:
    try:
        entries = list(acl_entries(value))
    except ValueError:
        return value
    kinds: dict[int, Kind] = {ACL_USER: "user", ACL_GROUP: "group"}
    return acl_value(
        [(tag, rights, here(kinds[tag], number) if tag in kinds else number) for tag, rights, number in entries]
    )


def _acl_of(value: bytes, who: Callable[[Kind, int], str]) -> object:
    try:
        entries = list(acl_entries(value))
    except ValueError:
        return value
    kinds: dict[int, Kind] = {ACL_USER: "user", ACL_GROUP: "group"}
    return [(tag, rights, who(kinds[tag], number) if tag in kinds else "") for tag, rights, number in entries]


def _is_name(name: str) -> bool:
    """Whether a name can be told as it is."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return 0 < len(name) < _LONGEST and name[0] not in "#~" and "\0" not in name


def _is_identity(who: str) -> bool:
    if who.startswith("#"):
        return who[1:].isascii() and who[1:].isdigit() and len(who) <= 11 and int(who[1:]) < NOBODY_EQUALS
    return _is_name(who[1:] if who.startswith("~") else who)


def _parts(names: dict[int, str]) -> Iterable[dict[int, str]]:
    items = list(names.items())
    for at in range(0, len(items), _NAMES_PER_FRAME):
        yield dict(items[at : at + _NAMES_PER_FRAME])
