"""What every test can rely on: no network, no thread storms, reproducible random numbers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before anything imports torch or transformers: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # where a test has more, two run at a time
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import hypothesis
import pytest
import torch

import rain_mergekit

# For what is not in the package: testbed and benchmarks. Last, so that an installed package is
# found before the sources beside them.
ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

# The continuous integration tests the wheel that it has installed, and nothing else.
if os.environ.get("RAIN_TESTED") == "installed" and "site-packages" not in rain_mergekit.__file__:
    raise pytest.UsageError(f"{rain_mergekit.__file__} is not what was installed")

# Times on a shared machine say nothing; examples that differ from run to run say it too late.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("project")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)
