"""decide and driver against nodes that crash, hang, refuse and lose answers, and a monitor that dies anywhere."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, currently_in_test_context, settings
from hypothesis import note as _note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from farshore.config import Check, MonitorGroup, NodeRef, Service, Side
from farshore.control import api
from farshore.control.client import RequestFailed
from farshore.control.driver import Driver, Events
from farshore.control.nodes import PolledNode
from farshore.control.state import PHASES, GroupState
from farshore.errors import HookFailed, NotInTime, PeerUnreachable, StaleEpoch
from farshore.smm.health import Health

GROUP = "web"


def note(text: str) -> None:
    if currently_in_test_context():
        _note(text)


class Crash(BaseException):
    """The monitor's process dies here."""


class Bomb:
    """Kills the monitor at its n-th contact with the world from now."""

    def __init__(self) -> None:
        self.left: int | None = None

    def tick(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise Crash


class FakeClock:
    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return 1.7e9 + self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


@dataclass
class SimNode:
    """A node with a disk that survives a crash and a memory that does not."""

    side: Side
    epoch: int = 0
    owner: Side = "local"
    data: frozenset[int] = frozenset()
    synced_once: bool = False
    held: str = ""
    # Lost in a crash:
    up: bool = True
    confirmed: bool = False
    frozen: bool = False
    units: bool = False
    # Faults:
    reached: bool = True
    broken: bool = False
    mode: str = "well"

    @property
    def serves(self) -> bool:
        return self.up and self.units and not self.broken

    @property
    def is_source(self) -> bool:
        return self.up and self.confirmed and self.owner == self.side

    def crash(self) -> None:
        self.up = self.confirmed = self.frozen = self.units = False


class World:
    """Two nodes, the link between them, the gateway's rules, and users."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.bomb = Bomb()
        self.nodes: dict[Side, SimNode] = {"local": SimNode("local"), "remote": SimNode("remote")}
        self.linked = True
        self.stored: GroupState | None = None
        self.rules: Side = "local"
        self.wanted: Side = "local"
        self.writes: dict[Side, set[int]] = {"local": set(), "remote": set()}
        self.count = 0
        #: Owners that accepted each epoch.
        self.accepted: dict[int, set[Side]] = {}
        self.verified: set[tuple[Side, int]] = set()
        #: The epoch by which it was last decided to send the users to each side.
        self.chosen: dict[Side, int] = {"local": 1, "remote": 0}
        self.epochs: list[int] = []
        self.refuse_rules = False
        self.flips: list[Side] = []

    # --- the nodes ---

    def replicate(self) -> bool:
        for side, other in (("local", "remote"), ("remote", "local")):
            source, replica = self.nodes[side], self.nodes[other]  # type: ignore[index]
            if (
                self.linked
                and source.is_source
                and replica.up
                and replica.confirmed
                and (replica.owner, replica.epoch) == (source.owner, source.epoch)
            ):
                # What the brake holds is acknowledged like all else; the tree is without it.
                if not replica.held:
                    replica.data = source.data
                replica.synced_once = True
                return True
        return False

    async def ask(self, ref: NodeRef, request: api.Request, timeout: float) -> Any:
        self.bomb.tick()
        node = self.nodes["local" if ref.node == "web1" else "remote"]
        if not (node.up and node.reached):
            self.clock.time += min(timeout, 5.0)
            raise PeerUnreachable(ref.node, "timed out")
        mode = node.mode
        if mode == "deaf":
            self.clock.time += timeout
            raise NotInTime("request", timeout, "no answer")
        if mode == "refuses" and not isinstance(request, api.StatusRequest):
            raise RequestFailed(ref.node, api.Failed("no", 22))
        answer = self.carry_out(node, request)
        if mode == "loses answers" and not isinstance(request, api.StatusRequest):
            self.clock.time += timeout
            raise NotInTime("request", timeout, "the answer was lost")
        self.bomb.tick()
        if isinstance(answer, api.Failed):
            raise RequestFailed(ref.node, answer)
        return answer

    def carry_out(self, node: SimNode, request: api.Request) -> api.Answer:
        match request:
            case api.StatusRequest():
                return api.NodeStatus(ref_name(node.side), "0", 1.0, {GROUP: self.status(node)})
            case api.SetOwner():
                if request.epoch < node.epoch:
                    return api.Failed(str(StaleEpoch(GROUP, request.epoch, node.epoch)), StaleEpoch.exit_code)
                if request.epoch == node.epoch and request.owner != node.owner:
                    return api.Failed("another owner has this epoch", 13)
                if request.epoch > node.epoch:
                    node.frozen, node.held = False, ""
                    # Its own writes make an owner's tree another one than the replica's that it becomes.
                    node.synced_once &= not (node.owner == node.side != request.owner)
                node.epoch, node.owner, node.confirmed = request.epoch, request.owner, True
                if node.frozen:
                    return api.Done()
                node.units = node.owner == node.side
                if node.units:
                    self.accepted.setdefault(node.epoch, set()).add(node.side)
                if node.units and node.mode == "units fail":
                    node.units = False
                    return api.Failed(str(HookFailed("nginx.service", "exit code 1")), HookFailed.exit_code)
                return api.Done()
            case api.Freeze():
                if not node.is_source or request.epoch != node.epoch:
                    return api.Failed("not the owner by this epoch", 13)
                node.frozen, node.units = True, False
                return api.Done() if self.replicate() else api.Failed("not durable in time", 20)
            case api.Thaw():
                if not node.is_source or request.epoch != node.epoch:
                    return api.Failed("not the owner by this epoch", 13)
                node.frozen, node.units = False, True
                return api.Done()
            case _:
                raise AssertionError(request)

    def status(self, node: SimNode) -> api.GroupStatus:
        other = self.nodes["remote" if node.side == "local" else "local"]
        joined = self.linked and other.up and other.confirmed and other.epoch == node.epoch
        state = "unconfirmed"
        if node.confirmed:
            state = "frozen" if node.frozen else "replicating" if node.is_source else "replica"
            if node.is_source and not joined:
                state = "disconnected"
        return api.GroupStatus(
            group=GROUP,
            side=node.side,
            owner=node.owner,
            epoch=node.epoch,
            state=state,
            reason="",
            connected=joined,
            in_step=node.is_source and joined and (node.data == other.data or bool(other.held)),
            rpo=(0.0 if node.data == other.data or other.held else 0.5) if node.is_source else None,
            backlog_paths=0,
            seq=0,
            sent_bytes=0,
            units={"nginx.service": "active" if node.units else "inactive"},
            problems=[],
            synced_once=node.synced_once,
            held=node.held,
            held_transactions=7 if node.held else 0,
        )

    # --- the users ---

    def write(self) -> None:
        node = self.nodes[self.rules]
        if node.serves and node.owner == node.side:
            self.count += 1
            node.data |= {self.count}
            self.writes[self.rules].add(self.count)

    # --- what the driver holds on to ---

    def load(self, group: str) -> GroupState:
        return self.stored or GroupState(group)

    def save(self, state: GroupState) -> None:
        self.bomb.tick()
        if self.stored is None or state.epoch != self.stored.epoch:
            self.epochs.append(state.epoch)
        if state.switched != (self.stored is not None and self.stored.switched):
            self.chosen["remote" if state.switched else "local"] = state.epoch
        self.stored = state
        self.bomb.tick()

    def want(self, group: str, switched: bool, held: bool = False) -> None:
        self.wanted = "remote" if switched else "local"

    def in_place(self, group: str) -> bool:
        return self.rules == self.wanted

    async def ensure(self) -> None:
        self.bomb.tick()
        if self.refuse_rules:
            raise HookFailed("iptables-restore", "no")
        if self.rules != self.wanted:
            assert self.stored is not None
            side = self.wanted
            assert self.stored.switched == (side == "remote"), "rules follow the stored state"
            assert (side, self.chosen[side]) in self.verified, "users are sent only where the service was seen"
            if side == "local":
                lost = self.writes["remote"] - self.nodes["local"].data
                assert not lost, f"users' writes {lost} to the backup are missing at home"
            self.rules = side
            self.flips.append(side)
        self.bomb.tick()


def ref_name(side: Side) -> str:
    return "web1" if side == "local" else "bak1"


@dataclass
class FakeChecks:
    world: World
    health: Health = field(default_factory=lambda: Health(3, 2))

    @property
    def verdict(self) -> bool | None:
        return self.health.verdict

    @property
    def detail(self) -> str:
        return "" if self.health.verdict else "80/tcp: refused"

    def services(self) -> list[api.ServiceHealth]:
        return []

    def reset(self) -> None:
        self.health.reset()

    def tick(self) -> None:
        self.health.observe(self.world.nodes["local"].serves)

    async def ask(self, side: Side) -> tuple[bool, str]:
        self.world.bomb.tick()
        node = self.world.nodes[side]
        ok = node.serves and node.reached
        if ok and self.world.stored is not None and node.epoch == self.world.stored.epoch and node.owner == side:
            self.world.verified.add((side, node.epoch))
        return ok, "answers" if ok else "80/tcp: refused"


def config(failover: str = "auto", failback: str = "auto") -> MonitorGroup:
    return MonitorGroup(
        local=NodeRef("web1", "10.1.0.5"),
        backup=NodeRef("bak1", "10.2.0.5"),
        services=(Service(80, check=Check()),),
        failover=failover,  # type: ignore[arg-type]
        failback=failback,  # type: ignore[arg-type]
        step_timeout=5.0,
    )


class Bench:
    """A monitor of one group in the world, turned by hand, which may die and be started again."""

    def __init__(self, group: MonitorGroup) -> None:
        self.group = group
        self.world = World()
        self.loop = asyncio.new_event_loop()
        # A crash within a background task is one of the things that are tried here.
        self.loop.set_exception_handler(lambda loop, context: None)
        self.start()

    def start(self) -> None:
        world = self.world
        self.checks = FakeChecks(world)
        self.polled: dict[Side, PolledNode] = {
            "local": PolledNode(self.group.local, world.ask, world.clock.now),
            "remote": PolledNode(self.group.backup, world.ask, world.clock.now),
        }
        self.driver = Driver(
            GROUP,
            self.group,
            store=world,
            local=self.polled["local"],
            backup=self.polled["remote"],
            checks=self.checks,
            switch=world,
            events=Events(world.clock.wall),
            clock=world.clock,
        )

    def run(self, what: Any) -> Any:
        try:
            return self.loop.run_until_complete(what)
        except Crash:
            note("the monitor dies")
            self.loop.run_until_complete(self._end())
            self.start()
            return None

    async def _end(self) -> None:
        for asked in self.driver._asked.values():
            if asked.task:
                asked.task.cancel()
                await asyncio.wait({asked.task})

    async def _turn(self) -> str:
        try:
            action = await self.driver.step()
        except HookFailed:
            return "failed"
        for _ in range(10):
            tasks = {asked.task for asked in self.driver._asked.values() if asked.task}
            if not tasks:
                break
            for task in (await asyncio.wait(tasks))[0]:
                task.result()
        return action.kind

    def turn(self) -> str:
        kind = self.run(self._turn()) or "died"
        note(f"{kind}: {self.state.phase} {self.state.owner} {self.state.epoch}: {self.driver.reason}")
        return kind

    def poll(self, side: Side) -> None:
        self.run(self.polled[side].poll())

    def pass_time(self, seconds: float = 1.0) -> None:
        self.world.clock.time += seconds
        self.checks.tick()
        self.world.replicate()

    def keep_rules(self) -> None:
        async def ensure() -> None:
            try:
                await self.world.ensure()
            except HookFailed:
                return

        self.run(ensure())

    def go(self, turns: int = 40, *, write: bool = True, seconds: float = 1.0) -> list[str]:
        """Let the system live for a while; returns the phases that it went through."""
        phases = [self.state.phase]
        for _ in range(turns):
            self.poll("local")
            self.poll("remote")
            if write:
                self.world.write()
            kind = self.turn()
            if self.state.phase != phases[-1]:
                phases.append(self.state.phase)
            if kind == "stay":
                self.pass_time(seconds)
                self.keep_rules()
        return phases

    @property
    def state(self) -> GroupState:
        return self.driver.state

    def close(self) -> None:
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


class Disaster(RuleBasedStateMachine):
    """Whatever fails, and whenever: two owners never share an epoch, users go only where the service was seen, what
    they wrote to the backup is home before they are, and when the faults end, all comes right."""

    @initialize(failover=st.sampled_from(["auto", "manual"]), failback=st.sampled_from(["auto", "manual"]))
    def begin(self, failover: str, failback: str) -> None:
        self.bench = Bench(config(failover, failback))
        self.world = self.bench.world
        self.bench.go(8)

    @rule(phase=st.sampled_from(PHASES), write=st.booleans())
    def lead_to(self, phase: str, write: bool) -> None:
        """Faults mostly hit in the long quiet phases; so wait for the short ones."""
        if phase in ("promoting", "verifying", "failed_over") and self.bench.state.phase == "normal":
            self.world.nodes["local"].crash()
        if phase in ("recovering", "recovered", "freezing", "returning"):
            self.world.nodes["local"].up = True
        for _ in range(30):
            if self.bench.state.phase == phase:
                break
            self.bench.go(1)
        if write:
            self.world.write()

    @rule(side=st.sampled_from(["local", "remote"]), turns=st.integers(1, 3))
    def fails_for_a_moment(self, side: Side, turns: int) -> None:
        self.world.linked = self.world.nodes[side].reached = False
        for _ in range(turns):
            self.bench.turn()
        self.world.linked = self.world.nodes[side].reached = True

    @rule(turns=st.integers(1, 3))
    def link_fails_for_a_moment(self, turns: int) -> None:
        self.world.linked = False
        self.world.write()
        for _ in range(turns):
            self.bench.turn()
        self.world.linked = True

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            try:
                self.converge()
            finally:
                self.bench.close()

    @rule(turns=st.integers(1, 4))
    def turns(self, turns: int) -> None:
        for _ in range(turns):
            self.bench.turn()
            self.bench.pass_time(0.5)

    @rule(turns=st.integers(1, 12))
    def live(self, turns: int) -> None:
        self.bench.go(turns)

    @rule(side=st.sampled_from(["local", "remote"]))
    def poll(self, side: Side) -> None:
        self.bench.poll(side)

    @rule()
    def users_write(self) -> None:
        self.world.write()

    @rule(side=st.sampled_from(["local", "remote"]))
    def node_crashes(self, side: Side) -> None:
        self.world.nodes[side].crash()

    @rule(side=st.sampled_from(["local", "remote"]))
    def node_boots(self, side: Side) -> None:
        self.world.nodes[side].up = True

    @rule(side=st.sampled_from(["local", "remote"]), reached=st.booleans())
    def gateway_reaches(self, side: Side, reached: bool) -> None:
        self.world.nodes[side].reached = reached

    @rule(linked=st.booleans())
    def nodes_reach_each_other(self, linked: bool) -> None:
        self.world.linked = linked

    @rule(
        side=st.sampled_from(["local", "remote"]),
        mode=st.sampled_from(["well", "well", "deaf", "refuses", "loses answers", "units fail"]),
    )
    def node_mode(self, side: Side, mode: str) -> None:
        self.world.nodes[side].mode = mode

    @rule(side=st.sampled_from(["local", "remote"]), broken=st.booleans())
    def service_breaks(self, side: Side, broken: bool) -> None:
        self.world.nodes[side].broken = broken

    @rule(refuse=st.booleans())
    def rules_fail(self, refuse: bool) -> None:
        self.world.refuse_rules = refuse

    @rule(at=st.integers(0, 12))
    def monitor_dies_soon(self, at: int) -> None:
        self.world.bomb.left = at

    @rule(want=st.sampled_from(["failover", "failback", "recover", "none"]))
    def operator(self, want: Any) -> None:
        self.bench.run(self.bench.driver.wish(want))

    @precondition(lambda self: hasattr(self, "world"))
    @invariant()
    def one_owner_per_epoch(self) -> None:
        for epoch, owners in self.world.accepted.items():
            assert len(owners) == 1, f"epoch {epoch} has owners {owners}"

    @precondition(lambda self: hasattr(self, "world"))
    @invariant()
    def epochs_grow(self) -> None:
        assert self.world.epochs == sorted(set(self.world.epochs))
        for node in self.world.nodes.values():
            assert node.epoch <= self.bench.state.epoch, "nobody is told an epoch that is not stored"

    def converge(self) -> None:
        world = self.world
        world.bomb.left = None
        world.linked, world.refuse_rules = True, False
        for node in world.nodes.values():
            node.up, node.reached, node.broken, node.mode = True, True, False, "well"
        note("all faults end")
        for _ in range(12):
            self.bench.go(10, seconds=20.0)
            if self.bench.state.phase == "normal" and self.bench.turn() == "stay":
                self.bench.go(5)
                break
        state = self.bench.state
        serving = world.nodes[world.rules]
        assert serving.serves, f"nobody serves the users: {state} {world.nodes}"
        assert world.rules == ("remote" if state.switched else "local") == state.owner
        assert serving.owner == serving.side and serving.epoch == state.epoch
        self.one_owner_per_epoch()
        if self.bench.group.failback == "auto" and state.wish == "none":
            assert state.phase == "normal", self.bench.driver.reason
        elif state.wish == "failback":
            raise AssertionError(f"the wish was not granted: {self.bench.driver.reason}")
        elif state.wish == "recover":
            assert state.phase == "recovered"
        else:
            assert state.phase in ("normal", "failed_over", "recovered"), self.bench.driver.reason
        if state.phase in ("normal", "recovered"):
            assert world.nodes["local"].data == world.nodes["remote"].data


Disaster.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestDisaster = Disaster.TestCase


def bench(**policy: str) -> Bench:
    made = Bench(config(**policy))
    made.go(10)
    assert made.state.phase == "normal" and made.checks.verdict
    assert made.world.nodes["remote"].synced_once
    return made


def test_a_fresh_deployment_is_told_its_first_epoch() -> None:
    made = bench()
    assert [(n.owner, n.epoch, n.units) for n in made.world.nodes.values()] == [("local", 1, True), ("local", 1, False)]
    assert made.driver.reason == "web1 serves the users; bak1 stands by"
    made.close()


def test_a_dead_server_is_replaced_and_gets_its_users_and_their_data_back() -> None:
    made = bench()
    world = made.world
    world.nodes["local"].crash()
    assert made.go(12) == ["normal", "promoting", "verifying", "failed_over"] or made.state.phase == "failed_over"
    assert world.rules == "remote" and world.writes["remote"]
    world.nodes["local"].up = True
    phases = made.go(30)
    assert phases[0] == "failed_over" and phases[-1] == "normal" and "recovering" in phases
    assert phases[-3:] == ["freezing", "returning", "normal"]
    assert world.flips == ["remote", "local"]
    assert world.writes["remote"] <= world.nodes["local"].data
    assert made.state.epoch == 3
    made.close()


def test_a_failed_service_on_a_live_server_loses_nothing() -> None:
    made = bench(failback="manual")
    world = made.world
    world.write()
    world.nodes["local"].broken = True
    phases = made.go(12, write=False)
    assert phases == ["normal", "handing_over", "promoting", "verifying", "failed_over"]
    assert world.writes["local"] <= world.nodes["remote"].data
    assert not world.nodes["local"].units and world.nodes["local"].owner == "remote"
    made.close()


def test_users_do_not_go_back_to_a_server_that_holds_changes() -> None:
    made = bench()
    world = made.world
    world.nodes["local"].crash()
    made.go(12)
    world.nodes["local"].up = True
    while world.nodes["local"].epoch != 2:
        made.go(1)
    world.nodes["local"].held = "too much"
    made.go(30)
    assert made.state.phase == "recovering" and world.rules == "remote"
    assert "web1 holds 7 transactions that it was sent: too much" in made.driver.reason
    assert made.driver.status().local.held == "too much"  # type: ignore[union-attr]
    world.nodes["local"].held = ""
    assert made.go(30)[-1] == "normal"
    assert world.writes["remote"] <= world.nodes["local"].data
    told = [line.split(" ", 2)[2] for line in made.driver._events.lines()]
    assert told.count("HELD on web1: too much") == 1 and told.count("web1 holds nothing any more") == 1
    made.close()


def test_a_server_that_dies_while_its_changes_are_held_is_replaced_without_them() -> None:
    made = bench()
    world = made.world
    before = world.nodes["remote"].data
    world.nodes["remote"].held = "too much"
    made.go(5)
    assert made.driver.reason == "web1 serves the users; bak1 holds 7 transactions that it was sent: too much"
    world.nodes["local"].crash()
    made.go(12, write=False)
    assert made.state.phase == "failed_over" and world.nodes["remote"].data == before
    assert any("bak1 holds 7 transactions" in line and "takes over" in line for line in made.driver._events.lines())
    made.close()


def test_a_planned_switch_loses_nothing_and_holds_until_the_operator_ends_it() -> None:
    made = bench()
    world = made.world
    made.run(made.driver.wish("failover"))
    made.go(20)
    assert made.state.phase == "recovered" and made.state.switched
    assert world.writes["local"] <= world.nodes["remote"].data
    made.go(20)
    assert made.state.phase == "recovered"
    made.run(made.driver.wish("failback"))
    made.go(20)
    assert made.state.phase == "normal" and made.state.wish == "none" and not made.state.switched
    assert world.nodes["local"].data == world.nodes["remote"].data
    made.close()


def test_a_planned_switch_that_cannot_send_its_last_changes_is_given_up() -> None:
    made = bench()
    made.poll("local")
    made.run(made.driver.wish("failover"))
    made.turn()
    assert made.state.phase == "handing_over" and made.state.planned
    made.world.linked = False
    made.turn()
    assert made.state.phase == "normal" and made.state.wish == "none"
    assert "not durable in time" in made.driver.reason
    assert made.world.nodes["local"].units, "the local server serves again"
    made.close()


def test_failover_by_hand_waits_for_the_operator() -> None:
    made = bench(failover="manual")
    made.world.nodes["local"].crash()
    made.go(12)
    assert made.state.phase == "normal" and "waiting for the operator" in made.driver.reason
    made.run(made.driver.wish("failover"))
    made.go(12)
    assert made.state.phase == "failed_over"
    made.close()


def test_recover_brings_the_data_home_and_the_users_stay() -> None:
    made = bench(failback="manual")
    world = made.world
    world.nodes["local"].crash()
    made.go(12)
    world.nodes["local"].up = True
    made.go(12)
    assert made.state.phase == "failed_over" and not world.nodes["local"].confirmed, "it waits, passive, to be told"
    made.run(made.driver.wish("recover"))
    made.go(12)
    assert made.state.phase == "recovered" and world.rules == "remote"
    world.write()
    made.run(made.driver.wish("failback"))
    made.go(12)
    assert made.state.phase == "normal" and world.writes["remote"] <= world.nodes["local"].data
    made.close()


def test_an_old_owner_that_comes_back_without_a_reboot_is_fenced_at_once() -> None:
    made = bench(failback="manual")
    world = made.world
    world.nodes["local"].reached = False
    world.nodes["local"].broken = True
    made.go(12)
    assert made.state.phase == "failed_over" and world.nodes["local"].units
    world.nodes["local"].reached = True
    made.go(4)
    assert not world.nodes["local"].units and world.nodes["local"].owner == "remote"
    made.close()


def test_a_backup_that_cannot_take_over_leaves_the_group_with_a_local_server_that_can() -> None:
    made = bench()
    world = made.world
    world.nodes["remote"].mode = "units fail"
    made.run(made.driver.wish("failover"))
    made.go(30)
    assert made.state.phase == "normal" and world.nodes["local"].serves
    assert world.flips == []
    world.nodes["remote"].mode = "well"
    made.go(10)
    assert world.nodes["remote"].owner == "local"
    made.close()


def test_a_failback_that_fails_leaves_the_users_where_they_are_served() -> None:
    made = bench()
    world = made.world
    world.nodes["local"].crash()
    made.go(12)
    world.nodes["local"].up = True
    world.nodes["local"].mode = "units fail"
    made.go(40)
    assert world.flips == ["remote"] and made.state.switched
    assert made.state.failbacks >= 1
    assert world.nodes["remote"].serves or made.state.phase in ("freezing", "returning", "promoting")
    world.nodes["local"].mode = "well"
    made.go(80, seconds=30.0)
    assert made.state.phase == "normal"
    made.close()


def test_a_lost_state_is_taken_over_from_the_nodes_when_both_answer() -> None:
    made = bench()
    world = made.world
    world.nodes["local"].crash()
    made.go(12)
    world.stored = None
    made.start()
    # A rebooted gateway has no rules either; what the nodes agree on is all there is.
    world.rules = "local"
    made.go(5, write=False)
    assert made.state.epoch == 1 and "stale monitor state" in made.driver.reason
    world.nodes["local"].up = True
    world.verified.add(("remote", 2))
    made.go(3, write=False)
    assert made.state.owner == "remote" and made.state.epoch == 2 and world.rules == "remote"
    assert any("is adopted" in line for line in made.driver._events.lines())
    made.go(30)
    assert made.state.phase == "normal" and made.state.epoch == 3
    made.close()


def test_a_wish_that_comes_while_a_decision_is_stored_is_not_lost() -> None:
    made = bench()
    world = made.world
    world.nodes["local"].crash()
    made.pass_time()
    made.pass_time()
    made.poll("local")
    made.poll("remote")
    gate = threading.Event()
    save = world.save

    def slow(state: GroupState) -> None:
        gate.wait(30)
        save(state)

    async def race() -> None:
        wish = asyncio.create_task(made.driver.wish("recover"))
        await asyncio.sleep(0.01)
        step = asyncio.create_task(made.driver.step())
        await asyncio.sleep(0.01)
        gate.set()
        await asyncio.gather(wish, step)

    world.save = slow  # type: ignore[method-assign]
    made.run(race())
    assert (made.state.phase, made.state.wish) == ("promoting", "recover")
    assert world.stored == made.state
    made.close()


def test_a_failback_whose_last_changes_cannot_be_sent_is_put_off() -> None:
    made = bench()
    world = made.world
    world.nodes["local"].crash()
    made.go(12)
    world.nodes["local"].up = True
    while made.state.phase != "freezing":
        made.go(1)
    world.linked = False
    world.write()
    made.turn()
    assert made.state.phase == "recovering" and made.state.switched and world.nodes["remote"].serves
    assert "failback put off: bak1 could not send its last changes" in made.driver.reason
    world.linked = True
    made.go(40)
    assert made.state.phase == "normal" and world.writes["remote"] <= world.nodes["local"].data
    made.close()


def test_a_backup_that_fails_again_during_the_failback_keeps_what_users_wrote_there() -> None:
    made = bench()
    world = made.world
    world.nodes["local"].crash()
    made.go(12)
    world.nodes["local"].up = True
    while made.state.phase != "returning":
        made.go(1)
    world.nodes["local"].mode = "units fail"
    made.turn()
    made.poll("remote")
    made.turn()
    assert made.state.phase == "promoting" and made.state.switched
    # It takes over, but says so too late; users write there at once.
    world.nodes["remote"].mode = "loses answers"
    world.linked = False
    made.turn()
    world.write()
    world.nodes["local"].mode = "well"
    made.go(10)
    assert world.rules == "remote" and made.state.owner == "remote"
    world.nodes["remote"].mode = "well"
    world.linked = True
    made.go(60, seconds=5.0)
    assert made.state.phase == "normal" and world.writes["remote"] <= world.nodes["local"].data
    made.close()


def test_without_a_stored_state_nothing_is_done() -> None:
    made = bench()
    world = made.world
    world.nodes["local"].crash()
    made.pass_time()
    made.pass_time()
    made.poll("local")
    made.poll("remote")

    def save(state: GroupState) -> None:
        raise HookFailed("write", "disk full")

    world.save = save  # type: ignore[method-assign]
    made.turn()
    assert made.state.phase == "normal" and world.nodes["remote"].epoch == 1
    made.close()
