"""What a running node makes of another configuration. Pure: the node carries it out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from farshore.config import NodeConfig
from farshore.errors import ConfigError

#: What is read once, when the daemon starts. The files that ``tls`` names are looked at all the time.
AT_START = ("node", "listen", "tls", "state_dir", "runtime_dir")


@dataclass(frozen=True, slots=True)
class Reload:
    """``config`` is to be in force; it has the keys ``restart`` as before, as only a restart changes them."""

    config: NodeConfig
    restart: tuple[str, ...]


def merge(running: NodeConfig, wanted: NodeConfig) -> Reload:
    """What can be had of ``wanted`` without a restart. Raises ConfigError when it does not go with what stays."""
    restart = tuple(key for key in AT_START if getattr(running, key) != getattr(wanted, key))
    if not restart:
        return Reload(wanted, ())
    config = replace(wanted, **{key: getattr(running, key) for key in restart})
    try:
        config.validate("")
    except ConfigError as error:
        keys = ", ".join(restart)
        raise ConfigError(error.args[0], f"{error.args[1]} (without a restart, {keys} stays as it is)") from None
    return Reload(config, restart)


def regrouped(running: NodeConfig, wanted: NodeConfig) -> tuple[list[str], list[str], list[str]]:
    """The groups that are gone, that are another, and that are new."""
    before, after = running.groups, wanted.groups
    gone = [name for name in before if name not in after]
    other = [name for name in after if name in before and after[name] != before[name]]
    return gone, other, [name for name in after if name not in before]
