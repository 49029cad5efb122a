"""The vectors compute what the reference does, in both widths, whichever of them is this processor's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba.core.registry import cpu_target

from farshore.delta import reference, vectors

from .support import examples

WIDTHS = (8, 16)
FEATURES: str = cpu_target.target_context.codegen().magic_tuple()[2]


def hasher(lanes: int) -> Any:
    hash_rows = vectors.hash_rows_by(lanes)

    @numba.njit
    def call(
        table: int, blocks: int, last: int, flags: int, first_flags: int, last_flags: int, ahead: int, out: int
    ) -> None:
        hash_rows(table, blocks, last, flags, first_flags, last_flags, ahead, out)

    return call


def summer(lanes: int) -> Any:
    block_sums = vectors.block_sums_by(lanes)

    @numba.njit
    def call(data: Any, start: int, steps: int) -> int:
        return block_sums(data, start, steps)

    return call


HASHERS = {lanes: hasher(lanes) for lanes in WIDTHS}
SUMMERS = {lanes: summer(lanes) for lanes in WIDTHS}


@pytest.mark.parametrize("lanes", WIDTHS)
@examples(20)
@given(
    seed=st.integers(0, 2**32),
    stride=st.sampled_from([1024, 1031]),
    blocks=st.integers(1, 16),
    last=st.integers(1, 64),
    ahead=st.integers(0, 1 << 20),
)
def test_rows_from_anywhere_are_hashed_side_by_side(
    lanes: int, seed: int, stride: int, blocks: int, last: int, ahead: int
) -> None:
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, 1031 * lanes + 1024, np.uint8)
    places = random.permutation(lanes) * stride + int(random.integers(0, 64))
    counters = random.integers(0, 1 << 54, lanes)
    table = np.concatenate([data.ctypes.data + places, counters])
    # What lies behind the last block's end counts as zeros, and is to be zeros.
    for place in places:
        data[place + 64 * (blocks - 1) + last : place + 64 * blocks] = 0
    out = np.zeros((lanes + 1, 8), np.uint32)
    HASHERS[lanes](table.ctypes.data, blocks, last, 0, 1, 2, ahead, out.ctypes.data)
    for lane in range(lanes):
        row = data[places[lane] : places[lane] + 64 * (blocks - 1) + last].tobytes()
        assert tuple(out[lane].tolist()) == reference.chunk_cv(row, int(counters[lane]))
    assert not out[lanes].any()


@pytest.mark.parametrize("lanes", WIDTHS)
@examples(20)
@given(seed=st.integers(0, 2**32), flags=st.sampled_from([reference.PARENT, reference.PARENT | reference.ROOT]))
def test_parents_may_be_written_over_their_children(lanes: int, seed: int, flags: int) -> None:
    cvs = np.random.default_rng(seed).integers(0, 1 << 32, (2 * lanes, 8), np.uint32)
    expected = [reference.compress(reference.IV, cvs[i : i + 2].tobytes(), 0, flags) for i in range(0, 2 * lanes, 2)]
    table = np.concatenate([cvs.ctypes.data + 64 * np.arange(lanes), np.zeros(lanes, np.int64)])
    HASHERS[lanes](table.ctypes.data, 1, 64, flags, 0, 0, 0, cvs.ctypes.data)
    assert [tuple(row) for row in cvs[:lanes].tolist()] == expected


@pytest.mark.parametrize("lanes", WIDTHS)
@examples(50)
@given(data=st.binary(max_size=3000), start=st.integers(0, 70), highest=st.booleans())
def test_the_sums_of_whole_steps_are_the_papers(lanes: int, data: bytes, start: int, highest: bool) -> None:
    if highest:
        data = b"\xff" * (len(data) * 50)
    steps = max(0, len(data) - start) // (4 * lanes)
    found = SUMMERS[lanes](np.frombuffer(data + b"\xff", np.uint8), start, steps)
    assert found == reference.weak(data[start : start + 4 * lanes * steps])


@pytest.mark.parametrize(
    ("features", "lanes"),
    [
        ("", 8),
        ("+avx2,+sse4.2", 8),
        ("+avx2,-avx512bw,-avx512f,-avx512vl", 8),
        ("+avx2,+avx512f", 8),
        ("+avx2,+avx512bw,+avx512f,+avx512vl", 16),
    ],
)
def test_the_width_follows_from_what_numba_compiles_for(features: str, lanes: int) -> None:
    assert vectors.lanes_for(features) == lanes


def test_the_width_is_that_of_this_processor() -> None:
    assert vectors.lanes_for(FEATURES) == vectors.LANES
    assert vectors.SUM_STEP == 4 * vectors.LANES


_SIGN = """
import io, sys
import numpy as np
from farshore.delta import reference, sign, vectors
data = np.random.default_rng(1).bytes(300_001)
signature, expected = sign(io.BytesIO(data), 1024), reference.sign(data, 1024)
assert signature.digest == expected.digest
assert signature.weak.tolist() == [weak for weak, _ in expected.blocks]
assert signature.strong == b"".join(strong for _, strong in expected.blocks)
print(vectors.LANES)
"""


@pytest.mark.skipif(vectors.LANES == 8, reason="this processor has but the one width")
def test_the_other_width_passes_the_kernels_tests_and_shares_their_cache(tmp_path: Path) -> None:
    """As on a machine without AVX-512 that has the directory of numba's cache in common with this one."""
    tests = Path(__file__).parent
    narrow = os.environ | {"NUMBA_CPU_FEATURES": re.sub(r"\+(?=avx512|avx10)", "-", FEATURES)}
    kernels = [str(tests / name) for name in ("test_kernels.py", "test_roundtrip.py")]
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'narrow'}"]
    for environment, words, answer in (
        (narrow, ["-c", _SIGN], "8\n"),
        (narrow, ["-m", "pytest", *options, *kernels], " passed"),
        # And what the narrow ones have left there does not come to the wide ones.
        (dict(os.environ), ["-c", _SIGN], "16\n"),
    ):
        command = [sys.executable, *words]
        run = subprocess.run(
            command, env=environment, cwd=tests.parents[2], capture_output=True, text=True, timeout=900
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert answer in run.stdout
