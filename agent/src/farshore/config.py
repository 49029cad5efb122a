"""Configuration: YAML to frozen dataclasses.

An error names the key by its full path, the value, and what is allowed. Nothing is guessed: an
unknown key is an error, because a misspelt option on the worst day is a missing option.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import netaddr
import yaml

from farshore.errors import ConfigError
from farshore.fmm.types import Root

Side = Literal["local", "remote"]
_T = TypeVar("_T")

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_TIME = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])|24:00")
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kMG]?)(bit|B)/s")
_SCALE = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_DURATION = re.compile(r"([0-9]{1,6})([smhd]?)")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_SPACE = re.compile(r"([0-9]{1,9}) ?(%|MB|GB|TB)")
_SIZES = {"%": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_FILE_SIZE = re.compile(r"([0-9]{1,12}) ?(B|kB|MB|GB|TB)")
_FILE_SIZES = {"B": 1, "kB": 10**3, **_SIZES}
#: Below this, in bytes/s, even what keeps a connection alive would be late.
_LEAST_RATE = 8e3


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a node listens for its peers and for the gateways."""

    address: str
    port: int = 7820

    def validate(self, where: str) -> None:
        _address(f"{where}.address", self.address)
        _port(f"{where}.port", self.port)


@dataclass(frozen=True, slots=True)
class NodeRef:
    """Another node: its name (the common name of its certificate) and where it listens."""

    node: str
    address: str
    port: int = 7820

    def validate(self, where: str) -> None:
        _address(f"{where}.address", self.address)
        _port(f"{where}.port", self.port)


@dataclass(frozen=True, slots=True)
class Tls:
    """Files of this node's identity: the deployment's CA, its own certificate and key (PEM).

    ``crl``: the CA's list of certificates that it has taken back; without it, none are.
    """

    ca: Path
    certificate: Path
    key: Path
    crl: Path | None = None


@dataclass(frozen=True, slots=True)
class PathConfig:
    """One protected path. ``source`` names it the same on both sides; ``path`` is where it lies here.

    Files larger than ``max_size``, changed within ``min_age`` or not since ``max_age`` are left alone; with
    ``one_filesystem``, so is what is mounted below (``fmm.limits``).
    """

    source: str
    path: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_size: str = ""
    min_age: str = "0"
    max_age: str = "0"
    one_filesystem: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            object.__setattr__(self, "path", self.source)

    def validate(self, where: str) -> None:
        for name in ("source", "path"):
            value: str = getattr(self, name)
            if not value.startswith("/") or "/../" in value + "/" or value.rstrip("/") == "":
                raise ConfigError(f"{where}.{name}", f"{value!r} is not allowed; an absolute path other than / is")
        _file_size(f"{where}.max_size", self.max_size)
        least, most = (_duration(f"{where}.{name}", getattr(self, name)) for name in ("min_age", "max_age"))
        if most and most <= least:
            raise ConfigError(
                f"{where}.max_age", f"{self.max_age} is not more than min_age {self.min_age}: no file would be sent"
            )

    def root(self) -> Root:
        """What is protected, as the file monitoring takes it."""
        return Root(
            os.fsencode(self.path).rstrip(b"/"),
            self.include,
            self.exclude,
            _file_size("max_size", self.max_size),
            _duration("min_age", self.min_age),
            _duration("max_age", self.max_age),
            self.one_filesystem,
        )


@dataclass(frozen=True, slots=True)
class Rpo:
    """Thresholds in seconds for the age of the oldest change that is not yet durable on the other side."""

    warn: float = 5.0
    critical: float = 30.0

    def validate(self, where: str) -> None:
        if not 0 < self.warn <= self.critical:
            raise ConfigError(where, f"warn {self.warn} and critical {self.critical}: 0 < warn <= critical")


@dataclass(frozen=True, slots=True)
class Window:
    """A part of the week, in the node's local time, and the limit in it.

    ``start`` and ``end`` (``from`` and ``to`` in the file) are times of day; a window that ends before it starts goes
    on into the day after each of ``days``.
    """

    limit: str
    days: str = "mon-sun"
    start: str = field(default="00:00", metadata={"key": "from"})
    end: str = field(default="24:00", metadata={"key": "to"})

    def validate(self, where: str) -> None:
        _rate(f"{where}.limit", self.limit)
        _days(f"{where}.days", self.days)
        if _minutes(f"{where}.from", self.start) == _minutes(f"{where}.to", self.end):
            raise ConfigError(
                where, f"from {self.start} to {self.end} is no time at all; a whole day is 00:00 to 24:00"
            )

    def covers(self, when: datetime) -> bool:
        """Whether the wall clock's time ``when`` lies in this window."""
        days = _days("days", self.days)
        start, end = _minutes("from", self.start), _minutes("to", self.end)
        today, now = when.weekday(), when.hour * 60 + when.minute
        if start < end:
            return today in days and start <= now < end
        return (today in days and now >= start) or ((today - 1) % 7 in days and now < end)


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """How fast a group's changes may be sent: ``limit``, except in the windows of ``schedule``, the first that fits."""

    limit: str = "unlimited"
    schedule: tuple[Window, ...] = ()

    def validate(self, where: str) -> None:
        _rate(f"{where}.limit", self.limit)

    def at(self, when: datetime) -> float:
        """The limit in bytes/s at the local time ``when``; infinite when there is none."""
        limit = next((window.limit for window in self.schedule if window.covers(when)), self.limit)
        return _rate("limit", limit)


@dataclass(frozen=True, slots=True)
class History:
    """How long the replica remembers: everything for ``all``, then a state for each hour, then one for each day.

    ``space`` is how much of its filesystem the history may take. With ``all`` 0 there is none.
    """

    all: str = "24h"
    hourly: str = "7d"
    daily: str = "90d"
    space: str = "20%"

    def validate(self, where: str) -> None:
        durations = [_duration(f"{where}.{name}", getattr(self, name)) for name in ("all", "hourly", "daily")]
        _space(f"{where}.space", self.space)
        if durations[0] and sorted(durations) != durations:
            raise ConfigError(where, f"all {self.all}, hourly {self.hourly}, daily {self.daily}: each must be longer")

    @property
    def enabled(self) -> bool:
        """Whether there is one."""
        return self.seconds("all") > 0

    @property
    def longest(self) -> int:
        """Seconds after which all is forgotten."""
        return self.seconds("daily")

    def seconds(self, name: str) -> int:
        """``all``, ``hourly`` or ``daily`` in seconds."""
        return _duration(name, getattr(self, name))

    def space_of(self, size: int) -> int:
        """``space`` in bytes, on a filesystem of ``size`` bytes."""
        share, number = _space("space", self.space)
        return size * number // 100 if share else number


@dataclass(frozen=True, slots=True)
class BrakeConfig:
    """When a replica stops and asks before it applies a mass change; ``dbm.replica.brake`` has the rules.

    ``window`` in seconds; ``most_share`` of the group's files may be rewritten or removed in it, and ``entropy_share``
    may turn into contents that look encrypted within a day, both in percent: 100 is never exceeded. A group of fewer
    than ``least_files`` is never judged by its shares.
    """

    mode: Literal["hold", "warn", "off"] = "hold"
    window: float = 60.0
    most_share: float = 20.0
    least_files: int = 50
    entropy_share: float = 5.0

    def validate(self, where: str) -> None:
        if not 1 <= self.window <= 86400:
            raise ConfigError(f"{where}.window", f"{self.window} is not in 1..86400 seconds")
        for name in ("most_share", "entropy_share"):
            if not 1 <= getattr(self, name) <= 100:
                raise ConfigError(f"{where}.{name}", f"{getattr(self, name)} is not in 1..100 percent")
        if self.least_files < 1:
            raise ConfigError(f"{where}.least_files", f"{self.least_files} is not a number of files from 1")


@dataclass(frozen=True, slots=True)
class Verification:
    """How often source, index and replica of a group are compared, and what that may cost.

    ``contents``: with the contents of all files, of which each side reads no more than ``rate`` in a second. One that
    is due starts within the window of ``days``, ``start`` and ``end`` (``from`` and ``to`` in the file; see Window).
    """

    every: Literal["never", "day", "week", "month"] = "week"
    contents: bool = True
    rate: str = "20MB/s"
    days: str = "mon-sun"
    start: str = field(default="00:00", metadata={"key": "from"})
    end: str = field(default="24:00", metadata={"key": "to"})

    def validate(self, where: str) -> None:
        _rate(f"{where}.rate", self.rate)
        Window("unlimited", self.days, self.start, self.end).validate(where)

    @property
    def window(self) -> Window:
        """When one that is due may start."""
        return Window("unlimited", self.days, self.start, self.end)


def read_rate(where: str, value: str) -> float:
    """The bytes/s of a text such as 20MB/s, infinite for unlimited; raises ConfigError, naming ``where``."""
    return _rate(where, value)


@dataclass(frozen=True, slots=True)
class Consistency:
    """Whether the replica gets whole states of the group, each as it was at one moment here.

    With ``mode`` snapshot, every ``interval`` seconds in which something changed a snapshot is taken and sent.
    ``snapshot`` says how; auto is the best that the filesystem can. ``freeze`` and ``thaw`` are shell commands that
    still and wake whoever writes; each may take ``timeout`` seconds, and so may all that lies between them.
    """

    mode: Literal["none", "snapshot"] = "none"
    snapshot: Literal["auto", "btrfs", "reflink"] = "auto"
    interval: float = 5.0
    freeze: str = ""
    thaw: str = ""
    timeout: float = 10.0

    def validate(self, where: str) -> None:
        for name, least, most in (("interval", 0.1, 86400.0), ("timeout", 0.1, 3600.0)):
            value: float = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(f"{where}.{name}", f"{value:g} is not in {least:g}..{most:g} seconds")
        for name, other in (("freeze", "thaw"), ("thaw", "freeze")):
            if getattr(self, name) and not getattr(self, other):
                raise ConfigError(f"{where}.{other}", f"is missing; {name} needs it")
        if self.freeze and self.mode == "none":
            raise ConfigError(f"{where}.mode", "'none' takes no freeze and thaw; snapshot does")


@dataclass(frozen=True, slots=True)
class Watch:
    """How changes are noticed: by which engine (see ``fmm.factory``), and whether mapped files are looked for."""

    engine: Literal["auto", "inotify", "fanotify"] = "auto"
    mapped: bool = True


@dataclass(frozen=True, slots=True)
class OwnerMap:
    """Users and groups that are called otherwise on the backup server: names there by names on the local server."""

    users: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)

    def validate(self, where: str) -> None:
        for key in ("users", "groups"):
            names: dict[str, str] = getattr(self, key)
            for name in (*names, *names.values()):
                _account(f"{where}.{key}", name)
            seen: dict[str, str] = {}
            for here, there in names.items():
                if there in seen:
                    # Nobody could say whose a file is on the way back.
                    raise ConfigError(f"{where}.{key}", f"both {seen[there]!r} and {here!r} are {there!r} there")
                seen[there] = here


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """A protection group as one of its two nodes sees it."""

    side: Side
    peer: NodeRef
    paths: tuple[PathConfig, ...]
    units: tuple[str, ...] = ()
    rpo: Rpo = field(default_factory=Rpo)
    bandwidth: Bandwidth = field(default_factory=Bandwidth)
    compress: bool = True
    history: History = field(default_factory=History)
    brake: BrakeConfig = field(default_factory=BrakeConfig)
    verify: Verification = field(default_factory=Verification)
    consistency: Consistency = field(default_factory=Consistency)
    watch: Watch = field(default_factory=Watch)
    owners: Literal["number", "name"] = "number"
    owner_map: OwnerMap = field(default_factory=OwnerMap)

    def validate(self, where: str) -> None:
        if self.owners != "name" and (self.owner_map.users or self.owner_map.groups):
            raise ConfigError(f"{where}.owner_map", f"needs owners: name; it is {self.owners}")
        if not self.paths:
            raise ConfigError(f"{where}.paths", "is empty; at least one path is needed")
        for key in ("source", "path"):
            seen: set[str] = set()
            for item in self.paths:
                value = getattr(item, key).rstrip("/")
                if value in seen:
                    raise ConfigError(f"{where}.paths", f"{key} {value!r} is named twice")
                if any(value.startswith(s + "/") or s.startswith(value + "/") for s in seen):
                    raise ConfigError(f"{where}.paths", f"{key} {value!r} and another lie in each other")
                seen.add(value)


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """``node.yml``: what ``farshore-node`` runs by."""

    node: str
    listen: Endpoint
    tls: Tls
    groups: dict[str, NodeGroup]
    gateways: tuple[str, ...] = ()
    state_dir: Path = Path("/var/lib/farshore")
    runtime_dir: Path = Path("/run/farshore")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = False

    def validate(self, where: str) -> None:
        places = [(f"groups.{n}.paths", p.path) for n, group in self.groups.items() for p in group.paths]
        places.append(("state_dir", str(self.state_dir)))
        for i, (key, path) in enumerate(places):
            for other_key, other in places[:i]:
                mine, theirs = path.rstrip("/") + "/", other.rstrip("/") + "/"
                if mine.startswith(theirs) or theirs.startswith(mine):
                    raise ConfigError(key, f"{path} and {other} ({other_key}) lie in each other; they must be apart")


@dataclass(frozen=True, slots=True)
class Check:
    """How to ask whether a service answers. Times in seconds; rise and fall count successive answers."""

    kind: Literal["tcp", "http"] = "tcp"
    interval: float = 0.5
    timeout: float = 0.5
    rise: int = 3
    fall: int = 2
    path: str = "/"
    host: str = ""
    statuses: tuple[int, ...] = ()

    def validate(self, where: str) -> None:
        for name in ("interval", "timeout"):
            if not 0.01 <= getattr(self, name) <= 3600:
                raise ConfigError(f"{where}.{name}", f"{getattr(self, name)} is not in 0.01..3600 seconds")
        for name in ("rise", "fall"):
            if not 1 <= getattr(self, name) <= 1000:
                raise ConfigError(f"{where}.{name}", f"{getattr(self, name)} is not in 1..1000")
        if not self.path.startswith("/") or not self.path.isprintable() or " " in self.path:
            raise ConfigError(f"{where}.path", f"{self.path!r} is not a URL path; it begins with /")
        for status in self.statuses:
            if not 100 <= status <= 599:
                raise ConfigError(f"{where}.statuses", f"{status} is not an HTTP status in 100..599")


@dataclass(frozen=True, slots=True)
class Service:
    """One port that users reach through LDRG. ``backend_port`` defaults to the public ``port``."""

    port: int
    protocol: Literal["tcp", "udp"] = "tcp"
    backend_port: int = 0
    check: Check = field(default_factory=Check)

    def __post_init__(self) -> None:
        if not self.backend_port:
            object.__setattr__(self, "backend_port", self.port)

    def validate(self, where: str) -> None:
        _port(f"{where}.port", self.port)
        _port(f"{where}.backend_port", self.backend_port)


@dataclass(frozen=True, slots=True)
class MonitorGroup:
    """A protection group as the monitor on LDRG sees it."""

    local: NodeRef
    backup: NodeRef
    services: tuple[Service, ...]
    failover: Literal["auto", "manual"] = "auto"
    failback: Literal["auto", "manual"] = "auto"
    #: Seconds that the local server must be well again before recovery begins.
    hold_down: float = 2.0
    #: Seconds that a step on a node (start units, flush) may take before it counts as failed.
    step_timeout: float = 60.0
    rpo: Rpo = field(default_factory=Rpo)

    def validate(self, where: str) -> None:
        if not self.services:
            raise ConfigError(f"{where}.services", "is empty; at least one service is needed")


@dataclass(frozen=True, slots=True)
class Gateway:
    """LDRG's own addresses: users come to ``public_address``; ``lan_address`` is what servers see."""

    public_address: str
    lan_address: str

    def validate(self, where: str) -> None:
        _address(f"{where}.public_address", self.public_address)
        _address(f"{where}.lan_address", self.lan_address)


@dataclass(frozen=True, slots=True)
class MonitorConfig:
    """``monitor.yml``: what ``farshore-monitor`` runs by."""

    node: str
    gateway: Gateway
    tls: Tls
    groups: dict[str, MonitorGroup]
    state_dir: Path = Path("/var/lib/farshore")
    runtime_dir: Path = Path("/run/farshore")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = False

    def validate(self, where: str) -> None:
        seen: dict[tuple[str, int], str] = {}
        for name, group in self.groups.items():
            for service in group.services:
                key = (service.protocol, service.port)
                if key in seen:
                    raise ConfigError(
                        f"groups.{name}.services",
                        f"port {service.port}/{service.protocol} belongs to group {seen[key]!r} already",
                    )
                seen[key] = name


def load(path: Path, kind: type[_T]) -> _T:
    """Read ``path`` as a ``kind`` (NodeConfig or MonitorConfig); raises ConfigError."""
    try:
        data = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ConfigError(str(path), error.strerror or str(error)) from error
    except yaml.YAMLError as error:
        raise ConfigError(str(path), f"is not YAML: {error}") from error
    try:
        return parse(data, kind)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.args[0]}", error.args[1]) from None


def parse(data: object, kind: type[_T]) -> _T:
    """Turn plain data into ``kind``; raises ConfigError naming the key, the value and what is allowed."""
    return typing.cast(_T, _convert(data, kind, ""))


def _convert(data: Any, kind: Any, where: str) -> Any:
    name = where or "configuration"
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(data, kind, where)
    if origin in (Union, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        return None if data is None else _convert(data, kinds[0], where)
    if origin is Literal:
        if data is False and "off" in typing.get_args(kind):
            return "off"  # which YAML 1.1 takes for a truth value
        if data not in typing.get_args(kind):
            allowed = ", ".join(map(repr, typing.get_args(kind)))
            raise ConfigError(name, f"{data!r} is not allowed; allowed: {allowed}")
        return data
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            raise ConfigError(name, f"{data!r} is not a list")
        item = typing.get_args(kind)[0]
        return tuple(_convert(value, item, f"{where}[{i}]") for i, value in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise ConfigError(name, f"{data!r} is not a mapping")
        item = typing.get_args(kind)[1]
        if item is str:
            return {_scalar(key, str, name): _scalar(value, str, f"{where}.{key}") for key, value in data.items()}
        return {_name(key, where): _convert(value, item, f"{where}.{key}".lstrip(".")) for key, value in data.items()}
    return _scalar(data, kind, name)


def _scalar(data: Any, kind: Any, name: str) -> Any:
    if kind is Path and isinstance(data, str):
        return Path(data)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if kind in (int, float) and isinstance(data, bool):
        raise ConfigError(name, f"{data!r} is not a number")
    if not isinstance(data, kind):
        words = {
            int: "a whole number",
            float: "a number",
            str: "a text; quotes make it one",
            bool: "true or false",
            Path: "a path",
        }
        raise ConfigError(name, f"{data!r} is not {words.get(kind, kind.__name__)}")
    return data


def _dataclass(data: Any, kind: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(where or "configuration", f"{data!r} is not a mapping")
    hints = typing.get_type_hints(kind)
    fields = {f.metadata.get("key", f.name): f for f in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            allowed = ", ".join(fields)
            raise ConfigError(f"{where}.{key}".lstrip("."), f"is not a known key; allowed: {allowed}")
    values = {}
    for key, spec in fields.items():
        below = f"{where}.{key}".lstrip(".")
        if key in data:
            values[spec.name] = _convert(data[key], hints[spec.name], below)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(below, "is missing")
    built = kind(**values)
    if hasattr(built, "validate"):
        built.validate(where)
    return built


def _name(value: object, where: str) -> str:
    """Names of groups become directories and chain names, so their alphabet is narrow."""
    text = value if isinstance(value, str) else ""
    plain = text.replace("-", "").replace("_", "")
    if not (plain.isascii() and plain.isalnum() and text[0].isalpha() and len(text) <= 20):
        raise ConfigError(
            f"{where}.{value}".lstrip("."),
            "is not a name; allowed: up to 20 letters, digits, - and _, beginning with a letter",
        )
    return text


def _account(where: str, name: str) -> None:
    """Names of users and groups, as directory services have them too: alice, EXAMPLE\\alice, alice@example.org."""
    if not 0 < len(name) < 256 or name[0] in "#~" or not name.isprintable() or set(name) & set(":/,"):
        raise ConfigError(where, f"{name!r} is not the name of a user or group")


def _address(where: str, value: str) -> None:
    try:
        netaddr.IPAddress(value)
    except (netaddr.AddrFormatError, ValueError):
        raise ConfigError(where, f"{value!r} is not an IP address") from None


def _port(where: str, value: int) -> None:
    if not 0 <= value <= 65535:
        raise ConfigError(where, f"{value} is not a port in 1..65535")


def _rate(where: str, value: str) -> float:
    """The bytes/s of a text such as 20Mbit/s."""
    if value == "unlimited":
        return math.inf
    found = _RATE.fullmatch(value)
    rate = float(found[1]) * _SCALE[found[2]] / (8 if found[3] == "bit" else 1) if found else 0.0
    if rate < _LEAST_RATE:
        raise ConfigError(
            where,
            f"{value!r} is not allowed; allowed: unlimited, or at least 64kbit/s, "
            "in bit/s, kbit/s, Mbit/s, Gbit/s, B/s, kB/s, MB/s or GB/s",
        )
    return rate


def _duration(where: str, value: str) -> int:
    """The seconds of a text such as 24h."""
    found = _DURATION.fullmatch(value)
    if not found:
        raise ConfigError(where, f"{value!r} is not a duration, such as 30m, 24h or 90d; 0 is none")
    return int(found[1]) * _UNITS[found[2]]


def _space(where: str, value: str) -> tuple[bool, int]:
    """Whether a text such as 20% or 50GB is a share, and its number of percent or bytes."""
    found = _SPACE.fullmatch(value)
    if not found or (found[2] == "%" and int(found[1]) > 90):
        raise ConfigError(where, f"{value!r} is not a size; allowed: up to 90%, or a number of MB, GB or TB")
    return found[2] == "%", int(found[1]) * _SIZES[found[2]]


def _file_size(where: str, value: str) -> int:
    """The bytes of a text such as 10GB; 0, which is no limit, for an empty one."""
    if not value:
        return 0
    found = _FILE_SIZE.fullmatch(value)
    size = int(found[1]) * _FILE_SIZES[found[2]] if found else 0
    if not size:
        raise ConfigError(where, f"{value!r} is not a size; allowed: a number above 0 of B, kB, MB, GB or TB")
    return size


def _days(where: str, value: str) -> frozenset[int]:
    """The weekdays, Monday is 0, of a text such as mon-fri,sun."""
    found: set[int] = set()
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        if first not in _DAYS or (last if dash else first) not in _DAYS:
            allowed = ", ".join(_DAYS)
            raise ConfigError(where, f"{value!r} is not allowed; days ({allowed}) and ranges such as mon-fri,sun are")
        day, end = _DAYS.index(first), _DAYS.index(last or first)
        found.add(day)
        while day != end:
            day = (day + 1) % 7
            found.add(day)
    return frozenset(found)


def _minutes(where: str, value: str) -> int:
    """The minutes since midnight of a text such as 08:00."""
    if not _TIME.fullmatch(value):
        raise ConfigError(where, f"{value!r} is not a time of day in 00:00..24:00, such as 08:00")
    return int(value[:2]) * 60 + int(value[3:])
