"""What the tests of the delta engine share: readers that misbehave, content, edits."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from farshore.delta import Applier, BytesReader, Encoder, Signature, sign

BLOCK_SIZES = (1024, 2048, 4096)


def examples(count: int = 100) -> settings:
    """Return settings that don't depend on how busy the machine is."""
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Dribble:
    """Gives content in pieces of the sizes given, in turn, through ``read`` alone."""

    def __init__(self, data: bytes, pieces: tuple[int, ...] = (1, 7, 64, 1000)) -> None:
        self._file = io.BytesIO(data)
        self._pieces = pieces
        self._turn = 0

    def read(self, size: int, /) -> bytes:
        self._turn += 1
        return self._file.read(min(size, self._pieces[self._turn % len(self._pieces)]))


def small_windows(window: int) -> type[Encoder]:
    """Return an Encoder whose windows hold `window` bytes."""

    class Small(Encoder):
        pass

    Small.window = window
    return Small


def signed(data: bytes, block_size: int) -> Signature:
    return sign(io.BytesIO(data), block_size)


def applied(base: bytes, delta: bytes, pieces: tuple[int, ...] = (1 << 30,)) -> bytes:
    """Apply `delta`, fed in pieces of the sizes given, in turn."""
    out = bytearray()
    applier = Applier(BytesReader(base), out.extend)
    at = turn = 0
    while at < len(delta):
        piece = pieces[turn % len(pieces)]
        applier.feed(delta[at : at + piece])
        at += piece
        turn += 1
    result = applier.finish()
    assert result.length == len(out)
    return bytes(out)


def contents(most: int = 12_000) -> st.SearchStrategy[bytes]:
    """Random content, and content that repeats itself in every way that comes to mind."""

    def repeat(parts: tuple[bytes, int]) -> bytes:
        unit, length = parts
        return (unit * (length // len(unit) + 1))[:length]

    def scatter(seed: int, length: int) -> bytes:
        return random.Random(seed).randbytes(length)

    def few_letters(seed: int, length: int) -> bytes:
        return bytes(random.Random(seed).choices(b"ab", k=length))

    def few_blocks(seed: int, choice: list[int]) -> bytes:
        kinds = [scatter(seed, 1024), bytes(1024), b"x" * 1024, b"ab" * 512]
        return b"".join(kinds[i] for i in choice)

    seeds, lengths = st.integers(0, 2**32), st.integers(0, most)
    periodic = st.tuples(st.binary(min_size=1, max_size=40), lengths).map(repeat)
    choices = st.lists(st.integers(0, 3), max_size=most // 1024)
    return st.one_of(
        st.builds(scatter, seeds, lengths),
        periodic,
        st.builds(few_letters, seeds, lengths),
        st.builds(few_blocks, seeds, choices),
        st.binary(max_size=100),
    )


Edit = Callable[[bytes], bytes]


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    """One change of content: insert, delete, overwrite, move, truncate, append, duplicate."""
    kinds = ["insert", "delete", "overwrite", "move", "truncate", "append", "double"]
    kind = draw(st.sampled_from(kinds))
    where = draw(st.floats(0, 1))
    there = draw(st.floats(0, 1))
    length = draw(st.one_of(st.integers(0, 30), st.integers(0, 3000)))
    fresh = random.Random(draw(st.integers(0, 2**32))).randbytes(length)

    def edit(data: bytes) -> bytes:
        at, to = int(where * len(data)), int(there * len(data))
        part = data[at : at + length]
        match kind:
            case "insert":
                return data[:at] + fresh + data[at:]
            case "delete":
                return data[:at] + data[at + length :]
            case "overwrite":
                return data[:at] + fresh[: len(part)] + data[at + len(part) :]
            case "move":
                rest = data[:at] + data[at + length :]
                return rest[:to] + part + rest[to:]
            case "truncate":
                return data[:at]
            case "append":
                return data + fresh
            case _:
                return data[:to] + part + data[to:]

    return edit


@st.composite
def pairs(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Old and new content, related by a few edits."""
    old = new = draw(contents())
    for edit in draw(st.lists(edits(), max_size=6)):
        new = edit(new)
    return old, new


def varints(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint at `at` and where it ends, for well-formed data."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def instructions(delta: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield ("copy", offset, length) and ("literal", -1, length) of a well-formed delta."""
    at = 12 + (40 if delta[5] & 1 else 0)
    while True:
        value, at = varints(delta, at)
        if not value:
            return
        if value & 1:
            offset, at = varints(delta, at)
            yield "copy", offset, value >> 1
        else:
            at += value >> 1
            yield "literal", -1, value >> 1
