"""A replica's state is brought to other roots: cut off anywhere, it ends alike."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from farshore.config import History as Retention
from farshore.dbm import roots
from farshore.dbm.replica.history import History
from farshore.dbm.replica.stage import Stage
from farshore.dbm.replica.undo import Absent, Kept, Moved, Step
from farshore.errors import StateError
from farshore.fmm.types import Root

AGO = 1_000_000_000


def made(base: Path, names: str) -> roots.Roots:
    for name in names:
        (base / name).mkdir(exist_ok=True)
    return [(f"/srv/{name}", Root(os.fsencode(base / name))) for name in names]


def stages(state: Path, of: roots.Roots) -> list[Stage]:
    return [Stage(root.path, state / str(number)) for number, (_, root) in enumerate(of)]


def history(state: Path, of: list[Stage]) -> History:
    return History(state / "history", of, Retention(), 10, lambda: AGO)


def test_what_differs() -> None:
    a, b = ("/srv/a", Root(b"/a")), ("/srv/b", Root(b"/b"))
    assert not roots.differ([a, b], [a, b])
    assert not roots.differ([a], [("/srv/a", Root(b"/a", exclude=("*.tmp",)))])
    assert roots.differ([a, b], [b, a])
    assert roots.differ([a], [("/srv/a", Root(b"/elsewhere"))])
    assert roots.mapping([a, b], [b]) == {1: 0}
    assert roots.mapping([a, b], [("/srv/c", Root(b"/c")), b, a]) == {0: 2, 1: 1}


def test_what_is_stored_is_loaded(tmp_path: Path) -> None:
    assert roots.load(tmp_path) is None
    kept = [("/srv/\xe4", Root("/\xe4".encode(), ("x",), ("*",)))]
    roots.store(tmp_path, kept)
    assert roots.load(tmp_path) == kept
    (tmp_path / "roots.json").write_text("[]")
    with pytest.raises(StateError, match=r"roots\.json"):
        roots.load(tmp_path)


class Cut(Exception):
    """The process ends here."""


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[[str], tuple[Path, roots.Roots, roots.Roots]]:
    """A state of the roots a, b and c with a history, ready to become one of others."""

    def make(after: str) -> tuple[Path, roots.Roots, roots.Roots]:
        state = tmp_path / "state"
        state.mkdir()
        old = made(tmp_path, "abc")
        roots.store(state, old)
        there = stages(state, old)
        past = history(state, there)
        steps = []
        for number, name in enumerate(b"abc"):
            kept = there[number].folder(past.folder())
            handle = os.open(b"kept", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=kept)
            os.write(handle, bytes([name]))
            os.close(handle)
            entries = [
                Absent(0, number, b"new"),
                Kept(1, number, b"gone", past.folder(), b"kept", 0o100600, 1, 0, 1, 1),
                Moved(2, number, b"was", b"is", False),
            ]
            steps.append(Step(number + 1, AGO, 0, 3, list(entries)))
        past.note(steps)
        past.settled(10)
        new = made(tmp_path, after)
        past.renumber(roots.mapping(old, new), state / roots.NEW_HISTORY)
        past.close()
        for stage in there:
            stage.close()
        return state, old, new

    return make


def check(state: Path, new: roots.Roots) -> None:
    """Each root has its own past, and no other's."""
    assert roots.load(state) == new
    there = stages(state, new)
    past = history(state, there)
    assert past.problem == ""
    entries = [entry for chapter in past.chapters for step in past.steps(chapter) for entry in step.entries]
    names = {number: source[-1:] for number, (source, _) in enumerate(new)}
    assert {names[entry.root] for entry in entries} == set(names.values()) & set("abc")
    for entry in entries:
        if isinstance(entry, Kept):
            folder = there[entry.root].folder(entry.folder)
            handle = os.open(entry.name, os.O_RDONLY, dir_fd=folder)
            assert os.read(handle, 9).decode() == names[entry.root]
            os.close(handle)
    past.close()
    for stage in there:
        stage.close()
    left = {path.name for path in state.iterdir()}
    assert not {name for name in left if name.startswith(("root-", "history."))}
    assert {name for name in left if name.isdigit()} <= {str(number) for number in names}


@pytest.mark.parametrize("after", ["cab", "a", "cb", "dcx", "bcad", "x"])
def test_every_root_keeps_its_past(
    prepared: Callable[[str], tuple[Path, roots.Roots, roots.Roots]], after: str
) -> None:
    state, old, new = prepared(after)
    roots.change(state, old, new)
    check(state, new)
    roots.finish(state)
    check(state, new)


@pytest.mark.parametrize("cut", range(12))
@pytest.mark.parametrize("name", ["rename", "write"])
def test_a_change_that_is_cut_off_is_completed(
    prepared: Callable[[str], tuple[Path, roots.Roots, roots.Roots]],
    monkeypatch: pytest.MonkeyPatch,
    cut: int,
    name: str,
) -> None:
    state, old, new = prepared("cxa")
    left = cut
    owner = roots.os if name == "rename" else roots.durable
    real = getattr(owner, name)

    def count(*arguments: object) -> None:
        nonlocal left
        if left == 0:
            raise Cut
        left -= 1
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, count)
        with contextlib.suppress(Cut):
            roots.change(state, old, new)
    roots.finish(state)
    if roots.load(state) == old:
        # It had not begun: all is as before.
        assert (name, cut) in (("write", 0), ("rename", 0))
        roots.change(state, old, new)
    check(state, new)
