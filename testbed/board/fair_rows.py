"""The rows of the fair scoreboard: every method gets the same grid of strengths, wherever it ends.

A grid has the ratio of two neighbours √2, begins with five strengths, and grows at an edge until
the best is inside. Arithmetic is float32 and the result is cast to bfloat16 once, for all rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from testbed.board import recipes, rivals
from testbed.board.methods import Method
from testbed.board.recipes import ROLES, rain_settings
from testbed.board.rivals import CalibratedRecipe

STARTS, MOST = 5, 14  # strengths at first, and at most
RAIN = "rain projection"
TWO_MODELS = "rain projection, two models"
STREAMS = "rain streams"
HEAD = ", head"  # with the map to the vocabulary
CEILING = "ceiling"
PAPER = "paper"
PUBLISHED = "published, nearest settings"


@dataclass(frozen=True)
class FairRow(Method):
    """One row. The strengths are scale · √2ᵏ, in two digits, from k = first, at most `limit`.

    calibrated: the recipe of a companion that takes a calibration file, made with the settings in
    section. strength_setting: where the strength is a setting of rain's calibration and lambda
    stays 1.
    """

    calibrated: CalibratedRecipe | None = None
    section: Mapping[str, Any] | None = None
    strength_setting: str | None = None
    scale: float = 1.0
    first: int = -3
    limit: float = inf

    def strength(self, k: int) -> float | None:
        """The strength number k of the grid; None past the limit."""
        found = float(f"{self.scale * 2 ** (k / 2):.2g}")
        return found if found <= self.limit else None

    @property
    def fixed(self) -> bool:
        """Whether there is nothing to choose: the row is a model of the trio, or the ceiling."""
        return self.group == "models"

    @property
    def nominal(self) -> float | None:
        """The strength that one would set without a search; None where there is none."""
        return 1.0 if self.settings is not None or self.calibrated is not None else None


def _half(name: str, recipe: rivals.Recipe) -> FairRow:
    """A way from one model (0) to the other (1)."""
    return FairRow(name, "mergekit", recipe=recipe, first=-5, limit=1.0)


def _plain() -> list[FairRow]:
    sparse = {
        "ties, density 0.2": ("ties", 0.2),
        "ties, density 0.5": ("ties", 0.5),
        "dare_ties": ("dare_ties", 0.5),
        "dare_linear": ("dare_linear", 0.5),
        "della": ("della", 0.5),
        "breadcrumbs": ("breadcrumbs", 0.9),
    }
    return [
        _half("linear", rivals.linear),
        FairRow("task_arithmetic", "mergekit", recipe=recipes.task_arithmetic),
        FairRow(
            "task_arithmetic, rain's tensors",
            "mergekit",
            recipe=recipes.linear_task_arithmetic,
        ),
        FairRow(
            "task_arithmetic, both task vectors", "mergekit", recipe=rivals.task_arithmetic_of_both
        ),
        *(FairRow(name, "mergekit", recipe=rivals.sparse(*v)) for name, v in sparse.items()),
        _half("slerp", recipes.slerp),
        _half("nuslerp, weights", rivals.nuslerp(None)),
        _half("nuslerp, task vectors", rivals.nuslerp("pretrained")),
        FairRow("nearswap", "mergekit", recipe=rivals.nearswap, scale=0.01),
    ]


def _companions() -> list[FairRow]:
    plain, anchored = (rivals.regmean(anchored=anchored) for anchored in (False, True))
    merged = {"regmean": {"features": "merged"}}
    return [
        FairRow("regmean", "companions", calibrated=plain),
        FairRow("regmean, anchored", "companions", calibrated=anchored),
        FairRow("regmean++", "companions", calibrated=plain, section=merged),
        FairRow("aim", "companions", calibrated=rivals.aim()),
        FairRow("aim, shuffled channels", "companions", calibrated=rivals.aim(shuffle="channels")),
        FairRow("opcm", "companions", recipe=rivals.companion("opcm")),
        FairRow("pcb", "companions", recipe=rivals.companion("pcb", density=0.6)),
        FairRow("wudi", "companions", recipe=rivals.companion("wudi")),
    ]


def _rain() -> list[FairRow]:
    streams = {
        STREAMS: {"fit": "streams"},
        f"{STREAMS}, from the reasoning model": {"fit": "streams", "stream_start": 0.0},
        f"{STREAMS}, one teacher of answers": {"fit": "streams", "teacher_margin": None},
        f"{STREAMS}, without both": {
            "fit": "streams",
            "stream_start": 0.0,
            "teacher_margin": None,
        },
    }
    projections: Mapping[str, Mapping[str, object]] = {
        RAIN: {},
        TWO_MODELS: {"gamma": 1.0},
        PAPER: {"preset": "paper"},
        PUBLISHED: {"preset": "published"},
    }
    return [
        *(
            FairRow(name, "rain", settings=own, strength_setting="teacher_strength")
            for name, own in streams.items()
        ),
        FairRow(
            f"{STREAMS}{HEAD}",
            "rain",
            settings=streams[STREAMS],
            strength_setting="teacher_strength",
            head=True,
        ),
        *(
            FairRow(f"{name}{HEAD * head}", "rain", settings=own, head=head)
            for name, own in projections.items()
            for head in (False, True)
        ),
    ]


def _controls() -> list[FairRow]:
    default = rain_settings("oblique", 0.99, 1)
    normalised = rain_settings("oblique", 0.99, 1, coefficients="normalized", rho=1.0)
    return [
        FairRow("random subspace", "controls", settings=default, edit="random subspace"),
        FairRow("shuffled coefficients", "controls", settings=normalised, edit="shuffled"),
    ]


def fair_rows() -> list[FairRow]:
    """All rows; the models of the trio and the ceiling have no strength."""
    models = [FairRow(name, "models") for name in (*ROLES, CEILING)]
    return [*models, *_plain(), *_companions(), *_rain(), *_controls()]
