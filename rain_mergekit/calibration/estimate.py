"""What a calibration will need, from shapes and token counts alone: memory, disk, operations.

The formulas are those of docs/performance.md. Bytes unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

from rain_mergekit.calibration.estimate_site import FLOAT32, SiteNeeds
from rain_mergekit.calibration.file_choices import FileChoices
from rain_mergekit.calibration.model_shape import ModelShape
from rain_mergekit.calibration.operations import Operations
from rain_mergekit.capture.token_chunks import TOKENS

# Python's objects, and the buffers of the libraries that multiply; measured, alike for all models.
LIBRARIES = 40 * 1024**2
# Operations of a symmetric eigenvalue decomposition of n x n with all eigenvectors, over n³.
EIGEN_FLOPS = 9.0
# Models of which every layer is read once, and those of them that are compared in the end.
MODELS, OTHERS = 3, 2


@dataclass(frozen=True)
class Workload:
    """Token counts of both sets, as they are used.

    compared_lengths: of the texts that the instruct and the pretrained model read in the end.
    """

    reasoning_lengths: Sequence[int]
    instruction_lengths: Sequence[int]
    protected_rows: int
    instruction_rows: int
    instruction_passes: int
    itemsize: int
    reading_rows: int = 0
    compared_lengths: Sequence[int] = ()

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
    """What a calibration needs.

    Attributes:
        memory: bytes of resident memory by part, at the highest point, on one process.
        work_disk: bytes of temporary files.
        file_bytes: size of the calibration file.
        read_bytes: bytes read from the checkpoints.
        forward_flops: floating-point operations of the forward passes.
        statistics_flops: those of the bases and factors.
        rank: the largest that the change or the protection of a module may get.
        operations: all of the work, by what limits its speed.
        file: what the file's size is a choice of.
        notes: what the user should know of this model and this activation budget.
    """

    memory: Mapping[str, int]
    work_disk: int
    file_bytes: int
    read_bytes: int
    forward_flops: float
    statistics_flops: float
    rank: int = 0
    operations: Operations = field(default_factory=Operations)
    file: FileChoices | None = None
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Highest resident memory in bytes, besides what the imports take."""
        return sum(self.memory.values())


def site_needs(shape: ModelShape, work: Workload, rank: int, *, oblique: bool) -> list[SiteNeeds]:
    """The sites with the rows that reach them; experts are thought to be used alike."""
    return [
        SiteNeeds(
            site,
            ceil(work.protected_rows * site.share),
            ceil(work.instruction_rows * site.share),
            work.reading_rows if site.reads else 0,
            rank,
            oblique,
        )
        for site in shape.all_sites
    ]


def feature_memory(sites: Sequence[SiteNeeds]) -> int:
    """Rows of all sites, float32, as the passes leave them."""
    return sum(site.rows for site in sites)


def solver_memory(sites: Sequence[SiteNeeds]) -> int:
    """What solving one site after the other takes besides `feature_memory`.

    A site's rows are freed when it is solved, so a later one may take more without a higher peak.
    """
    freed = kept = most = 0
    for site in sites:
        most = max(most, site.solution + kept - freed)
        freed += site.rows
        kept += site.result
    return most


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
    sites = site_needs(shape, work, rank, oblique=oblique)
    return max(0, budget - feature_memory(sites) - _transient(shape, work, sites))


def _transient(shape: ModelShape, work: Workload, sites: Sequence[SiteNeeds]) -> int:
    return max(working_memory(shape, work), solver_memory(sites))


def estimate(
    shape: ModelShape,
    work: Workload,
    *,
    budget: int,
    rank: int,
    oblique: bool,
    stores_v: bool,
    ahead: bool = False,
) -> Estimate:
    """Memory, disk and operations of a calibration with at most `rank` directions a site.

    ahead: whether the next layer is read while one computes.
    """
    sites = site_needs(shape, work, rank, oblique=oblique)
    hidden = hidden_bytes(shape, work)
    kept = min(hidden, hidden_budget(budget, shape, work, rank, oblique=oblique))

    def size(most: int) -> int:
        ranks = sum(min(most, work.protected_rows, width) * width for width in shape.widths)
        head = min(most, work.protected_rows, shape.hidden)
        factors = file_bytes(shape, ranks, stores_v=stores_v)
        return factors + head_bytes(shape, head, stores_v=stores_v)

    written, following = size(rank), ahead and shape.layers > 1
    models = MODELS + OTHERS * bool(work.compared_lengths)
    passed = (*work.lengths, *tuple(work.compared_lengths) * OTHERS)
    forward = shape.layers * forward_flops(shape, passed)
    double = shape.layers * statistics_flops(shape, sites)
    double += 2.0 * shape.vocabulary * shape.hidden * min(work.protected_rows, shape.hidden)
    cubes = shape.layers * sum(needs.decomposed for needs in sites)
    return Estimate(
        memory={
            "layer": shape.memory(work.itemsize),
            "next layer, as stored": following * shape.waiting,
            "features": feature_memory(sites),
            "hidden states": kept,
            "working space": _transient(shape, work, sites),
            "libraries": LIBRARIES,
        },
        work_disk=hidden - kept + 2 * hidden + written,
        file_bytes=written,
        read_bytes=models * shape.model_bytes,
        forward_flops=forward,
        statistics_flops=double + EIGEN_FLOPS * cubes,
        rank=min(rank, work.protected_rows + work.reading_rows),
        operations=Operations(
            products=forward,
            double=double,
            eigen=cubes,
            memory=float(shape.layers * _moved(shape, work)),
            read=float(models * shape.model_bytes),
            write=2.0 * written,
            passes=float(shape.layers * len(passed)),
        ),
        file=FileChoices.of(size, shape.model_bytes, shape.widths, rank),
    )


def _moved(shape: ModelShape, work: Workload) -> int:
    """Bytes that pass through memory beside the products of one layer: features, and weights."""
    features = sum(work.lengths) * (30 * shape.hidden + 8 * shape.ffn) * work.itemsize
    task_vectors = 3 * 2 * shape.layer_parameters * FLOAT32
    return features + task_vectors + shape.layer_parameters * 3 * work.itemsize


def forward_flops(shape: ModelShape, lengths: Sequence[int]) -> float:
    """Passes of texts of these lengths through one layer: matrices, and causal attention."""
    matrices = 2.0 * shape.passed * sum(lengths)
    return matrices + 2.0 * shape.heads_width * sum(length**2 for length in lengths)


def statistics_flops(shape: ModelShape, sites: Sequence[SiteNeeds]) -> float:
    """Gram matrices, responses and oblique solves of one layer's sites; no eigenvectors."""
    total = 0.0
    for needs in sites:
        width, outputs, rows = needs.site.width, needs.site.outputs, needs.protected
        small = min(rows, width)
        total += 1.2 * small * rows * width + 2.0 * outputs * width * small
        if needs.oblique:
            side = min(needs.instruction, width)
            total += 1.2 * side * needs.instruction * width + side**3 / 3
        total += 2 * reading_flops(shape, needs.reading // 2)
    return total


def reading_flops(shape: ModelShape, rows: int) -> float:
    """What attention reads of the prompts, or of the responses, in one layer; no eigenvectors."""
    small = min(rows, shape.hidden)
    answers = 2.0 * 3 * shape.heads_width * shape.hidden * (rows + small)
    return 1.2 * small * rows * shape.hidden + answers
