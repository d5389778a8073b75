"""What a calibration will need, from shapes and token counts alone: memory, disk, operations.

The formulas are those of docs/performance.md. Bytes unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rain_mergekit.chunks import TOKENS
from rain_mergekit.rows import BLOCK_BYTES, TASK_ROWS

FLOAT32, FLOAT64 = 4, 8
EIGEN_COPIES = 5  # the matrix, its eigenvectors, LAPACK's work space of two, one selection


@dataclass(frozen=True)
class ModelShape:
    """The largest decoder layer and what surrounds it."""

    layers: int
    layer_parameters: int
    largest_matrix: int
    hidden: int
    heads_width: int
    ffn: int
    stored_itemsize: int
    model_bytes: int
    # (width, rows of the task vectors) of each input site; by default those of a plain decoder:
    # attention (key and value heads counted as query heads), its output, MLP, its output.
    sites: tuple[tuple[int, int], ...] = ()
    # Rows of the output head where it is merged too, else 0.
    vocabulary: int = 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the input sites."""
        return tuple(width for width, _ in self._sites)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Rows of the task vectors at each site."""
        return tuple(rows for _, rows in self._sites)

    @property
    def _sites(self) -> tuple[tuple[int, int], ...]:
        plain = (
            (self.hidden, 3 * self.heads_width),
            (self.heads_width, self.hidden),
            (self.hidden, 2 * self.ffn),
            (self.ffn, self.hidden),
        )
        return self.sites or plain


@dataclass(frozen=True)
class Workload:
    """Token counts of both sets, as they are used."""

    reasoning_lengths: Sequence[int]
    instruction_lengths: Sequence[int]
    protected_rows: int
    instruction_rows: int
    instruction_passes: int
    itemsize: int
    reading_rows: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max((*self.reasoning_lengths, *self.instruction_lengths))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Every pass through a layer, by its length."""
        return (*self.reasoning_lengths, *tuple(self.instruction_lengths) * self.instruction_passes)


@dataclass(frozen=True)
class Estimate:
    """Memory by part, disk, floating-point operations."""

    memory: Mapping[str, int]
    work_disk: int
    file_bytes: int
    read_bytes: int
    forward_flops: float
    statistics_flops: float

    @property
    def peak(self) -> int:
        """Highest resident memory above the imports."""
        return sum(self.memory.values())


def layer_memory(shape: ModelShape, itemsize: int) -> int:
    """One layer in the forward dtype, and one matrix of each other model, as stored.

    Or, once no layer is needed any more, the output heads of both.
    """
    converted = shape.layer_parameters * itemsize
    layer = converted + 2 * shape.largest_matrix * shape.stored_itemsize
    return max(layer, 2 * shape.vocabulary * shape.hidden * shape.stored_itemsize)


def feature_memory(shape: ModelShape, work: Workload) -> int:
    """Rows of all sites, float32, until the sites are solved."""
    everywhere = (work.protected_rows + work.instruction_rows) * sum(shape.widths)
    return (everywhere + work.reading_rows * shape.hidden) * FLOAT32


def solver_memory(shape: ModelShape, work: Workload, rank: int, *, oblique: bool) -> int:
    """Eigenvectors and factors of the widest site, float64, and blocks of task vectors."""
    width = max(shape.widths)
    sides = [EIGEN_COPIES * min(work.protected_rows, width) ** 2]
    if oblique:
        sides.append(2 * min(work.instruction_rows, width) ** 2)
    kept = min(rank, work.protected_rows)
    blocks = 3 * TASK_ROWS * width * FLOAT32 + 3 * BLOCK_BYTES
    read = work.reading_rows * shape.hidden  # prompts or responses: half of them, and what is left
    return (max(sides) + read + 5 * width * kept) * FLOAT64 + blocks


def working_memory(shape: ModelShape, work: Workload) -> int:
    """Activations of one layer on the longest sample: linear, and the MLP in chunks."""
    attention = 4 * shape.hidden + 4 * shape.heads_width
    return work.itemsize * (work.longest * attention + min(work.longest, TOKENS) * 4 * shape.ffn)


def file_bytes(shape: ModelShape, elements: int, *, stores_v: bool) -> int:
    """The factors of all layers, for that many elements of U in each, float32."""
    return shape.layers * elements * (2 if stores_v else 1) * FLOAT32


def head_bytes(shape: ModelShape, rank: int, *, stores_v: bool) -> int:
    """The factors of the output head, and a number for each of its rows, float32."""
    if not shape.vocabulary:
        return 0
    return (rank * shape.hidden * (2 if stores_v else 1) + shape.vocabulary) * FLOAT32


def hidden_bytes(shape: ModelShape, work: Workload) -> int:
    """Hidden states of all streams."""
    return sum(work.lengths) * shape.hidden * work.itemsize


def hidden_budget(
    budget: int, shape: ModelShape, work: Workload, rank: int, *, oblique: bool
) -> int:
    """What the activation budget leaves for hidden states; the rest of them goes to disk."""
    transient = max(working_memory(shape, work), solver_memory(shape, work, rank, oblique=oblique))
    return max(0, budget - feature_memory(shape, work) - transient)


def estimate(
    shape: ModelShape,
    work: Workload,
    *,
    budget: int,
    rank: int,
    oblique: bool,
    stores_v: bool,
) -> Estimate:
    """Memory, disk and operations of a calibration with at most `rank` directions a site."""
    hidden = hidden_bytes(shape, work)
    kept = min(hidden, hidden_budget(budget, shape, work, rank, oblique=oblique))
    transient = max(working_memory(shape, work), solver_memory(shape, work, rank, oblique=oblique))
    ranks = sum(min(rank, work.protected_rows, width) * width for width in shape.widths)
    head = min(rank, work.protected_rows, shape.hidden)
    written = file_bytes(shape, ranks, stores_v=stores_v)
    written += head_bytes(shape, head, stores_v=stores_v)
    return Estimate(
        memory={
            "layer": layer_memory(shape, work.itemsize),
            "features": feature_memory(shape, work),
            "hidden states": kept,
            "working space": transient,
        },
        work_disk=hidden - kept + 2 * hidden + written,
        file_bytes=written,
        read_bytes=3 * shape.model_bytes,
        forward_flops=shape.layers * forward_flops(shape, work),
        statistics_flops=shape.layers * statistics_flops(shape, work, oblique=oblique)
        + 2.0 * shape.vocabulary * shape.hidden * min(work.protected_rows, shape.hidden),
    )


def forward_flops(shape: ModelShape, work: Workload) -> float:
    """All passes through one layer: matrices, and causal attention."""
    matrices = 2.0 * shape.layer_parameters * sum(work.lengths)
    return matrices + 2.0 * shape.heads_width * sum(length**2 for length in work.lengths)


def statistics_flops(shape: ModelShape, work: Workload, *, oblique: bool) -> float:
    """Gram matrices, eigenvectors, responses and oblique solves of one layer's sites."""
    total = 0.0
    for width, outputs in zip(shape.widths, shape.outputs, strict=True):
        rows, small = work.protected_rows, min(work.protected_rows, width)
        total += 1.2 * small * rows * width + 9.0 * small**3 + 2.0 * outputs * width * small
        if oblique:
            side = min(work.instruction_rows, width)
            total += 1.2 * side * work.instruction_rows * width + side**3 / 3
    return total + 2 * reading_flops(shape, work.reading_rows // 2)


def reading_flops(shape: ModelShape, rows: int) -> float:
    """What attention reads of the prompts, or of the responses, in one layer."""
    small = min(rows, shape.hidden)
    answers = 2.0 * 3 * shape.heads_width * shape.hidden * (rows + small)
    return 1.2 * small * rows * shape.hidden + 9.0 * small**3 + answers
