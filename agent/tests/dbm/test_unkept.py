"""What cannot be kept is told by cause, with a number and an example, and is over when it is over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.dbm import unkept as register
from farshore.dbm.messages import Cause
from farshore.dbm.unkept import Unkept, shown, texts


def told(unkept: Unkept) -> dict[str, tuple[int, bytes, bool]]:
    return {cause.text: (cause.count, cause.example, cause.more) for cause in unkept.causes()}


def test_causes_are_counted_by_file_not_by_attempt() -> None:
    unkept = Unkept()
    assert not unkept
    for _ in range(3):
        unkept.settle(b"/a", ["x"])
    unkept.settle(b"/b", ["x", "y"])
    assert told(unkept) == {"x": (2, b"/a", False), "y": (1, b"/b", False)}
    unkept.settle(b"/b", ["y"])
    unkept.note(b"/b", "z")
    assert told(unkept) == {"x": (1, b"/a", False), "y": (1, b"/b", False), "z": (1, b"/b", False)}
    unkept.settle(b"/a", [])
    unkept.settle(b"/b", [])
    assert not unkept


def test_removal_and_renaming_are_followed() -> None:
    unkept = Unkept()
    for path in (b"/d", b"/d/a", b"/d/b/c", b"/da"):
        unkept.note(path, "x")
    unkept.moved(b"/d", b"/e", below=True)
    assert told(unkept) == {"x": (4, b"/da", False)}
    unkept.gone(b"/e/a", below=False)
    unkept.gone(b"/e/b", below=True)
    assert told(unkept)["x"][0] == 2
    # What something is moved over is gone.
    unkept.note(b"/f", "y")
    unkept.moved(b"/da", b"/f", below=False)
    assert told(unkept) == {"x": (2, b"/e", False)}


def test_another_name_lacks_what_the_file_lacks() -> None:
    unkept = Unkept()
    unkept.note(b"/f", "x")
    unkept.note(b"/g", "y")
    unkept.linked(b"/g", b"/f")
    unkept.gone(b"/f", below=False)
    assert told(unkept) == {"x": (1, b"/g", False)}
    unkept.linked(b"/g", b"/h")
    assert not unkept


def test_a_full_comparison_ends_what_it_does_not_see_again() -> None:
    unkept = Unkept()
    unkept.note(b"/a", "x")
    unkept.note(b"/b", "x")
    unkept.note(b"/b", "y")
    unkept.begin_round()
    unkept.settle(b"/b", ["x"])
    # Until it is done, nothing that may still be so is forgotten; but what was tried again is known.
    assert told(unkept) == {"x": (2, b"/a", False)}
    unkept.end_round()
    assert told(unkept) == {"x": (1, b"/b", False)}
    unkept.note(b"/c", "z")
    unkept.end_round()
    assert set(told(unkept)) == {"x", "z"}


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register, "MAX_PATHS", 10)
    monkeypatch.setattr(register, "MAX_CAUSES", 3)
    unkept = Unkept()
    for number in range(20):
        unkept.note(b"/%d" % number, "x")
    assert told(unkept) == {"x": (10, b"/0", True)}
    for number in range(20):
        unkept.note(b"/a", f"cause {number}")
    assert list(told(unkept)) == ["x", "cause 0", "cause 1", "other metadata cannot be kept"]
    assert texts(unkept.causes())[0] == "x (more than 10 files, e.g. /0)"
    for number in range(20):
        unkept.settle(b"/%d" % number, [])
    assert texts(unkept.causes())[0] == "x (many files)"
    unkept.begin_round()
    unkept.end_round()
    assert not unkept


def test_it_is_known_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "unkept"
    unkept = Unkept(path)
    unkept.note(b"/\xff\n", "x")
    unkept.store()
    again = Unkept(path)
    assert (again.causes(), again.version > 0) == ([Cause("x", 1, b"/\xff\n", False)], True)
    again.settle(b"/\xff\n", [])
    again.store()
    assert not Unkept(path)
    path.write_bytes(b"\xc1")
    assert not Unkept(path)
    # A place that cannot be written to is no reason to stop.
    nowhere = Unkept(tmp_path / "no" / "where")
    nowhere.note(b"/a", "x")
    nowhere.store()


def test_texts_name_the_number_and_one_file_in_any_encoding() -> None:
    causes = [Cause("xattr security.selinux cannot be kept: Operation not supported", 312, b"/srv/www/x", False)]
    assert texts(causes) == [
        "xattr security.selinux cannot be kept: Operation not supported (312 files, e.g. /srv/www/x)"
    ]
    assert texts([Cause("x", 1, b"/a\xff\n", False)]) == ["x (/a\\xff\\n)"]
    assert shown("/é".encode()) == "/é"
    assert texts([Cause("\33[2J" + "x" * 9999, 1, b"/a", False)])[0].startswith("\\x1b[2Jxxx")
    assert len(texts([Cause("x" * 9999, 1, b"/a", False)])[0]) < 600


@given(st.lists(st.tuples(st.sampled_from("sgmn"), st.integers(0, 5), st.sets(st.sampled_from("xyz"))), max_size=30))
def test_it_agrees_with_a_table(steps: list[tuple[str, int, set[str]]]) -> None:
    unkept = Unkept()
    table: dict[bytes, set[str]] = {}
    for what, number, causes in steps:
        path, to = b"/%d" % number, b"/%d" % ((number + 1) % 6)
        if what == "s":
            unkept.settle(path, sorted(causes))
            table[path] = set(causes)
        elif what == "g":
            unkept.gone(path, below=False)
            table.pop(path, None)
        elif what == "m":
            unkept.moved(path, to, below=False)
            table[to] = table.pop(path, set())
        else:
            for cause in causes:
                unkept.note(path, cause)
            table.setdefault(path, set()).update(causes)
    expected = {cause: sum(cause in each for each in table.values()) for cause in "xyz"}
    assert {text: count for text, (count, _, _) in told(unkept).items()} == {k: v for k, v in expected.items() if v}
    assert bool(unkept) == any(table.values())
    for _, example, _ in told(unkept).values():
        assert os.path.isabs(example)
