"""The part of a model card that says how the model was merged, between two comments."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.calibration_file.stream_summary import Matching
from rain_mergekit.calibration_file.summary import FileSummary, PresetUse, summarise
from rain_mergekit.config.merge_config import MergeRecipe, parse_recipe, read_recipe
from rain_mergekit.config.method_names import RAIN, REGMEAN
from rain_mergekit.config.plain_merge import PlainMerge, read_any
from rain_mergekit.config.roles import is_proxy
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.verification_record import VerificationRecord, load
from rain_mergekit.models.folder_check import require_no_file
from rain_mergekit.report.card_text import (
    USAGE,
    code,
    data_rows,
    measurement,
    model_link,
    opening_rows,
    two_columns,
)
from rain_mergekit.report.front_matter import with_fields, with_tags
from rain_mergekit.report.plain_section import plain_section
from rain_mergekit.report.public_names import model_tree, without_local_paths
from rain_mergekit.report.regmean_section import regmean_section
from rain_mergekit.system.atomic_file import replacing
from rain_mergekit.system.untrusted_input import read_regular, within

BEGIN = "<!-- rain-mergekit: begin; `mergekit-rain card` rewrites what follows -->"
END = "<!-- rain-mergekit: end -->"
_PLAIN_TAGS: tuple[str, ...] = ("mergekit", "merge")
TAGS = (*_PLAIN_TAGS, "rain-merging")
_INTRO = """\
{reasoning} with the instruction following of {instruct}, merged by
[RAIN-Merging](https://arxiv.org/abs/2602.22538) with rain-mergekit. The difference between {of}
was added where the reasoning model's thinking does not notice it:

    W = W_reasoning + λ · (S_row · Δ · S_col) · (I − U Vᵀ)
    Δ = {delta}"""  # noqa: RUF001
_TUNED_FROM = "the\ninstruct model and the pretrained model that it was tuned from"
_STREAMS_INTRO = """\
{reasoning} with the instruction following of {instruct}, merged by rain-mergekit. Every weight of
the decoder layers got a low-rank change, found by ridge regression without gradients, so that the
merged model's hidden states follow the reasoning model's at prompts and in the thinking, and the
instruct model's at answers ("stream matching"; the roles and calibration sets are those of
[RAIN-Merging](https://arxiv.org/abs/2602.22538)):

    W = W_reasoning + λ · {change}"""
_CITATION = """\
```bibtex
@inproceedings{huang2026rainmerging,
  title     = {{RAIN-Merging}: A Gradient-Free Method to Enhance Instruction Following in Large
               Reasoning Models with Preserved Thinking Format},
  author    = {Huang, Zhehao and Liu, Yuhang and Lin, Baijiong and Lou, Yixin and He, Zhengbao and
               Tian, Hanling and Li, Tao and Huang, Xiaolin},
  booktitle = {International Conference on Learning Representations},
  year      = {2026},
  note      = {arXiv:2602.22538}
}
```"""


def write_card(folder: str | os.PathLike[str], calibration: str | None = None) -> bool:
    """Add or renew our part of `folder`/README.md; says whether the file changed.

    calibration: the calibration file, where it is not at the path that the configuration names.
    Raises RainError if the folder is no merge, the calibration is missing, or the card has our
    comments or its front matter in a form that cannot be kept.
    """
    require_no_file(folder, str(folder))
    config = read_any(Path(folder, "mergekit_config.yml"))
    measured = load(folder)
    if isinstance(config, PlainMerge):
        content, tags = plain_section(config, measured), _PLAIN_TAGS
    else:
        content = section(config, _summary(calibration or config.calibration), measured)
        tags = TAGS if config.method == RAIN else _PLAIN_TAGS
    path = within(folder, "README.md")
    old = _read(path)
    try:
        headed = with_fields(with_tags(old, tags), model_tree(config.models, config.main))
        new = with_section(headed, content)
    except RainError as error:
        raise RainError(f"{path}: {error}") from None
    if new == old:
        return False
    with replacing(path) as out:
        out.write(new.encode("utf-8"))
    return True


def _summary(path: str | os.PathLike[str]) -> FileSummary:
    file = CalibrationFile.open(path)
    try:
        return summarise(file)
    finally:
        file.close()


def carry_over(folder: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
    """Put the README.md of `folder`, if there is one, in place of that of the merge in `new`.

    What people wrote into it stays; where it shows the configuration of the earlier merge as
    mergekit prints it, the new one takes its place.
    """
    try:
        text = read_regular(within(folder, "README.md"))
        was, now = (f"```yaml\n{_config_text(place)}\n```".encode() for place in (folder, new))
    except FileNotFoundError:
        return
    text = _renewed(text, was, now)
    Path(new, "README.md").write_bytes(text)


def publish_names(folder: str | os.PathLike[str]) -> None:
    """Public names in place of this machine's paths in the README.md that mergekit has written.

    Models that are in the hub's cache, and those below adapters, get into its `base_model` too.
    """
    config = read_recipe(folder)
    path = within(folder, "README.md")
    text = without_local_paths(_read(path), config)
    tree = model_tree(config.models, config.main)
    path.write_text(with_fields(text, tree, instead=True), encoding="utf-8")


def _renewed(text: bytes, was: bytes, now: bytes) -> bytes:
    """The card with the new configuration where it shows the old one, in either spelling."""
    for old in (was, _published(was)):
        if text.count(old) == 1:
            return text.replace(old, _published(now))
    return text


def _published(block: bytes) -> bytes:
    """A configuration with public names; as it is where it cannot be read."""
    text = block.decode("utf-8", errors="replace")
    try:
        config = parse_recipe(text.removeprefix("```yaml\n").removesuffix("\n```"), "the card")
    except RainError:
        return block
    return without_local_paths(text, config).encode()


def _config_text(folder: str | os.PathLike[str]) -> str:
    file = Path(folder, "mergekit_config.yml")
    return read_regular(file).decode("utf-8", errors="replace") if file.exists() else "\0"


def with_section(text: str, content: str) -> str:
    """The card with `content` between our comments; the first time, they go to the end."""
    newline = "\r\n" if "\r\n" in text else "\n"
    part = f"{BEGIN}\n{content}\n{END}".replace("\n", newline)
    if BEGIN not in text and END not in text:
        gap = "" if not text.strip() else newline * (1 if text.endswith("\n") else 2)
        return f"{text}{gap}{part}{newline}"
    start, end = text.find(BEGIN), text.find(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or end < start:
        raise RainError(
            "the two comments around our part of the card are not one pair: remove them "
            "and what is between them, it will be added again"
        )
    return text[:start] + part + text[end + len(END) :]


def section(
    config: MergeRecipe, summary: FileSummary, measured: VerificationRecord | None = None
) -> str:
    """Method, models, strength, data, projection, measurement and citation, as Markdown."""
    if summary.kind == REGMEAN:
        return regmean_section(config.strength, summary, measured)
    models = summary.models
    told_as = _INTRO if summary.matching is None else _STREAMS_INTRO
    of, delta = _difference(summary)
    intro = told_as.format(
        reasoning=model_link(models["reasoning"]),
        instruct=model_link(models["instruct"]),
        of=of,
        delta=delta,
        change=_change(summary.matching.start if summary.matching else 0.0),
    )
    told = [*_rows(config, summary), *(measurement(measured) if measured else ())]
    parts = (intro, two_columns(told), USAGE, f"Please cite:\n\n{_CITATION}")
    return "\n\n".join(("## RAIN-Merging", *parts))


def _change(start: float) -> str:
    """What stream matching adds to a weight, as a formula."""
    share = f"({start:g} (W_instruct − W_reasoning) + A Bᵀ)"  # noqa: RUF001
    return share if start else "A Bᵀ"


def _difference(summary: FileSummary) -> tuple[str, str]:
    """What was added, in words and as a formula."""
    if summary.gamma == 1 or is_proxy(summary.models):
        of = "the instruct model\nand the reasoning model"
        return of, "W_instruct − W_reasoning"  # noqa: RUF001
    delta = "W_instruct − W_pretrained"  # noqa: RUF001
    if not summary.gamma:
        return _TUNED_FROM, delta
    less = f"{summary.gamma:g} (W_reasoning − W_pretrained)"  # noqa: RUF001
    of = f"{_TUNED_FROM}, less a share of what reasoning training changed,"
    return of, f"({delta}) − {less}"  # noqa: RUF001


def _rows(config: MergeRecipe, summary: FileSummary) -> Iterator[tuple[str, str]]:
    yield from opening_rows(config.strength, summary)
    yield from data_rows(summary)
    if summary.matching is not None:
        yield "stream matching", _matching(summary.matching, summary.settings)
    else:
        if summary.preset is not None:
            yield "preset", _preset(summary.preset)
        yield "projection", _projection(summary)
        yield "head coefficients", code(summary.settings.get("coefficients", "not recorded"))
    if (head := summary.settings.get("lm_head", "off")) != "off":
        yield "output head, merged and projected too", code(head)
    yield "calibrated with", code(summary.created_by)


def _preset(found: PresetUse) -> str:
    beside = f", but {', '.join(map(code, found.beside))} given beside it" if found.beside else ""
    return code(found.name) + beside


def _matching(found: Matching, settings: Mapping[str, Any]) -> str:
    teacher = code(settings.get("teacher", "not recorded"))
    strength = code(settings.get("teacher_strength", "not recorded"))
    text = f"teacher {teacher}, strength {strength}, changes of mean rank {found.mean_rank:.1f}"
    if found.layers and (left := found.layers[-1].held_out or found.layers[-1].fitted):
        errors = ", ".join(f"{group} {error:.1%}" for group, error in left.items())
        text += f"; distance from the teachers after the last layer: {errors}"
    return text


def _projection(summary: FileSummary) -> str:
    kind = code(summary.settings.get("projection", "not recorded"))
    if not summary.sites:
        return "none"
    ranks = [site.rank for site in summary.sites]
    text = f"{kind}, mean rank {fmean(ranks):.1f} over {len(ranks)} input sites"
    if kept := [site.kept for site in summary.sites if site.kept is not None]:
        text += f", kept energy {fmean(kept):.3f}"
    if response := [site.response for site in summary.sites if site.response is not None]:
        text += f", of the response {fmean(response):.3f}"
    return text


def _read(path: Path) -> str:
    try:
        return read_regular(path).decode("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise RainError(f"{path}: cannot read the model card: {error}") from None
