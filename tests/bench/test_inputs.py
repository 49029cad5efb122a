"""Hostile inputs are as hostile as they say."""

from __future__ import annotations

import pytest
from bench import inputs

from farshore.delta import reference

SIZE = 64 << 10


@pytest.mark.parametrize("name", inputs.HOSTILE)
def test_inputs_are_reproducible_and_differ(name: str) -> None:
    old, new = inputs.HOSTILE[name](SIZE)
    assert (old, new) == inputs.HOSTILE[name](SIZE)
    assert old != new
    assert len(old) == SIZE


def test_all_weak_sums_are_equal_and_no_block_is() -> None:
    old, new = inputs.equal_weak_sums(SIZE)
    blocks = [content[at : at + inputs.BLOCK] for content in (old, new) for at in range(0, SIZE, inputs.BLOCK)]
    assert len({reference.weak(block) for block in blocks}) == 1
    assert len(set(blocks)) == len(blocks)
