"""What the tests of the delta engine share: readers that misbehave, content, edits."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from farshore.delta import Applier, BytesReader, Encoder, Signature, sign

BLOCK_SIZES = (16, 17, 32, 61, 64, 100, 256)


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


def contents(most: int = 2000) -> st.SearchStrategy[bytes]:
    """Random content, and content that repeats itself in every way that comes to mind."""

    def repeat(parts: tuple[bytes, int]) -> bytes:
        unit, length = parts
        return (unit * (length // len(unit) + 1))[:length]

    periodic = st.tuples(st.binary(min_size=1, max_size=40), st.integers(0, most)).map(repeat)
    few_letters = st.text("ab", max_size=most // 2).map(str.encode)
    seeded = st.tuples(st.randoms(use_true_random=False), st.integers(0, most)).map(
        lambda pair: pair[0].randbytes(pair[1])
    )
    return st.one_of(seeded, periodic, few_letters, st.binary(max_size=most))


Edit = Callable[[bytes], bytes]


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    """One change of content: insert, delete, overwrite, move, truncate, append, duplicate."""
    kinds = ["insert", "delete", "overwrite", "move", "truncate", "append", "double"]
    kind = draw(st.sampled_from(kinds))
    where = draw(st.floats(0, 1))
    there = draw(st.floats(0, 1))
    length = draw(st.integers(0, 300))
    fresh = draw(st.randoms(use_true_random=False)).randbytes(length)

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
