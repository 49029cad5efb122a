"""What looks encrypted, and what became of a content."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.dbm.replica.contents import LEAST, Inline, Opened, compare, looks_random, sample, spots

TEXT = b" ".join(b"line %d of a report about nothing in particular" % number for number in range(60000))


def kept(before: bytes, after: bytes) -> float:
    return compare(Inline(before), Inline(after)).kept


def turned(before: bytes, after: bytes) -> bool:
    return compare(Inline(before), Inline(after)).turned


@given(st.integers(0, 1 << 26))
def test_a_sample_is_bounded_and_has_both_ends(size: int) -> None:
    taken = spots(size)
    assert sum(length for _, length in taken) == min(size, 64 << 10)
    assert all(offset >= 0 and offset + length <= size for offset, length in taken)
    if size:
        assert taken[0][0] == 0 and taken[-1][0] + taken[-1][1] == size


@given(st.integers(LEAST, 64 << 10), st.integers(0, 1 << 64))
@settings(deadline=None)
def test_random_bytes_look_random(size: int, seed: int) -> None:
    assert looks_random(b"\x80" + random.Random(seed).randbytes(size - 1))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        os.urandom(LEAST - 1),
        bytes(65536),
        bytes(range(256)) * 256,
        TEXT[:65536],
        TEXT.decode().encode("utf-16")[:65536],
        "Größenänderung für alle übrigen Einträge".encode() * 500,
        gzip.compress(TEXT),
        bz2.compress(TEXT),
        lzma.compress(TEXT),
        zlib.compress(TEXT),
        b"\xff\xd8\xff\xe0" + os.urandom(60000),
        b"PK\x03\x04" + os.urandom(60000),
        b"\0\0\0\x20ftypisom" + os.urandom(60000),
    ],
    ids=range(14),
)
def test_what_does_not_look_random(data: bytes) -> None:
    assert not looks_random(data[: 64 << 10])


REAL = ["/usr/bin", "/usr/lib", "/usr/share/doc", "/usr/share", "/var/lib/dpkg/info", "/etc"]


@pytest.mark.parametrize("place", [place for place in REAL if Path(place).is_dir()])
def test_real_files_seldom_look_random(place: str) -> None:
    """Executables, libraries, compressed documentation, images, data: of 100 at most one is taken for a cipher."""
    seen, wrong = 0, []
    for directory, _, names in os.walk(place):
        for name in sorted(names):
            path = os.path.join(directory, name)
            if not os.path.isfile(path) or os.path.islink(path) or os.path.getsize(path) < LEAST:
                continue
            try:
                content = Opened(os.open(path, os.O_RDONLY | os.O_NOFOLLOW))
            except OSError:
                continue
            seen += 1
            if looks_random(sample(content)):
                wrong.append(path)
            content.close()
            if seen >= 1500:
                break
        if seen >= 1500:
            break
    assert len(wrong) <= max(1, seen // 100), wrong


@pytest.mark.parametrize(
    ("before", "after", "least", "most"),
    [
        (TEXT, TEXT, 1.0, 1.0),
        (TEXT[:5000], TEXT[:9000], 1.0, 1.0),
        (TEXT[:9000], TEXT[:3000], 0.33, 0.45),
        (TEXT[:9000], b"", 0.0, 0.0),
        (TEXT[:9000], TEXT[:4000] + b"more words" + TEXT[4000:9000], 0.99, 1.0),
        (TEXT[:9000], TEXT[:4000] + TEXT[4100:9000], 0.97, 0.995),
        (TEXT, b"one more line" + TEXT, 0.99, 1.0),
        (TEXT, TEXT[:1000] + TEXT[1010:], 0.98, 1.0),
        (TEXT, TEXT + TEXT[:5000], 1.0, 1.0),
        (TEXT[:9000], bytes(9000), 0.0, 0.0),
        (TEXT, os.urandom(len(TEXT)), 0.0, 0.05),
        (TEXT[:9000], TEXT[9000:18000], 0.0, 0.5),
        (b"", b"something", 1.0, 1.0),
        (b"file 17 of old", b"something else", 0.0, 0.4),
    ],
    ids=range(14),
)
def test_how_much_is_kept(before: bytes, after: bytes, least: float, most: float) -> None:
    assert least <= kept(before, after) <= most


@given(st.binary(min_size=1, max_size=2000), st.binary(max_size=300), st.integers(0, 2000))
@settings(deadline=None)
def test_an_insertion_loses_nothing(data: bytes, more: bytes, at: int) -> None:
    at = min(at, len(data))
    assert kept(data, data[:at] + more + data[at:]) == 1.0


def every_other_block(data: bytes) -> bytes:
    return b"".join(
        os.urandom(16) if number % 2 else data[number * 16 : number * 16 + 16] for number in range(len(data) // 16)
    )


def noise(size: int) -> bytes:
    """Always the same: now and then, random bytes begin as a compressed file does."""
    return random.Random(size).randbytes(size)


ZIP = b"PK\x03\x04" + zlib.compress(TEXT)


@pytest.mark.parametrize("size", [600, 5000, 65536, 1_000_000])
@pytest.mark.parametrize(
    "encrypt",
    [
        lambda data: noise(len(data)),
        lambda data: noise(len(data) + 528),
        lambda data: noise(min(len(data), 1 << 20)) + data[1 << 20 :],
        every_other_block,
        lambda data: noise(4096)[: len(data)] + data[4096:],
    ],
    ids=["whole", "longer", "first MiB", "every other block", "first 4 KiB"],
)
def test_text_that_was_encrypted_has_turned(encrypt: object, size: int) -> None:
    assert turned(TEXT[:size], encrypt(TEXT[:size]))  # type: ignore[operator]


def test_an_archive_that_was_encrypted_has_turned() -> None:
    assert turned(ZIP, os.urandom(len(ZIP)))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (TEXT[:9000], TEXT[:9000]),
        (TEXT[:9000], TEXT[100:9500]),
        (TEXT, ZIP),
        (ZIP, b"PK\x03\x04" + zlib.compress(TEXT[:50000])),
        (os.urandom(9000), os.urandom(9000)),
        (b"", os.urandom(9000)),
        (b"x" * 100, os.urandom(9000)),
        (TEXT[:9000], b""),
        (TEXT[:60000], TEXT[:50000] + os.urandom(10000)),
        (TEXT[:60000], TEXT[:60000] + os.urandom(20000)),
    ],
    ids=range(10),
)
def test_what_has_not_turned(before: bytes, after: bytes) -> None:
    assert not turned(before, after)
