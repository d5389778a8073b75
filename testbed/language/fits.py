"""What the calibration file of a row says of its fit: size, ranks, distances by layer."""

from pathlib import Path
from typing import Any

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.stream_summary import matching

DIGITS = 4


def fit_of(path: Path) -> dict[str, Any] | None:
    """Distances of the merged hidden states from their teacher's, a list over layers a group.

    None for a file of another kind.
    """
    file = CalibrationFile.open(str(path))
    try:
        found = matching(file)
    finally:
        file.close()
    if found is None:
        return None
    distances = {
        part: {
            group: [round(getattr(layer, part).get(group, 0.0), DIGITS) for layer in found.layers]
            for group in found.groups
        }
        for part in ("fitted", "held_out")
    }
    return {"bytes": path.stat().st_size, "mean_rank": round(found.mean_rank, 1), **distances}
