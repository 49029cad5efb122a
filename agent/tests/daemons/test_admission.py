"""Who comes in: the limits hold whatever comes, and a flood keeps no peer out."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.daemons import admission
from farshore.daemons.admission import Admission, Bucket, Causes, Ticket

PEER, GATEWAY, FLOOD = "10.1.0.11", "10.1.0.1", "10.1.0.66"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


ADDRESSES = st.sampled_from([PEER, GATEWAY, FLOOD, "10.1.0.67", "fe80::1%eth0", "::1"])
STEPS = st.lists(
    st.tuples(st.just("enter"), ADDRESSES)
    | st.tuples(st.just("back"), st.integers(0, 10))
    | st.tuples(st.just("learn"), ADDRESSES)
    | st.tuples(st.just("wait"), st.floats(-1, 5)),
    max_size=400,
)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_the_limits_hold_whatever_comes(steps: list[tuple[str, object]]) -> None:
    clock = Clock()
    door = Admission(clock, [PEER])
    tickets: list[tuple[str, Ticket]] = []
    began = clock.now
    entered: Counter[str] = Counter()
    for what, value in steps:
        match what, value:
            case "enter", str(address):
                ticket = door.enter(address)
                if isinstance(ticket, Ticket):
                    tickets.append((address, ticket))
                    entered[address] += 1
            case "back", int(number) if number < len(tickets):
                _, given_back = tickets.pop(number)
                given_back.give_back()
                given_back.give_back()
            case "learn", str(address):
                door.learn(address)
            case "wait", float(seconds):
                clock.now += seconds
        assert door.pending == len(tickets) <= admission.MOST_PENDING
        assert max(Counter(address for address, _ in tickets).values(), default=0) <= admission.MOST_PENDING_ADDRESS
    passed = sum(max(0.0, float(value)) for what, value in steps if what == "wait" and isinstance(value, float))
    for address, count in entered.items():
        # What was a stranger may have become known, with a new measure.
        both = admission.KNOWN_RATE + admission.STRANGER_RATE, admission.KNOWN_BURST + admission.STRANGER_BURST
        assert count <= both[1] + both[0] * passed + 1, address
    assert clock.now >= began - len(steps)
    while tickets:
        tickets.pop()[1].give_back()
    assert door.pending == 0
    assert not door._pending


def test_a_flood_from_one_address_keeps_nobody_else_out() -> None:
    clock = Clock()
    door = Admission(clock, [PEER])
    door.learn(GATEWAY)
    in_flood: list[Ticket] = []
    for step in range(2000):
        ticket = door.enter(FLOOD)
        if isinstance(ticket, Ticket):
            in_flood.append(ticket)  # and never a word more
        if step % 100 == 0:
            for address in (PEER, GATEWAY):
                ticket = door.enter(address)
                assert isinstance(ticket, Ticket), (address, ticket)
                ticket.give_back()
        clock.now += 0.01
    assert len(in_flood) == admission.MOST_PENDING_ADDRESS


def test_a_flood_from_everywhere_keeps_no_peer_out() -> None:
    clock = Clock()
    door = Admission(clock, [PEER])
    door.learn(GATEWAY)
    came_in = 0
    for step in range(20_000):
        came_in += isinstance(door.enter(f"10.{step >> 16}.{step >> 8 & 255}.{step & 255}"), Ticket)
        if step % 1000 == 0:
            for address in (PEER, GATEWAY):
                ticket = door.enter(address)
                assert isinstance(ticket, Ticket), (address, ticket)
                ticket.give_back()
        clock.now += 0.001
    assert came_in == admission.MOST_PENDING_STRANGERS
    assert len(door._buckets) <= admission.MOST_STRANGERS


def test_strangers_have_few_handshakes_together() -> None:
    clock = Clock()
    door = Admission(clock)
    came_in = 0
    for step in range(10_000):
        ticket = door.enter(f"10.0.{step >> 8 & 255}.{step & 255}")
        if isinstance(ticket, Ticket):
            came_in += 1
            ticket.give_back()
        clock.now += 0.001
    assert came_in <= admission.STRANGERS_BURST + admission.STRANGERS_RATE * 10 + 1


def test_a_peer_of_many_groups_comes_with_all_of_them_at_once() -> None:
    door = Admission(Clock(), [PEER])
    assert all(isinstance(door.enter(PEER), Ticket) for _ in range(admission.MOST_PENDING_ADDRESS))
    assert door.enter(PEER) == "too many connections of one address in their handshake"


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.booleans()), max_size=60), st.integers(1, 4))
def test_connections_of_one_identity_are_counted(steps: list[tuple[str, bool]], most: int) -> None:
    door = Admission(Clock())
    have: Counter[str] = Counter()
    for name, comes in steps:
        if comes:
            assert door.identify(name, most) is (have[name] < most)
            have[name] = min(most, have[name] + 1)
        elif have[name]:
            door.leave(name)
            have[name] -= 1
    assert {name: count for name, count in have.items() if count} == dict(door._identities)


def test_few_addresses_are_learned() -> None:
    door = Admission(Clock(), [PEER])
    for number in range(1000):
        door.learn(f"10.9.{number >> 8}.{number & 255}")
    assert len(door._learned) == admission.MOST_KNOWN
    assert door.is_known(PEER)
    assert door.is_known("10.9.3.231")
    assert not door.is_known("10.9.0.1")


@given(st.lists(st.floats(-10, 10), max_size=50))
def test_a_bucket_is_neither_overfull_nor_negative(steps: list[float]) -> None:
    bucket = Bucket(2.0, 5.0, 5.0, 100.0)
    now = 100.0
    for step in steps:
        now += step
        level = bucket.fill(now)
        assert 0 <= level <= 5
        bucket.level -= min(1.0, level)


def test_a_cause_is_logged_once_and_then_summed_up() -> None:
    clock = Clock()
    causes = Causes(clock)
    assert causes.note("handshake failed", "first")
    assert not any(causes.note("handshake failed", f"{number}") for number in range(1000))
    assert causes.note("another", "x")
    assert causes.due() == []
    clock.now += admission.QUIET_SECONDS
    assert causes.due() == [("handshake failed", 1000, "999")]
    clock.now += admission.QUIET_SECONDS
    assert causes.due() == []
    assert causes.note("handshake failed", "again")
    for number in range(10_000):
        causes.note(f"cause {number}", "")
    assert len(causes._causes) == admission.MOST_CAUSES
