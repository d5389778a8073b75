"""`mergekit-rain data`: building and checking calibration sets."""

from __future__ import annotations

import click

from rain_mergekit.commands.data_check import check
from rain_mergekit.commands.data_instruction import instruction
from rain_mergekit.commands.data_reasoning import reasoning


@click.group(
    epilog="\b\nExample:\n"
    "  mergekit-rain data reasoning --model ./R1-Distill-Qwen-7B --prompts prompts.txt"
)
def data() -> None:
    """Build calibration sets from a model's own answers, or check one."""


for _command in (reasoning, instruction, check):
    data.add_command(_command)
