"""Who served the users, when: requests counted in short intervals of time."""

from __future__ import annotations

from typing import Any

from .history import History

_MOST = 240


def bins(history: History, local: str, backup: str) -> dict[str, Any] | None:
    """Answered requests and failures in each interval; ``start`` is wall-clock seconds, ``width`` seconds.

    Only what users did of their own accord counts: readings of the drill itself would show as peaks.
    """
    attempts = [a for a in history.attempts if a.why not in ("audit", "verify")]
    if not attempts:
        return None
    # The wall clock may be set meanwhile; one reading of it is enough to place all monotonic times.
    offset = attempts[0].wall - attempts[0].ended
    start = attempts[0].began + offset
    end = attempts[-1].ended + offset
    width = 0.5
    while (end - start) / width > _MOST:
        width *= 2
    size = int((end - start) / width) + 1
    counts: dict[str, list[int]] = {name: [0] * size for name in ("local", "backup", "failed")}
    for a in attempts:
        name = "failed" if not a.answered else "local" if a.by == local else "backup" if a.by == backup else "failed"
        counts[name][min(size - 1, int((a.ended + offset - start) / width))] += 1
    return {"start": round(start, 3), "width": width, **counts}
