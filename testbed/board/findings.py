"""Paired comparisons of rows on the same test prompts, with a verdict that the interval allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from testbed.board.curves import Row
from testbed.board.methods import BASE, DEFAULT, HEAD, PROMPT, TASK, TASK_LINEAR
from testbed.board.results_file import Entry
from testbed.judging.intervals import Numbers, Ratio, difference, resamples, unpacked
from testbed.judging.judge import domains, strata
from testbed.puzzles.records import Record

Pair = tuple[str, str]
SHARES = ("0.8", "0.9", "0.95", "0.99", "0.999")
CUT = f"{BASE}, normalized rho "

GROUPS: Mapping[str, Sequence[Pair]] = {
    "Oblique against orthogonal": [
        (f"rain oblique {share}, thinking {t}", f"rain orthogonal {share}, thinking {t}")
        for t in (1, 0)
        for share in SHARES
    ]
    + [(DEFAULT, "rain orthogonal 0.99, thinking 1, reading 0.9")],
    "Thinking content protected or only the markers": [
        (f"rain {kind} {share}, thinking 1", f"rain {kind} {share}, thinking 0")
        for kind in ("oblique", "orthogonal")
        for share in SHARES
    ],
    "What attention reads protected or not, and the head merged too": [
        (DEFAULT, BASE),
        *((DEFAULT, f"{BASE}, reading {share}") for share in ("0.5", "0.99")),
        (DEFAULT, PROMPT),
        ("rain orthogonal 0.99, thinking 1, reading 0.9", "rain orthogonal 0.99, thinking 1"),
        (HEAD, DEFAULT),
        (HEAD, TASK),
        (HEAD, "ties"),
    ],
    "Rank share against 0.99": [
        (f"rain oblique {share}, thinking 1", BASE) for share in ("0.8", "0.9", "0.95", "0.999")
    ],
    "Coefficients against none": [
        (f"{DEFAULT}, normalized rho 1", DEFAULT),
        *((f"{CUT}{rho}", BASE) for rho in ("0", "0.2", "1")),
        ("rain orthogonal 0.99, thinking 1, normalized rho 1", "rain orthogonal 0.99, thinking 1"),
        ("rain stage 2 only", TASK_LINEAR),
        (f"{CUT}1", "shuffled coefficients"),
    ],
    "The default against what else one would pick": [
        (DEFAULT, rival)
        for rival in (
            *(TASK, TASK_LINEAR, "ties", "ties, reasoning whole", "dare_ties"),
            *("dare_ties, reasoning whole", "della", "della, reasoning whole", "slerp"),
        )
    ],
    "Reading 0 against controls of the same rank": [
        (BASE, rival)
        for rival in (
            *("random subspace", "shrunk task vector"),
            *("sigmoid projection 0.1", "sigmoid projection 0.01"),
        )
    ],
}


@dataclass(frozen=True)
class Comparison:
    """first - second in shares, with its 95 % interval."""

    first: str
    second: str
    apart: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What may be said."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no clear difference"


class Comparer:
    """Comparisons over one list of test prompts."""

    def __init__(self, prompts: Sequence[Record]) -> None:
        self._where: dict[str, Numbers] = domains(prompts)
        self._counts = resamples(strata(prompts))

    def compare(
        self, rows: Mapping[str, Row], pair: Pair, *, nominal: bool, field: str = "both"
    ) -> Comparison | None:
        """Shares of constrained prompts, each at its own best strength or both at λ = 1."""
        if not all(name in rows for name in pair):
            return None
        entries = [rows[name].nominal if nominal else rows[name].test for name in pair]
        first, second = entries
        if first is None or second is None:
            return None
        ratios = self._share(first, field), self._share(second, field)
        return Comparison(*pair, *difference(*ratios, self._counts))

    def _share(self, entry: Entry, field: str) -> Ratio:
        asked = self._where["asked"]
        return Ratio(unpacked(entry["bits"][field]) * asked, asked)
