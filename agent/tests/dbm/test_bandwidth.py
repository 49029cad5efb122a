"""The limit: never faster, never idle, and another one at once when the schedule says so."""

from __future__ import annotations

import asyncio
import math
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.config import Bandwidth, Window, parse
from farshore.dbm.bandwidth import LARGEST_PIECE, SMALLEST_BURST, SMALLEST_PIECE, Pacer

BERLIN = ZoneInfo("Europe/Berlin")
OFFICE = Bandwidth("20Mbit/s", (Window("5Mbit/s", "mon-fri", "08:00", "18:00"),))
#: A Tuesday.
TUESDAY = datetime(2025, 3, 4, tzinfo=BERLIN)


class Time:
    """Both clocks, which go on when somebody sleeps by them; sleeping may take ``late`` seconds longer than asked."""

    def __init__(self, start: datetime = TUESDAY, late: float = 0.0) -> None:
        self.start = start.astimezone(UTC)
        self.now = 0.0
        self.late = late

    def clock(self) -> float:
        return self.now

    def wall(self) -> datetime:
        return (self.start + timedelta(seconds=self.now)).astimezone(BERLIN)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds + self.late
        await asyncio.sleep(0)

    def pacer(self, bandwidth: Bandwidth) -> Pacer:
        return Pacer(bandwidth, self.clock, self.wall, self.sleep)

    def at(self, hour: int, minute: int, second: float = 0) -> float:
        """The clock's time when it is that late on the wall, on the day of the start."""
        moment = self.start.astimezone(BERLIN).replace(hour=hour, minute=minute, second=0, microsecond=0)
        return (moment.astimezone(UTC) - self.start).total_seconds() + second


def burst(rate: float) -> float:
    return max(rate * 0.05, SMALLEST_BURST)


RATES = st.sampled_from(["64kbit/s", "1Mbit/s", "5Mbit/s", "100Mbit/s", "1Gbit/s"])


@settings(max_examples=150, deadline=None)
@given(
    RATES,
    st.lists(st.tuples(st.integers(1, 300_000), st.sampled_from([0, 0, 0, 0.001, 0.3])), min_size=1, max_size=60),
    st.sampled_from([0.0, 0.0005]),
)
def test_never_faster_than_the_limit(limit: str, sends: list[tuple[int, float]], late: float) -> None:
    async def run() -> None:
        time = Time(late=late)
        pacer = time.pacer(Bandwidth(limit))
        rate = Bandwidth(limit).at(TUESDAY)
        went: list[tuple[float, int]] = []
        for size, idle in sends:
            time.now += idle
            while size:
                piece = min(size, pacer.piece())
                await pacer.take(piece)
                went.append((time.now, piece))
                size -= piece
        for i, (since, _) in enumerate(went):
            total = 0
            for at, size in went[i:]:
                total += size
                # In any span, not only in a second.
                assert total <= rate * (at - since) + burst(rate) + 1

    asyncio.run(run())


@settings(max_examples=100, deadline=None)
@given(RATES, st.lists(st.integers(1, 300_000), min_size=1, max_size=40), st.sampled_from([0.0, 0.0005, 0.002]))
def test_never_idle_while_something_may_go(limit: str, sizes: list[int], late: float) -> None:
    async def run() -> None:
        time = Time(late=late)
        pacer = time.pacer(Bandwidth(limit))
        rate = Bandwidth(limit).at(TUESDAY)
        for size in sizes:
            await pacer.take(size)
        # The burst was there from the beginning; all the rest took what it had to, and the last wait its lateness.
        needed = max(sum(sizes) - burst(rate), 0) / rate
        assert time.now <= needed + late + 1e-4

    asyncio.run(run())


async def test_takers_are_served_in_turn() -> None:
    time = Time()
    pacer = time.pacer(Bandwidth("1Mbit/s"))
    order: list[int] = []

    async def one(i: int, size: int) -> None:
        await pacer.take(size)
        order.append(i)

    await asyncio.gather(*(one(i, size) for i, size in enumerate([200_000, 1, 50_000, 1])))
    assert order == [0, 1, 2, 3]


async def test_one_that_gives_up_holds_up_nobody() -> None:
    pacer = Pacer(Bandwidth("64kbit/s"))
    waiting = asyncio.create_task(pacer.take(10_000_000))
    await asyncio.sleep(0.01)
    waiting.cancel()
    async with asyncio.timeout(5):
        await pacer.take(1)


async def test_without_a_limit_nothing_waits() -> None:
    time = Time()
    pacer = time.pacer(Bandwidth())
    for _ in range(100):
        await pacer.take(1 << 30)
    assert time.now == 0
    assert pacer.piece() == LARGEST_PIECE


@pytest.mark.parametrize(
    ("limit", "piece"),
    [("64kbit/s", SMALLEST_PIECE), ("5Mbit/s", 15625), ("1Gbit/s", LARGEST_PIECE), ("1MB/s", 25_000)],
)
def test_a_piece_is_worth_25_ms(limit: str, piece: int) -> None:
    assert Time().pacer(Bandwidth(limit)).piece() == piece


@pytest.mark.parametrize(
    ("start", "before", "after"),
    [((7, 59, 58), 20e6 / 8, 5e6 / 8), ((17, 59, 58), 5e6 / 8, 20e6 / 8)],
)
async def test_the_schedule_is_followed_in_the_middle_of_a_wait(
    start: tuple[int, int, int], before: float, after: float
) -> None:
    time = Time(TUESDAY.replace(hour=start[0], minute=start[1], second=start[2]))
    pacer = time.pacer(OFFICE)
    await pacer.take(int(before * 2 + after * 3 + burst(before)))
    # What was saved up at the higher rate is not all to be had at the lower one.
    assert 5 - 0.06 <= time.now <= 5.2


async def test_when_the_limit_ends_waiting_does() -> None:
    time = Time(TUESDAY.replace(hour=17, minute=59, second=59))
    pacer = time.pacer(Bandwidth(schedule=(Window("64kbit/s", end="18:00"),)))
    await pacer.take(1 << 30)
    assert time.now == pytest.approx(1)


async def test_a_limit_that_begins_finds_no_more_than_a_burst() -> None:
    time = Time(TUESDAY.replace(hour=7, minute=59, second=30))
    pacer = time.pacer(Bandwidth(schedule=(Window("1Mbit/s", start="08:00"),)))
    await pacer.take(1 << 30)
    time.now += 31
    began = time.now
    await pacer.take(125_000 + int(burst(125_000)))
    assert time.now - began == pytest.approx(1, abs=0.01)


def rates(bandwidth: Bandwidth, start: datetime, hours: int) -> list[tuple[str, float]]:
    """When, in UTC, the limit becomes another one, as a pacer that is asked every 10 s sees it; in Mbit/s."""
    time = Time(start)
    pacer = time.pacer(bandwidth)
    found: list[tuple[str, float]] = []
    for second in range(0, hours * 3600, 10):
        time.now = float(second)
        pacer.piece()
        rate = pacer._rate * 8 / 1e6
        if not found or found[-1][1] != rate:
            found.append((time.wall().astimezone(UTC).strftime("%a %H:%M:%S"), rate))
    return found


NIGHT = Bandwidth("1Mbit/s", (Window("9Mbit/s", "mon-fri", "22:00", "03:00"),))


def test_a_window_goes_on_after_midnight() -> None:
    # A Friday evening: the window that began then ends on Saturday; none begins on Saturday or Sunday.
    friday = datetime(2025, 1, 10, 20, tzinfo=BERLIN)
    assert rates(NIGHT, friday, 75)[1:] == [
        ("Fri 21:00:00", 9.0),
        ("Sat 02:00:00", 1.0),
        ("Mon 21:00:00", 9.0),
    ]


def test_summer_time_begins_within_a_window() -> None:
    # On 30 March 2025 at 01:00 UTC, 02:00 becomes 03:00: a window that ends at 03:00 ends there.
    bandwidth = Bandwidth("1Mbit/s", (Window("9Mbit/s", "sat-sun", "22:00", "03:00"),))
    start = datetime(2025, 3, 29, 20, tzinfo=BERLIN)
    assert rates(bandwidth, start, 8)[1:] == [("Sat 21:00:00", 9.0), ("Sun 01:00:00", 1.0)]


def test_summer_time_ends_within_a_window() -> None:
    # On 26 October 2025 at 01:00 UTC, 03:00 becomes 02:00: the hour from 02:00 comes twice.
    bandwidth = Bandwidth("1Mbit/s", (Window("9Mbit/s", "sun", "01:00", "02:30"),))
    start = datetime(2025, 10, 26, 0, 30, tzinfo=BERLIN)
    assert rates(bandwidth, start, 5)[1:] == [
        ("Sat 23:00:00", 9.0),
        ("Sun 00:30:00", 1.0),
        ("Sun 01:00:00", 9.0),
        ("Sun 01:30:00", 1.0),
    ]


async def test_a_wait_across_the_change_to_summer_time() -> None:
    time = Time(datetime(2025, 3, 30, 1, 59, 59, tzinfo=BERLIN))
    pacer = time.pacer(Bandwidth("64kbit/s", (Window("unlimited", start="03:00"),)))
    await pacer.take(1 << 30)
    assert time.now == pytest.approx(1)


async def test_a_wall_clock_that_is_set_is_followed() -> None:
    time = Time(TUESDAY.replace(hour=12))
    pacer = time.pacer(OFFICE)
    assert pacer.piece() == 15625
    time.start += timedelta(hours=8)
    time.now += 60
    assert pacer.piece() == 62500


@settings(max_examples=300, deadline=None)
@given(
    st.datetimes(datetime(2025, 1, 1), datetime(2025, 12, 31)),
    st.integers(0, 1439),
    st.integers(1, 1440),
    st.sets(st.integers(0, 6), min_size=1),
)
def test_a_window_covers_what_it_says(when: datetime, start: int, end: int, days: set[int]) -> None:
    if start == end:
        return
    names = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
    window = Window(
        "1Mbit/s", ",".join(names[day] for day in days), *(f"{t // 60:02}:{t % 60:02}" for t in (start, end))
    )
    length = (end - start) % 1440 or 1440
    midnight = when.replace(hour=0, minute=0, second=0, microsecond=0)
    expected = any(
        (midnight - timedelta(days=ago)).weekday() in days
        and 0 <= (when - midnight + timedelta(days=ago)).total_seconds() - start * 60 < length * 60
        for ago in (0, 1)
    )
    assert window.covers(when) == expected


def test_the_first_window_that_fits_counts() -> None:
    bandwidth = parse(
        {
            "limit": "unlimited",
            "schedule": [
                {"days": "sat,sun", "limit": "100 Mbit/s"},
                {"from": "08:00", "to": "18:00", "limit": "500kB/s"},
                {"from": "06:00", "to": "24:00", "limit": "8Mbit/s"},
            ],
        },
        Bandwidth,
    )
    saturday, monday = datetime(2025, 3, 8), datetime(2025, 3, 10)
    assert bandwidth.at(saturday.replace(hour=9)) == 12.5e6
    hours = [bandwidth.at(monday.replace(hour=hour)) for hour in (0, 6, 8, 17, 18, 23)]
    assert hours == [math.inf, 1e6, 5e5, 5e5, 1e6, 1e6]


@pytest.mark.parametrize(
    ("days", "count"), [("mon-fri", 5), ("sat,sun", 2), ("fri-mon", 4), ("wed", 1), ("sun-mon", 2)]
)
def test_days(days: str, count: int) -> None:
    window = Window("1Mbit/s", days)
    week = [datetime(2025, 3, 3) + timedelta(days=i) for i in range(7)]
    assert sum(map(window.covers, week)) == count


async def test_real_time() -> None:
    pacer = Pacer(Bandwidth("80Mbit/s"))
    loop = asyncio.get_running_loop()
    times = [loop.time()]
    for _ in range(10):
        await pacer.take(1_000_000)
        times.append(loop.time())
    assert times[-1] - times[0] >= 0.9
    assert all(after >= before for before, after in pairwise(times))
