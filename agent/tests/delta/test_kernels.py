"""The kernels compute what the reference does."""

from __future__ import annotations

import io

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from farshore.delta import kernels, reference, sign, warm_up
from farshore.delta.encode import _PADDING, _make_index
from farshore.delta.vectors import LANES

from .support import BLOCK_SIZES, contents, examples

CHUNK = kernels.CHUNK


def array(data: bytes) -> np.ndarray:
    """Return `data` as kernels take it, with bytes behind it that must not matter."""
    return np.frombuffer(data + b"\xff" * _PADDING, np.uint8).copy()


def noise(length: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(length)


# Weak sums


@examples()
@given(contents(), st.integers(0, 100), st.integers(0, 100))
def test_weak_sums_are_the_papers(data: bytes, before: int, after: int) -> None:
    length = max(0, len(data) - before - after)
    start = len(data) - after - length
    assert kernels.weak_sum(array(data), max(0, start), length) == reference.weak(
        data[max(0, start) : max(0, start) + length]
    )


@pytest.mark.parametrize("size", [1024, 4096, 65536, 1 << 20])
def test_weak_sums_of_large_bytes_in_large_blocks_wrap_rightly(size: int) -> None:
    data = b"\xff" * size
    assert kernels.weak_sum(array(data), 0, size) == reference.weak(data)


@examples()
@given(contents(600), st.integers(1, 100))
def test_rolling_is_the_same_as_computing_anew(data: bytes, size: int) -> None:
    anew = [reference.weak(data[i : i + size]) for i in range(len(data) - size + 1)]
    assert list(reference.rolling(data, size)) == anew


# Strong hashes

EDGES = [0, 1, 63, 64, 65, 127, 128, 1023, 1024, 1025, 2047, 2048, 2049, 3072, 4095, 4096, 4097, 5121, 31_744, 32_769]


@pytest.mark.parametrize("length", EDGES)
def test_the_references_blake3_is_blake3(length: int) -> None:
    assert reference.digest(noise(length)) == blake3(noise(length)).digest()


@pytest.mark.parametrize("size", [1024, 2048, 4096, 16_384, 1 << 20])
@pytest.mark.parametrize("length", [*EDGES, 65_536, 100_000, 1 << 20, (1 << 20) + 1, 5_000_001])
def test_the_digest_is_blake3s(size: int, length: int) -> None:
    data = noise(length, 2)
    signature = sign(io.BytesIO(data), size)
    assert signature.digest == blake3(data).digest()
    assert len(signature) == -(-length // size)


@pytest.mark.parametrize("size", [1024, 4096, 32_768, 131_072])
@pytest.mark.parametrize("length", [131_072, 300_001, 600_000])
def test_blocks_smaller_and_larger_than_the_lanes_take_have_both_their_checksums(size: int, length: int) -> None:
    data = noise(length, 6)
    signature, expected = sign(io.BytesIO(data), size), reference.sign(data, size)
    assert signature.weak.tolist() == [weak for weak, _ in expected.blocks]
    assert signature.strong == b"".join(strong for _, strong in expected.blocks)


@examples(30)
@given(st.integers(0, 2**54), st.integers(1, 9000))
def test_any_subtree_anywhere(first: int, length: int) -> None:
    data = noise(length, 3)
    scratch = kernels.make_scratch(16_384)
    kernels.hash_partial(array(data), 0, length, first, scratch)
    assert tuple(scratch.cvs[0].tolist()) == reference.subtree_cv(data, first)


@pytest.mark.parametrize("shift", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("count", sorted({1, 2, 3, 7, 8, kernels.GROUP}))
def test_blocks_from_anywhere_as_blocks_of_anywhere(shift: int, count: int) -> None:
    size = CHUNK << shift
    data = noise(size * 2 + 1000, 4)
    scratch = kernels.make_scratch(size)
    for i in range(count):
        scratch.starts[i] = 97 * i
        scratch.numbers[i] = (1 << 33 - shift) + 3 * i
    kernels.hash_blocks(array(data), count, shift, scratch)
    for i in range(0, count, 3):
        expected = reference.subtree_cv(data[97 * i : 97 * i + size], (1 << 33) + (3 * i << shift))
        assert tuple(scratch.cvs[i].tolist()) == expected


@examples(20)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=40))
def test_the_tree_over_any_number_of_leaves(seeds: list[int]) -> None:
    leaves = np.random.default_rng(seeds).integers(0, 1 << 32, (len(seeds), 8), np.uint32)
    rows = [tuple(row) for row in leaves.tolist()]

    def root(rows: list[tuple[int, ...]], flags: int) -> tuple[int, ...]:
        if len(rows) == 1:
            return rows[0]
        left = 1 << (len(rows) - 1).bit_length() - 1
        both = np.array([*root(rows[:left], 0), *root(rows[left:], 0)], np.uint32).tobytes()
        return reference.compress(reference.IV, both, 0, reference.PARENT | flags)

    lanes = np.zeros(2 * LANES, np.int64)
    for flags in (0, reference.ROOT):
        cvs = np.concatenate([leaves, np.zeros((LANES, 8), np.uint32)])
        if flags:
            kernels.root_cv(cvs, len(leaves), lanes)
        else:
            kernels.reduce_cvs(cvs, len(leaves), 1, lanes)
        assert tuple(cvs[0].tolist()) == root(rows, flags)


# The index and the scan


@examples()
@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 9), max_size=300))
def test_the_index_knows_each_sum_and_the_blocks_in_order(sums: list[int]) -> None:
    weak = np.array(sums, np.uint32)
    index, distinct = _make_index(weak)
    assert distinct == len(set(sums))
    for s in set(sums):
        chain, block = [], kernels.first_block(index, s)
        while block >= 0:
            chain.append(block)
            block = int(index.following[block])
        assert chain == [i for i, other in enumerate(sums) if other == s]
    for s in range(100):
        if s not in sums:
            assert kernels.first_block(index, s) == -1


def test_an_index_filled_with_colliding_sums_stays_bounded() -> None:
    index, _ = _make_index(np.arange(1000, dtype=np.uint32))
    # A factor of 1 puts all of these into one slot.
    index = index._replace(factor=np.uint32(1))
    index.heads[:] = -1
    assert kernels.fill_index(np.arange(1000, dtype=np.uint32), index) == kernels.MAX_PROBES


@examples()
@given(contents(), st.sampled_from(BLOCK_SIZES), st.integers(0, 2**32 - 1), st.data())
def test_a_batch_has_the_sums_of_all_positions_and_misses_none_that_is_known(
    data: bytes, size: int, other: int, draw: st.DataObject
) -> None:
    sums = list(reference.rolling(data, size))
    if not sums:
        return
    known = set(draw.draw(st.lists(st.sampled_from(sums), max_size=20))) | {other}
    index, _ = _make_index(np.array(sorted(known), np.uint32))
    scratch = kernels.make_scratch(size)
    start = draw.draw(st.integers(0, len(sums) - 1))
    count = draw.draw(st.integers(1, min(kernels.SCAN_BATCH, len(sums) - start)))
    scratch.sums[0] = sums[start]
    found = kernels.scan_batch(array(data), start, count, size, index, scratch)
    assert scratch.sums[:count].tolist() == sums[start : start + count]
    if start + count < len(sums):
        assert scratch.sums[count] == sums[start + count]
    hits = scratch.hits[:found].tolist()
    assert hits == sorted(set(hits))
    assert {i for i in range(count) if sums[start + i] in known} <= set(hits)


def test_what_the_filters_let_through_by_chance_is_little() -> None:
    weak = np.random.default_rng(5).integers(0, 1 << 32, 10_000, np.uint32)
    index, _ = _make_index(weak)
    scratch = kernels.make_scratch(4096)
    data = array(noise(200_000))
    through = 0
    for start in range(0, 100 * 1024, 1024):
        scratch.sums[0] = kernels.weak_sum(data, start, 4096)
        through += kernels.scan_batch(data, start, 1024, 4096, index, scratch)
    assert through < 100 * 1024 // 50


@examples()
@given(contents(), st.sampled_from(BLOCK_SIZES), st.integers(0, 3000))
def test_a_run_is_followed_as_far_as_it_goes(data: bytes, size: int, damage: int) -> None:
    signature = sign(io.BytesIO(data), size)
    blocks = len(data) // size
    weak = signature.weak.view()
    weak.flags.writeable = False
    base = kernels.Base(weak, np.frombuffer(signature.strong, np.uint32).reshape(-1, 4), len(data))
    state = np.zeros(kernels.STATE_WORDS, np.int64)
    shift = size.bit_length() - 11
    damaged = bytearray(b"#" + data)
    expected = blocks
    if 0 < damage < len(damaged):
        damaged[damage] ^= 1
        expected = min(blocks, (damage - 1) // size)
    scratch = kernels.make_scratch(size)
    assert kernels.follow_run(array(bytes(damaged)), 1, blocks, 0, shift, base, scratch, state) == expected


def test_warm_up_passes_its_own_test() -> None:
    warm_up()
