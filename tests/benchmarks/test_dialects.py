"""The comparison of both versions of transformers: what it does with the installed one."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import FAMILIES, make
from published import check_folder

from benchmarks.dialects import NOT_COMPARED, configs, differs, merged


@pytest.mark.parametrize("family", ["olmo2", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_trio_is_merged_at_lambda_zero(tmp_path: Path, family: str) -> None:
    make(tmp_path, family)
    assert merged(tmp_path) is None
    check_folder(tmp_path / "reasoning", tmp_path / "merged")


def test_every_family_is_compared_or_named() -> None:
    assert configs([]).keys() == FAMILIES.keys() >= NOT_COMPARED.keys()


def test_rotary_embeddings_are_given_as_transformers_4_has_them() -> None:
    text = configs(["qwen3_vl"])["qwen3_vl"]["text_config"]
    assert text["rope_theta"] == 10000.0
    assert text["rope_scaling"] == {"rope_type": "default", "mrope_section": [2, 2, 2]}


def test_what_counts_as_a_difference() -> None:
    assert not differs(0.0)
    assert differs(1e-9)
    assert differs("ValueError: no such key")
    assert not differs("cannot run the reasoning model itself: AttributeError: x")
