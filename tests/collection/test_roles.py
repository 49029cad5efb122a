"""The roles' anatomy: defaults and argument specs are mirrors, and task files are short."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROLES = sorted(path.name for path in (Path(__file__).resolve().parents[2] / "roles").iterdir())
MAX_LINES = 65


@pytest.mark.parametrize("role", ROLES)
def test_every_default_has_its_argument_spec(root: Path, role: str) -> None:
    path = root / "roles" / role
    defaults = {}
    if (path / "defaults/main.yml").exists():
        defaults = yaml.safe_load((path / "defaults/main.yml").read_text())
    specs = yaml.safe_load((path / "meta/argument_specs.yml").read_text())["argument_specs"]
    for entry in specs.values():
        assert {name: option.get("default") for name, option in entry["options"].items()} == {
            name: value.strip() if isinstance(value, str) else value for name, value in defaults.items()
        }
    assert all(name.startswith(f"{role}_") for name in defaults)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_explains_itself(root: Path, role: str) -> None:
    readme = (root / "roles" / role / "README.md").read_text()
    specs = yaml.safe_load((root / "roles" / role / "meta/argument_specs.yml").read_text())["argument_specs"]
    for name in specs["main"]["options"]:
        assert f"`{name}`" in readme


@pytest.mark.parametrize("role", ROLES)
def test_task_files_are_short(root: Path, role: str) -> None:
    for path in (root / "roles" / role / "tasks").glob("*.yml"):
        assert len(path.read_text().splitlines()) <= MAX_LINES, path
