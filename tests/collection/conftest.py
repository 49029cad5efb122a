"""Load the collection's plugins from the checkout, without Ansible."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    """The module in the file ``path`` of the checkout."""
    name = "farshore_collection_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def intent() -> ModuleType:
    return load("plugins/filter/intent.py")


@pytest.fixture(scope="session")
def wheelhouse() -> ModuleType:
    return load("plugins/module_utils/_wheelhouse.py")


@pytest.fixture(scope="session")
def runtime() -> ModuleType:
    return load("plugins/module_utils/_runtime.py")


@pytest.fixture(scope="session")
def agent() -> ModuleType:
    return load("plugins/module_utils/_agent.py")
