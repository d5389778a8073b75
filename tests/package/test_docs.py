"""What the README and the docs show is run here, and what they say of the code is compared.

Commands run in a temporary folder, in the order of the page, on the trio that is shipped with the
package; its calibration sets are cut short for speed.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import settings_table
import transformers
from click.testing import CliRunner
from doc_blocks import EMPTY, PAGES, ROOT, Block, blocks, fences
from hangs import HANGS
from mergekit import merge_methods

import rain_mergekit
from rain_mergekit.calibration_file.published_coefficients import read_alpha
from rain_mergekit.config.merge_config import MergeRecipe, read_config
from rain_mergekit.config.plain_merge import read_any
from rain_mergekit.data_building.constraints import read_constrained
from rain_mergekit.data_building.prompts import read_prompts
from rain_mergekit.text import calibration_sets
from rain_mergekit.text.markers import NO_MARKERS

RULES = ("building-data.md", "evaluation.md")  # pages with IFEval's rules
PACKAGE = Path(rain_mergekit.__file__).parent
INSTALLS = ("pip", "uv")
EXAMPLES = "\nmergekit-rain examples ."  # brings the trio
CONFIG = """\
merge_method: rain
base_model: ./trio/reasoning
models:
  - {model: ./trio/instruct, parameters: {role: instruct}}
parameters: {calibration: ./trio.rain.safetensors, lambda: 1.0}
dtype: bfloat16
rain: {reasoning_data: ./trio/reasoning.jsonl, instruction_data: ./trio/instruction.jsonl}
"""
PROMPTS: dict[str, Callable[[Path], Any]] = {
    "prompts.jsonl": read_prompts,
    "constraints.jsonl": read_constrained,
    "alpha.json": read_alpha,
}
SETS = {"reasoning.jsonl": 24, "instruction.jsonl": 12}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


ALL = [block for page in PAGES for block in blocks(page)]
each_page = pytest.mark.parametrize("page", PAGES, ids=name)


def chosen(*languages: str) -> pytest.MarkDecorator:
    found = [block for block in ALL if block.language in languages]
    return pytest.mark.parametrize("block", found, ids=lambda block: block.place)


@each_page
def test_every_block_says_what_it_is(page: Path) -> None:
    found = blocks(page)
    assert fences(page) == 2 * len(found)
    known = {"sh", "yaml", "python", "json", "text"}
    assert {block.language for block in found} <= known


@each_page
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command and every Python block; the README's installation is CI's own first step."""
    skip_without_rules(page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAIN_MERGEKIT_AUTOLOAD", raising=False)
    text = page.read_text(encoding="utf-8")
    if EMPTY not in text:
        if EXAMPLES not in text:
            shutil.copytree(PACKAGE / "trio", "trio")
        Path("config.yml").write_text(CONFIG, encoding="utf-8")
        shorten()
    verbosity = transformers.logging.get_verbosity()
    for block in blocks(page):
        if block.file is not None:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "sh" and not block.skip:
            run_all(block)
        elif block.language == "python":
            exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})  # noqa: S102
    transformers.logging.set_verbosity(verbosity)


def skip_without_rules(page: Path) -> None:
    if page.name in RULES and sys.version_info < (3, 11):
        pytest.skip("if-verifiable needs Python 3.11")


def run_all(block: Block) -> None:
    for line in block.text.splitlines():
        code, output = run(line)
        assert code == 0, f"{block.place}: {line}\n{output}"
        shorten()


def run(line: str) -> tuple[int, str]:
    """Run one command line; ours and mergekit's in this process, to import torch once."""
    words = shlex.split(line)
    command = commands().get(words[0])
    if command is None:
        return run_shell(line)
    result = CliRunner().invoke(command, words[1:], prog_name=words[0])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@cache
def commands() -> dict[str, click.Command]:
    from mergekit.scripts.run_yaml import main  # noqa: PLC0415 - after the entry point's watcher

    from rain_mergekit.cli import cli  # noqa: PLC0415

    return {"mergekit-rain": cli, "mergekit-yaml": main}


def run_shell(line: str) -> tuple[int, str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(  # noqa: S602 - the project's own documentation
        line,
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS,
        env=environment,
    )
    return done.returncode, done.stdout + done.stderr


def shorten() -> None:
    """Keep the first lines of the trio's calibration sets, once they are there."""
    for file, count in SETS.items():
        path = Path("trio", file)
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(lines[:count]), encoding="utf-8")


@chosen("sh")
def test_only_installation_is_skipped(block: Block) -> None:
    assert block.skip == (shlex.split(block.text)[0] in INSTALLS)


@chosen("yaml")
def test_yaml_is_a_configuration(block: Block, tmp_path: Path) -> None:
    assert block.file is not None, "give it a name: <!-- file: ... -->"
    path = tmp_path / block.file
    path.write_text(block.text, encoding="utf-8")
    config = read_any(path)
    if isinstance(config, MergeRecipe):
        assert read_config(path).settings.reasoning_data
    else:
        assert merge_methods.get(config.method).spec.name == config.method


@chosen("json")
def test_data_examples_are_usable(block: Block, tmp_path: Path) -> None:
    """Read, rendered and tokenised; every instruction's spans are found."""
    skip_without_rules(ROOT / block.place.partition(":")[0])
    assert block.file is not None, "give it a name: <!-- file: ... -->"
    path = tmp_path / block.file
    path.write_text(block.text, encoding="utf-8")
    if block.file in PROMPTS:
        assert PROMPTS[block.file](path)
        return
    if block.file == "stays.jsonl":  # outputs of an agent, without thinking
        loaded: calibration_sets.DataSet[Any] = calibration_sets.load_reasoning(
            path, characters(), markers=NO_MARKERS
        )
    elif block.file.startswith("reasoning"):
        loaded = calibration_sets.load_reasoning(path, characters())
    else:
        loaded = calibration_sets.load_instruction(path, characters())
    assert len(loaded.samples) == loaded.total
    assert not loaded.skipped


def characters() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that knows every text: one token a character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # noqa: PLC0415

    letters = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    build: Any = transformers.PreTrainedTokenizerFast  # it has no types
    fast: transformers.PreTrainedTokenizerFast = build(tokenizer_object=tokenizer)
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}bot: "
    return fast


def test_settings_page_is_what_the_code_accepts() -> None:
    before, table, after = settings_table.parts(settings_table.PAGE.read_text(encoding="utf-8"))
    assert before
    assert after
    assert table == settings_table.table(), "run: python tests/support/settings_table.py"
    ends = settings_table.PRESETS_BEGIN, settings_table.PRESETS_END
    _, presets, after = settings_table.parts(settings_table.PAGE.read_text(encoding="utf-8"), *ends)
    assert after
    assert presets == settings_table.presets(), "run: python tests/support/settings_table.py"


def test_every_setting_is_described() -> None:
    rows = settings_table.table().splitlines()[2:]
    assert len(rows) > 20
    assert all(row.split(" | ")[3].rstrip(" |").endswith(".") for row in rows)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{name(page)}: {target}"


@each_page
def test_every_picture_says_what_to_look_for(page: Path) -> None:
    """In the paragraph below it, in italics."""
    paragraphs = page.read_text(encoding="utf-8").split("\n\n")
    for picture, caption in pairwise([*paragraphs, ""]):
        if picture.strip().startswith("!["):
            assert re.match(r"\*[^*]*look for", caption.strip(), re.IGNORECASE), picture


def test_readme_names_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES if page.parent.name == "docs" and page.name not in text]
    assert not missing


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    """Commands in running text too, not only in blocks."""
    text = page.read_text(encoding="utf-8")
    group = commands()["mergekit-rain"]
    assert isinstance(group, click.Group)
    for command in re.findall(r"mergekit-rain ([a-z]+(?:-[a-z]+)*)", text):
        assert command in group.list_commands(click.Context(group)), f"{name(page)}: {command}"
    known = {option for command in subcommands(group) for option in options(command)}
    for option in re.findall(r"`(--[a-z-]+)", text):
        assert option in known, f"{name(page)}: {option}"


def subcommands(group: click.Group) -> list[click.Command]:
    """All commands, those of groups inside the group too."""
    context = click.Context(group)
    found = [group.get_command(context, item) for item in group.list_commands(context)]
    inner = [c for group in found if isinstance(group, click.Group) for c in subcommands(group)]
    return [command for command in found if command is not None] + inner


def options(command: click.Command) -> list[str]:
    return [o for item in command.params for o in (*item.opts, *item.secondary_opts)]


MESSAGES = ROOT / "docs" / "troubleshooting.md"


def test_documented_messages_exist() -> None:
    """The first column of the message tables quotes what the code really says."""
    said = spoken()
    for quote in quotes(MESSAGES.read_text(encoding="utf-8")):
        for part in quote.split("…"):
            wanted = part.strip(" ,:;%")
            assert any(wanted in text for text in said), f"{quote!r}: nothing says {wanted!r}"


def test_errors_are_documented() -> None:
    """Every message that the code can raise is found on the page by some part of it."""
    found = [
        [part.strip(" ,:;%") for part in quote.split("…")]
        for quote in quotes(MESSAGES.read_text(encoding="utf-8"))
    ]
    raised = {text for path in sources() for text in messages(path, raised_only=True)}
    undocumented = [
        text
        for text in raised
        if not any(all(part in text for part in parts) for parts in found) and not internal(text)
    ]
    assert not undocumented, "\n".join(sorted(undocumented))


# Said inside another message, which is documented, or only to callers of Python functions.
INTERNAL = (
    "features contain NaN or Inf",
    "nothing of its prompt is left without its instructions",
    "must be 0 or more tokens",
    "must be 1 or more",
    "of the calibration file",
    "for the calibration file",
    "calibration header:",
    "a calibration file does not store",
    "the tokenizer {} has no chat template",
    ": rain: ",
    "format_version must be",
    "there is no format version",
    "its metadata has no",
)
CONTAINER = ("container.py", "schema.py", "writer.py")  # `cannot be used: ...`


def internal(text: str) -> bool:
    return text.strip("{}: ") == "" or any(part in text for part in INTERNAL)


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.name not in CONTAINER]


@cache
def spoken() -> frozenset[str]:
    """Every text of the package, with {} for values."""
    files = sorted(PACKAGE.rglob("*.py"))
    extra = {"Input should be"}  # pydantic's
    return frozenset(text for path in files for text in messages(path)) | extra


def messages(path: Path, *, raised_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not raised_only:
        return [text for node in ast.walk(tree) if (text := literal(node)) is not None]
    raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    calls = [node.exc for node in raised if isinstance(node.exc, ast.Call)]
    kinds = ("RainError", "RainMergeError", "UnusableError")
    return [
        text
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id in kinds and call.args
        if (text := literal(call.args[0])) is not None and text.strip("{}: ")
    ]


def literal(node: ast.AST) -> str | None:
    """A string, f-string, or a sum of them."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(value) or "{}" for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (literal(node.left) or "{}") + (literal(node.right) or "{}")
    return None


def quotes(text: str) -> list[str]:
    """The quoted messages: first columns of the tables, and paragraphs' bold beginnings."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    cells += re.findall(r"^\*\*(`.*?`)\*\*", text, re.MULTILINE)
    found = [quote for cell in cells for quote in re.findall(r"``\s?(.+?)\s?``|`([^`]+)`", cell)]
    return [first or second for first, second in found]


@pytest.mark.parametrize(
    "check",
    [
        lambda text: not re.search(r"/(work|tmp|home|root)/", text),
        lambda text: "\t" not in text,
        lambda text: text.endswith("\n") and not text.endswith("\n\n"),
    ],
    ids=["no path of a machine", "no tabs", "one newline at the end"],
)
@each_page
def test_page_is_tidy(page: Path, check: Callable[[str], bool]) -> None:
    assert check(page.read_text(encoding="utf-8"))


def test_calibration_readme_counts() -> None:
    folder = ROOT / "calibration"
    text = (folder / "README.md").read_text(encoding="utf-8")
    reasoning = calibration_sets.read_reasoning(folder / "reasoning.jsonl")
    instruction = calibration_sets.read_instruction(folder / "instruction.jsonl")
    kinds = {spec.instruction_id for sample in instruction for spec in sample.instructions}
    total = sum(len(sample.instructions) for sample in instruction)
    assert f"| `reasoning.jsonl` | {len(reasoning)} |" in text
    assert (
        f"| `instruction.jsonl` | {len(instruction)} | {total} instructions of {len(kinds)}" in text
    )
    assert set(re.findall(r"`(\w+:\w+)`", text)) == kinds
