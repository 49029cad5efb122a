"""What a user gets: a tarball with the collection in it, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest


@pytest.mark.skipif(not shutil.which("ansible-galaxy"), reason="needs ansible-core")
def test_the_tarball_is_clean(root: Path, tmp_path: Path) -> None:
    subprocess.run(
        ["ansible-galaxy", "collection", "build", "--output-path", str(tmp_path), str(root)],
        check=True, capture_output=True, cwd=tmp_path,
    )  # fmt: skip
    (archive,) = tmp_path.glob("farshore-dr-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    allowed = {
        "CHANGELOG.md", "FILES.json", "LICENSE", "MANIFEST.json", "README.md",
        "agent", "docs", "inventories", "meta", "playbooks", "plugins", "roles",
    }  # fmt: skip
    assert {name.split("/")[0] for name in names} <= allowed
    for needed in ("agent/pyproject.toml", "agent/README.md", "agent/src/farshore/config.py", "roles/node/README.md"):
        assert needed in names
    for name in names:
        assert not name.endswith((".pyc", ".nbi", ".nbc", ".key", ".crt")), name
        assert (
            "__pycache__" not in name
            and not name.startswith("inventories/example/.pki")
            and not name.startswith("agent/tests")
        ), name
