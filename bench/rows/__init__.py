"""The rows of the table, one family per file. A new family is added to ``families``."""

from __future__ import annotations

from bench.context import Row
from bench.rows.heldopen import HeldOpen
from bench.rows.hostile import Hostile
from bench.rows.insertion import Insertion
from bench.rows.kernels import Kernels
from bench.rows.line import LongLine
from bench.rows.million import Million
from bench.rows.pages import Pages
from bench.rows.rpo import RecoveryPoint
from bench.rows.smallfiles import SmallFiles
from bench.rows.storm import EventStorm
from bench.rows.tunnel import Tunnel


def families() -> list[Row]:
    """All families, in the order of the table."""
    return [
        Pages(),
        Insertion(),
        Kernels(),
        Hostile(),
        SmallFiles(),
        RecoveryPoint(),
        HeldOpen(),
        Million(),
        EventStorm(),
        LongLine(),
        Tunnel(),
    ]


#: Rows that ``--quick`` runs.
QUICK = (1, 2, 3, 4, 5, 6, 7)
