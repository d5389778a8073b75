"""What a calibration is made from and how it runs: the same for both ways to find a change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

import rain_mergekit
from rain_mergekit.calibration.options import RunOptions
from rain_mergekit.calibration.samples import Samples, load_samples, record
from rain_mergekit.checks.answer_likelihood import compared_texts
from rain_mergekit.config.merge_config import RainConfig
from rain_mergekit.config.method_names import AIM, RAIN
from rain_mergekit.config.settings import RainSettings
from rain_mergekit.dequantize.plain_view import plain_view
from rain_mergekit.models.loading import Trio, default_dtype, open_trio, read_model_config
from rain_mergekit.models.tokenizer import tokenizer_digest
from rain_mergekit.system import blas_mode
from rain_mergekit.system.distributed import World
from rain_mergekit.text.token_positions import InstructionTokens


@dataclass(frozen=True)
class CalibrationJob:
    """One calibration.

    Attributes:
        method: the merge method that will apply the file.
        settings: the YAML's `rain:` section.
        options: device, dtype and memory.
        trio: the three models, of which only headers and tokenizers have been read.
        samples: both calibration sets as token positions.
        world: the processes that share the work.
    """

    method: str
    settings: RainSettings
    options: RunOptions
    trio: Trio
    samples: Samples
    world: World

    @classmethod
    def of(cls, config: RainConfig, options: RunOptions, world: World) -> CalibrationJob:
        """Open the models and tokenise the sets; RainError names what cannot be used."""
        trio = open_trio(config, options.load, plain_view)
        samples = load_samples(config.settings, trio)
        return cls(config.method, config.settings, options, trio, samples, world)

    @property
    def walked(self) -> Trio:
        """The three models as the engine takes them: the texts pass the first.

        For AIM that is the pretrained model; the texts stay the reasoning model's.
        """
        if self.method != AIM:
            return self.trio
        found = self.trio
        config = read_model_config(found.pretrained)
        return replace(found, reasoning=found.pretrained, pretrained=found.reasoning, config=config)

    @property
    def compared(self) -> list[InstructionTokens]:
        """The texts on which the instruct and the pretrained model are compared in the end.

        Empty where the method does not subtract the pretrained model.
        """
        instruction = self.samples.instruction
        if self.method != RAIN or self.settings.fit != "projection" or instruction is None:
            return []
        return compared_texts(self.trio, instruction.samples)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the forward pass."""
        return self.options.dtype or default_dtype(self.trio.config, self.options.device)

    @property
    def quiet(self) -> bool:
        """Whether this process shows no progress: only the first one does."""
        return self.options.quiet or self.world.rank > 0

    def identity(self, models: Mapping[str, Any]) -> dict[str, Any]:
        """What must be equal for an interrupted run to be continued; models: their records."""
        identity = {
            "version": rain_mergekit.__version__,
            "method": self.method,
            "models": models,
            "tokenizer": tokenizer_digest(self.trio.reasoning.path),
            "data": record(self.samples),
            "settings": self.settings.numbers(),
            "dtype": str(self.dtype),
            "device": torch.device(self.options.device).type,
            "processes": self.world.size,
            "batch_tokens": self.options.tokens_together,
        }
        if self.options.deterministic:
            identity["deterministic"] = blas_mode.mode()  # which changes the bits of products
        return identity
