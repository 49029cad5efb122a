"""The fuzzing campaign: hostile bytes at a node's port, a valid peer that lies, symbolic links that appear meanwhile.

The peer that lies has a certificate and a group. It speaks the real protocol over a socket to a real replica; honest
operations and lies follow each other at random, as hypothesis chooses them, which also shrinks what fails. What must
hold: nothing outside the root changes (a tree of canaries lies around it), a connection ends with an error of ours or
a Nak, no thread and no task fails otherwise, memory and descriptors are bounded, and an honest peer is served then.

    python agent/tests/hostile.py --minutes 5 --report build/fuzz/report.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import io
import logging
import os
import random
import shutil
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
import traceback
import typing
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import blake3
import msgspec
import zstandard
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from nodes import Pair, running_pair
from replicas import DIRECTORY, FILE, Replica, chunks, stream
from reports import tell

from farshore import delta, tls
from farshore.config import NodeRef, Tls
from farshore.control import api
from farshore.daemons import admission
from farshore.dbm import wire
from farshore.dbm.blocks import MAX_BLOCK, PLAIN, ZSTD
from farshore.dbm.messages import (
    Ack,
    Begin,
    Chunk,
    Commit,
    Copy,
    Drop,
    Entries,
    FromSource,
    Hello,
    InStep,
    Link,
    ListTree,
    MakeDir,
    MakeNode,
    MakeSymlink,
    Meta,
    Move,
    Nak,
    Patch,
    Ping,
    Pong,
    Put,
    Refused,
    Remove,
    SetMeta,
    SignaturePart,
    Upload,
    WantSignature,
)
from farshore.errors import FarshoreError

#: MiB that a campaign's process may grow by beyond what it has once everything is loaded and was used.
MOST_GROWTH = 256
_HEAD = struct.Struct(">IB")


# --- what must not change


def canaries(base: Path) -> Path:
    """Make a tree with a place for a root in it; returns the root, which is a directory."""
    secret = base / "canary"
    (secret / "sub").mkdir(parents=True)
    (secret / "file").write_text("canary")
    (secret / "sub" / "file").write_text("canary")
    (secret / "link").symlink_to("sub")
    (base / "file").write_text("canary")
    root = base / "site" / "root"
    root.mkdir(parents=True)
    (base / "site" / "file").write_text("canary")
    (base / "site" / "a").mkdir()
    (base / "site" / "a" / "file").write_text("canary")
    return root


def look_around(base: Path) -> dict[str, object]:
    """All that lies around the root: kinds, identities, times of change, contents.

    The directory that holds the root has a place for staging in it at times; of it, the names count.
    """
    seen: dict[str, object] = {}
    for where, directories, names in os.walk(base):
        if where == str(base) and "state" in directories:
            directories.remove("state")
        if where == str(base / "site"):
            with contextlib.suppress(ValueError):
                directories.remove("root")
            names = [name for name in names if name != "root"]
        for name in (*directories, *names):
            path = Path(where, name)
            status = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else None
            times = (status.st_ctime_ns, status.st_mtime_ns) if name != "site" else None
            seen[str(path)] = (
                status.st_mode,
                status.st_ino,
                status.st_uid,
                status.st_gid,
                status.st_nlink,
                times,
                content,
            )
    return seen


class Faults(logging.Handler):
    """What fails without anybody's asking: errors in logs, tasks and threads. Holds while it is entered."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler``."""
        self.found.append(self.format(record) + f" {getattr(record, 'fields', '')}")

    def __enter__(self) -> Faults:
        logging.getLogger().addHandler(self)
        self._hook, threading.excepthook = threading.excepthook, self._thread
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)
        threading.excepthook = self._hook

    def _thread(self, failed: Any) -> None:
        self.found.append("".join(traceback.format_exception(failed.exc_type, failed.exc_value, failed.exc_traceback)))


def resident() -> int:
    """MiB of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


# --- what a peer says


def one_of(*values: Any) -> st.SearchStrategy[Any]:
    """As ``sampled_from``, which would tell of all these long values in each report."""
    return st.integers(0, len(values) - 1).map(lambda number: values[number])


NAMES = st.sampled_from([b"a", b"b", b"c", b"file", b"sub", b"door"])
PLAIN_PATHS = st.lists(NAMES, min_size=1, max_size=4).map(b"/".join)
ODD_NAMES = one_of(
    *(b"", b".", b"..", b"...", b"/", b"\0", b"a\0b", b"\xff\xfe", b"\n", b".farshore-stage", b".farshore-x"),
    *(b"x" * 255, b"x" * 256, b"..\0", b" ", b"..", b"..", b"canary", b"root", b"site"),
)
ODD_PATHS = (
    st.lists(NAMES | ODD_NAMES, max_size=6).map(b"/".join)
    | st.tuples(st.integers(1, 4), NAMES).map(lambda pair: b"/" * pair[0] + pair[1])
    | one_of(b"", b"/", b"//", b"x/" * 2048 + b"x", b"y" * 5000, b"/etc/passwd", b"/" * 4000, b"z/" * 300_000)
    | st.binary(max_size=12)
)
PATHS = PLAIN_PATHS | PLAIN_PATHS | ODD_PATHS
TARGETS = one_of(
    *(
        b"..",
        b"../..",
        b"../../canary",
        b"../../canary/file",
        b"../a",
        b"../file",
        b"/",
        b".",
        b"a",
        b"b",
        b"door",
        b"",
    ),
    *(
        b"/proc/self/root",
        b"/proc/self/cwd",
        b"/etc",
        b"x" * 5000,
        b"a\0b",
        b"../../canary/sub",
        b"@canary",
        b"@canary",
    ),
)
NUMBERS = one_of(
    *(0, 1, 2, 7, 255, 0o644, 0o755, 0o7777, 0o170000, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1),
    *(1 << 63, (1 << 64) - 1, -1, -2, -(1 << 31), -(1 << 63)),
)
XATTRS = st.lists(
    st.tuples(
        one_of(
            *(b"user.a", b"user.b", b"trusted.overlay.redirect", b"security.selinux", b"security.capability", b"user."),
            *(b"", b"system.posix_acl_access", b"x" * 300, b"user.a\0b", b"odd.name", b"user." + b"n" * 300),
        ),
        st.binary(max_size=20) | one_of(bytes(3000), bytes(70_000)),
    ),
    max_size=3,
)
METAS = st.just(FILE) | st.just(DIRECTORY) | st.builds(Meta, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, XATTRS)
ROOTS = st.just(0) | st.just(0) | st.just(0) | NUMBERS
CONTENTS = st.binary(max_size=40) | st.integers(0, 255).map(lambda byte: bytes([byte]) * 60_000)
#: Numbers of devices that nobody minds if they were opened: /dev/null, and one that nobody has.
DEVICES = st.sampled_from([os.makedev(1, 3), os.makedev(240, 77)]) | st.sampled_from([-1, (1 << 64) - 1, 1 << 63])
DIGESTS = CONTENTS.map(lambda data: blake3.blake3(data).digest()) | st.binary(max_size=40)

OPERATIONS = st.one_of(
    st.builds(MakeDir, ROOTS, PATHS, METAS),
    st.builds(Put, ROOTS, PATHS, METAS, CONTENTS),
    st.builds(Copy, ROOTS, PATHS, METAS, ROOTS, PATHS, DIGESTS),
    st.builds(MakeSymlink, ROOTS, PATHS, METAS, TARGETS),
    st.builds(MakeNode, ROOTS, PATHS, METAS, st.integers(-1, 9), DEVICES),
    st.builds(Link, ROOTS, PATHS, PATHS),
    st.builds(Move, ROOTS, PATHS, PATHS),
    st.builds(Remove, ROOTS, PATHS),
    st.builds(SetMeta, ROOTS, PATHS, METAS),
)
#: What is in order but for what it is about: most of it is applied.
TAME = st.one_of(
    st.builds(MakeDir, st.just(0), PLAIN_PATHS, st.just(DIRECTORY)),
    st.builds(Put, st.just(0), PLAIN_PATHS, st.just(FILE), CONTENTS),
    st.builds(MakeSymlink, st.just(0), PLAIN_PATHS, st.just(FILE), TARGETS),
    st.builds(Link, st.just(0), PLAIN_PATHS, PLAIN_PATHS),
    st.builds(Move, st.just(0), PLAIN_PATHS, PLAIN_PATHS),
    st.builds(Remove, st.just(0), PLAIN_PATHS),
    st.builds(SetMeta, st.just(0), PLAIN_PATHS, st.just(DIRECTORY)),
)


def any_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a message's type, or of a field's: what is added to the protocol is tried, too."""
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: NUMBERS,
        bytes: PATHS,
        str: st.text(max_size=5),
        bool: st.booleans(),
        float: st.floats(),
        type(None): st.none(),
        Meta: METAS,
    }
    if kind in plain:
        return plain[kind]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return any_of(inner[0])
    if origin is list:
        return st.lists(any_of(inner[0]), max_size=3)
    if origin is tuple:
        return st.tuples(*map(any_of, inner))
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if inner:
        return st.one_of(*map(any_of, inner))
    fields = {field.name: any_of(field.type) for field in msgspec.structs.fields(kind)}
    return st.builds(kind, **fields)


UPLOADS = st.builds(Upload, NUMBERS, ROOTS, PATHS, st.booleans(), st.booleans(), st.just(0) | NUMBERS)
FRAMES = st.one_of(
    OPERATIONS,
    UPLOADS,
    st.builds(Begin, st.just(1) | NUMBERS, NUMBERS),
    st.builds(Commit, NUMBERS),
    st.builds(Chunk, NUMBERS, st.binary(max_size=200), st.booleans()),
    st.builds(Drop, NUMBERS),
    st.builds(Patch, ROOTS, PATHS, METAS, NUMBERS),
    st.builds(WantSignature, ROOTS, PATHS),
    st.builds(ListTree, st.booleans()),
    st.builds(Hello, NUMBERS, st.text(max_size=5), NUMBERS, st.lists(st.text(max_size=5), max_size=3)),
    st.just(InStep()),
    any_of(FromSource),
)


def fits(message: object) -> bool:
    """Whether a message fits into a frame: what does not, cannot be said."""
    try:
        wire.frame(message)
    except FarshoreError:
        return False
    return True


@st.composite
def deltas(draw: st.DrawFn, old: bytes, new: bytes) -> bytes:
    """A delta that is whole, damaged, cut short, or made of anything."""
    made = bytearray(stream(new, old if draw(st.booleans()) else None))
    kind = draw(st.sampled_from(["whole", "damaged", "cut", "bomb", "anything"]))
    if kind == "damaged":
        for _ in range(draw(st.integers(1, 3))):
            made[draw(st.integers(0, len(made) - 1))] = draw(st.integers(0, 255))
    elif kind == "cut":
        del made[draw(st.integers(0, len(made))) :]
    elif kind == "bomb":
        head = delta.DeltaHeader(4096, len(old), blake3.blake3(old).digest()).to_bytes()
        numbers = st.sampled_from([1, 100, len(old), 1 << 31, 1 << 62, (1 << 63) - 1])
        made = bytearray(head)
        for _ in range(draw(st.integers(1, 5))):
            made += delta.format.copy(draw(numbers | st.just(0)), draw(numbers))
    elif kind == "anything":
        made = bytearray(draw(st.binary(max_size=300)))
    return bytes(made)


# --- a valid peer that lies


class Liar(RuleBasedStateMachine):
    """One replica, and one who may send to it and lies."""

    #: Of all examples of this process.
    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="farshore-liar-", dir=self.place()))
        self.root = canaries(self.base)
        self.before = look_around(self.base)
        self.faults = Faults()
        self.faults.__enter__()
        self.descriptors = len(os.listdir("/proc/self/fd"))
        (self.base / "state").mkdir()
        self.replica = Replica(self.base, ("site/root",))
        self.replica._loop.set_exception_handler(lambda _, context: self.faults.found.append(str(context)))
        self.uploads = 0

    @staticmethod
    def place() -> str | None:
        """Where trees are made; None is the system's place."""
        return os.environ.get("FARSHORE_FUZZ_DIR")

    # What is said, and how it ends.

    def say(self, *frames: object, commits: bool = False) -> list[object]:
        """Send frames and read until all is answered, or the connection has ended, as it must with an error of ours."""
        if not all(map(fits, frames)):
            return []
        self.counts["steps"] += 1
        answers: list[object] = []
        try:
            self.replica.source.put(*frames, Ping())
        except (ConnectionError, FarshoreError):
            pass
        else:
            pending = {Pong, *([Ack] if commits else [])}
            while pending and (answer := self.replica.source.read()) is not None:
                answers.append(answer)
                pending.discard(type(answer))
                if isinstance(answer, (Nak, Refused)):
                    break
            if not pending:
                self.counts["answered"] += 1
                return answers
        if any(isinstance(answer, Nak) for answer in answers):
            self.leave()
        else:
            ended = self.replica.ended()
            assert ended is None or isinstance(ended, FarshoreError), ended
        self.counts["refused"] += 1
        return answers

    def leave(self) -> None:
        """Cut the connection. If something was not read yet, the system tells the replica so."""
        ended = self.replica.disconnect()
        assert ended is None or isinstance(ended, (FarshoreError, ConnectionError)), ended

    def targets(self, operation: object) -> object:
        """An operation with its placeholder for an absolute path outside filled in."""
        if isinstance(operation, MakeSymlink) and operation.target == b"@canary":
            target = os.fsencode(self.base / "canary")
            return MakeSymlink(operation.root, operation.path, operation.meta, target)
        return operation

    # Rules

    @initialize()
    def begin(self) -> None:
        """The tree has something to begin with."""
        self.say(*self.replica.transaction(MakeDir(0, b"a", DIRECTORY), Put(0, b"a/file", FILE, b"x")), commits=True)

    @rule(operations=st.lists(TAME | OPERATIONS, min_size=1, max_size=8))
    def transaction(self, operations: list[object]) -> None:
        """A transaction in good order, of whatever operations."""
        self.say(*self.replica.transaction(*map(self.targets, operations)), commits=True)

    @rule(operations=st.lists(TAME, min_size=1, max_size=8), door=NAMES)
    def through_a_door(self, operations: list[Any], door: bytes) -> None:
        """A symbolic link is planted, and gone through."""
        where = os.fsencode(self.base / "canary")
        through = [
            Put(0, door + b"/file", FILE, b"evil"),
            Remove(0, door + b"/sub"),
            SetMeta(0, door + b"/file", Meta(0o777, 1, 1, 1, 1, [])),
            Link(0, b"c", door + b"/file"),
            Move(0, door + b"/sub", b"c"),
            Move(0, b"a", door + b"/a"),
        ]
        for each in [*through, *operations]:
            planted = MakeSymlink(0, door, FILE, where)
            self.say(*self.replica.transaction(planted, each), commits=True)

    @rule(path=PLAIN_PATHS, below=NAMES)
    def into_itself(self, path: bytes, below: bytes) -> None:
        """A directory is moved into itself, and onto what it lies in."""
        for move in (Move(0, path, path + b"/" + below), Move(0, path + b"/" + below, path), Move(0, path, path)):
            self.say(*self.replica.transaction(MakeDir(0, path, DIRECTORY), move), commits=True)

    @rule(frames=st.lists(FRAMES, max_size=6))
    def out_of_order(self, frames: list[object]) -> None:
        """Frames that do not belong there; whatever is left open ends with the connection."""
        self.say(*map(self.targets, frames))
        self.leave()

    @rule(data=st.data(), path=PLAIN_PATHS, based=st.booleans(), sparse=st.booleans(), size=st.integers(1, 5000))
    def upload(self, data: st.DataObject, path: bytes, based: bool, sparse: bool, size: int) -> None:
        """An upload, with a wrong base or a wrong delta; put into place, dropped, or left."""
        old, new = b"o" * 5000, b"o" * 3000 + b"new" * 500
        self.say(*self.replica.transaction(Put(0, b"file", FILE, old)), commits=True)
        made = data.draw(deltas(old, new))
        self.uploads += 1
        number = self.uploads
        where = data.draw(st.just(b"file") | PATHS)
        said = [Upload(number, 0, where, based, sparse, 0), *chunks(number, made, size)]
        end = data.draw(st.sampled_from(["patch", "drop", "leave", "again"]))
        if end == "patch":
            patch = Patch(0, data.draw(PATHS), data.draw(METAS), number)
            self.say(*said, *self.replica.transaction(patch), commits=True)
        else:
            self.say(*said, *{"drop": [Drop(number)], "again": said[:1]}.get(end, []))
            self.leave()

    @rule(body=st.binary(min_size=1, max_size=300), kind=st.sampled_from([PLAIN, ZSTD, 7]), packed=st.booleans())
    def bytes_in_a_block(self, body: bytes, kind: int, packed: bool) -> None:
        """A block of anything."""
        if packed:
            body = zstandard.ZstdCompressor().compress(body)
        self.raw(_HEAD.pack(1 + len(body), kind) + body)

    @rule(size=st.sampled_from([MAX_BLOCK - 10, MAX_BLOCK + 1, 64 << 20]), byte=st.integers(0, 255))
    def a_bomb(self, size: int, byte: int) -> None:
        """A block that inflates to much."""
        body = zstandard.ZstdCompressor().compress(bytes([byte]) * size)
        self.raw(_HEAD.pack(1 + len(body), ZSTD) + body)

    @rule(
        length=st.sampled_from([0, 1, MAX_BLOCK + 2, MAX_BLOCK * 2, (1 << 32) - 1]), kind=st.sampled_from([PLAIN, ZSTD])
    )
    def a_length(self, length: int, kind: int) -> None:
        """A block that is announced, and does not come."""
        self.raw(_HEAD.pack(length, kind) + b"xyz")

    @rule(frame=FRAMES, data=st.data())
    def a_damaged_frame(self, frame: object, data: st.DataObject) -> None:
        """A frame some of whose bytes are others."""
        try:
            made = bytearray(wire.frame(frame))
        except (OverflowError, FarshoreError):
            return
        for _ in range(data.draw(st.integers(1, 4))):
            made[data.draw(st.integers(0, len(made) - 1))] = data.draw(st.integers(0, 255))
        self.raw(_HEAD.pack(1 + len(made), PLAIN) + bytes(made))

    def raw(self, data: bytes) -> None:
        """Bytes as they are, and the end of the stream: the connection ends with an error of ours."""
        self.counts["steps"] += 1
        source = self.replica.source
        with contextlib.suppress(ConnectionError):
            source.sock.sendall(data)
            source.sock.shutdown(socket.SHUT_WR)
        while True:
            try:
                if source.read() is None:
                    break
            except (FarshoreError, AssertionError, TimeoutError):
                raise
        ended = self.replica.ended()
        assert ended is None or isinstance(ended, FarshoreError), ended
        self.counts["refused"] += 1

    @rule(content=CONTENTS)
    def honest(self, content: bytes) -> None:
        """Whatever was said before: an honest peer is served."""
        self.counts["honest"] += 1
        self.leave()
        ready = MakeDir(0, b"", DIRECTORY), Remove(0, b"honest"), MakeDir(0, b"honest", DIRECTORY)
        for _ in range(3):
            answers = self.say(
                *self.replica.transaction(*ready, Put(0, b"honest/file", FILE, content)),
                ListTree(True),
                WantSignature(0, b"honest/file"),
                commits=True,
            )
            refused = [answer for answer in answers if isinstance(answer, Nak)]
            # What was said before may turn out to be in vain only now, and is told to whoever is there: an honest peer
            # sends again. Its own is never refused.
            assert all(nak.seq < self.replica.seq for nak in refused), answers
            if not refused:
                break
        assert not refused, answers
        while not any(isinstance(answer, SignaturePart) and answer.last for answer in answers):
            answer = self.replica.source.read()
            assert answer is not None
            answers.append(answer)
        assert (self.root / "honest" / "file").read_bytes() == content
        entries = {e.path: e for part in answers if isinstance(part, Entries) for e in part.entries}
        assert entries[b"honest/file"].digest == blake3.blake3(content).digest()
        signature = b"".join(part.data for part in answers if isinstance(part, SignaturePart))
        assert delta.Signature.from_bytes(signature).length == len(content)
        # What is suspended has to fit into a Welcome.
        wire.frame(self.replica.partials())

    def teardown(self) -> None:
        """What must hold at the end."""
        try:
            self.honest(b"the end")
            self.replica.disconnect()
            self.replica.finish()
            assert look_around(self.base) == self.before
            left = [
                name for _, names, files in os.walk(self.root) for name in (*names, *files) if name[:10] == ".farshore-"
            ]
            assert left == []
            assert self.faults.found == []
            assert len(os.listdir("/proc/self/fd")) <= self.descriptors + 3
        finally:
            self.faults.__exit__()
            remove(self.base)


def remove(base: Path) -> None:
    """Remove a tree of any depth and any modes."""
    from farshore.dbm.replica.paths import remove_tree

    above = os.open(base.parent, os.O_RDONLY)
    try:
        remove_tree(above, os.fsencode(base.name), b"", None)
    finally:
        os.close(above)


def lie(examples: int, steps: int, seed: int | None = None) -> None:
    """Let ``Liar`` lie; raises what hypothesis found, shrunk."""
    from hypothesis import seed as seeded

    checks = list(HealthCheck)
    run = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=checks,
        phases=(Phase.generate, Phase.shrink),
        print_blob=True,
    )
    run_state_machine_as_test(Liar if seed is None else seeded(seed)(Liar), settings=run)


# --- symbolic links that appear meanwhile


def race(base: Path, seconds: float, seed: int) -> dict[str, int]:
    """Somebody on the backup server swaps directories for symbolic links while an honest peer's changes are applied.

    Some of them are refused, and none lands outside. Raises AssertionError.
    """
    chance = random.Random(seed)
    root = canaries(base)
    before = look_around(base)
    (base / "state").mkdir()
    replica = Replica(base, ("site/root",))
    stop = threading.Event()
    outside = os.fsencode(base / "canary")
    swaps = 0

    def swap() -> None:
        nonlocal swaps
        mine = random.Random(seed + 1)
        while not stop.is_set():
            name = os.fsencode(root) + b"/" + mine.choice([b"a", b"a/sub", b"b", b"b/sub"])
            with contextlib.suppress(OSError):
                os.rename(name, name + b".aside")
                os.symlink(outside, name)
                swaps += 1
            time.sleep(mine.choice([0, 0, 0.0005]))
            with contextlib.suppress(OSError):
                os.unlink(name)
            with contextlib.suppress(OSError):
                os.rename(name + b".aside", name)

    counts: ClassVar[Counter[str]] = Counter()
    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            operations: list[object] = [
                MakeDir(0, b"a", DIRECTORY),
                MakeDir(0, b"a/sub", DIRECTORY),
                MakeDir(0, b"b", DIRECTORY),
            ]
            for _ in range(chance.randrange(1, 12)):
                top, other = chance.choice([b"a", b"b", b"a/sub", b"b/sub"]), chance.choice([b"a", b"b"])
                name = top + b"/" + chance.choice([b"file", b"sub", b"x"])
                operations.append(
                    chance.choice(
                        [
                            Put(0, name, FILE, b"y"),
                            Put(0, top + b"/file", FILE, b"z"),
                            MakeDir(0, name, DIRECTORY),
                            Remove(0, name),
                            SetMeta(0, name, Meta(0o600, os.getuid(), os.getgid(), 5, 5, [(b"user.x", b"1")])),
                            Link(0, other + b"/linked", name),
                            Move(0, name, other + b"/moved"),
                            MakeSymlink(0, name, FILE, outside),
                            Copy(0, name, FILE, 0, top + b"/file", blake3.blake3(b"canary").digest()),
                        ]
                    )
                )
            counts["taken" if isinstance(replica.send(*operations), Ack) else "refused"] += 1
    finally:
        stop.set()
        swapper.join()
        replica.finish()
    assert look_around(base) == before
    return {**counts, "swaps": swaps}


# --- bytes at the port


async def spray(base: Path, seconds: float, seed: int) -> dict[str, int]:
    """Bytes of all kinds at a node's port, before the handshake and after it, as a stranger, a peer and a gateway.

    Raises AssertionError unless the node goes on as if nothing had been.
    """
    chance = random.Random(seed)
    counts: ClassVar[Counter[str]] = Counter()
    faults = Faults()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.found.append(str(context)))
    async with running_pair(base) as pair:
        await pair.own("local", 1)
        contexts = {
            who: tls.client_context(Tls(pair.keys / "ca.crt", pair.keys / f"{who}.crt", pair.keys / f"{who}.key"))
            for who in ("stranger", "local", "gateway")
        }
        with faults:
            ends = time.monotonic() + seconds
            number = 0
            while time.monotonic() < ends:
                number += 1
                who = chance.choice(["nobody", *contexts])
                with contextlib.suppress(OSError, FarshoreError, TimeoutError):
                    async with asyncio.timeout(20):
                        await _one(pair, contexts.get(who), chance)
                    counts[who] += 1
                if number % 50 == 0:
                    (pair.local_tree / "still").write_text(str(number))
                    await pair.local.groups["web"].flush(60)
                    assert (pair.remote_tree / "still").read_text() == str(number)
            (pair.local_tree / "last").write_text("works")
            await pair.local.groups["web"].flush(60)
            assert (pair.remote_tree / "last").read_text() == "works"
            assert sorted(os.listdir(base)) == ["local-state", "local-tree", "pki", "remote-state", "remote-tree"]
        assert faults.found == []
    return dict(counts)


async def _one(pair: Pair, context: Any, chance: random.Random) -> None:
    """One connection that says something odd, and waits for its end or for an answer."""
    address = f"127.{chance.randrange(1, 250)}.0.1"
    if context is None:
        reader, writer = await asyncio.open_connection("127.0.0.1", pair.remote.port, local_addr=(address, 0))
        hello = bytes.fromhex("160301020001000201fc0303") + chance.randbytes(500)
        said = chance.choice(
            [chance.randbytes(chance.choice([1, 5, 1000, 100_000])), hello, hello[:50], bytes(300), b"GET /"]
        )
    else:
        reader, writer = await tls.connect(NodeRef("remote", "127.0.0.1", pair.remote.port), context)
        requests = [api.StatusRequest(), api.SetOwner("w", "local", 1), api.Flush(0.0, ""), api.Pause("x" * 1000)]
        hello = wire.frame(
            Hello(wire.PROTOCOL, chance.choice(["web", "x"]), chance.choice([0, 1, 2, 1 << 63]), ["/srv/www"])
        )
        whole = bytearray(chance.choice([*map(wire.frame, requests), hello, hello]))
        if chance.random() < 0.7:
            for _ in range(chance.randrange(1, 5)):
                whole[chance.randrange(len(whole))] = chance.randrange(256)
        junk = chance.randbytes(chance.choice([0, 1, 100, 5000]))
        length = struct.pack(">I", chance.choice([0, 1, wire.MAX_FRAME, wire.MAX_FRAME + 1, (1 << 32) - 1]))
        said = chance.choice([bytes(whole), bytes(whole) + junk, junk, length + junk, bytes(whole) * 200])
    try:
        writer.write(said)
        if context is None and chance.random() < 0.8:
            writer.write_eof()
        async with asyncio.timeout(chance.choice([0.0, 0.01, 0.3])):
            await writer.drain()
            await reader.read()
    finally:
        writer.transport.abort()


# --- the campaign


def campaign(minutes: float, seed: int, base: Path) -> dict[str, Any]:
    """All of it, for ``minutes``; returns the report."""
    started = time.monotonic()
    ends = started + minutes * 60
    os.environ["FARSHORE_FUZZ_DIR"] = str(base)
    report: dict[str, Any] = {"seed": seed, "failures": [], "race": Counter(), "port": Counter(), "rounds": 0}
    baseline = 0
    # The limits by address would leave little to be tried.
    for name in ("KNOWN_RATE", "STRANGER_RATE", "STRANGERS_RATE", "KNOWN_BURST", "STRANGER_BURST", "STRANGERS_BURST"):
        setattr(admission, name, 1e6)
    while time.monotonic() < ends and not report["failures"]:
        report["rounds"] += 1
        number = seed + report["rounds"]
        parts: list[tuple[str, Any]] = [
            ("a peer that lies", lambda n=number: lie(40, 25, n)),
            ("links that appear", lambda n=number: report["race"].update(race(_fresh(base), 5, n))),
            ("bytes at the port", lambda n=number: report["port"].update(asyncio.run(spray(_fresh(base), 10, n)))),
        ]
        for what, part in parts:
            output = io.StringIO()
            try:
                with contextlib.redirect_stdout(output):
                    part()
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                told = "".join(traceback.format_exception(error))
                report["failures"].append(
                    {
                        "part": what,
                        "seed": number,
                        "error": told[:4000] + told[4000:][-4000:] + output.getvalue()[-4000:],
                    }
                )
        for left in base.iterdir():
            remove(left)
        if report["rounds"] == 1:
            baseline = resident()
        report["resident MiB"] = {"after one round": baseline, "now": resident()}
        if resident() > baseline + MOST_GROWTH:
            report["failures"].append({"part": "memory", "error": f"{resident()} MiB, {baseline} MiB after one round"})
        print(f"round {report['rounds']}: {dict(Liar.counts)}, {resident()} MiB", flush=True)
    report["lies"] = dict(Liar.counts)
    report["seconds"] = round(time.monotonic() - started)
    return report


def _fresh(base: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix="farshore-fuzz-", dir=base))


def main() -> int:
    """The command line; the exit code is 0 when nothing failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="default: %(default)g")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), metavar="N")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the figures there, as JSON")
    options = parser.parse_args()
    logging.getLogger("farshore").setLevel(logging.ERROR)
    print(f"seed {options.seed}", flush=True)
    base = Path(tempfile.mkdtemp(prefix="farshore-hostile-"))
    try:
        report = campaign(options.minutes, options.seed, base)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return tell(report, options.report)


if __name__ == "__main__":
    sys.exit(main())
