"""The wheel in an environment of its own, made once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import environments
import pytest
from environments import Environment


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environments.link_dependencies(tmp_path_factory.mktemp("dependencies"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environments.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(
    tmp_path_factory: pytest.TempPathFactory, dependencies: Path, wheel: Path
) -> Environment:
    """The wheel's environment, for the tests that leave it as it is."""
    environment = environments.create(tmp_path_factory.mktemp("installed"), dependencies)
    environment.install("pip", str(wheel))
    return environment
