"""What comes out is what went in, and costs no more than the reference says."""

from __future__ import annotations

import io
import random

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from farshore.delta import (
    BLOCK_SIZE,
    Encoder,
    apply_bytes,
    encode_bytes,
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
pieces = st.lists(st.integers(1, 300), min_size=1, max_size=5).map(tuple)


@examples(300)
@given(pairs(), sizes, st.integers(1, 3000), st.booleans(), pieces, pieces)
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
@given(pairs(), sizes, st.integers(1, 3000))
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
@given(contents(), sizes, st.integers(1, 500))
def test_without_a_base_all_is_literal(data: bytes, size: int, window: int) -> None:
    encoder = small_windows(window)(None, block_size=size)
    delta = b"".join(encoder.encode(io.BytesIO(data)))
    assert applied(b"whatever", delta) == data
    assert encoder.stats.literal_bytes == len(data)
    assert encoder.signature == signed(data, size)


@examples()
@given(contents(), sizes, st.integers(1, 3000))
def test_unchanged_content_costs_one_copy(data: bytes, size: int, window: int) -> None:
    encoder = small_windows(window)(signed(data, size))
    delta = b"".join(encoder.encode(io.BytesIO(data)))
    assert encoder.stats.literal_bytes == 0
    assert encoder.stats.copies == (1 if data else 0)
    assert applied(data, delta) == data


@examples()
@given(st.randoms(use_true_random=False), st.integers(0, 1000), st.integers(1, 300))
def test_what_is_appended_is_all_that_is_sent(rng: random.Random, length: int, more: int) -> None:
    data, added = rng.randbytes(length), rng.randbytes(more)
    encoder = small_windows(512)(signed(data, 64))
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


def test_encoder_rejects_block_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="block size 15"):
        Encoder(None, block_size=15)
    with pytest.raises(ValueError, match="block size 64"):
        Encoder(signed(b"x", 32), block_size=64)
    with pytest.raises(ValueError, match="block size"):
        sign(io.BytesIO(b""), 1 << 21)


def test_an_encoder_can_be_used_again() -> None:
    encoder = Encoder(signed(b"a" * 1000, 16))
    first = b"".join(encoder.encode(io.BytesIO(b"b" + b"a" * 1000)))
    assert b"".join(encoder.encode(io.BytesIO(b"b" + b"a" * 1000))) == first
    assert encode_bytes(signed(b"a" * 1000, 16), b"b" + b"a" * 1000) == first
