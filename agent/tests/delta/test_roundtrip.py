"""What comes out is what went in, and costs no more than the reference says."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from farshore.delta import (
    BLOCK_SIZE,
    COPY_PIECE,
    MAX_BLOCK_SIZE,
    Applier,
    BytesReader,
    Encoder,
    apply_bytes,
    encode_bytes,
    preferred_block_size,
    reference,
    sign,
)
from farshore.delta.format import CHUNK_LIMIT

from .support import (
    BLOCK_SIZES,
    Dribble,
    applied,
    contents,
    examples,
    instructions,
    pairs,
    signed,
    small_windows,
)

sizes = st.sampled_from(BLOCK_SIZES)
pieces = st.lists(st.integers(1, 2000), min_size=1, max_size=5).map(tuple)


@examples(300)
@given(pairs(), sizes, st.integers(1, 20_000), st.booleans(), pieces, pieces)
def test_any_change_survives_any_chunking(
    pair: tuple[bytes, bytes],
    size: int,
    window: int,
    sign_new: bool,
    read: tuple[int, ...],
    fed: tuple[int, ...],
) -> None:
    old, new = pair
    encoder = small_windows(window)(signed(old, size), sign_new=sign_new)
    delta = b"".join(encoder.encode(Dribble(new, read)))
    assert applied(old, delta, fed) == new
    assert encoder.length == len(new)
    assert encoder.digest == blake3(new).digest()
    assert encoder.signature == (signed(new, size) if sign_new else None)
    found = list(instructions(delta))
    stats = encoder.stats
    assert stats.delta_bytes == len(delta)
    assert stats.copies == sum(kind == "copy" for kind, _, _ in found)
    assert stats.literals == sum(kind == "literal" for kind, _, _ in found)
    assert stats.literal_bytes == sum(n for kind, _, n in found if kind == "literal")
    assert stats.copied_bytes == sum(n for kind, _, n in found if kind == "copy")


@examples(250)
@given(pairs(), sizes, st.integers(1, 20_000))
def test_literals_are_as_few_as_the_references(pair: tuple[bytes, bytes], size: int, window: int) -> None:
    old, new = pair
    encoder = small_windows(window)(signed(old, size))
    delta = b"".join(encoder.encode(io.BytesIO(new)))
    if encoder.stats.false_alarms > 16:
        return  # the budget may have cut the search short, which is its purpose
    # Of identical blocks either may take another one, so that the base's short last block comes
    # into reach for one and not for the other; nothing else may differ.
    expected = reference.literal_bytes(reference.sign(old, size), new)
    assert encoder.stats.literal_bytes <= expected + 2 * size
    at = 0
    for kind, offset, length in instructions(delta):
        if kind == "copy":
            assert old[offset : offset + length] == new[at : at + length]
        at += length
    assert at == len(new)


@examples(120)
@given(pairs(), sizes)
def test_the_references_deltas_are_accepted(pair: tuple[bytes, bytes], size: int) -> None:
    old, new = pair
    assert apply_bytes(old, reference.encode(reference.sign(old, size), new, size)) == new
    assert apply_bytes(b"", reference.encode(None, new, size)) == new


@examples()
@given(contents(), sizes)
def test_signature_is_the_references(data: bytes, size: int) -> None:
    signature, expected = signed(data, size), reference.sign(data, size)
    assert signature.length == expected.length
    assert signature.digest == expected.digest
    assert signature.weak.tolist() == [weak for weak, _ in expected.blocks]
    assert signature.strong == b"".join(strong for _, strong in expected.blocks)


@examples()
@given(contents(), sizes, st.integers(1, 20_000))
def test_without_a_base_all_is_literal(data: bytes, size: int, window: int) -> None:
    encoder = small_windows(window)(None, block_size=size)
    delta = b"".join(encoder.encode(io.BytesIO(data)))
    assert applied(b"whatever", delta) == data
    assert encoder.stats.literal_bytes == len(data)
    assert encoder.signature == signed(data, size)


@examples()
@given(contents(), sizes, st.integers(1, 20_000))
def test_unchanged_content_costs_one_copy(data: bytes, size: int, window: int) -> None:
    encoder = small_windows(window)(signed(data, size))
    delta = b"".join(encoder.encode(io.BytesIO(data)))
    assert encoder.stats.literal_bytes == 0
    assert encoder.stats.copies == (1 if data else 0)
    assert applied(data, delta) == data


@examples()
@given(st.integers(0, 2**32), st.integers(0, 10_000), st.integers(1, 3000))
def test_what_is_appended_is_all_that_is_sent(seed: int, length: int, more: int) -> None:
    rng = random.Random(seed)
    data, added = rng.randbytes(length), rng.randbytes(more)
    encoder = small_windows(4096)(signed(data, 1024))
    delta = b"".join(encoder.encode(io.BytesIO(data + added)))
    assert encoder.stats.literal_bytes <= more
    assert applied(data, delta) == data + added


MIB = 1 << 20


def test_a_byte_in_front_of_8_mib_costs_less_than_3_blocks() -> None:
    old = random.Random(1).randbytes(8 * MIB + 100)
    for new in (b"x" + old, old[1:], old[: 3 * MIB] + b"x" + old[3 * MIB :]):
        encoder = Encoder(signed(old, BLOCK_SIZE))
        delta = b"".join(encoder.encode(io.BytesIO(new)))
        assert encoder.stats.literal_bytes < 3 * BLOCK_SIZE
        assert encoder.stats.copies < 5
        assert apply_bytes(old, delta) == new


def test_changed_pages_cost_themselves() -> None:
    rng = random.Random(2)
    old = bytearray(rng.randbytes(16 * MIB))
    new = bytearray(old)
    pages = rng.sample(range(len(old) // BLOCK_SIZE), 41)
    for page in pages:
        new[page * BLOCK_SIZE : (page + 1) * BLOCK_SIZE] = rng.randbytes(BLOCK_SIZE)
    encoder = Encoder(signed(bytes(old), BLOCK_SIZE))
    delta = b"".join(encoder.encode(io.BytesIO(new)))
    assert encoder.stats.literal_bytes == len(pages) * BLOCK_SIZE
    assert len(delta) < 1.01 * len(pages) * BLOCK_SIZE + 200
    assert apply_bytes(bytes(old), delta) == new


@pytest.mark.parametrize("length", [0, 1, CHUNK_LIMIT, 10 * MIB + 1])
def test_chunks_keep_to_their_limit(length: int) -> None:
    new = random.Random(3).randbytes(length)
    for base in (None, signed(b"", BLOCK_SIZE), signed(b"abc" * 5000, BLOCK_SIZE)):
        chunks = list(Encoder(base).encode(io.BytesIO(new)))
        assert max(map(len, chunks)) <= CHUNK_LIMIT
        assert applied(b"abc" * 5000, b"".join(chunks)) == new


def test_the_new_signature_serves_for_the_next_delta() -> None:
    rng = random.Random(4)
    content = rng.randbytes(300_000)
    signature = sign(io.BytesIO(content))
    for _ in range(5):
        at = rng.randrange(len(content))
        changed = content[:at] + rng.randbytes(50) + content[at:]
        encoder = Encoder(signature)
        delta = b"".join(encoder.encode(io.BytesIO(changed)))
        assert apply_bytes(content, delta) == changed
        assert encoder.stats.literal_bytes < 3 * BLOCK_SIZE
        assert encoder.signature is not None
        content, signature = changed, encoder.signature


def test_the_sink_can_tell_what_comes_from_the_base() -> None:
    rng = random.Random(5)
    old = rng.randbytes(3 * MIB)
    new = b"in front" + old[: 2 * MIB + 5] + rng.randbytes(9000) + old[2 * MIB + 5 :]
    out = bytearray()
    copied: list[tuple[int, int, int]] = []

    def copy(offset: int, piece: bytes) -> None:
        assert len(piece) <= COPY_PIECE
        assert piece == old[offset : offset + len(piece)]
        copied.append((len(out), offset, len(piece)))
        out.extend(piece)

    applier = Applier(BytesReader(old), out.extend, copy=copy)
    encoder = Encoder(signed(old, BLOCK_SIZE))
    for chunk in encoder.encode(io.BytesIO(new)):
        applier.feed(chunk)
    assert applier.finish().digest == blake3(new).digest()
    assert bytes(out) == new
    assert sum(length for _, _, length in copied) == encoder.stats.copied_bytes > 2 * MIB


def extents(*parts: tuple[int, int]) -> Callable[[Path], bytes]:
    """Return what makes a sparse file with data at these offsets, of these lengths."""

    def make(path: Path) -> bytes:
        with path.open("wb") as file:
            for offset, length in parts:
                file.seek(offset)
                file.write(random.Random(offset).randbytes(length))
            file.truncate(max(offset + length for offset, length in parts))
        return path.read_bytes()

    return make


@pytest.mark.parametrize(
    "make",
    [
        extents((9 * MIB + 5, 0)),
        extents((0, 5000), (9 * MIB, 0)),
        extents((3 * MIB + 1, 100_000), (6 * MIB, 4096), (9 * MIB, 7)),
    ],
)
def test_sparse_files_are_read_without_their_holes(tmp_path: Path, make: Callable[[Path], bytes]) -> None:
    data = make(tmp_path / "sparse")
    with (tmp_path / "sparse").open("rb", buffering=0) as file:
        signature = sign(file)
        file.seek(0)
        encoder = Encoder(signed(data[MIB:], BLOCK_SIZE))
        delta = b"".join(encoder.encode(file))
    assert signature == signed(data, BLOCK_SIZE)
    assert applied(data[MIB:], delta) == data
    assert encoder.digest == signature.digest


def test_large_content_has_larger_blocks() -> None:
    assert preferred_block_size(0) == preferred_block_size(16 << 30) == BLOCK_SIZE
    assert preferred_block_size(64 << 30) == 128 << 10
    assert preferred_block_size(1 << 60) == MAX_BLOCK_SIZE


def test_encoder_rejects_block_sizes_that_cannot_be() -> None:
    for size in (15, 512, 1023, 1025, 3072, 1 << 21):
        with pytest.raises(ValueError, match=f"block size {size}: allowed are powers of two from 1024"):
            Encoder(None, block_size=size)
    with pytest.raises(ValueError, match="block size 2048"):
        Encoder(signed(b"x", 1024), block_size=2048)
    with pytest.raises(ValueError, match="block size"):
        sign(io.BytesIO(b""), 1 << 21)


def test_an_encoder_can_be_used_again() -> None:
    base, new = signed(b"a" * 9000, 1024), b"b" + b"a" * 9000
    encoder = Encoder(base)
    first = b"".join(encoder.encode(io.BytesIO(new)))
    assert b"".join(encoder.encode(io.BytesIO(new))) == first
    assert encode_bytes(base, new) == first
