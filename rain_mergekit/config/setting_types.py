"""The types of the settings' values, with their limits and what YAML makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)

from rain_mergekit.config.method_names import REGMEAN


def _no_truth(value: object) -> object:
    """Refuse booleans as numbers: pydantic reads `true` as 1, and YAML reads `yes` as true."""
    if isinstance(value, bool):
        raise ValueError("Input should be a number")  # noqa: TRY004 - pydantic wants ValueError
    return value


Number = BeforeValidator(_no_truth)
Share = Annotated[float, Field(gt=0.0, le=1.0), Number]
ShareOrNone = Annotated[float, Field(ge=0.0, le=1.0), Number]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False), Number]
PositiveInt = Annotated[int, Field(gt=0), Number]
Accepted = Literal["same_model", "large_task_vector", "other_tokens", "no_thinking"]


def _yaml_off(value: object) -> object:
    """The word `off`, which YAML 1.1 reads as false."""
    return "off" if value is False else value


class StreamWeights(BaseModel):
    """How much each group of tokens counts in stream matching, as a whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: NonNegative = 0.5
    markers: NonNegative = 1.0
    thinking: NonNegative = 1.0
    answers: NonNegative = 1.0
    responses: NonNegative = 0.5


class RegMeanSettings(BaseModel):
    """How RegMean weighs the two sets of features."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: Literal["reasoning", "merged"] = "reasoning"
    thinking_weight: NonNegative = 1.0
    rows: PositiveInt = 8192
    epsilon: Annotated[float, Field(ge=1e-12, allow_inf_nan=False), Number] = 1e-6


class MarkerSettings(BaseModel):
    """The strings that open and close a thinking block."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    open: Annotated[str, Field(min_length=1)]
    close: Annotated[str, Field(min_length=1)]


def _listed(value: object) -> object:
    """A single pair as a list of one."""
    if value == []:
        raise ValueError("a pair of texts, or auto, or none, is expected")
    return [value] if isinstance(value, Mapping) else value


def _own_arguments(value: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(_RESERVED & set(value)):
        raise ValueError(f"{', '.join(taken)} cannot be set here")
    return value


# Arguments that the conversation determines; others are the template's own.
_RESERVED = frozenset(
    {"conversation", "messages", "tools", "add_generation_prompt", "continue_final_message"}
    | {"tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask"}
)
_Auto = Annotated[Literal["auto", "none"], Tag("auto")]
_Pairs = Annotated[tuple[MarkerSettings, ...], Tag("pairs")]
MarkersOrAuto = Annotated[
    _Auto | _Pairs,
    Discriminator(lambda value: "auto" if isinstance(value, str) else "pairs"),
    BeforeValidator(_listed),
]
TemplateArguments = Annotated[dict[str, Any], AfterValidator(_own_arguments)]
Off = BeforeValidator(_yaml_off)
Fit = Annotated[
    Literal["streams", "projection"],
    Field(
        description="How the change of each weight is found. streams: ridge regression, module "
        "by module, so that the merged model's hidden states equal the reasoning model's at "
        "prompts, markers and thinking, and the instruct model's at answers. projection: the "
        "paper's, the task vector without its effect on the thinking."
    ),
]
Start = Annotated[
    Annotated[Literal["auto"], Tag("auto")]
    | Annotated[float, Field(ge=0.0, le=1.0), Number, Tag("number")],
    Discriminator(lambda value: "auto" if isinstance(value, str) else "number"),
    Field(
        description="For fit: streams, where each weight starts: the reasoning model's plus this "
        "share of (instruct - reasoning). What the calibration texts do not decide stays there; 0 "
        "keeps it the reasoning model's. auto: 0.5, or 0 for a weight whose difference is more "
        "than a quarter of its own size."
    ),
]
Teacher = Annotated[
    Literal["instruct", "contrast"],
    Field(
        description="For fit: streams, what is aimed at in answers: the instruct model's hidden "
        "states, or the reasoning model's plus what the instruction changes in the instruct "
        "model's."
    ),
]
LmHead = Annotated[
    Literal["off", "all", "unseen"],
    Off,
    Field(
        description="The map to the vocabulary, merged like the other weights: not at all, all "
        "of its rows, or those of tokens that the instruction set's responses have and the "
        "reasoning set never has (the only choice where it is the embedding)."
    ),
]
Projection = Annotated[
    Literal["oblique", "orthogonal"],
    Field(
        description="oblique spares what the instruct model does to instruction features; "
        "orthogonal is the paper's."
    ),
]
LaterTurns = Annotated[
    ShareOrNone,
    Field(
        description="The share of the samples that come as a chat's second turn: the prompt and "
        "the answer of another one go before, without its thinking. 0: samples stay as they are."
    ),
]
TeachInstructions = Annotated[
    bool,
    Field(
        description="For fit: streams, whether the instruct model teaches the instructions' tokens "
        "in the prompt too (prompt_spans of the instruction set), so that they are read as it "
        "reads them."
    ),
]
RankShare = Annotated[
    Share,
    Field(
        description="For fit: streams, the share of the fitted energy that the low-rank change of "
        "a weight keeps; its rank follows, within max_rank or size_budget."
    ),
]
TeacherStrength = Annotated[
    NonNegative,
    Field(
        description="For fit: streams, the share of the instruct model in the aim at answers "
        "(the rest is the reasoning model's), or the factor on the contrast."
    ),
]
Margin = Annotated[
    NonNegative | None,
    Field(
        description="For fit: streams, an answer token stays the reasoning model's where that one "
        "finds the sample's next token likelier than the instruct model does by this much (nats of "
        "log probability); null: the instruct model teaches all of them."
    ),
]
FitExperts = Annotated[
    bool,
    Field(
        description="For fit: streams, fit the routed experts of a mixture too, each on the "
        "tokens that are routed to it; false: they stay the reasoning model's."
    ),
]
PresetName = Annotated[
    Literal["paper", "published"] | None,
    Field(
        description="A name for a group of settings: paper, the paper's method; published, as near "
        "to its published scripts as these settings come. One given beside it wins."
    ),
]
Gamma = Annotated[
    float,
    Field(
        ge=0.0,
        le=1.0,
        description="For fit: projection, how much of what reasoning training changed is taken "
        "from the task vector: (instruct - pretrained) - gamma (reasoning - pretrained). 0 is the "
        "paper's; 1 is instruct - reasoning, which needs no pretrained model.",
    ),
    Number,
]
Weights = Annotated[
    StreamWeights,
    Field(
        description="For fit: streams, how much each group of tokens counts as a whole: prompts, "
        "markers, thinking, answers (of the instruction set), responses (of the reasoning set)."
    ),
]
ReasoningData = Annotated[
    str, Field(description="The reasoning set, JSON or JSONL: what must stay as it is.")
]
Emphasis = Annotated[
    Literal["divergence", "even"],
    Field(
        description="For fit: streams, how the tokens of answers share their group's weight: by "
        "how far the two models' next tokens are apart there, for which both models read the "
        "instruction set once before; or all alike."
    ),
]
_Positive = Annotated[float, Field(ge=1e-12, allow_inf_nan=False), Number]
EpsilonOrAuto = Annotated[
    Annotated[Literal["auto"], Tag("auto")] | Annotated[_Positive, Tag("number")],
    Discriminator(lambda value: "auto" if isinstance(value, str) else "number"),
    Field(
        description="For fit: streams, the ridge penalty, relative to the mean energy of an input "
        "feature; auto: for each weight the largest that still removes 85 % of the error that the "
        "best one removes on the texts that are held out (0.01 where there are too few)."
    ),
]
RegMean = Annotated[
    RegMeanSettings,
    Field(
        description="For merge_method: regmean: whose features are looked at (features: the "
        "reasoning model's, or for RegMean++ of each layer those that the layers merged before it "
        "give), the weight of the reasoning set's features against the instruction set's "
        "(thinking_weight), tokens of each set over all samples (rows), and the ridge relative to "
        "the mean energy of an instruction feature (epsilon)."
    ),
]

# Who reads a setting, where not all do: a `fit` of rain, or another method by its name.
_STREAMS = (
    *(
        "teacher",
        "teacher_strength",
        "teacher_margin",
        "teach_instructions",
        "stream_weights",
        "stream_epsilon",
        "stream_rank_share",
    ),
    *("stream_emphasis", "stream_start", "stream_experts"),
)
_PROJECTION = (
    *("preset", "gamma", "projection", "rank_tolerance", "rank_count", "epsilon", "ridge"),
    "instruction_rows",
    *("protect_thinking", "protect_prompt", "protect_response", "reading_share", "content_rows"),
    *("coefficients", "rho", "alpha_min", "alpha_max", "leakage_from_thinking"),
)
READERS: Mapping[str, tuple[str, ...]] = {
    "fit": ("streams", "projection"),
    **dict.fromkeys(_STREAMS, ("streams",)),
    **dict.fromkeys(_PROJECTION, ("projection",)),
    **dict.fromkeys(("rank_by", "rank_share"), ("projection", REGMEAN)),
    **dict.fromkeys(("max_rank", "size_budget"), ("streams", "projection", REGMEAN)),
    "lm_head": ("streams", "projection"),
    "regmean": (REGMEAN,),
}
