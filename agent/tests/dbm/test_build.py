"""Contents of staged files, on filesystems that share blocks and on those that do not."""

from __future__ import annotations

import contextlib
import io
import os
import random
from collections.abc import Iterator
from pathlib import Path

import blake3
import pytest
from filesystems import filesystem_or_skip
from hypothesis import given, settings
from hypothesis import strategies as st
from replicas import FILE, Replica, put_whole, stream

from farshore import delta
from farshore.dbm.messages import Ack, Copy, Nak
from farshore.dbm.replica import build, leaves
from farshore.dbm.replica.build import Building, copy_file
from farshore.dbm.replica.stage import Staged
from farshore.dbm.replica.upload import Upload

PAGE = 4096


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A filesystem whose files can share blocks, on an image; skips where none can be mounted."""
    with filesystem_or_skip("xfs", tmp_path_factory.mktemp("xfs")) as where:
        yield where


@pytest.fixture(params=["plain", "shared"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory on either kind of filesystem."""
    if request.param == "plain":
        return tmp_path
    made = request.getfixturevalue("xfs") / tmp_path.name
    made.mkdir()
    return Path(made)


def build_file(place: Path, old: bytes | None, new: bytes, sparse: bool) -> Path:
    """Apply the delta from ``old`` to ``new`` as an upload does; returns the new file."""
    base = None
    if old is not None:
        (place / "old").write_bytes(old)
        base = os.open(place / "old", os.O_RDONLY)
    path = place / "new"
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    building = Building(Staged(-1, b"new"), handle, base, sparse=sparse, check=lambda: None)
    applier = delta.Applier(None if base is None else delta.FdReader(base), building.write, copy=building.copy)
    applier.feed(stream(new, old))
    building.finish(applier.finish().digest)
    building.close()
    return path


def edited(seed: int) -> tuple[bytes, bytes]:
    """Old and new content: pages overwritten, moved, zeroed, bytes inserted, an end cut off or added."""
    chance = random.Random(seed)
    old = b"".join(
        chance.choice([chance.randbytes(PAGE), bytes(PAGE)]) for _ in range(200)
    ) + b"tail" * chance.randrange(9)
    new = bytearray(old)
    for _ in range(chance.randrange(8)):
        at = chance.randrange(0, len(new) // PAGE) * PAGE
        match chance.randrange(6):
            case 0:
                new[at : at + PAGE] = chance.randbytes(PAGE)
            case 1:
                new[at : at + 20 * PAGE] = bytes(min(20 * PAGE, len(new) - at))
            case 2:
                new[at:at] = chance.randbytes(chance.randrange(1, 9000))
            case 3:
                part = new[at : at + 40 * PAGE]
                del new[at : at + 40 * PAGE]
                new += part
            case 4:
                del new[-chance.randrange(1, 3 * PAGE) :]
            case 5:
                new += bytes(chance.randrange(1, 30 * PAGE))
    return old, bytes(new)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_any_edit_gives_the_same_bytes(place: Path, seed: int, sparse: bool) -> None:
    old, new = edited(seed)
    assert build_file(place, old, new, sparse).read_bytes() == new
    assert build_file(place, None, new, sparse).read_bytes() == new
    assert (place / "old").read_bytes() == old


def test_only_what_changed_is_written(xfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = xfs / tmp_path.name
    place.mkdir()
    written = []
    pwrite = os.pwrite

    def noted(handle: int, data: memoryview, at: int) -> int:
        written.append(len(data))
        return pwrite(handle, data, at)

    old = os.urandom(8 << 20)
    new = bytearray(old)
    new[5 * PAGE : 6 * PAGE] = os.urandom(PAGE)
    # A part at another place, whole blocks of it.
    new[1 << 20 : 2 << 20] = old[4 << 20 : 5 << 20]
    monkeypatch.setattr(os, "pwrite", noted)
    path = build_file(place, old, bytes(new), False)
    assert path.read_bytes() == new
    assert sum(written) <= 4 * PAGE


def data_bytes(path: Path) -> int:
    """How much of a file is not a hole."""
    found = end = 0
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        with contextlib.suppress(OSError):
            while end < size:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                found += end - start
    return found


@pytest.mark.parametrize("based", [False, True])
def test_zeros_become_holes(place: Path, based: bool) -> None:
    old = os.urandom(4 << 20)
    new = old[: 1 << 20] + bytes(2 << 20) + old[3 << 20 :] + bytes(1 << 20)
    path = build_file(place, old if based else None, new, True)
    # A block at each end of a piece may be written. Not after reading: what was read of an allocation of XFS's own
    # accord counts as data.
    assert data_bytes(path) <= (2 << 20) + 16 * PAGE
    assert path.read_bytes() == new


def test_a_base_that_is_tampered_with_meanwhile(place: Path) -> None:
    """What was hashed is what the new file holds, or the file is refused."""
    old = os.urandom(64 * PAGE)
    (place / "old").write_bytes(old)
    base = os.open(place / "old", os.O_RDONLY)
    handle = os.open(place / "new", os.O_RDWR | os.O_CREAT, 0o600)
    with (place / "old").open("r+b") as file:
        file.write(b"tampered")
        file.flush()
        os.fsync(file.fileno())
        building = Building(Staged(-1, b"new"), handle, base, sparse=False, check=lambda: None)
        file.seek(0)
        file.write(old[:8])
    os.utime(place / "old", ns=(1, 1))
    hasher = blake3.blake3(old)
    for at in range(0, len(old), PAGE):
        building.copy(at, old[at : at + PAGE])
    try:
        building.finish(hasher.digest())
    except delta.DeltaCorrupt:
        pass
    else:
        assert (place / "new").read_bytes() == old
    building.close()


def test_a_copy_shares_or_repeats(place: Path) -> None:
    content = os.urandom(3 * PAGE) + bytes(100 * PAGE) + b"end"
    (place / "old").write_bytes(content)
    handle = os.open(place / "new", os.O_RDWR | os.O_CREAT, 0o600)
    base = os.open(place / "old", os.O_RDONLY)
    building = Building(Staged(-1, b"new"), handle, base, sparse=True, check=lambda: None)
    assert copy_file(building) == blake3.blake3(content).digest()
    building.close()
    assert (place / "new").read_bytes() == content


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=50),
    st.lists(st.tuples(st.booleans(), st.integers(1, 9000)), max_size=6),
    st.integers(0, 9000),
    st.booleans(),
)
def test_runs_cover_everything(seed: bytes, parts: list[tuple[bool, int]], at: int, whole: bool) -> None:
    data = seed + b"".join((b"\0" if zero else b"x") * length for zero, length in parts)
    end = 0
    for start, stop, empty in build._runs(memoryview(data), at, whole=whole):
        assert start == end < stop
        end = stop
        if empty:
            assert not data[start:stop].strip(b"\0")
            assert not whole or (at + start) % PAGE == 0 == (at + stop) % PAGE
        else:
            block = -(-(at + start) // PAGE) * PAGE
            for each in range(block, at + stop - PAGE + 1, PAGE):
                assert data[each - at : each - at + PAGE].strip(b"\0")
    assert end == len(data)


def test_a_replica_where_blocks_are_shared(place: Path) -> None:
    (place / "root").mkdir()
    replica = Replica(place)
    try:
        old, new = edited(99)
        for number, (content, before) in enumerate(((old, None), (new, old), (old, new))):
            frames = put_whole(number, b"f", content, before, sparse=bool(number % 2))
            replica.source.put(*frames[:-1])
            assert isinstance(replica.send(frames[-1]), Ack)
            assert (place / "root" / "f").read_bytes() == content
        assert isinstance(replica.send(Copy(0, b"g", FILE, 0, b"f", blake3.blake3(old).digest())), Ack)
        assert (place / "root" / "g").read_bytes() == old
    finally:
        replica.finish()


def changed(old: bytes, page: int) -> bytes:
    """``old`` with one page overwritten."""
    return old[: page * PAGE] + os.urandom(PAGE) + old[(page + 1) * PAGE :]


def put(replica: Replica, number: int, new: bytes, old: bytes | None) -> Ack | Nak:
    """Put content to the path f, by an upload with this number."""
    frames = put_whole(number, b"f", new, old)
    replica.source.put(*frames[:-1])
    return replica.send(frames[-1])


def test_a_change_of_what_is_known_reads_next_to_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "root").mkdir()
    replica = Replica(place)
    pread = delta.FdReader.pread
    read: list[int] = []

    def noted(reader: delta.FdReader, offset: int, length: int, /) -> bytes:
        data = pread(reader, offset, length)
        read.append(len(data))
        return data

    monkeypatch.setattr(delta.FdReader, "pread", noted)
    try:
        content = os.urandom((4 << 20) + 99)
        assert isinstance(put(replica, 1, content, None), Ack)
        for number in range(2, 6):
            old, content = content, changed(content, 100 * number)
            assert isinstance(put(replica, number, content, old), Ack)
            assert (place / "root" / "f").read_bytes() == content
        assert sum(read) < 8 * PAGE
        monkeypatch.setattr(build, "read_blocks", None)
        for name, source in ((b"g", b"f"), (b"h", b"g")):
            assert isinstance(replica.send(Copy(0, name, FILE, 0, source, blake3.blake3(content).digest())), Ack)
            assert (place / "root" / os.fsdecode(name)).read_bytes() == content
        monkeypatch.undo()
        monkeypatch.setattr(delta.FdReader, "pread", noted)
        # After a restart it is read, once.
        replica.close()
        replica.open()
        read.clear()
        for number in (6, 7):
            old, content = content, changed(content, 100 * number)
            assert isinstance(put(replica, number, content, old), Ack)
        assert len(content) - PAGE <= sum(read) < len(content) + 4 * PAGE
        assert (place / "root" / "f").read_bytes() == content
    finally:
        replica.finish()


@pytest.mark.parametrize("same_times", [False, True])
def test_what_somebody_changed_at_the_replica_is_not_known(place: Path, same_times: bool) -> None:
    (place / "root").mkdir()
    replica = Replica(place)
    try:
        old = os.urandom(4 << 20)
        assert isinstance(put(replica, 1, old, None), Ack)
        path = place / "root" / "f"
        before = path.stat()
        with path.open("r+b") as file:
            file.seek(1000 * PAGE)
            file.write(b"tampered")
        if same_times:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        tampered = path.read_bytes()
        new = changed(old, 5)
        answer = put(replica, 2, new, old)
        assert isinstance(answer, Nak)
        assert answer.unknown_base
        assert path.read_bytes() == tampered
        assert isinstance(put(replica, 1, new, tampered), Ack)
        assert path.read_bytes() == new
    finally:
        replica.finish()


def test_an_upload_that_is_not_put_into_place_leaves_the_base_known(place: Path) -> None:
    (place / "root").mkdir()
    replica = Replica(place)
    try:
        old = os.urandom(5 << 20)
        assert isinstance(put(replica, 1, old, None), Ack)
        handle = os.open(place / "root" / "f", os.O_RDONLY)

        def is_known() -> bool:
            known = replica.applier.leaves.of(handle)
            if known is not None:
                known.close()
            return known is not None

        assert is_known()
        staged, target = replica.applier.stages[0].create()
        encoder = delta.Encoder(delta.sign(io.BytesIO(old)))
        made = b"".join(encoder.encode(io.BytesIO(changed(old, 5))))
        upload = Upload(0, b"f", based=True, sparse=False)
        upload.open(staged, target, os.dup(handle), replica.applier.leaves)
        upload.feed(made, True)
        assert upload.complete
        replica.applier.drop(upload)
        assert is_known()
        assert isinstance(put(replica, 2, changed(old, 6), old), Ack)
        assert not is_known()
        os.close(handle)
    finally:
        replica.finish()


def test_leaves_that_are_damaged_are_used_once(place: Path) -> None:
    (place / "root").mkdir()
    replica = Replica(place)
    try:
        old = os.urandom(5 << 20)
        assert isinstance(put(replica, 1, old, None), Ack)
        handle = os.open(place / "root" / "f", os.O_RDONLY)
        known = replica.applier.leaves.of(handle)
        os.close(handle)
        assert known is not None
        os.pwrite(known.fd, b"damaged", 32 * 1000)
        known.close()
        new = changed(old, 5)
        answer = put(replica, 2, new, old)
        assert isinstance(answer, Nak)
        assert answer.unknown_base
        assert (place / "root" / "f").read_bytes() == old
        assert isinstance(put(replica, 1, new, old), Ack)
        assert (place / "root" / "f").read_bytes() == new
    finally:
        replica.finish()


def test_what_is_kept_behind_what_has_moved(place: Path) -> None:
    """The clone ends where something has moved; what stays behind that is shared, or copied, all the same."""
    old, new = place / "old", place / "new"
    old.write_bytes(os.urandom(64 * PAGE))
    base = os.open(old, os.O_RDONLY)
    building = Building(
        Staged(-1, b"new"), os.open(new, os.O_RDWR | os.O_CREAT), base, sparse=False, check=lambda: None
    )
    moved = os.pread(base, PAGE, 2 * PAGE)
    building.copy(2 * PAGE, moved)
    assert building.keep(PAGE, 63 * PAGE)
    whole = moved + old.read_bytes()[PAGE:]
    building.finish(blake3.blake3(whole).digest())
    building.close()
    assert new.read_bytes() == whole


@pytest.mark.parametrize("by_copy", [False, True])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_base_that_changes_as_its_leaves_are_taken(
    place: Path, monkeypatch: pytest.MonkeyPatch, by_copy: bool, moment: str
) -> None:
    """What is acknowledged has the right bytes, whenever somebody writes to the base."""
    (place / "root").mkdir()
    replica = Replica(place)
    path = place / "root" / "f"
    of = leaves.LeafStore.of

    def tamper() -> None:
        with path.open("r+b") as file:
            file.seek(1000 * PAGE)
            file.write(b"tampered")

    def disturbed(store: leaves.LeafStore, handle: int) -> delta.Leaves | None:
        if moment == "before":
            tamper()
        known = of(store, handle)
        if moment == "after":
            assert known is not None
            tamper()
        return known

    try:
        old = os.urandom(5 << 20)
        assert isinstance(put(replica, 1, old, None), Ack)
        new = old if by_copy else changed(old, 5)
        monkeypatch.setattr(leaves.LeafStore, "of", disturbed)
        if by_copy:
            answer = replica.send(Copy(0, b"g", FILE, 0, b"f", blake3.blake3(old).digest()))
        else:
            answer = put(replica, 2, new, old)
        if isinstance(answer, Ack):
            assert (place / "root" / ("g" if by_copy else "f")).read_bytes() == new
        else:
            assert answer.unknown_base
    finally:
        replica.finish()


def test_leaves_of_few_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaves, "MOST_FILES", 3)
    store = leaves.LeafStore(tmp_path)
    handles = []
    try:
        for number in range(5):
            handle = os.open(tmp_path / str(number), os.O_RDWR | os.O_CREAT)
            handles.append(handle)
            os.write(handle, b"content")
            notes = store.new_file()
            assert notes is not None
            store.add(os.fstat(handle), delta.Leaves(notes, PAGE, 7, b"digest"))
            assert store.of(handle) is None
            os.rename(tmp_path / str(number), tmp_path / f"placed{number}")
            store.placed(os.fstat(handle))
        for number, handle in enumerate(handles):
            known = store.of(handle)
            assert (known is None) == (number < 2)
            if known is not None:
                assert known.digest == b"digest"
                known.close()
        assert not [name for name in os.listdir(tmp_path) if not name.startswith("placed")]
    finally:
        store.close()
        for handle in handles:
            os.close(handle)
