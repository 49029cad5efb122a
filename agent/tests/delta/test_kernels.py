"""The kernels compute what the reference does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.delta import kernels, reference, warm_up
from farshore.delta.signature import weak_sums

from .support import contents, examples

FACTORS = (1, 0x9E3779B1, 0xFFFFFFFF)


def array(data: bytes) -> np.ndarray:
    """Return `data` as kernels take it, with bytes behind it that must not matter."""
    return np.frombuffer(data + b"\xff" * 64, np.uint8).copy()


class WeakSet:
    def __init__(self, sums: set[int], factor: int) -> None:
        weak = np.array(sorted(sums), np.uint32)
        bits = max(len(weak) - 1, 1).bit_length()
        self.empty = next(i for i in range(len(sums) + 1) if i not in sums)
        self.factor = factor
        self.table = np.full(2 << bits, self.empty, np.uint32)
        self.shift = 31 - bits
        self.filter_shift = 22
        self.bits = np.zeros(2 << 5, np.uint32)
        self.lost = kernels.fill_set(weak, factor, self.shift, self.empty, self.table, self.filter_shift, self.bits)

    def hits(self, data: bytes, start: int, stop: int, size: int) -> list[int]:
        state = np.zeros(kernels.STATE_WORDS, np.uint32)
        sums = np.empty(kernels.SCAN_BATCH, np.uint32)
        hits = np.empty(kernels.SCAN_BATCH + 1, np.uint16)
        found = []
        fresh = True
        while start < stop:
            start = kernels.scan(
                array(data), start, stop, size, fresh, state, sums, hits, self.factor,
                self.shift, self.empty, self.table, self.filter_shift, self.bits,
            )  # fmt: skip
            if start < stop:
                found.append(start)
            start += 1
            fresh = False
        return found


@examples()
@given(contents(), st.integers(1, 300))
def test_weak_sums_are_the_papers(data: bytes, size: int) -> None:
    got = weak_sums(array(data), 0, len(data), size)
    expected = [reference.weak(data[i : i + size]) for i in range(0, len(data), size)]
    assert got.tolist() == expected


@pytest.mark.parametrize("size", [4096, 65536, 1 << 20])
def test_weak_sums_of_large_bytes_in_large_blocks_wrap_rightly(size: int) -> None:
    data = b"\xff" * size
    assert weak_sums(array(data), 0, size, size).tolist() == [reference.weak(data)]


@examples()
@given(contents(600), st.integers(1, 100))
def test_rolling_is_the_same_as_computing_anew(data: bytes, size: int) -> None:
    anew = [reference.weak(data[i : i + size]) for i in range(len(data) - size + 1)]
    assert list(reference.rolling(data, size)) == anew


@examples()
@given(contents(), st.integers(1, 200), st.sampled_from(FACTORS), st.data())
def test_scan_reports_every_position_whose_sum_is_known(
    data: bytes, size: int, factor: int, draw: st.DataObject
) -> None:
    sums = list(reference.rolling(data, size))
    known = set(draw.draw(st.lists(st.sampled_from(sums), max_size=20))) if sums else set()
    known |= set(draw.draw(st.lists(st.integers(0, 2**32 - 1), max_size=20)))
    known.add(7)
    weak_set = WeakSet(known, factor)
    assert weak_set.lost == 0
    start = draw.draw(st.integers(0, len(sums)))
    expected = [i for i in range(start, len(sums)) if sums[i] in known]
    assert weak_set.hits(data, start, len(sums), size) == expected


def test_scan_over_many_batches() -> None:
    data = bytes(np.random.default_rng(5).integers(0, 256, 40_000, np.uint8))
    sums = list(reference.rolling(data, 4096))
    known = {sums[0], sums[511], sums[512], sums[513], sums[20_000], sums[-1]}
    expected = [i for i, s in enumerate(sums) if s in known]
    assert WeakSet(known, FACTORS[1]).hits(data, 0, len(sums), 4096) == expected


def test_a_set_filled_with_colliding_sums_stays_bounded() -> None:
    # A factor of 1 puts all of these into one slot.
    weak_set = WeakSet(set(range(1000)), 1)
    assert weak_set.lost == 1000 - kernels.MAX_PROBES
    assert weak_set.hits(b"\xff" * 5000, 0, 4000, 1000) == []


@examples()
@given(contents(), st.integers(16, 64), st.data())
def test_weak_run_counts_equal_blocks(data: bytes, size: int, draw: st.DataObject) -> None:
    weak = weak_sums(array(data), 0, len(data) // size * size, size)
    blocks = len(weak)
    start = draw.draw(st.integers(0, blocks))
    block = draw.draw(st.integers(0, blocks))
    expected = 0
    while start + expected < blocks and block + expected < blocks and weak[start + expected] == weak[block + expected]:
        expected += 1
    got = kernels.weak_run(array(data), start * size, blocks - start, size, weak, block)
    assert got == expected


@examples()
@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=50))
def test_find_strong(keys: list[tuple[int, int]]) -> None:
    table = dict(sorted(dict(keys).items()))
    high = np.array(list(table), np.uint64)
    low = np.array(list(table.values()), np.uint64)
    block = np.arange(len(table), dtype=np.int64)
    for number, (h, lo) in enumerate(table.items()):
        assert kernels.find_strong(high, low, block, h, lo) == number
        assert kernels.find_strong(high, low, block, h, lo ^ 1) == -1
        if h ^ 1 not in table:
            assert kernels.find_strong(high, low, block, h ^ 1, lo) == -1


def test_warm_up_passes_its_own_test() -> None:
    warm_up()
