"""Who may ask what: every kind of request, of every kind of peer."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path

import pytest
from nodes import Pair

from farshore import tls
from farshore.config import Endpoint, NodeConfig, NodeGroup, NodeRef, PathConfig, Tls
from farshore.control import api, client
from farshore.control.server import LOCAL
from farshore.daemons import rights
from farshore.dbm import sender, wire
from farshore.dbm.messages import Hello, Refused, Welcome
from farshore.errors import PeerRefused, UsageError

REQUESTS: dict[type[api.Request], api.Request] = {
    api.StatusRequest: api.StatusRequest(),
    api.SetOwner: api.SetOwner("web", "local", 1, False),
    api.Freeze: api.Freeze("web", 1, 0.1),
    api.Thaw: api.Thaw("web", 1),
    api.Flush: api.Flush(0.1, "web"),
    api.Verify: api.Verify("web"),
    api.Pause: api.Pause("web"),
    api.Resume: api.Resume("web"),
    api.Explain: api.Explain(b"/srv/www/x"),
    api.History: api.History("web"),
    api.Restore: api.Restore("web", to="/nowhere"),
    api.RestoreOnPromotion: api.RestoreOnPromotion("web", seq=1),
    api.Approve: api.Approve("web"),
    api.Reject: api.Reject("web"),
    api.Wish: api.Wish("web", "none"),
}
PARTIES = {"local": LOCAL, "gateway": "gw", "peer": "web1", "other": "db1"}
YES, NO = True, False
#: What a node permits.                local, gateway, peer, other
NODE = {
    api.StatusRequest: (YES, YES, YES, NO),
    api.SetOwner: (YES, YES, NO, NO),
    api.Freeze: (YES, YES, NO, NO),
    api.Thaw: (YES, YES, NO, NO),
    api.Flush: (YES, YES, NO, NO),
    api.Verify: (YES, YES, NO, NO),
    api.Pause: (YES, NO, NO, NO),
    api.Resume: (YES, NO, NO, NO),
    api.Explain: (YES, NO, NO, NO),
    api.History: (YES, NO, NO, NO),
    api.Restore: (YES, NO, NO, NO),
    api.RestoreOnPromotion: (YES, NO, NO, NO),
    api.Approve: (YES, NO, NO, NO),
    api.Reject: (YES, NO, NO, NO),
    api.Wish: (NO, NO, NO, NO),
}
MONITOR = {kind: (kind in (api.StatusRequest, api.Wish), NO, NO, NO) for kind in NODE}


def config(tmp_path: Path) -> NodeConfig:
    def group(peer: str) -> NodeGroup:
        return NodeGroup("remote", NodeRef(peer, "192.0.2.1"), (PathConfig(f"/srv/{peer}"),))

    files = Tls(tmp_path, tmp_path, tmp_path)
    return NodeConfig("bak1", Endpoint("192.0.2.2"), files, {"web": group("web1"), "mail": group("mail1")}, ("gw",))


def permitted(call: typing.Callable[[], None]) -> bool:
    try:
        call()
    except (PeerRefused, UsageError):
        return False
    return True


def test_every_request_is_in_the_tables_of_this_test() -> None:
    assert set(typing.get_args(api.Request)) == set(NODE) == set(REQUESTS)


@pytest.mark.parametrize("party", PARTIES)
@pytest.mark.parametrize("kind", NODE, ids=lambda kind: kind.__name__)
def test_a_node_permits(kind: type[api.Request], party: str, tmp_path: Path) -> None:
    expected = NODE[kind][list(PARTIES).index(party)]
    assert rights.party(config(tmp_path), PARTIES[party]) == party
    allowed = permitted(lambda: rights.check_node(REQUESTS[kind], PARTIES[party], config(tmp_path)))
    assert allowed is expected


@pytest.mark.parametrize("party", PARTIES)
@pytest.mark.parametrize("kind", NODE, ids=lambda kind: kind.__name__)
def test_the_monitor_permits(kind: type[api.Request], party: str) -> None:
    expected = MONITOR[kind][list(PARTIES).index(party)]
    assert permitted(lambda: rights.check_monitor(REQUESTS[kind], PARTIES[party], "ldrg")) is expected


def test_what_is_in_no_table_is_denied(tmp_path: Path) -> None:
    class Unheard(api.StatusRequest, frozen=True, tag="unheard?"):
        """Of a later version."""

    for name in PARTIES.values():
        assert not permitted(lambda name=name: rights.check_node(Unheard(), name, config(tmp_path)))  # type: ignore[misc]
        assert not permitted(lambda name=name: rights.check_monitor(Unheard(), name, "ldrg"))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "group", "expected"),
    [
        ("web1", "web", YES),
        ("mail1", "mail", YES),
        ("web1", "mail", NO),
        ("web1", "none", NO),
        ("gw", "web", NO),
        ("db1", "web", NO),
        ("bak1", "web", NO),
        (LOCAL, "web", NO),
        ("", "web", NO),
    ],
)
def test_a_stream_is_for_the_groups_other_node(name: str, group: str, expected: bool, tmp_path: Path) -> None:
    assert rights.may_stream(config(tmp_path), name, group) is expected


# --- the same over the wire


def as_who(pair: Pair, who: str) -> tuple[NodeRef, Tls]:
    keys = Tls(pair.keys / "ca.crt", pair.keys / f"{who}.crt", pair.keys / f"{who}.key")
    return NodeRef("remote", "127.0.0.1", pair.remote.port), keys


@pytest.mark.parametrize(("who", "party"), [("gateway", "gateway"), ("local", "peer"), ("stranger", "other")])
async def test_a_node_answers_over_tls_as_the_table_says(pair: Pair, who: str, party: str) -> None:
    peer, keys = as_who(pair, who)
    for kind, request in REQUESTS.items():
        try:
            await client.ask_peer(peer, tls.client_context(keys), request, 30)
        except client.RequestFailed as error:
            refused = error.exit_code == PeerRefused.exit_code
        else:
            refused = False
        assert refused is not NODE[kind][list(PARTIES).index(party)], kind


@pytest.mark.parametrize(
    ("who", "expected"), [("gateway", Refused), ("local", Welcome), ("stranger", Refused), ("remote", Refused)]
)
async def test_a_node_takes_streams_as_the_table_says(pair: Pair, who: str, expected: type[object]) -> None:
    await pair.own("local", 1)
    peer, keys = as_who(pair, who)
    reader, writer = await tls.connect(peer, tls.client_context(keys))
    writer.write(wire.frame(Hello(wire.PROTOCOL, "web", 1, ["/srv/www"])))
    assert isinstance(await sender._CODEC.read(reader, "remote"), expected)
    writer.close()


async def test_a_peer_is_told_of_its_own_groups_only(pair: Pair) -> None:
    assert set((await pair.remote.status()).groups) == {"web"}
    assert (await pair.remote.status(only_for="stranger")).groups == {}
    peer, keys = as_who(pair, "local")
    answer = await client.ask_peer(peer, tls.client_context(keys), api.StatusRequest(), 30)
    assert isinstance(answer, api.NodeStatus)
    assert set(answer.groups) == {"web"}


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e300])
async def test_no_time_limit_ends_the_event_loop(pair: Pair, seconds: float) -> None:
    peer, keys = as_who(pair, "gateway")
    with pytest.raises(Exception, match=r"closed the connection|reset|Broken"):
        await client.ask_peer(peer, tls.client_context(keys), api.Flush(seconds, "web"), 30)
    assert isinstance(await client.ask_peer(peer, tls.client_context(keys), api.StatusRequest(), 30), api.NodeStatus)


def test_nobody_asks_the_handlers_around_the_tables() -> None:
    from farshore.daemons.monitor import MonitorDaemon
    from farshore.daemons.node import Node

    for handler in (Node.handle, MonitorDaemon.handle):
        first = inspect.getsource(handler).split('"""')[2].strip().splitlines()[0]
        assert first.startswith("rights.check_")
