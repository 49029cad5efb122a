"""What a campaign of tests ends with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def tell(report: dict[str, Any], path: Path | None) -> int:
    """Print the report, and write it to ``path`` if given; returns the exit code: 0 when its ``failures`` are none."""
    text = json.dumps(report, indent=2)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    print(text)
    return 1 if report["failures"] else 0
