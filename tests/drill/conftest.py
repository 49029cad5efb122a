"""The drill's package and programs lie in the role, where an installed collection has them, too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "roles" / "drill" / "files"))
