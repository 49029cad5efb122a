"""Input that means harm: it may cost matches, it never costs wrong bytes, time or memory."""

from __future__ import annotations

import contextlib
import io
import random
import tracemalloc

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from farshore.delta import (
    Applier,
    BytesReader,
    DeltaCorrupt,
    DeltaHeader,
    Encoder,
    Signature,
    SignatureCorrupt,
    apply_bytes,
    encode_bytes,
    kernels,
    parse_header,
    reference,
)
from farshore.delta import format as stream
from farshore.errors import FarshoreError

from .support import applied, contents, examples, pairs, signed, small_windows

MIB = 1 << 20


def encoded(old: bytes, new: bytes, size: int) -> Encoder:
    """Encode, check that the delta applies, and return the encoder with its results."""
    encoder = Encoder(signed(old, size))
    delta = b"".join(encoder.encode(io.BytesIO(new)))
    assert apply_bytes(old, delta) == new
    return encoder


def equal_weak_sums(rng: random.Random, block: bytes, count: int) -> list[bytes]:
    """Return different blocks with the weak sums of `block`: at three places in a row -1, +2, -1
    changes neither a nor b."""
    out: list[bytes] = []
    while len(out) < count:
        other = bytearray(block)
        for _ in range(8):
            i = rng.randrange(len(block) - 2)
            if other[i] > 0 and other[i + 1] < 254 and other[i + 2] > 0:
                other[i] -= 1
                other[i + 1] += 2
                other[i + 2] -= 1
        if other != block:
            assert reference.weak(bytes(other)) == reference.weak(block)
            out.append(bytes(other))
    return out


def test_zeros_against_zeros() -> None:
    encoder = encoded(bytes(MIB), bytes(3 * MIB + 7), 4096)
    assert encoder.stats.literal_bytes < 4096
    encoder = encoded(random.Random(1).randbytes(MIB), bytes(3 * MIB), 4096)
    assert encoder.stats.literal_bytes == 3 * MIB


@pytest.mark.parametrize("period", [1, 2, 3, 7, 64, 255, 4095, 4097])
def test_short_periods(period: int) -> None:
    unit = random.Random(period).randbytes(period)
    content = (unit * (2 * MIB // period + 1))[: 2 * MIB]
    encoder = encoded(content, b"#" + content[100:], 4096)
    assert encoder.stats.literal_bytes < 2 * 4096


def test_thue_morse() -> None:
    bits = bytes(i.bit_count() & 1 for i in range(MIB))
    encoder = encoded(bits, b"\2" + bits, 1024)
    assert encoder.stats.literal_bytes < MIB // 4


def test_planted_equal_weak_sums_in_the_base() -> None:
    rng = random.Random(2)
    block = rng.randbytes(1024)
    old = b"".join(equal_weak_sums(rng, block, 2000))
    new = b"".join(equal_weak_sums(rng, block, 2000))
    encoder = encoded(old, new, 1024)
    assert encoder.stats.literal_bytes == len(new)
    # Every block of the new content is an alarm, for no more blocks of the base than a chain has.
    assert encoder.stats.false_alarms <= (kernels.MAX_CHAIN + 1) * 2000
    assert encoded(old, b"!" + old, 1024).stats.literal_bytes < 2 * 1024


def test_an_alarm_at_every_position_is_cut_short() -> None:
    size = 4096
    plain = b"d" * size
    decoy = b"cfc" + plain[3:]
    assert reference.weak(decoy) == reference.weak(plain)
    new = b"x" + b"d" * (8 * MIB)
    encoder = encoded(decoy, new, size)
    assert encoder.stats.literal_bytes == len(new)
    assert encoder.stats.false_alarms < 3 * 2 * (8 * MIB // size) + 100


def test_a_spent_budget_leaves_aligned_matches() -> None:
    rng = random.Random(3)
    size = 1024
    block = rng.randbytes(size)
    decoys = b"".join(equal_weak_sums(rng, block, 2000))
    keep = rng.randbytes(30 * size)
    old = b"".join(equal_weak_sums(rng, block, 2000)) + keep
    new = decoys + keep
    encoder = small_windows(1 << 20)(signed(old, size))
    encoder_delta = b"".join(encoder.encode(io.BytesIO(new)))
    assert applied(old, encoder_delta) == new
    assert encoder.stats.copied_bytes >= len(keep)


@examples(200)
@given(pairs(), st.data())
def test_a_damaged_delta_gives_our_error_or_the_right_bytes(pair: tuple[bytes, bytes], draw: st.DataObject) -> None:
    old, new = pair
    delta = bytearray(encode_bytes(signed(old, 1024), new))
    for _ in range(draw.draw(st.integers(1, 3))):
        delta[draw.draw(st.integers(0, len(delta) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    with contextlib.suppress(DeltaCorrupt):
        assert apply_bytes(old, bytes(delta)) == new


@examples()
@given(pairs(), st.data())
def test_a_delta_cut_short_or_with_more_behind_it_is_refused(pair: tuple[bytes, bytes], draw: st.DataObject) -> None:
    old, new = pair
    delta = encode_bytes(signed(old, 1024), new)
    with pytest.raises(DeltaCorrupt):
        apply_bytes(old, delta[: draw.draw(st.integers(0, len(delta) - 1))])
    with pytest.raises(DeltaCorrupt):
        apply_bytes(old, delta + draw.draw(st.binary(min_size=1, max_size=5)))


@examples(200)
@given(st.binary(max_size=300), st.booleans(), st.integers(1, 20))
def test_garbage_is_refused(garbage: bytes, with_header: bool, piece: int) -> None:
    header = DeltaHeader(1024, 1000, bytes(32)).to_bytes() if with_header else b""
    with pytest.raises(DeltaCorrupt):
        applied(bytes(1000), header + garbage, (piece,))


HEAD = DeltaHeader(4096, 1000, bytes(32)).to_bytes()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (stream.copy(0, 1 << 40), "beyond the base"),
        (stream.copy((1 << 63) - 1, (1 << 62)), "beyond the base"),
        (stream.copy(1000, 1), "beyond the base"),
        (stream.varint(1) + b"\0", "length 0"),
        (b"\x80" * 9, "cut short"),
        (b"\x80" * 10, "malformed"),
        (b"\xff" * 9 + b"\x7f", "malformed"),
        (b"\x80\x00", "malformed"),
        (stream.varint(1 << 63) + b"x", "cut short"),
        (stream.trailer(5, blake3(b"").digest()), "0 bytes instead of 5"),
        (stream.trailer(0, bytes(32)), "another digest"),
        (stream.trailer(0, blake3(b"").digest())[:-1], "cut short"),
        (stream.trailer(0, blake3(b"").digest()) + b"x", "after its end"),
    ],
)
@pytest.mark.parametrize("piece", [1, 5, 1 << 20])
def test_each_kind_of_damage_is_named(body: bytes, reason: str, piece: int) -> None:
    with pytest.raises(DeltaCorrupt, match=reason):
        applied(bytes(1000), HEAD + body, (piece,))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"", "cut short"),
        (b"rs\x02\x36" + bytes(20), "begin like one"),
        (HEAD[:4] + b"\x02" + HEAD[5:], "version 2"),
        (HEAD[:5] + b"\x03" + HEAD[6:], "flags"),
        (HEAD[:8] + bytes(4) + HEAD[12:], "block size 0"),
        (HEAD[:8] + b"\x00\x0c\0\0" + HEAD[12:], "block size 3072"),
        (HEAD[:-1], "cut short"),
    ],
)
def test_headers_are_checked(header: bytes, reason: str) -> None:
    with pytest.raises(DeltaCorrupt, match=reason):
        parse_header(header)
    with pytest.raises(DeltaCorrupt, match=reason):
        applied(b"", header)


def test_the_header_tells_the_base() -> None:
    old = random.Random(4).randbytes(3000)
    delta = encode_bytes(signed(old, 1024), old)
    assert parse_header(delta) == DeltaHeader(1024, 3000, blake3(old).digest())
    applier = Applier(BytesReader(old), lambda part: None)
    applier.feed(delta[:20])
    assert applier.header is None
    applier.feed(delta[20:60])
    assert applier.header == parse_header(delta)
    assert parse_header(encode_bytes(None, old)).base_length is None


def test_another_base_is_noticed() -> None:
    rng = random.Random(5)
    old = rng.randbytes(10_000)
    delta = encode_bytes(signed(old, 1024), old[:5000] + b"new" + old[5000:])
    changed = bytearray(old)
    changed[7777] ^= 1
    with pytest.raises(DeltaCorrupt, match="another digest"):
        apply_bytes(bytes(changed), delta)
    with pytest.raises(DeltaCorrupt, match="the base ends at 9000"):
        apply_bytes(old[:9000], delta)
    with pytest.raises(DeltaCorrupt, match="needs a base"):
        Applier(None, lambda part: None).feed(delta)


def test_after_an_error_nothing_is_accepted() -> None:
    applier = Applier(BytesReader(b""), lambda part: None)
    with pytest.raises(DeltaCorrupt):
        applier.feed(b"x" * 100)
    with pytest.raises(DeltaCorrupt, match="earlier"):
        applier.feed(encode_bytes(None, b""))
    with pytest.raises(DeltaCorrupt, match="earlier"):
        applier.finish()


def test_a_limit_stops_what_grows_without_end() -> None:
    base = bytes(1000)
    bomb = HEAD + stream.copy(0, 1000) * 50
    written: list[int] = []
    applier = Applier(BytesReader(base), lambda part: written.append(len(part)), limit=5000)
    with pytest.raises(DeltaCorrupt, match="more than 5000"):
        applier.feed(bomb)
    assert sum(written) == 5000


def test_memory_stays_bounded_whatever_the_delta_says() -> None:
    class Endless:
        def pread(self, offset: int, length: int, /) -> bytes:
            return bytes(length)

    total = 0

    def count(part: bytes | memoryview) -> None:
        nonlocal total
        total += len(part)

    applier = Applier(Endless(), count)
    head = DeltaHeader(4096, 1 << 40, bytes(32)).to_bytes()
    tracemalloc.start()
    try:
        applier.feed(head + stream.copy(0, 256 * MIB) + stream.varint(1 << 62))
        for _ in range(100):
            applier.feed(bytes(MIB))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 356 * MIB
    assert peak < 8 * MIB


def test_encoding_takes_a_bounded_window() -> None:
    class Source:
        left = 256 * MIB

        def readinto(self, view: memoryview) -> int:
            got = min(len(view), self.left)
            self.left -= got
            return got

        def read(self, size: int, /) -> bytes:
            raise AssertionError("readinto is there")

    tracemalloc.start()
    try:
        encoder = Encoder(signed(bytes(MIB), 4096))
        for _ in encoder.encode(Source()):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert encoder.length == 256 * MIB
    # The windows, what a window may hold of literals, and 20 bytes and some for each block.
    assert peak < 24 * MIB


# Signatures


@examples()
@given(contents(), st.sampled_from([1024, 4096]))
def test_a_signature_survives_storage(data: bytes, size: int) -> None:
    signature = signed(data, size)
    again = Signature.from_bytes(signature.to_bytes())
    assert again == signature
    assert hash(again) == hash(signature)
    with pytest.raises(ValueError, match="read-only"):
        again.weak[:1] = 0
        raise ValueError("an empty one has nothing to write: read-only")


@examples(200)
@given(contents(5000), st.data())
def test_a_damaged_signature_is_refused(data: bytes, draw: st.DataObject) -> None:
    stored = bytearray(signed(data, 1024).to_bytes())
    at = draw.draw(st.integers(0, len(stored) - 1))
    with pytest.raises(SignatureCorrupt):
        Signature.from_bytes(stored[:at])
    with pytest.raises(SignatureCorrupt):
        Signature.from_bytes(stored + b"x")
    stored[at] ^= 1 << draw.draw(st.integers(0, 7))
    with pytest.raises(SignatureCorrupt):
        Signature.from_bytes(stored)


@examples()
@given(st.binary(max_size=200))
def test_garbage_is_no_signature(garbage: bytes) -> None:
    with pytest.raises(SignatureCorrupt):
        Signature.from_bytes(garbage)


def test_a_signature_that_announces_too_much_allocates_nothing() -> None:
    stored = bytearray(signed(b"x" * 10_000, 1024).to_bytes())
    stored[12:20] = (1 << 62).to_bytes(8, "little")
    tracemalloc.start()
    try:
        with pytest.raises(SignatureCorrupt, match="announced"):
            Signature.from_bytes(stored)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MIB


def test_errors_are_ours_and_tell_themselves_apart() -> None:
    assert issubclass(DeltaCorrupt, FarshoreError)
    assert issubclass(SignatureCorrupt, FarshoreError)
    assert DeltaCorrupt.exit_code != SignatureCorrupt.exit_code
    assert "because" in str(DeltaCorrupt("because"))


def test_a_source_that_does_not_block_is_refused() -> None:
    class Source:
        def readinto(self, view: memoryview) -> None:
            return None

        def read(self, size: int, /) -> bytes:
            return b""

    with pytest.raises(BlockingIOError):
        list(Encoder(None).encode(Source()))
