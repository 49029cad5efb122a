"""Who may ask what of a daemon. What is not in a table is nobody's.

A peer over TLS is whatever its certificate's name makes it: a gateway, the other node of a group, or some other node
of the deployment. Who reaches a daemon's Unix socket is the local administrator; no certificate can say that.
"""

from __future__ import annotations

from typing import Literal

from farshore.config import NodeConfig
from farshore.control import api
from farshore.control.server import LOCAL
from farshore.errors import PeerRefused, UsageError

Party = Literal["local", "gateway", "peer", "other"]

#: Requests to a node. A peer is told of the groups that it has a part in, and of no others.
NODE: dict[type[api.Request], frozenset[Party]] = {
    api.StatusRequest: frozenset({"local", "gateway", "peer"}),
    api.SetOwner: frozenset({"local", "gateway"}),
    api.Freeze: frozenset({"local", "gateway"}),
    api.Thaw: frozenset({"local", "gateway"}),
    api.Flush: frozenset({"local", "gateway"}),
    api.Verify: frozenset({"local", "gateway"}),
    api.Pause: frozenset({"local"}),
    api.Resume: frozenset({"local"}),
    api.Explain: frozenset({"local"}),
    api.History: frozenset({"local"}),
    api.Restore: frozenset({"local"}),
    api.RestoreOnPromotion: frozenset({"local"}),
    api.Approve: frozenset({"local"}),
    api.Reject: frozenset({"local"}),
}
#: Requests to the monitor, which has no other door than its socket.
MONITOR: dict[type[api.Request], frozenset[Party]] = {
    api.StatusRequest: frozenset({"local"}),
    api.Wish: frozenset({"local"}),
}
_WORDS: dict[Party, str] = {
    "gateway": "gateways",
    "peer": "the other node of a group",
    "local": "the local administrator",
    "other": "other nodes",
}


def party(config: NodeConfig, name: str) -> Party:
    """What ``name``, of a certificate, or LOCAL, is to this node. A gateway that is a group's node too is a gateway."""
    if name == LOCAL:
        return "local"
    if name in config.gateways:
        return "gateway"
    return "peer" if any(group.peer.node == name for group in config.groups.values()) else "other"


def check_node(request: api.Request, name: str, config: NodeConfig) -> None:
    """Raises PeerRefused when ``request`` is not for ``name`` to make of a node."""
    _check(NODE, request, party(config, name), name, config.node, "a node")


def check_monitor(request: api.Request, name: str, node: str) -> None:
    """Raises PeerRefused when ``request`` is not for ``name`` to make of the monitor, UsageError if it is a node's."""
    _check(MONITOR, request, "local" if name == LOCAL else "other", name, node, "the monitor")


def may_stream(config: NodeConfig, name: str, group: str) -> bool:
    """Whether ``name`` may open the stream of ``group``: only its other node may, whoever the name is otherwise."""
    known = config.groups.get(group)
    return known is not None and name != LOCAL and known.peer.node == name


def _check(
    table: dict[type[api.Request], frozenset[Party]], request: api.Request, who: Party, name: str, node: str, what: str
) -> None:
    kind = type(request)
    if kind not in table:
        if who == "local":
            raise UsageError(f"{kind.__name__} is not asked of {what}")
        raise PeerRefused(node, f"{kind.__name__} is not for {what}")
    if who not in table[kind]:
        allowed = " and ".join(words for each, words in _WORDS.items() if each in table[kind])
        raise PeerRefused(node, f"{kind.__name__} is for {allowed}, not for {name}")
