# Copyright: The Farshore authors
# GNU General Public License v3.0 or later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Filters that compute each host's part from what the user wrote: ``farshore_sites`` and ``farshore_groups``."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

DOCUMENTATION = r"""
name: intent
short_description: Compute a host's part from the declared protection groups
description: See the filters themselves.
author: The Farshore authors
"""

NODE_TYPES = {"ldrg": "ldrg", "rdrg": "rdrg", "local_servers": "local_server", "backup_servers": "backup_server"}
SITE_OF = {"ldrg": "ldc", "local_servers": "ldc", "rdrg": "rbc", "backup_servers": "rbc"}

_GROUP_KEYS = (
    "local_server", "backup_server", "paths", "services", "units",
    "failover", "failback", "rpo", "hold_down", "step_timeout", "bandwidth", "compress", "brake", "verify",
    "consistency", "history", "owners", "owner_map", "watch",
)  # fmt: skip
_SITE_KEYS = ("network", "public_address")
_PATH_AGES = ("min_age", "max_age")
_PATH_LIMITS = ("max_size", *_PATH_AGES, "one_filesystem")
_PATH_KEYS = ("path", "replica", "include", "exclude", *_PATH_LIMITS)
_SERVICE_KEYS = ("port", "protocol", "backend_port", "check")
_CHECK_KEYS = ("kind", "interval", "timeout", "rise", "fall", "path", "host", "statuses")
_RPO_KEYS = ("warn", "critical")
_CONSISTENCY_KEYS = ("mode", "snapshot", "interval", "freeze", "thaw", "timeout")
#: Of the keys that are numbers of seconds, what the agent allows.
_CONSISTENCY_SECONDS = {"interval": (0.1, 86400), "timeout": (0.1, 3600)}
_WATCH_KEYS = ("engine", "mapped")
_ENGINES = ("auto", "inotify", "fanotify")
_BANDWIDTH_KEYS = ("limit", "schedule")
_BRAKE_KEYS = ("mode", "window", "most_share", "least_files", "entropy_share")
_HISTORY_AGES = {"all": "24h", "hourly": "7d", "daily": "90d"}
_HISTORY_KEYS = (*_HISTORY_AGES, "space")
_DURATION = re.compile(r"([0-9]{1,6})([smhd]?)")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_SPACE = re.compile(r"([0-9]{1,9}) ?(%|MB|GB|TB)")
_FILE_SIZE = re.compile(r"([0-9]{1,12}) ?(B|kB|MB|GB|TB)")
_VERIFY_KEYS = ("every", "contents", "rate", "days", "from", "to")
_PERIODS = ("never", "day", "week", "month")
_OWNER_KEYS = ("users", "groups")
_WINDOW_KEYS = ("days", "from", "to", "limit")
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,19}")
_TIME = re.compile(r"([01][0-9]|2[0-3]):[0-5][0-9]|24:00")
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kMG]?)(bit|B)/s")
_SCALE = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
#: Bytes/s, as the agent has it: below, even what keeps a connection alive would be late.
_LEAST_RATE = 8e3
_UNIT = re.compile(r"[A-Za-z0-9:_.@\\-]+\.(service|socket|target|timer|path|mount)")

Intent = Mapping[str, Mapping[str, Any]]
HostVars = Mapping[str, Mapping[str, Any]]


def node_groups(intent: Intent, host: str, hostvars: HostVars, replica_root: str, port: int = 7820) -> dict[str, Any]:
    """``groups`` of ``host``'s node.yml: each group that it is the local or the backup server of."""
    found: dict[str, Any] = {}
    for name, group in sorted(intent.items()):
        ends = {"local": group["local_server"], "remote": group["backup_server"]}
        for side, peer in (("local", "remote"), ("remote", "local")):
            if ends[side] != host:
                continue
            entry: dict[str, Any] = {
                "side": side,
                "peer": _node(ends[peer], hostvars, port),
                "paths": [_path(item, name, side, intent, replica_root) for item in group["paths"]],
            }
            if group.get("units"):
                entry["units"] = list(group["units"])
            for key in ("rpo", "bandwidth", "verify", "consistency", "history", "owner_map", "watch"):
                if group.get(key):
                    entry[key] = dict(group[key])
            for key in ("compress", "owners"):
                if key in group:
                    entry[key] = group[key]
            if group.get("brake"):
                entry["brake"] = _brake(group["brake"])
            found[str(name)] = entry
    return found


def monitor_groups(intent: Intent, hostvars: HostVars, port: int = 7820) -> dict[str, Any]:
    """``groups`` of the gateway's monitor.yml: all of them."""
    found: dict[str, Any] = {}
    for name, group in sorted(intent.items()):
        entry: dict[str, Any] = {
            "local": _node(group["local_server"], hostvars, port),
            "backup": _node(group["backup_server"], hostvars, port),
            "services": [dict(service) for service in group["services"]],
        }
        for key in ("failover", "failback", "hold_down", "step_timeout", "rpo"):
            if key in group:
                entry[key] = group[key]
        found[str(name)] = entry
    return found


def publications(intent: Intent, hostvars: HostVars) -> list[dict[str, Any]]:
    """The ports that users reach through the gateway, and the local servers behind them."""
    return [
        {
            "group": str(name),
            "protocol": service.get("protocol", "tcp"),
            "port": service["port"],
            "address": hostvars[group["local_server"]]["farshore_address"],
            "backend_port": service.get("backend_port") or service["port"],
        }
        for name, group in sorted(intent.items())
        for service in group["services"]
    ]


def backup_groups(intent: Intent, host: str) -> dict[str, list[str]]:
    """The groups that ``host`` is the backup server of, with their units."""
    return {
        str(name): list(group.get("units") or [])
        for name, group in sorted(intent.items())
        if group["backup_server"] == host
    }


def node_type(groups: Mapping[str, Sequence[str]], host: str) -> str:
    """The node-type role of ``host``: ldrg, rdrg, local_server or backup_server; empty for other hosts."""
    return next((role for group, role in NODE_TYPES.items() if host in groups.get(group, ())), "")


def gateway_place(
    groups: Mapping[str, Sequence[str]], host: str, sites: Mapping[str, Any], hostvars: HostVars
) -> dict[str, str]:
    """A gateway's addresses and its peer's: what the tunnel and the firewall are made from."""
    here, there = ("ldrg", "rdrg") if host in groups.get("ldrg", ()) else ("rdrg", "ldrg")
    own, peer = sites[SITE_OF[here]], sites[SITE_OF[there]]
    return {
        "site": SITE_OF[here],
        "network": own["network"],
        "public_address": own["public_address"],
        "lan_address": hostvars[host]["farshore_address"],
        "peer": groups[there][0],
        "peer_network": peer["network"],
        "peer_public_address": peer["public_address"],
    }


def intent_errors(
    intent: Any, sites: Any, groups: Mapping[str, Sequence[str]], hostvars: HostVars, replica_root: str = "/"
) -> list[str]:
    """What is wrong in the inventory, as sentences that name the key, the value and what is allowed."""
    errors = list(_site_errors(sites))
    errors += _host_errors(sites if not errors else {}, groups, hostvars)
    if not isinstance(intent, Mapping) or not intent:
        return [*errors, f"farshore_groups: {intent!r} is not allowed; a mapping with at least one group is"]
    for name, group in intent.items():
        errors += _group_errors(f"farshore_groups.{name}", name, group, groups)
    return errors or [*_port_clashes(intent), *_path_clashes(intent, replica_root)]


def status_table(groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The monitor's groups as the lines of a table."""
    rows = [("GROUP", "PHASE", "SERVED BY", "OWNER", "EPOCH", "RPO", "BACKLOG", "WHY")]
    for name, group in sorted(groups.items()):
        source = group.get("local" if group.get("owner") == "local" else "backup") or {}
        rpo = source.get("rpo")
        why = group.get("reason", "")
        for side in ("local", "backup"):
            if held := (group.get(side) or {}).get("held"):
                why = f"HELD on the {side} server: {held}; {why}"
        rows.append((
            name, group.get("phase", ""), group.get("served_by", ""), group.get("owner", ""),
            str(group.get("epoch", "")), "unknown" if rpo is None else f"{rpo:.1f} s",
            str(source.get("backlog_paths", "unknown")), why,
        ))  # fmt: skip
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _node(host: str, hostvars: HostVars, port: int) -> dict[str, Any]:
    return {"node": str(host), "address": hostvars[host]["farshore_address"], "port": int(port)}


def _path(item: Any, group: str, side: str, intent: Intent, replica_root: str) -> dict[str, Any]:
    source = _source(item)
    path = _replica(item, group, intent, replica_root) if side == "remote" else source
    entry: dict[str, Any] = {"source": source, "path": path}
    if isinstance(item, Mapping):
        entry.update({key: list(item[key]) for key in ("include", "exclude") if item.get(key)})
        entry.update({key: item[key] for key in _PATH_LIMITS if item.get(key)})
    return entry


def _brake(brake: Mapping[str, Any]) -> dict[str, Any]:
    """The keys, with ``off`` as a word: without quotes it is false to YAML."""
    return {key: "off" if key == "mode" and value is False else value for key, value in brake.items()}


def _source(item: Any) -> str:
    return item["path"] if isinstance(item, Mapping) else item


def _replica(item: Any, group: str, intent: Intent, replica_root: str) -> str:
    """The same path where one server is backed up; below ``replica_root`` where several are."""
    if isinstance(item, Mapping) and item.get("replica"):
        return item["replica"]
    backup = intent[group]["backup_server"]
    servers = {other["local_server"] for other in intent.values() if other["backup_server"] == backup}
    source = _source(item)
    return source if len(servers) == 1 else f"{replica_root.rstrip('/')}/{group}{source}"


def _site_errors(sites: Any) -> Iterator[str]:
    if not isinstance(sites, Mapping) or set(sites) != {"ldc", "rbc"}:
        given = ", ".join(map(str, sites)) if isinstance(sites, Mapping) else repr(sites)
        yield f"farshore_sites: has {given}; it must have exactly ldc and rbc"
        return
    networks = []
    for name, site in sites.items():
        where = f"farshore_sites.{name}"
        yield from _keys(where, site, _SITE_KEYS, required=_SITE_KEYS)
        if not isinstance(site, Mapping):
            continue
        try:
            networks.append(ipaddress.ip_network(site.get("network", "")))
        except ValueError:
            yield f"{where}.network: {site.get('network')!r} is not a network such as 10.1.0.0/24"
        if not _is_address(site.get("public_address")):
            yield f"{where}.public_address: {site.get('public_address')!r} is not an IP address"
    if len(networks) == 2 and networks[0].overlaps(networks[1]):
        yield f"farshore_sites: the networks {networks[0]} and {networks[1]} overlap; the sites need different ones"


def _host_errors(sites: Mapping[str, Any], groups: Mapping[str, Sequence[str]], hostvars: HostVars) -> Iterator[str]:
    for group in ("ldrg", "rdrg"):
        if len(groups.get(group, ())) != 1:
            yield f"inventory group {group}: has {len(groups.get(group, ()))} hosts; exactly one is allowed"
    seen: dict[str, str] = {}
    for group, site in SITE_OF.items():
        for host in groups.get(group, ()):
            where = f"host {host}: farshore_address"
            if host in seen:
                yield f"host {host}: is in the inventory groups {seen[host]} and {group}; one type of node is allowed"
                continue
            seen[host] = group
            address = hostvars[host].get("farshore_address")
            if not _is_address(address):
                yield f"{where}: {address!r} is not allowed; the host's IP address in its site's LAN is"
            elif sites and ipaddress.ip_address(address) not in ipaddress.ip_network(sites[site]["network"]):
                yield f"{where}: {address} is not in farshore_sites.{site}.network, {sites[site]['network']}"


def _group_errors(where: str, name: Any, group: Any, groups: Mapping[str, Sequence[str]]) -> Iterator[str]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        yield f"{where}: is not a name; up to 20 letters, digits, - and _, beginning with a letter, are allowed"
    yield from _keys(where, group, _GROUP_KEYS, required=("local_server", "backup_server", "paths", "services"))
    if not isinstance(group, Mapping):
        return
    for key, inventory_group in (("local_server", "local_servers"), ("backup_server", "backup_servers")):
        hosts = groups.get(inventory_group, ())
        if key in group and group[key] not in hosts:
            allowed = ", ".join(hosts) or "nothing: the group is empty"
            yield f"{where}.{key}: {group[key]!r} is not in the inventory group {inventory_group}; allowed: {allowed}"
    for key in ("failover", "failback"):
        if group.get(key, "auto") not in ("auto", "manual"):
            yield f"{where}.{key}: {group[key]!r} is not allowed; allowed: auto, manual"
    for key in ("hold_down", "step_timeout"):
        if not _is_number(group.get(key, 1)):
            yield f"{where}.{key}: {group[key]!r} is not a number of seconds"
    yield from _rpo_errors(f"{where}.rpo", group.get("rpo", {}))
    yield from _bandwidth_errors(f"{where}.bandwidth", group.get("bandwidth", {}))
    yield from _watch_errors(f"{where}.watch", group.get("watch", {}))
    yield from _brake_errors(f"{where}.brake", group.get("brake", {}))
    yield from _verify_errors(f"{where}.verify", group.get("verify", {}))
    if not isinstance(group.get("compress", True), bool):
        yield f"{where}.compress: {group['compress']!r} is not allowed; allowed: true, false"
    yield from _consistency_errors(f"{where}.consistency", group.get("consistency", {}))
    yield from _history_errors(f"{where}.history", group.get("history", {}))
    if group.get("owners", "number") not in ("number", "name"):
        yield f"{where}.owners: {group['owners']!r} is not allowed; allowed: number, name"
    yield from _owner_map_errors(where, group)
    yield from _list_errors(where, group, "paths", _path_errors)
    yield from _list_errors(where, group, "services", _service_errors)
    for i, unit in enumerate(group.get("units") or []):
        if not isinstance(unit, str) or not _UNIT.fullmatch(unit):
            yield f"{where}.units[{i}]: {unit!r} is not a unit's full name such as nginx.service"


def _list_errors(where: str, group: Mapping[str, Any], key: str, check: Any) -> Iterator[str]:
    items = group.get(key)
    if key in group and (not isinstance(items, Sequence) or isinstance(items, str) or not items):
        yield f"{where}.{key}: {items!r} is not allowed; a list with at least one item is"
        return
    for i, item in enumerate(items or []):
        yield from check(f"{where}.{key}[{i}]", item)


def _path_errors(where: str, item: Any) -> Iterator[str]:
    if isinstance(item, str):
        item = {"path": item}
    yield from _keys(where, item, _PATH_KEYS, required=("path",))
    if not isinstance(item, Mapping):
        return
    for key in ("path", "replica"):
        value = item.get(key, "/x")
        if not isinstance(value, str) or not value.startswith("/") or "/../" in value + "/" or not value.strip("/"):
            yield f"{where}.{key}: {value!r} is not allowed; an absolute path other than / is"
    for key in ("include", "exclude"):
        value = item.get(key, [])
        if not isinstance(value, Sequence) or isinstance(value, str):
            yield f"{where}.{key}: {value!r} is not a list of patterns"
    size = item.get("max_size", "")
    found = _FILE_SIZE.fullmatch(size) if isinstance(size, str) else None
    if size != "" and (found is None or not int(found[1])):
        yield f"{where}.max_size: {size!r} is not a size; allowed: a number above 0 of B, kB, MB, GB or TB"
    seconds = []
    for key in _PATH_AGES:
        value = item.get(key, "0")
        found = _DURATION.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            yield f"{where}.{key}: {value!r} is not a duration, such as 30s, 24h or 90d; '0' is none"
        else:
            seconds.append(int(found[1]) * _UNITS[found[2]])
    if len(seconds) == len(_PATH_AGES) and 0 < seconds[1] <= seconds[0]:
        yield f"{where}.max_age: {item['max_age']} is not more than min_age {item['min_age']}: no file would be sent"
    if not isinstance(item.get("one_filesystem", False), bool):
        yield f"{where}.one_filesystem: {item['one_filesystem']!r} is not allowed; allowed: true, false"


def _service_errors(where: str, item: Any) -> Iterator[str]:
    yield from _keys(where, item, _SERVICE_KEYS, required=("port",))
    if not isinstance(item, Mapping):
        return
    for key in ("port", "backend_port"):
        value = item.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65535:
            yield f"{where}.{key}: {value!r} is not a port in 1..65535"
    if item.get("protocol", "tcp") not in ("tcp", "udp"):
        yield f"{where}.protocol: {item['protocol']!r} is not allowed; allowed: tcp, udp"
    check = item.get("check", {})
    yield from _keys(f"{where}.check", check, _CHECK_KEYS)
    if not isinstance(check, Mapping):
        return
    if check.get("kind", "tcp") not in ("tcp", "http"):
        yield f"{where}.check.kind: {check['kind']!r} is not allowed; allowed: tcp, http"
    for key in ("interval", "timeout", "rise", "fall"):
        if not _is_number(check.get(key, 1)) or check.get(key, 1) <= 0:
            yield f"{where}.check.{key}: {check[key]!r} is not a number above 0"


def _rpo_errors(where: str, rpo: Any) -> Iterator[str]:
    yield from _keys(where, rpo, _RPO_KEYS)
    if isinstance(rpo, Mapping):
        warn, critical = rpo.get("warn", 5), rpo.get("critical", 30)
        if not (_is_number(warn) and _is_number(critical) and 0 < warn <= critical):
            yield f"{where}: warn {warn!r} and critical {critical!r}; allowed: 0 < warn <= critical, in seconds"


def _brake_errors(where: str, brake: Any) -> Iterator[str]:
    yield from _keys(where, brake, _BRAKE_KEYS)
    if not isinstance(brake, Mapping):
        return
    if _brake(brake).get("mode", "hold") not in ("hold", "warn", "off"):
        yield f"{where}.mode: {brake['mode']!r} is not allowed; allowed: hold, warn, off"
    for key in ("window", "most_share", "entropy_share"):
        value = brake.get(key, 1)
        most, unit = (86400, "seconds") if key == "window" else (100, "percent")
        if not _is_number(value) or not 1 <= value <= most:
            yield f"{where}.{key}: {value!r} is not in 1..{most} {unit}"
    files = brake.get("least_files", 1)
    if not isinstance(files, int) or isinstance(files, bool) or files < 1:
        yield f"{where}.least_files: {files!r} is not a number of files from 1"


def _watch_errors(where: str, watch: Any) -> Iterator[str]:
    yield from _keys(where, watch, _WATCH_KEYS)
    if isinstance(watch, Mapping) and watch.get("engine", "auto") not in _ENGINES:
        yield f"{where}.engine: {watch['engine']!r} is not allowed; allowed: {', '.join(_ENGINES)}"
    if isinstance(watch, Mapping) and not isinstance(watch.get("mapped", True), bool):
        yield f"{where}.mapped: {watch['mapped']!r} is not allowed; allowed: true, false"


def _bandwidth_errors(where: str, bandwidth: Any) -> Iterator[str]:
    yield from _keys(where, bandwidth, _BANDWIDTH_KEYS)
    if not isinstance(bandwidth, Mapping):
        return
    yield from _rate_errors(f"{where}.limit", bandwidth.get("limit", "unlimited"))
    if bandwidth.get("schedule") != []:
        yield from _list_errors(where, bandwidth, "schedule", _window_errors)


def _verify_errors(where: str, verify: Any) -> Iterator[str]:
    yield from _keys(where, verify, _VERIFY_KEYS)
    if not isinstance(verify, Mapping):
        return
    if verify.get("every", "week") not in _PERIODS:
        yield f"{where}.every: {verify['every']!r} is not allowed; allowed: {', '.join(_PERIODS)}"
    if not isinstance(verify.get("contents", True), bool):
        yield f"{where}.contents: {verify['contents']!r} is not allowed; allowed: true, false"
    yield from _rate_errors(f"{where}.rate", verify.get("rate", "unlimited"))
    yield from _time_errors(where, verify)


def _consistency_errors(where: str, item: Any) -> Iterator[str]:
    yield from _keys(where, item, _CONSISTENCY_KEYS)
    if not isinstance(item, Mapping):
        return
    mode = item.get("mode", "none")
    for key, allowed in (("mode", ("none", "snapshot")), ("snapshot", ("auto", "btrfs", "reflink"))):
        if item.get(key, allowed[0]) not in allowed:
            yield f"{where}.{key}: {item[key]!r} is not allowed; allowed: {', '.join(allowed)}"
    for key, (least, most) in _CONSISTENCY_SECONDS.items():
        value = item.get(key, least)
        if not _is_number(value) or not least <= value <= most:
            yield f"{where}.{key}: {value!r} is not in {least}..{most} seconds"
    for key, other in (("freeze", "thaw"), ("thaw", "freeze")):
        if not isinstance(item.get(key, ""), str):
            yield f"{where}.{key}: {item[key]!r} is not a shell command"
        elif item.get(key) and not item.get(other):
            yield f"{where}.{other}: is missing; {key} needs it"
    if item.get("freeze") and mode == "none":
        yield f"{where}.mode: {mode!r} takes no freeze and thaw; snapshot does"


def _window_errors(where: str, item: Any) -> Iterator[str]:
    yield from _keys(where, item, _WINDOW_KEYS, required=("limit",))
    if not isinstance(item, Mapping):
        return
    yield from _rate_errors(f"{where}.limit", item.get("limit", "unlimited"))
    yield from _time_errors(where, item)


def _time_errors(where: str, item: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong in the days and times of a window of the week."""
    days = item.get("days", "mon-sun")
    ends = [day for part in str(days).split(",") for day in part.strip().split("-", 1)]
    if not isinstance(days, str) or not set(ends) <= set(_DAYS):
        yield f"{where}.days: {days!r} is not allowed; days ({', '.join(_DAYS)}) and ranges such as mon-fri,sun are"
    times = {key: item.get(key, default) for key, default in (("from", "00:00"), ("to", "24:00"))}
    for key, value in times.items():
        if not isinstance(value, str) or not _TIME.fullmatch(value):
            # Without quotes, 18:00 is the number 1080 to YAML.
            yield f"{where}.{key}: {value!r} is not a time of day in '00:00'..'24:00', in quotes"
    if times["from"] == times["to"]:
        yield f"{where}: from {times['from']} to {times['to']} is no time at all; a whole day is '00:00' to '24:00'"


def _history_errors(where: str, item: Any) -> Iterator[str]:
    yield from _keys(where, item, _HISTORY_KEYS)
    if not isinstance(item, Mapping):
        return
    seconds = []
    for key, default in _HISTORY_AGES.items():
        value = item.get(key, default)
        found = _DURATION.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            yield f"{where}.{key}: {value!r} is not a duration, such as 30m, 24h or 90d; 0 is none"
        else:
            seconds.append(int(found[1]) * _UNITS[found[2]])
    if len(seconds) == len(_HISTORY_AGES) and seconds[0] and sorted(seconds) != seconds:
        yield f"{where}: all, hourly, daily: each must be longer than the one before"
    space = item.get("space", "20%")
    found = _SPACE.fullmatch(space) if isinstance(space, str) else None
    if found is None or (found[2] == "%" and int(found[1]) > 90):
        yield f"{where}.space: {space!r} is not a size; allowed: up to 90%, or a number of MB, GB or TB"


def _owner_map_errors(where: str, group: Mapping[str, Any]) -> Iterator[str]:
    owner_map = group.get("owner_map", {})
    yield from _keys(f"{where}.owner_map", owner_map, _OWNER_KEYS)
    if not isinstance(owner_map, Mapping):
        return
    if any(owner_map.values()) and group.get("owners", "number") != "name":
        yield f"{where}.owner_map: needs owners: name"
    for key in _OWNER_KEYS:
        names = owner_map.get(key, {})
        if not isinstance(names, Mapping):
            yield f"{where}.owner_map.{key}: {names!r} is not a mapping of names here to names on the backup"
            continue
        for name in (*names, *names.values()):
            if not _is_account(name):
                yield f"{where}.owner_map.{key}: {name!r} is not the name of a user or group"
        twice = {there for there in names.values() if list(names.values()).count(there) > 1}
        for there in sorted(map(str, twice)):
            yield f"{where}.owner_map.{key}: {there!r} stands for several; each name is allowed once"


def _is_account(name: Any) -> bool:
    return (
        isinstance(name, str)
        and 0 < len(name) < 256
        and name[0] not in "#~"
        and name.isprintable()
        and not set(name) & set(":/,")
    )


def _rate_errors(where: str, value: Any) -> Iterator[str]:
    found = _RATE.fullmatch(value) if isinstance(value, str) else None
    rate = float(found[1]) * _SCALE[found[2]] / (8 if found[3] == "bit" else 1) if found else 0.0
    if value != "unlimited" and rate < _LEAST_RATE:
        yield (
            f"{where}: {value!r} is not allowed; allowed: unlimited, or at least 64kbit/s, "
            "in bit/s, kbit/s, Mbit/s, Gbit/s, B/s, kB/s, MB/s or GB/s"
        )


def _keys(where: str, item: Any, allowed: Sequence[str], required: Sequence[str] = ()) -> Iterator[str]:
    if not isinstance(item, Mapping):
        yield f"{where}: {item!r} is not a mapping; its keys are {', '.join(allowed)}"
        return
    for key in item:
        if key not in allowed:
            yield f"{where}.{key}: is not a known key; allowed: {', '.join(allowed)}"
    for key in required:
        if key not in item:
            yield f"{where}.{key}: is missing"


def _port_clashes(intent: Intent) -> Iterator[str]:
    seen: dict[tuple[str, int], str] = {}
    for name, group in intent.items():
        for service in group["services"]:
            key = (service.get("protocol", "tcp"), service["port"])
            if key in seen:
                yield (
                    f"farshore_groups.{name}.services: port {key[1]}/{key[0]} is published by group {seen[key]} already"
                )
            seen.setdefault(key, str(name))


def _path_clashes(intent: Intent, replica_root: str) -> Iterator[str]:
    seen: dict[str, list[tuple[str, str]]] = {}
    for name, group in sorted(intent.items()):
        for item in group["paths"]:
            for host, path in (
                (group["local_server"], _source(item)),
                (group["backup_server"], _replica(item, name, intent, replica_root)),
            ):
                for other_name, other in seen.setdefault(host, []):
                    if f"{path}/".startswith(f"{other}/") or f"{other}/".startswith(f"{path}/"):
                        yield (
                            f"farshore_groups.{name}.paths: {path} and {other} of group {other_name} "
                            f"are the same place or lie in each other on {host}"
                        )
                seen[host].append((str(name), path.rstrip("/")))


def _is_address(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(ipaddress.ip_address(value))
    except ValueError:
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Any]:
        return {
            "backup_groups": backup_groups,
            "gateway_place": gateway_place,
            "intent_errors": intent_errors,
            "monitor_groups": monitor_groups,
            "node_groups": node_groups,
            "node_type": node_type,
            "publications": publications,
            "status_table": status_table,
        }
