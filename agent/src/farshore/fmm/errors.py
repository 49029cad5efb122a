"""Errors of the file monitoring module."""

from __future__ import annotations

import os

from farshore.errors import FarshoreError


class WatchError(FarshoreError):
    """Cannot watch {0}: {1}"""

    exit_code = 23

    def __init__(self, root: bytes, reason: str) -> None:
        super().__init__(os.fsdecode(root).encode("utf-8", "backslashreplace").decode(), reason)
        self.root = root
        self.reason = reason
