"""The little statistics that the figures need."""

from __future__ import annotations

import math
from collections.abc import Sequence


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle; raises ValueError for no values."""
    return percentile(values, 50.0)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values don't exceed, interpolated; raises ValueError for no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100.0
    low = math.floor(place)
    high = math.ceil(place)
    if low == high or ordered[low] == ordered[high]:
        return ordered[low]
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def curve_ms(values: Sequence[float], points: int = 200) -> list[float]:
    """Percentiles 0, 0.5, ... 100 of times in seconds, as milliseconds; empty for no values."""
    if not values:
        return []
    ordered = sorted(values)
    return [round(percentile(ordered, 100.0 * k / points) * 1e3, 4) for k in range(points + 1)]


def pair_ratios(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float]:
    """The ratio of each pair that has both figures; pairs are never mixed, so a slow minute hits both sides of one."""
    return [a / b for a, b in zip(ours, theirs, strict=False) if a is not None and b]
