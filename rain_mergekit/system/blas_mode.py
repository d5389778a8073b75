"""Ask MKL for products whose bits do not depend on threads, before torch loads it."""

from __future__ import annotations

import os
import sys

OPTION = "--deterministic"
MKL, STRICT = "MKL_CBWR", "AUTO,STRICT"
# MKL promises it for matrix products on processors with AVX2 or AVX-512; the cuBLAS variable is
# what torch asks for where the order of sums has to be the same on a GPU.
_WANTED = {MKL: STRICT, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def ask() -> None:
    """Set what MKL and cuBLAS read when they start; the user's own values stay.

    Once torch is loaded it is too late, and nothing is set.
    """
    if "torch" not in sys.modules:
        for name, value in _WANTED.items():
            os.environ.setdefault(name, value)


def mode() -> str:
    """The MKL mode that the environment sets; empty if none."""
    return os.environ.get(MKL, "").strip().upper()


def strict() -> bool:
    """Whether that mode gives the same bits with any number of threads."""
    return "STRICT" in mode().split(",")
