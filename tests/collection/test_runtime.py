"""The lock files, the wheelhouse's keys, and the installation's links."""

from __future__ import annotations

import re
import tarfile
import tomllib
from pathlib import Path
from types import ModuleType

import pytest


def pins(root: Path, flavor: str) -> set[str]:
    text = (root / f"roles/agent_runtime/files/requirements-{flavor}.txt").read_text()
    return set(re.findall(r"^([\w-]+)==", text, re.MULTILINE))


def needed(root: Path, *extras: str) -> set[str]:
    project = tomllib.loads((root / "agent/pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    return {re.split(r"[<>=;\[ ]", item)[0] for item in wanted}


@pytest.mark.parametrize("flavor", ["node", "gateway"])
def test_every_dependency_is_pinned(root: Path, flavor: str) -> None:
    assert needed(root, flavor) <= pins(root, flavor)


def test_gateways_get_no_numba(root: Path) -> None:
    assert not {"numba", "numpy", "llvmlite"} & pins(root, "gateway")


def house(wheelhouse: ModuleType, tmp_path: Path, python: str = "3.11", pin: str = "one==1") -> object:
    source = tmp_path / "agent"
    (source / "src").mkdir(parents=True, exist_ok=True)
    (source / "README.md").write_text("")
    (source / "pyproject.toml").write_text('version = "1.2.3"\n')
    (tmp_path / "requirements.txt").write_text(f'{pin}  # why\ntwo==2; python_version >= "3.12"\n')
    return wheelhouse.Wheelhouse(
        str(source), str(tmp_path / "requirements.txt"), [], python, "x86_64", str(tmp_path / "cache")
    )


def test_the_key_follows_the_content(wheelhouse: ModuleType, tmp_path: Path) -> None:
    first = house(wheelhouse, tmp_path)
    assert first.key == house(wheelhouse, tmp_path).key
    assert first.version == "1.2.3"
    assert first.key != house(wheelhouse, tmp_path, python="3.13").key
    assert first.key != house(wheelhouse, tmp_path, pin="one==2").key
    (tmp_path / "agent/src/new.py").write_text("x = 1\n")
    assert first.key != house(wheelhouse, tmp_path).key


def test_what_python_leaves_behind_does_not_count(wheelhouse: ModuleType, tmp_path: Path) -> None:
    first = house(wheelhouse, tmp_path)
    (tmp_path / "agent/src/__pycache__").mkdir()
    (tmp_path / "agent/src/__pycache__/new.pyc").write_text("")
    assert first.key == house(wheelhouse, tmp_path).key


def test_markers_are_the_targets(wheelhouse: ModuleType, tmp_path: Path) -> None:
    assert house(wheelhouse, tmp_path, python="3.11").pins == ["one==1"]
    assert house(wheelhouse, tmp_path, python="3.13").pins == ["one==1", "two==2"]


def test_what_is_not_pinned_is_refused(wheelhouse: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(wheelhouse.WheelhouseError, match="not pinned"):
        house(wheelhouse, tmp_path, pin="one>=1")


def complete(root: Path, release: str) -> None:
    (root / release).mkdir(parents=True)
    (root / release / ".complete").touch()


def test_a_complete_version_is_switched_to_and_old_ones_go(runtime: ModuleType, tmp_path: Path) -> None:
    root = tmp_path / "opt"
    for release in ("1-a", "1-b", "1-c"):
        complete(root, release)
    install = runtime.Runtime(str(root), "1-c", "/none", str(tmp_path / "farshore"), 2, "", "")
    assert install.pending() == ["switch", "link", "prune"]
    install.apply()
    assert install.pending() == []
    assert (root / "current").readlink() == Path("1-c")
    assert (tmp_path / "farshore").readlink() == root / "current/bin/farshore"
    assert len([path for path in root.iterdir() if not path.is_symlink()]) == 2


def test_half_an_installation_is_not_used(runtime: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "opt/1-a").mkdir(parents=True)
    install = runtime.Runtime(str(tmp_path / "opt"), "1-a", "/none", str(tmp_path / "farshore"), 2, "", "")
    assert "install" in install.pending()
    with pytest.raises(OSError, match="/none"):
        install.apply()
    assert not (tmp_path / "opt/current").exists()


def test_an_archive_holds_files_only(runtime: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.add(tmp_path / "x", arcname="../x")
    with pytest.raises(runtime.RuntimeInstallError, match="not a plain file"):
        list(runtime._unpack(str(tmp_path / "bad.tar"), str(tmp_path)))
