"""The small models and a workplace of each test, which quantises them in its own way."""

from pathlib import Path

import pytest
from commands import Workplace, make_models, make_workplace


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(tmp_path: Path, models: Path) -> Workplace:
    return make_workplace(tmp_path, models, samples=3)
