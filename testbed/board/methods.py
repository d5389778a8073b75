"""What the scoreboard compares, row by row, and at which strengths."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from testbed.board.recipes import (
    ROLES,
    Recipe,
    linear_task_arithmetic,
    rain_settings,
    slerp,
    sparse,
    task_arithmetic,
)

TASK_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.5)
SLERP_STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5)
SPARSE_STRENGTHS = (0.3, 0.5, 0.7, 1.0, 1.5)
TIES_STRENGTHS = (0.1, 0.2, *SPARSE_STRENGTHS)
RAIN_STRENGTHS = (0.7, 1.0, 1.2, 1.5, 2.0, 2.5)
QUICK = (0.5, 1.0, 1.5)
BASE = "rain oblique 0.99, thinking 1"
DEFAULT = f"{BASE}, reading 0.9"
HEAD = f"{DEFAULT}, head"
TASK, TASK_LINEAR = "task_arithmetic", "task_arithmetic, linear"
PROMPT = f"{BASE}, prompt 1"
CORE = (
    *("rain orthogonal 0.99, thinking 1, reading 0.9", f"{DEFAULT}, normalized rho 1", HEAD),
    *(PROMPT, f"{PROMPT}, response 0.1", f"{PROMPT}, response 1"),
    "rain oblique 0.95, thinking 1, prompt 1",
    *("ties", "dare_ties", "della", "slerp"),
    *("rain oblique 0.95, thinking 1", "rain orthogonal 0.95, thinking 1"),
    *("shuffled coefficients", "rain stage 2 only", "sigmoid projection 0.1"),
    *(f"{BASE}, {change}" for change in ("response 0.1", "float32")),
)


@dataclass(frozen=True)
class Method:
    """One row: a model of the trio, a mergekit recipe, or rain with settings and maybe an edit.

    edit names a change that testbed.board.controls makes to a copy of the calibration file.
    head: with lm_head: all, or unseen where the trio's head is its embedding.
    """

    name: str
    group: str
    strengths: tuple[float, ...] = (0.0,)
    recipe: Recipe | None = None
    settings: Mapping[str, Any] | None = None
    edit: str | None = None
    main: bool = False
    dtype: str = "bfloat16"
    head: bool = False

    @property
    def core(self) -> bool:
        """Whether every trio gets this row; the others are for a closer look at one."""
        return self.main or self.name in CORE

    def swept(self, *, quick: bool) -> tuple[float, ...]:
        """The strengths that are tried on validation prompts."""
        if quick and len(self.strengths) > 1:
            return tuple(strength for strength in self.strengths if strength in QUICK)
        return self.strengths


def _rain(
    name: str,
    group: str,
    *,
    main: bool = False,
    edit: str | None = None,
    dtype: str = "bfloat16",
    head: bool = False,
    **settings: Any,
) -> Method:
    return Method(
        name,
        group,
        RAIN_STRENGTHS,
        settings=settings,
        edit=edit,
        main=main,
        dtype=dtype,
        head=head,
    )


def projections() -> list[Method]:
    """Projection x rank share x protected thinking content, coefficients off."""
    shares = ("0.99", "0.95", "0.9", "0.8", "0.999")
    return [
        _rain(
            f"rain {projection} {share}, thinking {thinking}",
            "projection",
            main=share == "0.99",
            **rain_settings(projection, float(share), thinking),
        )
        for share in shares
        for thinking in (1, 0)
        for projection in ("oblique", "orthogonal")
    ]


def reading() -> list[Method]:
    """What attention reads protected too: the default, and with one change each."""
    rows = [
        _rain(DEFAULT, "reading", main=True, **rain_settings("oblique", 0.99, 1, reading_share=0.9))
    ]
    for name, projection, more in (
        ("rain orthogonal 0.99, thinking 1, reading 0.9", "orthogonal", {}),
        (f"{BASE}, reading 0.5", "oblique", {"reading_share": 0.5}),
        (f"{BASE}, reading 0.99", "oblique", {"reading_share": 0.99}),
        (f"{DEFAULT}, normalized rho 1", "oblique", {"coefficients": "normalized"}),
    ):
        found = rain_settings(projection, 0.99, 1, **{"reading_share": 0.9, **more})
        rows.append(_rain(name, "reading", **found))
    found = rain_settings("oblique", 0.99, 1, reading_share=0.9)
    unseen = {**found, "lm_head": "unseen"}
    return [
        *rows,
        _rain(HEAD, "reading", head=True, **found),
        _rain(f"{DEFAULT}, head unseen", "reading", **unseen),
    ]


def coefficients() -> list[Method]:
    """The default projection with coefficients, and coefficients without a projection."""
    rows = []
    for projection, rhos in (("oblique", (1.0, 0.0, 0.2)), ("orthogonal", (1.0,))):
        for rho in rhos:
            name = f"rain {projection} 0.99, thinking 1, normalized rho {rho:g}"
            found = rain_settings(projection, 0.99, 1, coefficients="normalized", rho=rho)
            rows.append(_rain(name, "coefficients", main=rho == 1.0, **found))
    found = rain_settings("oblique", 0.99, 1, coefficients="normalized", rho=1.0)
    rows.append(_rain("rain stage 2 only", "coefficients", edit="no projection", **found))
    return rows


def controls() -> list[Method]:
    """Edited copies of real calibration files."""
    default = rain_settings("oblique", 0.99, 1)
    shuffled = rain_settings("oblique", 0.99, 1, coefficients="normalized", rho=1.0)
    whole = rain_settings("orthogonal", 0.99, 0, rank_by="full")
    return [
        _rain("random subspace", "controls", edit="random subspace", main=True, **default),
        _rain("shrunk task vector", "controls", edit="shrunk", main=True, **default),
        _rain("shuffled coefficients", "controls", edit="shuffled", **shuffled),
        _rain("sigmoid projection 0.1", "soft", edit="sigmoid 0.1", **whole),
        _rain("sigmoid projection 0.01", "soft", edit="sigmoid 0.01", **whole),
    ]


def ablations() -> list[Method]:
    """One change each to a default that has to earn its place."""
    return [
        _rain(
            f"{BASE}, response {weight:g}",
            "ablations",
            **rain_settings("oblique", 0.99, 1, protect_response=weight),
        )
        for weight in (0.1, 1.0)
    ] + [
        _rain(PROMPT, "ablations", **rain_settings("oblique", 0.99, 1, protect_prompt=1.0)),
        _rain(
            "rain oblique 0.95, thinking 1, prompt 1",
            "ablations",
            **rain_settings("oblique", 0.95, 1, protect_prompt=1.0),
        ),
        *(
            _rain(
                f"{PROMPT}, response {weight:g}",
                "ablations",
                **rain_settings("oblique", 0.99, 1, protect_prompt=1.0, protect_response=weight),
            )
            for weight in (0.1, 1.0)
        ),
        _rain(
            f"{BASE}, float32", "ablations", dtype="float32", **rain_settings("oblique", 0.99, 1)
        ),
        _rain(f"{BASE}, window 1", "ablations", **rain_settings("oblique", 0.99, 1, window=1)),
    ]


def methods() -> list[Method]:
    """All rows, the most telling ones first: a run that is cut short has these."""
    models = [Method(role, "models", main=True) for role in ROLES]
    plain = [
        Method(TASK, "mergekit", TASK_STRENGTHS, task_arithmetic, main=True),
        Method(TASK_LINEAR, "mergekit", TASK_STRENGTHS, linear_task_arithmetic, main=True),
    ]
    others = [
        Method(
            f"{name}{', reasoning whole' if whole else ''}",
            "mergekit",
            TIES_STRENGTHS if name == "ties" and not whole else SPARSE_STRENGTHS,
            recipe,
        )
        for name in ("ties", "dare_ties", "della")
        for whole in (True, False)
        for recipe in (sparse(name, whole=whole),)
    ]
    others.append(Method("slerp", "mergekit", SLERP_STRENGTHS, slerp))
    rows = [
        *models,
        *plain,
        *reading(),
        *projections(),
        *controls(),
        *coefficients(),
        *others,
        *ablations(),
    ]
    return sorted(rows, key=_late)


def _late(method: Method) -> int:
    """What a short run leaves out first: variants of rows that come earlier."""
    if method.core:
        return 0 if method.main or method.name == PROMPT else 1
    soon = (
        "0.95, thinking 1",
        "0.9, thinking 1",
        "whole",
        "slerp",
        "stage 2 only",
        "sigmoid projection 0.1",
    )
    if method.name.endswith(soon):
        return 2
    return 4 if method.name.endswith(("thinking 0", "ties", "della")) else 3
