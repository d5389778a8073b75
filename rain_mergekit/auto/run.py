"""All steps in order: look, plan, ask, calibrate, merge, measure, record; each is done once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import constants

from rain_mergekit.auto.candidates import Candidate, called, find_roles, look_at
from rain_mergekit.auto.configuration import Places, configuration
from rain_mergekit.auto.finish import measure_and_tell, merged_already, write_down
from rain_mergekit.auto.job import Job
from rain_mergekit.auto.needs import Needs, need_lines, needs_of, require_room
from rain_mergekit.auto.own_set import thinks_on, write_own_set
from rain_mergekit.auto.request import Request, continued, keep
from rain_mergekit.auto.sets import Sets, choose_sets, lay_out
from rain_mergekit.checks.host_plan import require_found
from rain_mergekit.checks.tokenizers import check_tokenizers
from rain_mergekit.commands.console import Console
from rain_mergekit.commands.merge import Making, make, refuse_input
from rain_mergekit.commands.moving_bar import moving_bar
from rain_mergekit.config.merge_config import parse_config, read_config
from rain_mergekit.errors import RainError
from rain_mergekit.models.loading import open_checkpoint
from rain_mergekit.publish.layout import CALIBRATION, CONFIG, INSTRUCTION, REASONING
from rain_mergekit.system.atomic_file import replacing
from rain_mergekit.system.staged_folder import output_folder
from rain_mergekit.text.markers import Markers


def run_auto(job: Job, console: Console, agreed: Callable[[], bool]) -> str | None:
    """Make the merge, or go on with it; returns the verdict on its thinking, None if not agreed.

    agreed: asked once, after the plan, unless the same request was begun before. Raises RainError
    for models or sets that cannot be used; before anything is written if headers, tokenizers and
    configs tell.
    """
    out = output_folder(job.out)
    before = continued(out, job.request)
    if not before or not (out / CONFIG).exists():
        with tempfile.TemporaryDirectory(prefix="rain-auto-") as place:
            roles, text, sets = _look(job, out, Path(place), console)
            if not before and not agreed():
                return None
        keep(out, job.request)
        _sets(job, out, roles["reasoning"].pinned, sets, console)
        with replacing(out / CONFIG) as file:
            file.write(text.encode())
    else:
        console.print(f"Going on with {out}")
    config = read_config(out / CONFIG)
    refuse_input(config, str(out))
    if merged_already(out, config):
        console.print(f"{out} is merged already")
    else:
        make(config, str(out), Making(job.merge_options, job.run), console)
        write_down(job, out, config, console)
    return measure_and_tell(job, out, config, console)


def _look(
    job: Job, out: Path, place: Path, console: Console
) -> tuple[Mapping[str, Candidate], str, Sets]:
    """Roles, YAML and the first sets; prints each model's role and what the merge will need."""
    request = job.request
    load, template = job.run.load, request.chat_template_kwargs
    found = []
    for number, name in enumerate(request.models):
        folder = place / str(number)
        folder.mkdir()
        console.print(f"Looking at {name}")
        found.append(look_at(name, folder, load, template))
    roles, notes = find_roles(found, request.markers)
    for text in notes:
        console.warn(f"{text}: the roles are not those of the order")
    with called({one.seen.folder: one.name for one in found}):
        sets, needs = _check(job, roles, console)
    _tell(roles, request, console)
    console.heading("This takes about")
    for line in need_lines(needs):
        console.print(f"  {line}")
    require_room(needs, out, Path(load.transformers_cache or constants.HF_HUB_CACHE))
    names = {role: one.pinned for role, one in roles.items()}
    places = Places(out / CALIBRATION, out / REASONING, out / INSTRUCTION)
    return roles, configuration(roles, names, places, request), sets


def _check(job: Job, roles: Mapping[str, Candidate], console: Console) -> tuple[Sets, Needs]:
    """Everything that headers alone show; the configuration names the models by their folders."""
    reasoning, request = roles["reasoning"], job.request
    if reasoning.tokenizer is None:
        raise RainError(f"{reasoning.name}: has no tokenizer")
    sets = choose_sets(request, reasoning.tokenizer, reasoning.name)
    folders = {role: one.seen.folder for role, one in roles.items()}
    shown = Markers.of(request.markers) if request.markers else reasoning.shown[0]
    labels = {role: one.name for role, one in roles.items()}
    trust = job.run.load.trust_remote_code
    for text in check_tokenizers(folders, labels, shown.words, (), trust_remote_code=trust):
        console.warn(text)
    places = Places(Path("auto.rain.safetensors"), Path(sets.reasoning), Path(sets.instruction))
    config = parse_config(configuration(roles, folders, places, request), "mergekit-rain auto")
    with moving_bar(1, "planning", console):
        needs = needs_of(config, roles, job.run)
    require_found({role: one.checkpoint for role, one in roles.items()})
    return sets, needs


def _tell(roles: Mapping[str, Candidate], request: Request, console: Console) -> None:
    does = "keeps" if request.blocks == "optional" else "thinks in"
    for role, one in roles.items():
        known = [Markers.of(request.markers)] if request.markers else one.shown
        shown = f"  {does} {known[0]}" if role == "reasoning" and known else ""
        console.print(f"  {role:<10} {one.name}{shown}")
    how = "stream matching" if request.fit == "streams" else "the paper's projection"
    console.print(f"  {'method':<10} {how} (fit: {request.fit}), lambda {request.strength:g}")


def _sets(job: Job, out: Path, reasoning: str, sets: Sets, console: Console) -> None:
    """Lay both sets out beside the result; the reasoning model writes its own where none fits."""
    if (out / REASONING).exists() and (out / INSTRUCTION).exists():
        return
    path, request = sets.reasoning, job.request
    how = job.run, job.loading, job.talk
    if request.prompts:
        path = write_own_set(reasoning, request.prompts, out, request, how)
    elif sets.packaged:
        console.print("Reading a few samples of the package with the reasoning model")
        checkpoint = open_checkpoint(reasoning, job.run.load)
        with moving_bar(1, "reading", console):
            thinks = thinks_on(checkpoint, path, request, job.run)
        if not thinks:
            console.print("It does not think on them as they are: it writes a set of its own")
            path = write_own_set(reasoning, (), out, request, how)
    lay_out(Sets(path, sets.instruction, sets.packaged), out)
