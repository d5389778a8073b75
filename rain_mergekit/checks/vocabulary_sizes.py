"""Warnings about a configuration, given before the calibration starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rain_mergekit.checks.host_plan import adapter_warning
from rain_mergekit.config.merge_config import RainConfig
from rain_mergekit.config.roles import is_proxy
from rain_mergekit.dequantize.plain_view import plain_view
from rain_mergekit.errors import RainError
from rain_mergekit.models.checkpoint import Checkpoint
from rain_mergekit.models.loading import LoadOptions, Trio, open_models, read_model_config
from rain_mergekit.models.merge_names import lost_warning


def warnings_of(config: RainConfig, trio: Trio, lost: Sequence[str]) -> list[str]:
    """Sentences for the user and for the calibration file; headers are read, no tensors.

    lost: the tensors that mergekit will leave out.
    """
    found = [lost_warning(lost)] if lost else []
    found += model_warnings(config, trio)
    different = different_vocabularies(trio.items(), trio.config)
    if different and not config.tokenizer:
        found.append(f"{_describe(different)} mergekit will not merge them as they are: {_REMEDY}")
    return found


def model_warnings(config: RainConfig, trio: Trio) -> list[str]:
    """Warnings about adapters, and about a reasoning model that stands for the pretrained one."""
    unreachable = adapter_warning(trio.items(), trio.config)
    found = [] if unreachable is None else [unreachable]
    proxy = is_proxy({role: str(model) for role, model in config.models.items()})
    settings = config.settings
    if settings.fit == "projection" and settings.gamma == 1:
        found.append(
            "gamma is 1, so the task vector is instruct minus reasoning: where nothing is "
            "protected the merge takes back what reasoning training did; measure reasoning "
            "afterwards"
        )
    elif proxy and settings.fit == "projection":
        found.append(
            "the reasoning model stands for the pretrained one, so the task vector is instruct "
            "minus reasoning: where nothing is protected the merge takes back what reasoning "
            "training did; keep `lambda` low, and measure reasoning afterwards"
        )
    return found


def require_mergeable(config: RainConfig, options: LoadOptions) -> None:
    """Raise RainError now if mergekit would later refuse embeddings of different sizes."""
    if config.tokenizer:
        return
    models = open_models(config, options, plain_view)
    different = different_vocabularies(models, read_model_config(models["reasoning"]))
    if different:
        raise RainError(f"{config.path}: {_describe(different)} {_REMEDY}")


_REMEDY = (
    "add `tokenizer: {source: base}` to the configuration, which keeps the reasoning model's "
    "tokens and their embeddings (no new calibration is needed)"
)


def different_vocabularies(
    models: Mapping[str, Checkpoint], config: object
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes by role of each tensor with a row for each token, where the three do not agree.

    mergekit gathers every tensor of all models and compares the shapes before the merge method is
    asked, also of those that the method leaves as they are.
    """
    text = getattr(config, "get_text_config", lambda: config)()
    rows = getattr(text, "vocab_size", None)
    shapes = {role: model.shapes(model.names) for role, model in models.items()}
    wanted = [name for name, shape in shapes["reasoning"].items() if shape and shape[0] == rows]
    found = {name: {r: s[name] for r, s in shapes.items() if name in s} for name in sorted(wanted)}
    return {name: by_role for name, by_role in found.items() if len(set(by_role.values())) > 1}


def _describe(different: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str:
    parts = [
        f"{name} ({', '.join(f'{role} {list(shape)}' for role, shape in by_role.items())})"
        for name, by_role in different.items()
    ]
    return f"the vocabularies of the three models differ in size: {', '.join(parts)};"
