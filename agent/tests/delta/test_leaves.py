"""Leaves: the digest of content of which most is known."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from io import BytesIO
from math import inf

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from farshore.delta import Applied, Applier, BytesReader, DeltaCorrupt, Leaves, encode_bytes, sign
from farshore.delta import leaves as leaves_module
from farshore.delta.leaves import LeafHasher

from .support import examples


def unnamed() -> int:
    """A new file's descriptor."""
    with tempfile.TemporaryFile(buffering=0) as file:
        return os.dup(file.fileno())


class Keeper:
    """A destination beside its base, which keeps what it can."""

    def __init__(self, base: bytes, least: float = 0) -> None:
        self.base = base
        self.out = bytearray()
        self.kept = 0
        self.read = 0
        self.asked = 0
        self._least = least

    def pread(self, offset: int, length: int, /) -> bytes:
        data = self.base[offset : offset + length]
        self.read += len(data)
        return data

    def keep(self, offset: int, length: int) -> bool:
        assert offset == len(self.out)
        self.asked += 1
        if length < self._least:
            return False
        self.out += self.base[offset : offset + length]
        self.kept += length
        return True

    def apply(self, delta: bytes, known: Leaves | None, pieces: int = 1 << 30) -> tuple[Applied, Leaves | None]:
        """Apply ``delta``, and take the leaves of the result."""
        applier = Applier(self, self.out.extend, keep=self.keep, known=known, notes=unnamed)
        for at in range(0, len(delta), pieces):
            applier.feed(delta[at : at + pieces])
        return applier.finish(), applier.leaves()


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(5).randbytes((5 << 20) + 777)


@pytest.fixture
def leaves(content: bytes) -> Iterator[Leaves]:
    made = Keeper(b"").apply(encode_bytes(None, content), None)[1]
    assert made is not None
    yield made
    made.close()


def edited(content: bytes, seed: int) -> bytes:
    """Pages overwritten, and perhaps an insertion, a cut, or an end of another length."""
    chance = random.Random(seed)
    new = bytearray(content)
    for _ in range(chance.randrange(9)):
        at = chance.randrange(len(new))
        new[at : at + 4096] = chance.randbytes(chance.choice([1, 4096, 4096, 5000]))
    match chance.randrange(4):
        case 0:
            del new[chance.randrange(len(new)) :]
        case 1:
            new += chance.randbytes(chance.randrange(9000))
    return bytes(new)


@pytest.mark.parametrize("seed", range(25))
def test_what_is_kept_is_not_read_and_all_is_verified(content: bytes, leaves: Leaves, seed: int) -> None:
    new = edited(content, seed)
    signature = sign(BytesIO(content))
    keeper = Keeper(content)
    applied, again = keeper.apply(encode_bytes(signature, new), leaves, 1000 if seed % 2 else 1 << 30)
    assert bytes(keeper.out) == new
    assert applied.digest == blake3(new).digest()
    if again is not None:
        # They are what reading all of it gives.
        fresh = Keeper(b"").apply(encode_bytes(None, new), None)[1]
        assert fresh is not None
        count = again.size // 32
        assert (again.read(0, count) == fresh.read(0, count)).all()
        fresh.close()
        again.close()
    else:
        assert len(new) < 2 << 20


def test_one_changed_page_costs_a_page(content: bytes, leaves: Leaves) -> None:
    new = bytearray(content)
    new[3 << 20 : (3 << 20) + 4096] = bytes(4096)
    keeper = Keeper(content)
    _, again = keeper.apply(encode_bytes(sign(BytesIO(content)), bytes(new)), leaves)
    assert again is not None
    again.close()
    # The first block, which could be the only one, and the end, which is shorter than one.
    assert keeper.read <= 4096 + 777
    assert keeper.kept + keeper.read == len(content) - 4096


def test_who_keeps_nothing_is_asked_once_for_each_range(content: bytes, leaves: Leaves) -> None:
    new = bytearray(content)
    for at in (1 << 20, 3 << 20):
        new[at : at + 4096] = bytes(4096)
    keeper = Keeper(content, least=inf)
    keeper.apply(encode_bytes(sign(BytesIO(content)), bytes(new)), leaves)
    assert bytes(keeper.out) == new
    assert (keeper.asked, keeper.kept) == (3, 0)


def test_a_short_range_that_cannot_be_kept_leaves_the_long_ones(content: bytes, leaves: Leaves) -> None:
    new = bytearray(content)
    for at in (1 << 20, (1 << 20) + 20_480, 3 << 20):
        new[at : at + 4096] = bytes(4096)
    keeper = Keeper(content, least=100_000)
    keeper.apply(encode_bytes(sign(BytesIO(content)), bytes(new)), leaves)
    assert bytes(keeper.out) == new
    assert keeper.read <= 4096 + 16_384 + 777
    assert keeper.kept > 5_000_000


def test_leaves_of_something_else_are_not_used(content: bytes, leaves: Leaves) -> None:
    other = edited(content, 3)
    keeper = Keeper(other)
    keeper.apply(encode_bytes(sign(BytesIO(other)), content), leaves)
    assert bytes(keeper.out) == content
    assert not keeper.kept


def test_wrong_leaves_are_found_out(content: bytes, leaves: Leaves) -> None:
    os.pwrite(leaves.fd, b"wrong", 32 * 700)
    with pytest.raises(DeltaCorrupt):
        Keeper(content).apply(encode_bytes(sign(BytesIO(content)), content + b"x"), leaves)


def test_leaves_that_are_cut_short(content: bytes, leaves: Leaves) -> None:
    os.ftruncate(leaves.fd, 32 * 700)
    with pytest.raises(DeltaCorrupt):
        Keeper(content).apply(encode_bytes(sign(BytesIO(content)), content + b"x"), leaves)


@pytest.mark.parametrize("there", ["none", "read-only", "full"])
def test_nowhere_to_note_leaves(content: bytes, there: str) -> None:
    flags = {"none": "", "read-only": "/dev/null", "full": "/dev/full"}[there]
    file = os.open(flags, os.O_RDONLY if there == "read-only" else os.O_RDWR) if flags else None
    applier = Applier(BytesReader(b""), lambda data: None, notes=lambda: file)
    applier.feed(encode_bytes(None, content))
    assert applier.finish().digest == blake3(content).digest()
    assert applier.leaves() is None
    if file is not None:
        os.close(file)


def test_leaves_of_too_much_take_no_room(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaves_module, "MOST_NOTED", 32 * (4 << 20 >> 12))
    file = unnamed()
    applier = Applier(BytesReader(b""), lambda data: None, notes=lambda: file)
    delta = encode_bytes(None, content)
    applier.feed(delta[: 3 << 20])
    assert os.fstat(file).st_size
    applier.feed(delta[3 << 20 :])
    assert applier.finish().digest == blake3(content).digest()
    assert applier.leaves() is None
    assert not os.fstat(file).st_size
    os.close(file)


@examples(200)
@given(st.sampled_from([1024, 2048, 1 << 20]), st.lists(st.integers(0, 70_000), max_size=8), st.integers(0, 99))
def test_any_pieces_give_the_digest(block_size: int, pieces: list[int], seed: int) -> None:
    data = random.Random(seed).randbytes(sum(pieces))
    hasher = LeafHasher(block_size)
    at = 0
    for piece in pieces:
        hasher.update(memoryview(data)[at : at + piece])
        at += piece
    assert hasher.length == len(data)
    assert hasher.digest() == blake3(data).digest()
