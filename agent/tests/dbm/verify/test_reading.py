"""Reading contents at a budget, and what is remembered of them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import blake3
import pytest

from farshore.dbm.replica.intake import Interrupted
from farshore.dbm.verify.reading import Budget, ContentReader, Store, be_idle, forget
from farshore.errors import UnsafePath
from farshore.fmm import scanner
from farshore.fmm.types import Observed, Root


class Clock:
    """A clock that an event's waiting moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Waits(threading.Event):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self._clock.now += max(0.0, timeout)
        return False


def test_a_budget_is_kept_on_average() -> None:
    clock = Clock()
    budget = Budget(1000.0, Waits(clock), clock)
    for _ in range(10):
        budget.spend(500)
    assert clock.now == pytest.approx(105.0)
    clock.now += 50  # What was not used is not saved up.
    budget.spend(1000)
    budget.spend(1000)
    assert clock.now == pytest.approx(157.0)


def test_work_is_followed_by_as_much_rest() -> None:
    clock = Clock()
    budget = Budget(1000.0, Waits(clock), clock)
    for _ in range(1000):
        clock.now += 0.001
        budget.breathe()
    assert clock.now == pytest.approx(102.0, abs=0.01)
    unlimited = Budget(0.0, Waits(clock), clock)
    for _ in range(1000):
        clock.now += 0.001
        unlimited.breathe()
    assert clock.now == pytest.approx(103.0, abs=0.01)


def test_a_budget_ends_when_it_is_told_to() -> None:
    stopped = threading.Event()
    budget = Budget(1.0, stopped)
    threading.Timer(0.05, stopped.set).start()
    with pytest.raises(Interrupted):
        budget.spend(1000)  # a quarter of an hour
    with pytest.raises(Interrupted):
        budget.check()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    return tmp_path / "tree"


def seen(tree: Path, name: str) -> Observed:
    found = scanner.observe(os.fsencode(tree), 0, os.fsencode(name))
    assert found is not None
    return found


def reader(tree: Path, run: bytes = b"run", spare_cache: bool = True) -> ContentReader:
    store = Store(tree.parent / "survey.db", run)
    return ContentReader([Root(os.fsencode(tree))], store, Budget(0.0, threading.Event()), spare_cache)


@pytest.mark.parametrize("spare_cache", [True, False])
def test_contents_are_read_once_for_a_run(tree: Path, spare_cache: bool) -> None:
    data = os.urandom(2_500_000)
    (tree / "f").write_bytes(data)
    first = reader(tree, spare_cache=spare_cache)
    assert first.digest(seen(tree, "f")) == blake3.blake3(data).digest()
    assert first.read == len(data)
    assert first.digest(seen(tree, "f")) == blake3.blake3(data).digest()
    first._store.close()
    again = reader(tree)
    assert again.digest(seen(tree, "f")) == blake3.blake3(data).digest()
    assert (first.read, again.read) == (len(data), 0)
    # Changed, it is read; and so it is for another run.
    with (tree / "f").open("r+b") as file:
        file.write(b"x")
    assert again.digest(seen(tree, "f")) == blake3.blake3(b"x" + data[1:]).digest()
    again._store.close()
    other = reader(tree, b"other")
    assert other.digest(seen(tree, "f")) == blake3.blake3(b"x" + data[1:]).digest()
    assert other.read == len(data)


def test_holes_are_not_read(tree: Path) -> None:
    with (tree / "f").open("wb") as file:
        file.truncate(50_000_000)
        file.seek(20_000_000)
        file.write(b"x" * 10_000)
    made = reader(tree)
    assert made.digest(seen(tree, "f")) == blake3.blake3((tree / "f").read_bytes()).digest()
    assert made.read < 1_000_000


def test_what_has_become_another_file_has_no_digest(tree: Path) -> None:
    (tree / "f").write_bytes(b"1")
    before = seen(tree, "f")
    (tree / "g").write_bytes(b"2")
    (tree / "g").rename(tree / "f")
    made = reader(tree)
    assert made.digest(before) is None
    (tree / "f").unlink()
    assert made.digest(before) is None
    (tree / "f").symlink_to("/etc/passwd")
    assert made.digest(before) is None


def test_no_path_leads_out(tree: Path) -> None:
    (tree / "f").write_bytes(b"1")
    made = reader(tree)
    here = seen(tree, "f")
    for path in (b"../out", b"/etc/passwd", b"a/../f", b".farshore-x"):
        with pytest.raises(UnsafePath):
            made.digest(Observed(**{**{k: getattr(here, k) for k in here.__struct_fields__}, "path": path}))


def test_a_damaged_store_is_begun_anew(tree: Path) -> None:
    path = tree.parent / "survey.db"
    path.write_bytes(b"no database at all" * 100)
    store = Store(path, b"run")
    store.set_content(0, b"f", b"i", b"d")
    store.set_below(1, b"", b"e")
    store.close()
    again = Store(path, b"run")
    assert (again.content(0, b"f", b"i"), again.content(0, b"f", b"j")) == (b"d", None)
    assert (again.below(1, b""), again.below(0, b"")) == (b"e", None)
    again.close()
    forget(path)
    assert not list(tree.parent.glob("survey.db*"))
    forget(path)


def test_a_thread_can_be_idle() -> None:
    be_idle()
