"""The cables: bridges in a network namespace of the lab's own, and each host's namespace plugged into them.

Nothing is put into the machine's own network namespace, so labs with equal addresses never meet.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
from collections.abc import Iterable
from pathlib import Path

from .paths import NETNS_ROOT, RUN_ROOT, LabPaths
from .proc import LabError, locked, run, wait_for
from .topology import MANAGEMENT, Host, Topology


def bridge(network: str) -> str:
    """The bridge that is a network."""
    return f"br-{network}"


def port(host: str, interface: str) -> str:
    """The bridge's end of a host's cable."""
    return f"{host}.{interface}"


def in_netns(netns: str) -> list[str]:
    """Words that make a command run in a network namespace, and nothing else of it."""
    return ["nsenter", f"--net={NETNS_ROOT / netns}"]


def build(paths: LabPaths, topology: Topology) -> None:
    """Make the namespace of the bridges, with the controller's address on the management bridge."""
    _add_netns(paths.fabric)
    # A frame between two hosts is the hosts' business: this namespace forwards and filters nothing.
    _sysctl(
        paths.fabric,
        "net.ipv4.ip_forward=0",
        "net.ipv6.conf.all.disable_ipv6=1",
        "net.ipv6.conf.default.disable_ipv6=1",
    )
    for name in ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables", "bridge-nf-call-arptables"):
        if Path("/proc/sys/net/bridge", name).exists():
            _sysctl(paths.fabric, f"net.bridge.{name}=0")
    commands = ["link set lo up"]
    for network in (*topology.networks, MANAGEMENT):
        commands.append(f"link add {bridge(network)} type bridge forward_delay 0 mcast_snooping 0")
        commands.append(f"link set {bridge(network)} up")
    commands.append(f"addr add {topology.management} dev {bridge(MANAGEMENT)}")
    _batch(paths.fabric, commands)


def plug(paths: LabPaths, topology: Topology, host: Host) -> None:
    """Give a host a network namespace as new as after power-on, with addresses and routes.

    What an earlier boot left in its old one (rules, settings, connections) is gone with it.
    """
    unplug(paths, topology, host)
    netns = paths.netns(host.name)
    _add_netns(netns)
    # A new namespace inherits some of the machine's settings; a host starts from the kernel's own.
    _sysctl(netns, "net.ipv4.ip_forward=0")
    cables = [("mgmt0", MANAGEMENT)] + [(i.name, i.network) for i in host.interfaces]
    outside = []
    for interface, network in cables:
        end = port(host.name, interface)
        peer = f"name {interface} address {_mac(host.name, interface)} netns {netns}"
        outside.append(f"link add {end} type veth peer {peer}")
        if network == MANAGEMENT:
            # Isolated ports reach the bridge itself only: hosts can't talk to each other behind a link under test.
            outside.append(f"link set {end} master {bridge(network)}")
            outside.append(f"link set {end} type bridge_slave isolated on")
        elif not is_cut(paths, host.name, interface):
            outside.append(f"link set {end} master {bridge(network)}")
        outside.append(f"link set {end} up")
    _batch(paths.fabric, outside)
    inside = ["link set lo up", f"addr add {host.management} dev mgmt0"]
    inside += [f"addr add {i.address} brd + dev {i.name}" for i in host.interfaces]
    # No IPv6 link-local chatter, which would show up in captures.
    inside += [f"link set {name} addrgenmode none up" for name, _ in cables]
    for interface_ in host.interfaces:
        for prefix in topology.networks[interface_.network].on_link:
            if prefix != interface_.address.network:
                inside.append(f"route add {prefix} dev {interface_.name}")
    if host.gateway:
        inside.append(f"route add default via {host.gateway}")
    _batch(netns, inside)


def unplug(paths: LabPaths, topology: Topology, host: Host) -> None:
    """Pull all cables of a host at once and remove its namespace; nothing happens where they are gone."""
    if (NETNS_ROOT / paths.fabric).exists():
        ports = [port(host.name, name) for name in ("mgmt0", *(i.name for i in host.interfaces))]
        # The namespace's end would go with the namespace too, but only some time after its deletion.
        run(
            ["ip", "-n", paths.fabric, "-force", "-batch", "-"],
            stdin=_lines(f"link del {p}" for p in ports),
            check=False,
        )
    _delete_netns(paths.netns(host.name))


def demolish(paths: LabPaths) -> None:
    """Remove every namespace of the lab, and what still runs in that of the bridges (captures, SSH proxies)."""
    for netns in paths.all_netns():
        if netns == paths.fabric:
            _end_inhabitants(netns)
            links = run(["ip", "-n", netns, "-o", "link", "show"], check=False).stdout.splitlines()
            names = [line.split(": ")[1].partition("@")[0] for line in links]
            # Explicitly, so that the cables are gone even while somebody else's process pins the namespace.
            run(
                ["ip", "-n", netns, "-force", "-batch", "-"],
                stdin=_lines(f"link del {n}" for n in names if n != "lo"),
                check=False,
            )
    for netns in paths.all_netns():
        _delete_netns(netns)


def _end_inhabitants(netns: str) -> None:
    def inhabitants() -> list[int]:
        found = run(["ip", "netns", "pids", netns], check=False).stdout
        return [int(word) for word in found.split()]

    for pid in inhabitants():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    wait_for(lambda: not inhabitants(), f"the processes in {netns} to end", timeout=10)


def is_cut(paths: LabPaths, host: str, interface: str) -> bool:
    """Whether a link is cut now."""
    return (paths.cuts / f"{host}:{interface}").exists()


def cut(paths: LabPaths, host: Host, interface: str, *, unplugged: bool = False) -> None:
    """Let nothing through a link, in either direction; the cut outlives restarts of the host.

    The host's interface stays up, as when something further away has failed; with `unplugged` it loses its carrier.
    """
    paths.cuts.mkdir(exist_ok=True)
    (paths.cuts / f"{host.name}:{interface}").touch()
    if _has_port(paths, host.name, interface):
        _batch(paths.fabric, [f"link set {port(host.name, interface)} nomaster {'down' if unplugged else 'up'}"])


def restore(paths: LabPaths, host: Host, interface: str) -> None:
    """Undo `cut`; nothing happens where the link isn't cut."""
    (paths.cuts / f"{host.name}:{interface}").unlink(missing_ok=True)
    network = next(i.network for i in host.interfaces if i.name == interface)
    if _has_port(paths, host.name, interface):
        _batch(paths.fabric, [f"link set {port(host.name, interface)} master {bridge(network)} up"])


def _has_port(paths: LabPaths, host: str, interface: str) -> bool:
    """False for a host that is off: its cables are made when it boots."""
    return run(["ip", "-n", paths.fabric, "link", "show", port(host, interface)], check=False).returncode == 0


def _mac(host: str, interface: str) -> str:
    """The same at each boot, like a real card's: neighbours have it in their caches for a while."""
    digest = hashlib.sha256(port(host, interface).encode()).digest()
    return "02:" + digest[:5].hex(":")


def _add_netns(name: str) -> None:
    # `ip netns add` prepares its directory the first time; two at once would mount it over itself.
    with locked(RUN_ROOT / ".netns.lock", "permission to make a network namespace", timeout=60):
        run(["ip", "netns", "add", name])


def _delete_netns(name: str) -> None:
    if (NETNS_ROOT / name).exists():
        run(["ip", "netns", "del", name])


def _sysctl(netns: str, *settings: str) -> None:
    run([*in_netns(netns), "sysctl", "-q", "-w", *settings])


def _batch(netns: str, commands: Iterable[str]) -> None:
    text = _lines(commands)
    try:
        run(["ip", "-n", netns, "-batch", "-"], stdin=text)
    except LabError as error:
        raise LabError(f"{error}\nin {shlex.quote(netns)}, of these commands:\n{text}") from error


def _lines(commands: Iterable[str]) -> str:
    return "".join(command + "\n" for command in commands)
