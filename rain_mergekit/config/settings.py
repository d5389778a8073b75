"""The `rain:` section of the YAML: every setting, its default and its limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rain_mergekit.config.presets import expanded
from rain_mergekit.config.setting_types import (
    Accepted,
    Emphasis,
    EpsilonOrAuto,
    Fit,
    FitExperts,
    Gamma,
    LaterTurns,
    LmHead,
    Margin,
    MarkersOrAuto,
    NonNegative,
    Number,
    Off,
    PositiveInt,
    PresetName,
    Projection,
    RankShare,
    ReasoningData,
    RegMean,
    RegMeanSettings,
    Share,
    ShareOrNone,
    Start,
    StreamWeights,
    Teacher,
    TeacherStrength,
    TeachInstructions,
    TemplateArguments,
    Weights,
)
from rain_mergekit.text.markers import NO_MARKERS, Markers


class RainSettings(BaseModel):
    """What `mergekit-rain calibrate` does; the same names as in the YAML's `rain:` section."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reasoning_data: ReasoningData
    instruction_data: Annotated[
        str | None,
        Field(
            description="The instruction set, JSON or JSONL; needed for fit: streams, the oblique "
            "projection and coefficients."
        ),
    ] = None
    markers: Annotated[
        MarkersOrAuto,
        Field(
            description="The texts that open and close a thinking block, or another that must "
            "stay: those known that the outputs, the chat template or the tokenizer show, or one "
            "pair, or several; none: nothing marks one, and outputs count as a whole."
        ),
    ] = "auto"
    blocks: Annotated[
        Literal["required", "optional"],
        Field(
            description="Whether each sample must have a marked block. optional: an output without "
            "one counts as a whole, in the reasoning set as what stays, in the instruction set as "
            "what comes, and so does what the latter say before a block."
        ),
    ] = "required"
    chat_template_kwargs: Annotated[
        TemplateArguments,
        Field(description="Arguments of the chat template, such as enable_thinking: true."),
    ] = {}
    window: Annotated[
        int,
        Field(
            ge=0,
            description="Tokens protected after the open marker and before the close marker, "
            "besides the markers.",
        ),
        Number,
    ] = 5
    max_tokens: Annotated[
        PositiveInt | None,
        Field(description="Longer samples are skipped, counted and reported; null: no limit."),
    ] = None
    later_turns: LaterTurns = 0.0

    preset: PresetName = None
    fit: Fit = "streams"
    teacher: Teacher = "instruct"
    teacher_strength: TeacherStrength = 1.0
    teacher_margin: Margin = 0.5
    teach_instructions: TeachInstructions = False
    stream_start: Start = "auto"
    stream_weights: Weights = StreamWeights()
    stream_emphasis: Emphasis = "divergence"
    stream_epsilon: EpsilonOrAuto = "auto"
    stream_rank_share: RankShare = 0.99
    stream_experts: FitExperts = True
    gamma: Gamma = 0.0
    projection: Projection = "oblique"
    rank_by: Annotated[
        Literal["response_energy", "energy", "tolerance", "count", "full"],
        Field(
            description="How many directions are protected at each site: a share of the task "
            "vector's response to the features, a share of the features' energy, singular values "
            "above a tolerance, a count, or all that the features span."
        ),
    ] = "response_energy"
    rank_share: Annotated[
        Share, Field(description="The share for rank_by: response_energy and energy.")
    ] = 0.99
    rank_tolerance: Annotated[
        float,
        Field(
            ge=0.0,
            lt=1.0,
            description="For rank_by: tolerance; relative to the largest singular value.",
        ),
        Number,
    ] = 1e-3
    rank_count: Annotated[
        PositiveInt | None, Field(description="For rank_by: count, and required there.")
    ] = None
    max_rank: Annotated[
        PositiveInt | None,
        Field(description="Upper bound of the rank of every site; null: set by size_budget."),
    ] = None
    size_budget: Annotated[
        Share,
        Field(
            description="Largest calibration file as a share of the reasoning model's bytes; "
            "bounds the rank of every site where max_rank is null (never below 96, or below 32 "
            "where the experts of a mixture are fitted)."
        ),
    ] = 0.10
    epsilon: Annotated[
        float,
        Field(
            ge=1e-8,
            allow_inf_nan=False,
            description="Regularisation of the oblique projection, relative to the mean energy of "
            "an instruction feature; the larger, the closer to orthogonal.",
        ),
        Number,
    ] = 0.1
    ridge: Annotated[
        NonNegative,
        Field(
            description="0: protected directions are exact. Above: a direction is protected by "
            "s²/(s² + ridge · s₁²), s₁ the largest of those chosen, so weak ones only partly."
        ),
    ] = 0.0
    instruction_rows: Annotated[
        PositiveInt,
        Field(
            description="Response tokens of the instruction set that the oblique projection uses, "
            "over all samples (at least one each)."
        ),
    ] = 4096

    protect_thinking: Annotated[
        NonNegative,
        Field(
            description="Weight of the thinking block's content beside the marker positions "
            "(which weigh 1); 0: only the markers are protected."
        ),
    ] = 1.0
    protect_prompt: Annotated[
        NonNegative,
        Field(
            description="Weight of the reasoning set's prompts beside the marker positions (which "
            "weigh 1), with later questions and tool results: the thinking reads them through "
            "attention; 0: they are not protected."
        ),
    ] = 0.0
    protect_response: Annotated[
        NonNegative,
        Field(
            description="Weight of the reasoning set's responses beside the marker positions "
            "(which weigh 1), with answers of earlier turns; 0: they are not protected."
        ),
    ] = 0.0
    reading_share: Annotated[
        ShareOrNone,
        Field(
            description="At the inputs of queries, keys and values, protect more directions, until "
            "they cover this share of the task vector's response to the reasoning set's prompts, "
            "and of that to its responses; 0: no more."
        ),
    ] = 0.9
    content_rows: Annotated[
        PositiveInt,
        Field(
            description="Tokens of the thinking content, of the prompts, and of the responses that "
            "are used, over all samples (at least one each)."
        ),
    ] = 2048

    lm_head: LmHead = "off"

    coefficients: Annotated[
        Literal["off", "normalized", "closed_form"],
        Off,
        Field(
            description="One factor per attention head and layer: none, the closed form divided by "
            "its mean, or the closed form as it is."
        ),
    ] = "off"
    rho: Annotated[
        NonNegative,
        Field(description="Weight of leakage against alignment in the coefficients."),
    ] = 1.0
    alpha_min: Annotated[NonNegative, Field(description="Smallest coefficient.")] = 0.5
    alpha_max: Annotated[NonNegative, Field(description="Largest coefficient.")] = 1.5
    leakage_from_thinking: Annotated[
        bool,
        Field(description="Count attention from the thinking block to the instruction as leakage."),
    ] = False

    regmean: RegMean = RegMeanSettings()

    accept: Annotated[
        tuple[Accepted, ...],
        Field(
            description="Checks whose outcome is a warning and no error: same_model (two of the "
            "models are one), large_task_vector (larger than the weights), other_tokens (the "
            "tokenizers disagree), no_thinking (the reasoning model does not think on its set)."
        ),
    ] = ()

    _expanded = model_validator(mode="before")(expanded)

    @model_validator(mode="after")
    def _consistent(self) -> RainSettings:
        if self.rank_by == "count" and self.rank_count is None:
            raise ValueError("rank_by: count needs `rank_count` (how many directions to protect)")
        if self.alpha_min > self.alpha_max:
            raise ValueError("alpha_min must not be above alpha_max")
        if self.teach_instructions and self.teacher == "contrast":
            raise ValueError("teach_instructions needs teacher: instruct")
        if self.needs_instruction_data and self.instruction_data is None:
            raise ValueError(
                "instruction_data is missing: fit: streams, the oblique projection, the "
                "coefficients and lm_head: unseen are measured on it (or set fit: projection, "
                "projection: orthogonal, coefficients: off and another lm_head)"
            )
        return self

    def numbers(self) -> dict[str, Any]:
        """All settings on which the numbers in the calibration file depend, as JSON has them."""
        return self.model_dump(mode="json", exclude={"accept", "preset"})

    @property
    def marker_texts(self) -> Markers | None:
        """The configured markers; None where they are to be found. RainError if unfit."""
        if isinstance(self.markers, str):
            return NO_MARKERS if self.markers == "none" else None
        found = Markers.of([(pair.open, pair.close) for pair in self.markers])
        return replace(found, optional=self.blocks == "optional")

    @property
    def answer_margin(self) -> float | None:
        """teacher_margin, where the instruct model itself teaches the answers."""
        return self.teacher_margin if self.teacher == "instruct" else None

    @property
    def compares_answers(self) -> bool:
        """Whether both models read the answers before anything is fitted."""
        return self.stream_emphasis == "divergence" or self.answer_margin is not None

    @property
    def spans_read(self) -> Literal["all", "prompt", "none"]:
        """Which spans of the instruction set are looked for."""
        if self.fit == "projection":
            return "all"
        return "prompt" if self.teach_instructions else "none"

    @property
    def keeps_response(self) -> bool:
        """Whether the reasoning set's responses are run through the model."""
        measured = self.protect_response > 0 or self.reading_share > 0
        return self.fit == "streams" or measured or self.lm_head == "unseen"

    @property
    def stores_v(self) -> bool:
        """Whether V differs from U, so that the calibration file holds both."""
        return self.projection == "oblique" or self.ridge > 0

    @property
    def needs_instruction_data(self) -> bool:
        """Whether anything is measured on the instruction set."""
        measured = self.projection == "oblique" or self.coefficients != "off"
        return self.fit == "streams" or measured or self.lm_head == "unseen"
