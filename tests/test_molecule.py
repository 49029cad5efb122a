"""The roles on the lab's hosts: converge, idempotence, check mode, verification, teardown."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: A run takes about four minutes; twice the whole suite's budget means that it hangs.
LONGEST = 3000


@pytest.mark.lab
@pytest.mark.timeout(LONGEST + 60)
def test_default_scenario() -> None:
    if os.geteuid() != 0:
        pytest.skip("the lab's hosts need root")
    log = ROOT / "build" / "molecule.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        result = subprocess.run(
            ["molecule", "test"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=LONGEST,
            env=os.environ | {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}", "ANSIBLE_FORCE_COLOR": "0"},
        )
    text = log.read_text(errors="replace")
    assert result.returncode == 0, f"see {log}\n" + "\n".join(text.splitlines()[-60:])
