from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.smm.health import Health

T, F, N = True, False, None


@pytest.mark.parametrize(
    ("rise", "fall", "answers", "verdicts"),
    [
        (3, 2, [T, T, T], [N, N, T]),
        (3, 2, [F, F], [N, F]),
        (3, 2, [T, T, T, F, T, F, F], [N, N, T, T, T, T, F]),
        (3, 2, [F, F, T, T, F, T, T, T], [N, F, F, F, F, F, F, T]),
        (1, 1, [T, F, T], [T, F, T]),
    ],
)
def test_rise_and_fall(rise: int, fall: int, answers: list[bool], verdicts: list[bool | None]) -> None:
    health = Health(rise, fall)
    assert [health.observe(ok) for ok in answers] == verdicts


def test_reset_forgets_the_verdict_and_the_count() -> None:
    health = Health(2, 2)
    health.observe(False)
    health.observe(False)
    health.observe(True)
    health.reset()
    assert health.verdict is None
    assert health.observe(True) is None
    assert health.observe(True) is True


@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.booleans()))
def test_the_verdict_is_that_of_the_last_full_run(rise: int, fall: int, answers: list[bool]) -> None:
    health = Health(rise, fall)
    expected = None
    for end in range(1, len(answers) + 1):
        if end >= rise and all(answers[end - rise : end]):
            expected = True
        if end >= fall and not any(answers[end - fall : end]):
            expected = False
        assert health.observe(answers[end - 1]) is expected
