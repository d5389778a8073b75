"""What stream matching will need, from shapes and token counts alone: memory, disk, operations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from rain_mergekit.calibration.estimate import LIBRARIES, Estimate
from rain_mergekit.calibration.estimate_site import FLOAT32
from rain_mergekit.calibration.expert_rows import BATCH
from rain_mergekit.calibration.file_choices import FileChoices
from rain_mergekit.calibration.fit_rule import FitRule, sums_bytes
from rain_mergekit.calibration.operations import Operations
from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.stream_shape import FittedSite, LayerShape, StreamShape
from rain_mergekit.calibration.stream_site_needs import FitNeeds, HeadNeeds
from rain_mergekit.calibration.stream_texts import StreamTexts
from rain_mergekit.capture.output_head import LOGITS

GIB = 1024**3
# How often the features inside a layer pass through memory beside its products, a token: what
# surrounds the residual stream, and what is between the projections.
_HIDDEN_COPIES, _INNER_COPIES = 40, 8


@dataclass(frozen=True)
class StreamWork:
    """Tokens of each text.

    Attributes:
        own: of both sets, as the reasoning model reads them.
        fitted: those of them that take part in the fit.
        others: what the instruct model reads.
        itemsize: bytes a number in the forward pass.
        rank: the largest of a change.
        budget: the activation budget in bytes.
        batch: tokens of texts that pass a layer together.
        ahead: whether the next layer of both models is read meanwhile.
        chooses: whether the ridge penalty is chosen by tokens held aside.
        before: what both models read once before anything is fitted, to compare their answers.
        compared: how many tokens of answers these are.
    """

    own: Sequence[int]
    fitted: Sequence[int]
    others: Sequence[int]
    itemsize: int
    rank: int
    budget: int
    batch: int = 0
    ahead: bool = True
    chooses: bool = True
    before: Sequence[int] = ()
    compared: int = 0

    @classmethod
    def of(
        cls, texts: StreamTexts, rule: FitRule, itemsize: int, options: RunOptions
    ) -> StreamWork:
        """The lengths of these texts."""
        return cls(
            own=[len(text.input_ids) for text in texts.all],
            fitted=[len(text.input_ids) for text in texts.all if rule.uses(text)],
            others=[len(one.input_ids) for one in (*texts.readings, *texts.bare)],
            itemsize=itemsize,
            rank=rule.max_rank,
            budget=options.activation_budget,
            batch=options.tokens_together,
            ahead=options.read_ahead,
            chooses=rule.epsilon is None,
        )

    def comparing(self, texts: StreamTexts) -> StreamWork:
        """The same where both models read the answers before anything is fitted."""
        tokens = sum(one.answer for one in texts.readings)
        return replace(self, before=texts.compared, compared=tokens)

    @property
    def at_once(self) -> int:
        """Tokens that pass a layer together at most: a batch, or the longest text."""
        return max(*self.own, *self.others, min(self.batch, sum(self.own)))

    @property
    def texts_at_once(self) -> float:
        """How many texts a batch has, about."""
        return max(1.0, self.batch * len(self.own) / sum(self.own))

    def passes(self, layer: LayerShape) -> tuple[int, int]:
        """All passes of that layer, those that end early counted whole: samples, tokens.

        Where an input is fitted within some directions, one pass more finds these.
        """
        sites = sum(self.passes_of(site) for site in layer.sites)
        return (
            2 * len(self.own) + sites * len(self.fitted) + len(self.others),
            2 * sum(self.own) + sites * sum(self.fitted) + sum(self.others),
        )

    def passes_of(self, site: FittedSite) -> int:
        """How often the fitted texts pass the layer up to that site."""
        return 1 if site.experts or self.fit(site).whole else 2

    def fit(self, site: FittedSite) -> FitNeeds:
        """What the fit of that site needs."""
        tokens = int(sum(self.fitted) * site.share)
        half = self.budget // 2
        return FitNeeds(site, tokens, self.rank, half, self.itemsize, self.chooses)


def estimate_streams(shape: StreamShape, work: StreamWork) -> Estimate:
    """Memory, disk and operations of stream matching."""
    hidden, targets = _hidden_bytes(shape, work), _targets(shape, work)
    kept = min(hidden, work.budget // 2)
    written = shape.bytes_at(work.rank)
    done = Operations()
    for layer, count in shape.layers:
        done += layer_work(layer, shape, work) * count
    if shape.head:
        done += head_fit(shape, work).work
    spilled = hidden - kept + max(0, targets - work.budget // 2)
    read = 2 * shape.model_bytes * (2 if work.before else 1)
    heads = 4.0 * work.compared * shape.vocabulary * shape.hidden  # both models' products
    done += Operations(products=heads)
    forward = _forward_flops(shape, work) + heads
    return Estimate(
        memory=max(_phases(shape, work, kept), key=lambda parts: sum(parts.values())),
        work_disk=spilled + 2 * hidden + written,
        file_bytes=written,
        read_bytes=read,
        forward_flops=forward,
        statistics_flops=done.products + done.double - forward,
        rank=work.rank,
        operations=done + Operations(read=read, write=2.0 * written),
        file=FileChoices.of(shape.bytes_at, shape.model_bytes, shape.sides or (1,), work.rank),
        notes=tuple(_notes(shape, work)),
    )


def _notes(shape: StreamShape, work: StreamWork) -> Iterator[str]:
    """Which inputs are too wide for their sums, what that costs, and which budget is enough."""
    sites = {site.width: work.fit(site) for layer, _ in shape.layers for site in layer.sites}
    if any(layer.apart(shape.stored_itemsize) for layer, _ in shape.layers):
        yield (
            "experts are read one by one whenever tokens reach them (--experts-budget), from the "
            "system's cache where it has room for a layer of each model, else from the disk"
        )
    allowed = {width: one.affordable for width, one in sorted(sites.items())}
    cut = {width: directions for width, directions in allowed.items() if directions < width}
    if not cut:
        return
    enough = 2 * sums_bytes(max(cut))
    told = ", ".join(f"{directions:,} of {width:,}" for width, directions in cut.items())
    yield (
        f"wide inputs are fitted within some directions alone ({told}), as their sums are beyond "
        f"half of the activation budget; --activation-budget {ceil(enough / GIB)}GiB fits all"
    )


def _hidden_bytes(shape: StreamShape, work: StreamWork) -> int:
    return (2 * sum(work.own) + sum(work.others)) * shape.hidden * work.itemsize


def _targets(shape: StreamShape, work: StreamWork) -> int:
    widest = max(sum(site.kept for site in layer.sites) for layer, _ in shape.layers)
    return sum(work.own) * widest * work.itemsize


def _phases(shape: StreamShape, work: StreamWork, hidden: int) -> list[Mapping[str, int]]:
    """Every moment that may be the highest: the teachers run, each site is fitted, the head."""
    fixed = {"hidden states": hidden, "libraries": LIBRARIES}
    if work.ahead and shape.depth > 1:
        waiting = max(layer.ahead(shape.stored_itemsize) for layer, _ in shape.layers)
        fixed["next layers, as stored"] = 2 * waiting
    phases = [one | fixed for layer, _ in shape.layers for one in _of_layer(layer, shape, work)]
    head = shape.vocabulary * shape.hidden * shape.stored_itemsize + 3 * FLOAT32 * LOGITS
    if shape.head:
        head = max(head, head_fit(shape, work).memory)
    return [*phases, {"output head": head, "hidden states": hidden, "libraries": LIBRARIES}]


def _of_layer(layer: LayerShape, shape: StreamShape, work: StreamWork) -> list[dict[str, int]]:
    """What one layer takes while the teachers run, and while each of its sites is fitted."""
    one = layer.held(work.itemsize, shape.stored_itemsize)
    targets = min(work.budget // 2, _targets(shape, work))
    taught = {
        "layers of both models": 2 * one,
        "targets": targets,
        "working space": _passing(layer, shape, work),
    }
    phases = [taught]
    open_rows = sum(site.kept for site in layer.sites)
    for site in layer.sites:
        left = min(work.budget // 2, sum(work.own) * open_rows * work.itemsize)
        text = work.itemsize * _rows_at_once(site, work) * (site.width + 2 * site.rows)
        space = max(work.fit(site).memory + text, _passing(layer, shape, work))
        # Experts are compared with those of the other model, one by one.
        layers = 2 * one if site.experts else one
        phases.append({"layers of both models": layers, "targets": left, "working space": space})
        if not site.experts:  # their rows are kept until all are fitted
            open_rows -= site.kept
    return phases


def head_fit(shape: StreamShape, work: StreamWork) -> HeadNeeds:
    """What fitting the output head needs."""
    site = FittedSite(shape.hidden, (2 * shape.hidden,))
    return HeadNeeds(work.fit(site), shape.vocabulary, shape.stored_itemsize)


def _rows_at_once(site: FittedSite, work: StreamWork) -> int:
    """Tokens whose inputs and errors are there together: of a batch, or some of one expert's."""
    if not site.experts:
        return work.at_once
    return min(BATCH + work.at_once, int(sum(work.fitted) * site.share))


def _passing(layer: LayerShape, shape: StreamShape, work: StreamWork) -> int:
    """Texts on their way through a layer together, with what every map receives and gives."""
    return work.itemsize * work.at_once * (layer.features + 2 * layer.widest + 8 * shape.hidden)


def _forward_flops(shape: StreamShape, work: StreamWork) -> float:
    """All passes of all layers; those that end early as far as they go."""
    return sum(count * _layer_flops(layer, work) for layer, count in shape.layers)


def _layer_flops(layer: LayerShape, work: StreamWork) -> float:
    whole = (2.0 * sum(work.own) + sum(work.others) + sum(work.before)) * layer.active
    early = sum(work.fitted) * sum(1.0 * work.passes_of(s) * s.before for s in layer.sites)
    heads = next((site.width for site in layer.sites if not site.reads), 0)
    later = sum(work.passes_of(site) for site in layer.sites if not site.reads)
    squares = 2 * _squares(work.own) + _squares(work.others) + _squares(work.before)
    squares += later * _squares(work.fitted)
    return 2.0 * (whole + early) + 2.0 * heads * squares


def _squares(lengths: Sequence[int]) -> float:
    return float(sum(length**2 for length in lengths))


def _copied_tokens(layer: LayerShape, work: StreamWork) -> float:
    """Tokens of all passes; those that end early count as much as their features of a layer."""
    early, reached = 0.0, 0
    for site in layer.sites:
        reached += site.width + site.rows
        share = 1.0 if site.experts else reached / layer.features
        early += share * work.passes_of(site)
    whole = 2.0 * sum(work.own) + sum(work.others) + sum(work.before)
    return whole + early * sum(work.fitted)


def layer_work(layer: LayerShape, shape: StreamShape, work: StreamWork) -> Operations:
    """Everything that is done in one layer."""
    samples = work.passes(layer)[0] + len(work.before)
    calls = samples / work.texts_at_once
    copied = _copied_tokens(layer, work) * (
        _HIDDEN_COPIES * shape.hidden + _INNER_COPIES * layer.features
    )
    filled = 2.0 * layer.parameters * (shape.stored_itemsize + 3 * work.itemsize)
    filled += (
        calls
        * layer.kept(work.itemsize, shape.stored_itemsize)
        * (shape.stored_itemsize + work.itemsize)
    )
    done = Operations(
        products=_layer_flops(layer, work),
        memory=float(work.itemsize * copied + filled),
        passes=calls,
    )
    for site in layer.sites:
        done += work.fit(site).work * site.copies
        if site.experts:  # the products of both models' experts, and the inner features again
            products = 8.0 * site.copies * work.fit(site).tokens
            done += Operations(products=products * site.width * site.rows)
    return done
