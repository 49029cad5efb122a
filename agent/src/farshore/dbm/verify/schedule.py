"""When a group is verified without being asked to."""

from __future__ import annotations

import zlib
from datetime import datetime

from farshore.config import Verification

_DAY = 86400.0
PERIODS = {"day": _DAY, "week": 7 * _DAY, "month": 30 * _DAY}
#: Seconds after which one that failed is tried again.
AGAIN = 3600.0


def next_run(settings: Verification, group: str, since: float, last: float | None, failed: bool) -> float | None:
    """When the next verification is due, in seconds of the wall clock; None: never.

    ``since``: when the group was first here; ``last``: when the last verification ended. The first ones of the groups
    are spread over the period, so that a deployment does not verify all of them at once.
    """
    period = PERIODS.get(settings.every)
    if period is None:
        return None
    if last is None:
        return since + period * (0.1 + 0.9 * zlib.crc32(group.encode()) / 2**32)
    return last + (min(period, AGAIN) if failed else period)


def may_start(settings: Verification, due: float | None, now: float, local: datetime) -> bool:
    """Whether one starts now: it is due, and ``local``, the local time, lies in the window."""
    return due is not None and now >= due and settings.window.covers(local)
