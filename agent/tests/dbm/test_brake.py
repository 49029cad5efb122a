"""The mass-change brake: it trips above the shares and never below, in bounded memory, and not at ordinary work."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from brakes import META, Clock, Group
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.config import BrakeConfig
from farshore.dbm.messages import Move, Operation, Remove
from farshore.dbm.replica.brake import MOST_MARKS, Brake, Change, Hold, Pass, Warn, _Distinct

PACES = [0.0005, 0.02, 0.7]


def marks(count: int, seed: int = 1) -> tuple[int, ...]:
    generator = random.Random(seed)
    return tuple(generator.getrandbits(63) for _ in range(count))


def removal(*numbers: int) -> Change:
    return Change(removed=numbers, grown_files=-len(numbers))


def brake(files: int, **config: object) -> tuple[Brake, Clock]:
    clock = Clock()
    made = Brake(BrakeConfig(**config), clock)  # type: ignore[arg-type]
    made.note_total(files, files * 1000)
    return made, clock


# --- the windows


@given(
    files=st.integers(50, 3000),
    share=st.integers(1, 99),
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=40),
    rewrite=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_it_trips_above_the_share_and_never_up_to_it(files: int, share: int, sizes: list[int], rewrite: bool) -> None:
    judge, clock = brake(files, most_share=share)
    names = list(marks(files))
    lost = 0
    for size in sizes:
        part, names = names[:size], names[size:]
        if not part:
            return
        verdict = judge.judge(Change(rewritten=tuple(part)) if rewrite else removal(*part))
        lost += len(part)
        clock.now += 0.5
        if lost * 100 > files * share:
            assert isinstance(verdict, Hold)
            assert f"{lost:,} of {files:,} files" in verdict.reason and f"allowed are {share}%" in verdict.reason
            return
        assert verdict == Pass()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), min_size=1, max_size=60))
@settings(deadline=None, max_examples=200)
def test_a_sliding_count_is_what_a_list_of_times_says(seen: list[tuple[int, int]]) -> None:
    counter = _Distinct(60)
    now, last = 0, dict[int, int]()
    for mark, pause in seen:
        now += pause
        last[mark] = now
        counter.add([mark], now)
        assert counter.count(now) == sum(now - at < 60 for at in last.values())
    assert counter.count(now + 60) == 0


def test_what_was_lost_long_ago_does_not_count() -> None:
    judge, clock = brake(5000)
    for number, mark in enumerate(marks(4500)):
        # Of what there is, a tenth in each hour.
        assert judge.judge(removal(mark)) == Pass(), number
        clock.now += 7.2 * (1 + number / 500)


def test_a_slow_loss_trips_within_the_hour() -> None:
    judge, clock = brake(5000)
    for number, mark in enumerate(marks(5000)):
        verdict = judge.judge(Change(rewritten=(mark,)))
        clock.now += 2.0
        if number < 1000:
            assert verdict == Pass()
    assert "1,001 of 5,000 files (20.02%) were rewritten or removed within 1 h; allowed are 20%" in judge.held


def test_a_file_counts_once_however_often_it_is_rewritten() -> None:
    judge, clock = brake(5000)
    few = marks(900)
    for _ in range(30):
        assert judge.judge(Change(rewritten=few)) == Pass()
        clock.now += 1.0


def test_a_small_group_never_trips_by_its_shares() -> None:
    judge, _ = brake(49)
    names = marks(49)
    assert judge.judge(removal(*names[:40])) == Pass()
    assert judge.judge(Change(rewritten=names[40:], turned=names[40:])) == Pass()


def test_files_that_come_and_go_do_not_count() -> None:
    judge, clock = brake(200)
    for number, mark in enumerate(marks(20000)):
        assert judge.judge(Change(added=(mark,), grown_files=1)) == Pass(), number
        clock.now += 0.5
        assert judge.judge(removal(mark)) == Pass(), number
        clock.now += 0.5


def test_a_group_that_has_just_grown_may_not_shrink_as_fast() -> None:
    judge, clock = brake(0)
    names = marks(1000)
    assert judge.judge(Change(added=names, grown_files=1000)) == Pass()
    clock.now += 5
    verdict = judge.judge(removal(*names[:300]))
    assert verdict == Hold("300 of 1,000 files (30%) were removed within 60 s; allowed are 20%")


def test_the_first_filling_passes_and_a_root_that_would_be_emptied_in_it_does_not() -> None:
    clock = Clock()
    judge = Brake(BrakeConfig(), clock, armed=False)
    judge.note_total(1000, 1 << 20)
    names = marks(1000)
    # What lay there is replaced by what the source has.
    assert judge.judge(Change(removed=names[:400], rewritten=names[400:], grown_files=-400)) == Pass()
    assert judge.judge(Change(added=marks(6000, 2), grown_files=6000)) == Pass()
    judge.in_step()
    assert judge.judge(Change(rewritten=names[:900])) == Pass()
    assert isinstance(judge.judge(Change(rewritten=marks(600, 2))), Hold)
    again = Brake(BrakeConfig(), clock, armed=False)
    again.note_total(20, 2000)
    held = again.judge(Change(removed=names[:20], grown_files=-20, emptied=(0,)))
    assert isinstance(held, Hold) and "a protected path would be empty: 20 of 20 files" in held.reason


@pytest.mark.parametrize(
    ("files", "size", "held"), [(10, 100, True), (9, 100, False), (1, 1 << 20, True), (3, (1 << 20) - 1, False)]
)
def test_a_small_root_may_be_emptied_when_it_was_worth_nothing(files: int, size: int, held: bool) -> None:
    judge, _ = brake(0)
    judge.note_total(files, size)
    change = Change(removed=marks(files), grown_files=-files, grown_bytes=-size, emptied=(0,))
    assert isinstance(judge.judge(change), Hold) is held


def test_all_that_follows_a_hold_is_held_until_it_is_approved() -> None:
    judge, clock = brake(1000)
    names = marks(1000)
    wave = removal(*names[:700])
    assert isinstance(judge.judge(wave), Hold)
    clock.now += 100000
    later = Change(added=(1,), grown_files=1)
    assert isinstance(judge.judge(later), Hold) and judge.held
    assert judge.files == 1000, "nothing of it was applied"
    judge.approve()
    judge.note(wave)
    judge.note(later)
    assert judge.files == 301 and not judge.held
    assert judge.judge(removal(*names[700:760])) == Pass(), "60 of 301"
    verdict = judge.judge(removal(names[760]))
    assert isinstance(verdict, Hold) and "61 of 301 files" in verdict.reason


@pytest.mark.parametrize("mode", ["hold", "warn", "off"])
def test_a_hold_outlives_a_restart(mode: str) -> None:
    judge = Brake(BrakeConfig(mode), Clock(), held="because")  # type: ignore[arg-type]
    judge.note_total(10, 10)
    assert judge.judge(Change()) == Hold("because")


def test_a_warning_comes_once_for_as_long_as_it_is_so() -> None:
    judge, clock = brake(1000, mode="warn")
    names = marks(1000)
    assert judge.judge(Change(rewritten=names[:200])) == Pass()
    assert isinstance(judge.judge(Change(rewritten=names[200:210])), Warn)
    assert judge.judge(Change(rewritten=names[210:220])) == Pass()
    assert judge.warning.startswith("220 of 1,000 files")
    clock.now += 3601
    assert judge.judge(Change(rewritten=names[:10])) == Pass() and not judge.warning
    assert isinstance(judge.judge(Change(rewritten=names[:210])), Warn)


def test_off_is_off() -> None:
    judge, _ = brake(1000, mode="off")
    assert judge.judge(Change(removed=marks(1000), grown_files=-1000, emptied=(0,))) == Pass()
    assert judge.files == 0


def test_its_memory_is_bounded_and_its_estimate_good() -> None:
    judge, clock = brake(3_000_000, mode="warn", most_share=15)
    lost = 0
    for seed in range(100):
        names = marks(5000, seed)
        judge.judge(Change(added=names, grown_files=5000))
        verdict = judge.judge(Change(rewritten=marks(5000, -seed - 1)))
        lost += 5000
        clock.now += 0.1
        if isinstance(verdict, Warn):
            break
    assert 0.95 < lost / 450_000 < 1.05, "15 % of 3,000,000, give or take the error of the estimate"
    kept = [len(window.lost) for window in judge._windows]
    assert max(*kept, len(judge._young)) <= MOST_MARKS and min(kept) > MOST_MARKS // 4


def test_unnamed_files_count_too_and_in_bounded_memory() -> None:
    counter = _Distinct(60)
    for number in range(10000):
        counter.add_unnamed(3, number * 0.01)
    assert len(counter) <= 70
    assert abs(counter.count(100.0) - 18000) <= 18000 / 60


# --- what attackers do


def in_place(group: Group, paths: list[bytes]) -> Iterator[list[Operation]]:
    for path in paths:
        yield [group.put(path, group.noise())]


def in_place_renamed(group: Group, paths: list[bytes]) -> Iterator[list[Operation]]:
    for path in paths:
        yield [group.put(path, group.noise())]
        yield [Move(0, path, path + b".locked")]


def renamed_first(group: Group, paths: list[bytes]) -> Iterator[list[Operation]]:
    for path in paths:
        yield [Move(0, path, path + b".locked")]
        yield [group.put(path + b".locked", group.noise())]


def into_new_files(group: Group, paths: list[bytes]) -> Iterator[list[Operation]]:
    for path in paths:
        yield [group.put(path + b".locked", group.noise())]
        yield [Remove(0, path)]


def original_first(group: Group, paths: list[bytes]) -> Iterator[list[Operation]]:
    for path in paths:
        yield [Remove(0, path)]
        yield [group.put(path + b".locked", group.noise())]


def in_batches(group: Group, paths: list[bytes]) -> Iterator[list[Operation]]:
    for start in range(0, len(paths), 64):
        part = paths[start : start + 64]
        yield [group.put(path + b".locked", group.noise()) for path in part]
        yield [Remove(0, path) for path in part]


def everything_mixed(group: Group, paths: list[bytes]) -> Iterator[list[Operation]]:
    ways = (in_place, renamed_first, into_new_files, original_first)
    for path in paths:
        yield from group.random.choice(ways)(group, [path])


WAYS = [in_place, in_place_renamed, renamed_first, into_new_files, original_first, in_batches, everything_mixed]


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: str(way.__name__))
def test_ransomware_is_held_before_much_is_applied(way: object, pace: float) -> None:
    """5,000 files; the slowest pace takes from one hour to two."""
    group = Group()
    paths = group.fill(5000)
    originals = dict(group.memory.files)
    for operations in way(group, paths):  # type: ignore[operator]
        if isinstance(group.send(*operations), Hold):
            break
        group.clock.now += pace * len(operations)
    assert "look encrypted" in group.held
    unharmed = sum(group.memory.files.get(path) == data for path, data in originals.items())
    assert unharmed >= 5000 * 0.93


@pytest.mark.parametrize("way", [in_place, into_new_files, original_first])
def test_a_program_whose_output_looks_ordinary_is_held_by_its_losses(way: object) -> None:
    group = Group()
    paths = group.fill(5000)
    group.noise = lambda size=400: bytes(byte ^ 0x5A for byte in group.text(size))  # type: ignore[method-assign]
    originals = dict(group.memory.files)
    for operations in way(group, paths):  # type: ignore[operator]
        if isinstance(group.send(*operations), Hold):
            break
        group.clock.now += 0.02
    assert "were rewritten or removed" in group.held
    assert sum(group.memory.files.get(path) == data for path, data in originals.items()) >= 4000


def test_a_very_slow_attack_is_held_within_a_day() -> None:
    group = Group()
    for operations in into_new_files(group, group.fill(5000)):
        if isinstance(group.send(*operations), Hold):
            break
        group.clock.now += 100
    assert "within 24 h" in group.held
    assert sum(data.isascii() for data in group.memory.files.values()) > 4700


def test_files_that_were_written_just_before_are_guarded_too() -> None:
    group = Group()
    group.fill(0)
    paths = [b"file %d" % number for number in range(300)]
    for path in paths:
        assert group.send(group.put(path, group.text(500))) == Pass()
    for operations in in_place(group, paths):
        group.send(*operations)
    assert "look encrypted" in group.held
    assert sum(group.memory.files[path].isascii() for path in paths) >= 280


def test_rm_rf_is_held_in_one_transaction_or_many() -> None:
    group = Group()
    paths = group.fill(5000)
    assert isinstance(group.send(*(Remove(0, b"d%02d" % number) for number in range(40))), Hold)
    assert group.held == "a protected path would be empty: 5,000 of 5,000 files of the group are gone"
    group = Group()
    paths = group.fill(5000)
    for path in paths:
        if isinstance(group.send(Remove(0, path)), Hold):
            break
    assert len(group.memory.files) == 4000


def test_a_few_large_files_are_no_mass() -> None:
    group = Group()
    group.fill(40)
    group.memory.files[b"base.db"] = group.text(60000)
    group.settle()
    assert group.send(group.put(b"base.db", group.noise(60000))) == Pass()


# --- ordinary work


def test_a_database_that_rewrites_its_files_all_the_time() -> None:
    group = Group()
    paths = group.fill(60, size=8192)
    for _ in range(200):
        batch = group.random.sample(paths, 20)
        operations = []
        for path in batch:
            page = bytearray(group.memory.files[path])
            start = group.random.randrange(len(page) - 900)
            page[start : start + 900] = group.text(860) + group.noise(40)
            operations.append(group.put(path, bytes(page)))
        assert group.send(*operations) == Pass(), group.held
        group.clock.now += 5


def test_logs_that_are_appended_to_and_rotated() -> None:
    group = Group()
    group.fill(300)
    logs = [b"log/%02d.log" % number for number in range(20)]
    for log in logs:
        group.memory.files[log] = group.text(3000)
        for old in range(1, 5):
            group.memory.files[b"%b.%d.gz" % (log, old)] = b"\x1f\x8b\x08" + group.noise(900)
    group.settle()
    for _ in range(5):
        for log in logs:
            group.clock.now += 1
            operations: list[Operation] = [Remove(0, log + b".4.gz")]
            operations += [Move(0, b"%b.%d.gz" % (log, n), b"%b.%d.gz" % (log, n + 1)) for n in (3, 2, 1)]
            operations += [group.put(log + b".1.gz", b"\x1f\x8b\x08" + group.noise(900)), group.put(log, b"")]
            assert group.send(*operations) == Pass(), group.held
            for _ in range(10):
                appended = group.memory.files[log] + group.text(300)
                assert group.send(group.put(log, appended)) == Pass(), group.held
        group.clock.now += 86400


def test_an_upgrade_of_packages() -> None:
    """A tenth of the files is replaced as dpkg does it: under another name first, renamed over the old one then."""
    group = Group()
    paths = group.fill(4000)
    for path in paths[:400]:
        new = path + b".dpkg-new"
        assert group.send(group.put(new, group.text(450))) == Pass()
        assert group.send(Move(0, new, path)) == Pass(), group.held
        group.clock.now += 0.01


def test_a_checkout_of_another_branch() -> None:
    group = Group()
    paths = group.fill(4000)
    operations: list[Operation] = [Remove(0, path) for path in paths[:300]]
    operations += [group.put(path, group.text(500)) for path in paths[300:700]]
    operations += [group.put(b"new/%d" % number, group.text(300)) for number in range(2000)]
    assert group.send(*operations) == Pass(), group.held


def test_a_substitution_in_all_files_is_an_edit() -> None:
    group = Group()
    for path in group.fill(2000, size=2000):
        data = group.memory.files[path]
        assert group.send(group.put(path, data[:700] + b"https" + data[704:])) == Pass(), group.held


def test_a_tree_that_is_moved_within_the_group() -> None:
    group = Group()
    paths = group.fill(2000)
    assert group.send(*(Move(0, b"d%02d" % n, b"archive %02d" % n) for n in range(40))) == Pass(), group.held
    moves = [Move(0, p.replace(b"d", b"archive ", 1), b"flat-" + p.replace(b"/", b"-")) for p in paths]
    assert group.send(*moves, *(Remove(0, b"archive %02d" % n) for n in range(40))) == Pass(), group.held
    assert len(group.memory.files) == 2000


def test_a_store_of_encrypted_pieces_is_extended_and_pruned() -> None:
    """As restic and borg do it, beside other files that come and go."""
    group = Group()
    group.fill(500)
    packs = [b"data/%02d/%05d" % (n % 50, n) for n in range(1500)]
    for pack in packs:
        group.memory.files[pack] = group.noise(2000)
    group.settle()
    for day in range(20):
        added = [b"data/%02d/new %d %d" % (n % 50, day, n) for n in range(80)]
        for path in added:
            assert group.send(group.put(path, group.noise(2000))) == Pass(), group.held
        gone, packs = packs[:70], packs[70:] + added
        assert group.send(*(Remove(0, pack) for pack in gone)) == Pass(), group.held
        spool = group.put(b"spool/%d" % day, group.text(400))
        assert group.send(spool) == Pass() and group.send(Remove(0, spool.path)) == Pass()
        group.clock.now += 86400


def test_files_that_are_compressed_one_by_one() -> None:
    group = Group()
    for path in group.fill(1000)[:150]:
        assert group.send(group.put(path + b".gz", b"\x1f\x8b\x08" + group.noise(300)), Remove(0, path)) == Pass()
        group.clock.now += 1
    assert META.mode == 0o644
