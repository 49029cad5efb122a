"""A short soak; `make soak` runs a long one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soak
import workloads

missing = [package for program, package in workloads.NEEDED.items() if shutil.which(program) is None]


@pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
@pytest.mark.parametrize("engine", soak.engines())
def test_programs_at_work_leave_no_difference(tmp_path: Path, engine: str) -> None:
    report = tmp_path / "report.json"
    options = ["--campaign", "workloads", "--minutes", "5", "--rounds", "3", "--seconds", "4", "--engine", engine]
    command = [sys.executable, soak.__file__, *options, "--seed", "20268", "--dir", str(tmp_path / "base")]
    done = subprocess.run([*command, "--report", str(report)], check=False)
    result = json.loads(report.read_text())
    assert result["failures"] == []
    assert done.returncode == 0
    found = result["campaigns"]["workloads"]
    assert (found["rounds"], found["differences"]) == (3, 0)
    assert found["engines"] == {engine: 3}
    assert found["compared"] > 0


def test_a_difference_is_found(tmp_path: Path) -> None:
    """Where the replica's tree is changed behind its node's back, the soak says so."""
    result = soak.Result(1)
    campaign = soak.Soak(tmp_path, result, print, ["logs"], soak.engines()[:1])
    source, replica = campaign.trees()
    for tree in (source, replica):
        tree.mkdir(parents=True)
    (source / "file").write_bytes(b"a")
    with pytest.raises(soak.Failed, match=r"differences: .*file"):
        campaign.compare(patient=False)
    assert result.differences > 0


def test_all_processes_of_a_workload_end(tmp_path: Path) -> None:
    """Also those that it starts by itself, held or not."""
    for held in (False, True):
        running = workloads.Running("rm -rf", tmp_path / "tree", 1, tmp_path, tmp_path / "log")
        if held:
            running.hold()
        assert running.ended is None
        running.kill()
        assert running.ended is not None
