"""Check a merge configuration in seconds, from headers, tokenizers and a few rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from rain_mergekit.calibration import pipeline
from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.checks.host_plan import require_found, require_shared
from rain_mergekit.checks.role_names import swapped_hint
from rain_mergekit.checks.task_vector_size import LARGEST
from rain_mergekit.checks.tokenizers import disagreements
from rain_mergekit.checks.vocabulary_sizes import different_vocabularies, model_warnings
from rain_mergekit.config.merge_config import RainConfig
from rain_mergekit.dequantize.plain_view import plain_view
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation import parents
from rain_mergekit.models.checkpoint import PLAIN_TYPES, Checkpoint
from rain_mergekit.models.empty_model import decoder_layers, empty_model
from rain_mergekit.models.loading import LoadOptions, Trio, default_dtype, open_trio
from rain_mergekit.models.merge_names import lost_tensors, lost_warning, merge_names
from rain_mergekit.models.model_tensors import ModelTensors
from rain_mergekit.models.tokenizer import has_tokenizer, load_tokenizer
from rain_mergekit.text.marker_detection import find_markers

_SHOWN = 3
_MIB = 1024**2
# A task vector this much smaller than the reasoning model's changes next to nothing at lambda 1.
_SMALL = 0.02
_ALIKE = 0.5  # cosine, above which two task vectors are much the same


@dataclass(frozen=True)
class Finding:
    """One thing about a configuration.

    level: `problem` stops the merge or is sure to spoil it, `warning` may, `note` informs.
    """

    topic: str
    level: str
    text: str


def check_config(config: RainConfig, load: LoadOptions) -> list[Finding]:
    """All findings that need no running model; the check continues after a problem.

    If the models cannot be opened or are of two families, that is the only finding.
    """
    try:
        trio = open_trio(config, load, plain_view)
    except RainError as error:
        return [Finding("models", "problem", str(error))]
    loaded = _Tokenizers(trio)
    parts: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("models", lambda: _models(config, trio)),
        ("shapes", lambda: _shapes(trio)),
        ("vocabulary", lambda: _vocabulary(config, trio)),
        ("types", lambda: _types(config, trio)),
        ("tokenizers", lambda: _tokenizers(config, trio, loaded.by_role)),
        ("templates", lambda: _templates(loaded.by_role)),
        ("relations", lambda: _relations(trio)),
        ("left out", lambda: _left_out(trio)),
        ("calibration", lambda: _calibration(config, trio, load)),
    )
    found: list[Finding] = []
    for topic, part in parts:
        found += _said(topic, part)
    return found


def _said(topic: str, part: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of one part; an error that stops it becomes a finding."""
    try:
        yield from part()
    except RainError as error:
        yield Finding(topic, "problem", str(error))


def _distinct(trio: Trio) -> dict[str, Checkpoint]:
    """The models by role; one that stands for two has the first of its roles."""
    seen: dict[str, str] = {}
    for role, model in trio.items().items():
        seen.setdefault(model.path, role)
    return {role: model for role, model in trio.items().items() if seen[model.path] == role}


def _models(config: RainConfig, trio: Trio) -> Iterator[Finding]:
    for role, model in _distinct(trio).items():
        size = f"{len(model.names)} tensors, {model.bytes / _MIB:.1f} MiB"
        yield Finding("models", "note", f"{role}: {model.reference}: {size}")
    if trio.instruct.path in (trio.reasoning.path, trio.pretrained.path):
        text = "the instruct model is given twice: the task vector is zero"
        yield Finding("models", "problem", text)
    if config.settings.fit == "projection":
        hint = swapped_hint(config.instruct, config.pretrained)
        if hint is not None:
            yield Finding("models", "warning", hint)


def _shapes(trio: Trio) -> Iterator[Finding]:
    """Tensors that differ in shape, those with a row a token left to `_vocabulary`."""
    models = _distinct(trio)
    own = models["reasoning"]
    shapes = {role: model.shapes(model.names) for role, model in models.items()}
    expected = shapes.pop("reasoning")
    tokens = set(different_vocabularies(models, trio.config))
    for role, found in shapes.items():
        other = sorted(n for n, s in found.items() if expected.get(n, s) != s and n not in tokens)
        for name in other[:_SHOWN]:
            text = f"{role}: {name} is {list(found[name])}, not {list(expected[name])}"
            yield Finding("shapes", "problem", text)
        if len(other) > _SHOWN:
            yield Finding("shapes", "problem", f"{role}: {len(other) - _SHOWN} more differ")
        missing = sorted(own.names - found.keys())
        if missing:
            text = f"{role}: {len(missing)} tensors under other names or missing, as {missing[0]}"
            yield Finding("shapes", "note", text)


def _vocabulary(config: RainConfig, trio: Trio) -> Iterator[Finding]:
    for name, by_role in different_vocabularies(trio.items(), trio.config).items():
        sizes = ", ".join(f"{role} {shape[0]}" for role, shape in by_role.items())
        if config.tokenizer:
            yield Finding("vocabulary", "note", f"{name}: {sizes}; mergekit aligns them")
        else:
            text = f"{name}: {sizes}: mergekit stops there; add `tokenizer: {{source: base}}`"
            yield Finding("vocabulary", "problem", text)


def _types(config: RainConfig, trio: Trio) -> Iterator[Finding]:
    for role, model in _distinct(trio).items():
        counts = Counter(model.types(model.names).values())
        shown = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        coded = sorted(set(counts) - set(PLAIN_TYPES))
        yield Finding("types", "note", f"{role}: stored as {shown}")
        if coded:
            text = f"{role}: {', '.join(coded)}: quantised weights cannot be merged"
            yield Finding("types", "problem", text)
        if counts.get("F32") and config.merge.dtype in ("bfloat16", "float16"):
            text = f"{role}: the merge rounds its float32 weights to {config.merge.dtype}"
            yield Finding("types", "warning", text)


@dataclass(frozen=True)
class _Tokenizers:
    """The tokenizers of those models that have one, loaded once."""

    trio: Trio

    @cached_property
    def by_role(self) -> dict[str, PreTrainedTokenizerBase]:
        models = _distinct(self.trio)
        return {role: load_tokenizer(m) for role, m in models.items() if has_tokenizer(m.path)}


def _tokenizers(
    config: RainConfig, trio: Trio, loaded: Mapping[str, PreTrainedTokenizerBase]
) -> Iterator[Finding]:
    if "reasoning" not in loaded:
        yield Finding("tokenizers", "problem", "the reasoning model comes without a tokenizer")
        return
    own, settings = loaded["reasoning"], config.settings
    markers = settings.marker_texts or find_markers(
        settings.reasoning_data, own, settings.chat_template_kwargs
    )
    yield Finding("tokenizers", "note", f"thinking markers: {markers}")
    for role, other in loaded.items():
        if role == "reasoning":
            continue
        who = f"the {role} model {trio.items()[role].reference}"
        problems = list(disagreements(own, other, who, markers.words))
        for text in problems:
            accepted = "other_tokens" in settings.accept
            yield Finding("tokenizers", "warning" if accepted else "problem", text)
        if not problems:
            yield Finding("tokenizers", "note", f"{role}: reads tokens as the reasoning model does")


def _templates(loaded: Mapping[str, PreTrainedTokenizerBase]) -> Iterator[Finding]:
    found = {role: str(tokenizer.chat_template or "") for role, tokenizer in loaded.items()}
    own = found.pop("reasoning", "")
    if not own:
        yield Finding("templates", "problem", "the reasoning model has no chat template")
    for role, template in found.items():
        if not template:
            yield Finding("templates", "note", f"{role}: no chat template")
        elif template != own:
            text = f"{role}: another chat template; the merged model has the reasoning model's"
            yield Finding("templates", "note", text)


def _relations(trio: Trio) -> Iterator[Finding]:
    """Distances of the models, and of the task vectors size and sign."""
    # rows of quantised models cannot be compared without their scales
    plain = {role: one for role, one in _distinct(trio).items() if one.plain}
    rows = parents.shared_rows(plain) if plain else {}
    for (one, other), found in parents.relations(rows).items():
        near = f"distance {found.distance:.3g} of the norm, cosine {found.cosine:.4f}"
        yield Finding("relations", "note", f"{one} and {other}: {near}")
        if found.distance >= LARGEST:
            yield Finding("relations", "problem", f"{one} and {other} are not of one origin")
        elif not found.distance:
            yield Finding("relations", "problem", f"{one} and {other} have equal weights")
    if len(rows) < len(trio.items()):  # one model stands for two
        return
    vectors = parents.task_vector_pair(*(rows[r] for r in ("instruct", "reasoning", "pretrained")))
    yield Finding(
        "relations",
        "note",
        f"task vectors: instruct {vectors.instruct:.3g}, reasoning {vectors.reasoning:.3g} of the "
        f"pretrained norm; cosine {vectors.cosine:.3f}, {100 * vectors.agreement:.0f} % of the "
        "entries have the same sign",
    )
    if vectors.instruct < _SMALL * vectors.reasoning:
        text = "the instruct model's task vector is tiny beside the reasoning model's: raise lambda"
        yield Finding("relations", "warning", text)
    if vectors.cosine > _ALIKE:
        text = "the two task vectors are much alike: the instruct model may think already"
        yield Finding("relations", "warning", text)


def _left_out(trio: Trio) -> Iterator[Finding]:
    dtype = default_dtype(trio.config, "cpu")
    trust = trio.reasoning.trust_remote_code
    model = empty_model(trio.config, dtype, trust_remote_code=trust)
    tensors = ModelTensors.of(trio.reasoning, model)
    names = merge_names(trio.config, tensors)
    lost = lost_tensors(tensors, names)
    said = lost_warning(lost) if lost else "mergekit writes every tensor of the reasoning model"
    yield Finding("left out", "warning" if lost else "note", said)
    require_found(trio.items())
    layers, prefix = decoder_layers(model, trio.config)
    weights = (f"{prefix}.{name}" for name, part in layers.named_parameters() if part.dim() > 1)
    require_shared(trio.items(), trio.config, names, weights)


def _calibration(config: RainConfig, trio: Trio, load: LoadOptions) -> Iterator[Finding]:
    for text in model_warnings(config, trio):
        yield Finding("calibration", "warning", text)
    if config.calibration.exists():
        yield Finding("calibration", "note", f"{config.calibration} is there already")
    try:
        found = pipeline.plan(config, RunOptions(load=load, quiet=True))
    except RainError as error:
        yield Finding("calibration", "problem", str(error))
        return
    yield Finding(
        "calibration",
        "note",
        f"rank at most {found.rank}, file at most {found.file_bytes / _MIB:.1f} MiB, memory about "
        f"{found.peak / _MIB:.0f} MiB above the imports",
    )
