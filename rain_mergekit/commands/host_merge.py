"""mergekit's own merge into a folder, with what is done right before and after it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit.card import generate_card
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from rain_mergekit.config.merge_config import RainConfig
from rain_mergekit.dequantize.hollow_folder import shown_to_mergekit
from rain_mergekit.errors import RainError
from rain_mergekit.linalg.finite import finite
from rain_mergekit.merge_method.method import register
from rain_mergekit.merge_method.missing_tensors import Completion
from rain_mergekit.models.weight_files import open_weights, weight_files
from rain_mergekit.system.memory import out_of_memory


def merge_into(
    config: RainConfig, stage: Path, options: MergeOptions, completion: Completion
) -> tuple[str, ...]:
    """mergekit's run_merge, as mergekit-yaml calls it; returns what it left out and we added."""
    register()  # also where auto-loading is switched off
    with shown_to_mergekit(completion.checkpoints) as hollow:
        folders = {**completion.merged_adapters, **hollow}
        _run(_with_folders(config.merge, folders), config.text, stage, options)
    if folders and options.write_model_card:
        _write_card(config, stage)
    if config.merge.out_dtype not in (None, config.merge.dtype):
        require_finite(stage, config.merge.out_dtype)
    return completion.write(stage, config)


def _run(merge: MergeConfiguration, source: str, stage: Path, options: MergeOptions) -> None:
    """mergekit's merge; what goes wrong in it is one RainError."""
    try:
        run_merge(merge, str(stage), options=options, config_source=source)
    except (RainError, MemoryError):
        raise
    except Exception as error:
        if options.verbosity or out_of_memory(error):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise RainError(f"mergekit could not merge: {text} (-v shows where)") from error


def require_finite(folder: Path, dtype: str) -> None:
    """RainError if a tensor holds NaN or Inf: mergekit converts after the method has looked."""
    for path in weight_files(folder):
        with open_weights(path) as weights:
            bad = next((name for name in weights.names if not finite(weights.get(name))), None)
        if bad is not None:
            raise RainError(
                f"{bad} holds NaN or infinite values in the result in {dtype}: a lower `lambda`, "
                "or another `out_dtype`"
            )


def _with_folders(
    merge: MergeConfiguration, folders: Mapping[ModelReference, str]
) -> MergeConfiguration:
    """A copy of the merge in which these models are the given folders."""
    if not folders:
        return merge.model_copy(deep=True)

    by_name = {str(reference): folder for reference, folder in folders.items()}

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(one) for one in value]
        if isinstance(value, dict) and not value.keys() >= {"model", "lora"}:
            return {key: placed(one) for key, one in value.items()}
        folder = by_name.get(_name(value))
        return value if folder is None else {"model": {"path": folder}}

    return MergeConfiguration.model_validate(placed(merge.model_dump()))


def _name(value: Any) -> str:
    """What a dumped reference is called: a text, or an object where the text would be unclear."""
    return str(ModelReference.model_validate(value)) if isinstance(value, dict) else str(value)


def _write_card(config: RainConfig, folder: Path) -> None:
    """mergekit's card again, with the models as the configuration names them."""
    text = generate_card(config.merge, config.text, folder.name)
    (folder / "README.md").write_text(text, encoding="utf-8")
