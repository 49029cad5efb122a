"""Two trees, compared by their manifests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_NAMED = 50

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """``differing`` counts paths; ``differences`` names the first of them with what differs."""

    compared: int = 0
    differing: int = 0
    bytes: int = 0
    types: dict[str, int] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)


def load(lines: Iterable[str]) -> dict[Key, dict[str, Any]]:
    """Read a manifest."""
    listed = {}
    for line in lines:
        entry = json.loads(line)
        listed[entry.pop("root"), entry.pop("path")] = entry
    return listed


def compare(local: dict[Key, dict[str, Any]], backup: dict[Key, dict[str, Any]]) -> Comparison:
    """Compare all paths of both sides in everything that a manifest says, but for what either of them leaves alone."""
    left_alone = {key for side in (local, backup) for key, entry in side.items() if entry.get("left_alone")}
    local, backup = ({key: side[key] for key in side.keys() - left_alone} for side in (local, backup))
    differences = []
    for key in sorted(local.keys() | backup.keys()):
        text = _difference(local.get(key), backup.get(key))
        if text:
            differences.append(f"{'/'.join(key).encode('utf-8', 'backslashreplace').decode()}: {text}")
    return Comparison(
        compared=len(local.keys() | backup.keys()),
        differing=len(differences),
        bytes=sum(entry.get("size", 0) for entry in local.values()),
        types=dict(Counter(entry["type"] for entry in local.values()).most_common()),
        differences=differences[:_NAMED],
    )


def _difference(local: dict[str, Any] | None, backup: dict[str, Any] | None) -> str:
    if local is None or backup is None:
        return "only on the backup server" if local is None else "only on the local server"
    fields = [name for name in sorted(local.keys() | backup.keys()) if local.get(name) != backup.get(name)]
    return "; ".join(f"{name} is {_short(local.get(name))} here, {_short(backup.get(name))} there" for name in fields)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
