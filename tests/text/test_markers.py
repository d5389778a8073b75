"""Every thinking format, position by position, with real tokenizers and templates of its kind.

The expected positions come from marked texts: `⟦` and `⟧` around what is a think position and
`⟨` and `⟩` around the rest of a block, tokenised piece by piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from commands import run
from tiny import REASONING, Tiny
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rain_mergekit.calibration_file.reader import CalibrationFile
from rain_mergekit.errors import RainError
from rain_mergekit.evaluation.texts import Texts, texts_from_settings
from rain_mergekit.text.calibration_sets import load_instruction, load_reasoning, read_reasoning
from rain_mergekit.text.marker_detection import find_markers, tokenizer_markers, written_markers
from rain_mergekit.text.markers import KNOWN, Markers
from rain_mergekit.text.thinking_blocks import split_thinking

Write = Callable[..., Path]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: thinking of turns before the last question goes, that since then stays, and switching
# thinking off writes an empty block.
HYBRID = """\
{%- set found = namespace(last=0) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set found.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}{{- '# Tools: <think> before you call ' + (tools | tojson) + '\n' -}}{%- endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role == 'assistant' -%}
{%- if loop.index0 > found.last and m.reasoning_content -%}
{{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' -}}
{%- elif loop.index0 > found.last -%}
{{- '<think>\n\n</think>\n\n' -}}
{%- endif -%}
{%- endif -%}
{{- m.content -}}
{%- for call in m.tool_calls or [] -%}
{{- '<tool_call>' + (call | tojson) + '</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\n\n</think>\n\n' -}}
{%- endif -%}
"""
OPENING = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
OPENING = OPENING.replace("assistant\n<think>\n", "{{ 'assistant\n<think>\n' }}")
HARMONY = (
    "<|start|>system<|message|>Channels: analysis, commentary, final.<|end|>"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|start|>functions.f to=assistant<|channel|>commentary<|message|>"
    "{{ m.content }}<|end|>"
    "{% elif m.role == 'assistant' %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}<|start|>assistant<|channel|>commentary to=functions.f<|message|>"
    "{{ m.content }}<|call|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "<|start|>assistant"
)
MISTRAL = "[INST]{{ messages[-1]['content'] }}[/INST]"
SEED = (
    "{% for m in messages %}<seed:bos>{{ m.role }}\n{{ m.content }}<seed:eos>{% endfor %}"
    "<seed:bos>assistant\n"
)
CHAT = ("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<seed:bos>", "<seed:eos>")
CHANNELS = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>")


def make_tokenizer(folder: Path, template: str, markers: Sequence[str] = ()) -> Any:
    """One token a character, and those of chat formats: saved and loaded as a checkpoint's."""
    letters = {letter: code for code, letter in enumerate([*map(chr, range(128)), "◁", "▷"])}
    backend = Tokenizer(models.WordLevel(letters, unk_token="?"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    chat = CHANNELS if template == HARMONY else CHAT
    added = [AddedToken(token, special=True) for token in (*chat, *markers)]
    backend.add_special_tokens(added)
    build: Any = PreTrainedTokenizerFast  # it has no types
    build(tokenizer_object=backend, chat_template=template).save_pretrained(folder)
    return cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(folder))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Any]:
    counter = iter(range(100))
    return lambda *arguments: make_tokenizer(tmp_path / f"t{next(counter)}", *arguments)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*samples: Mapping[str, Any]) -> Path:
        path = tmp_path / "set.jsonl"
        path.write_text("\n".join(json.dumps(sample) for sample in samples))
        return path

    return write


def marked(tokenizer: Any, text: str) -> tuple[list[int], dict[str, list[int]]]:
    """Token ids of a text with marks, and the positions that each mark opens ("": no mark).

    ⟦think positions⟧, ⟨content⟩, «earlier answers».
    """
    ids: list[int] = []
    chosen: dict[str, list[int]] = {"⟦": [], "⟨": [], "«": [], "": []}
    kind = ""
    for piece in re.split("([⟦⟧⟨⟩«»])", text):
        if piece in ("⟦", "⟨", "«"):
            kind = piece
        elif piece in ("⟧", "⟩", "»"):
            kind = ""
        else:
            part = tokenizer(piece, add_special_tokens=False)["input_ids"]
            chosen[kind] += range(len(ids), len(ids) + len(part))
            ids += part
    return ids, chosen


def check(
    tokenizer: Any, path: Path, expected: str, markers: Markers, window: int = 1, **options: Any
) -> None:
    (tokens,) = load_reasoning(
        path,
        tokenizer,
        markers=markers,
        window=window,
        keep_response=True,
        chat_template_kwargs=options,
    ).samples
    ids, chosen = marked(tokenizer, expected)
    end = max(chosen["⟦"]) + 1
    assert tokenizer.decode(tokens.input_ids) == re.sub("[⟦⟧⟨⟩«»]", "", expected)
    assert list(tokens.input_ids) == ids
    assert list(tokens.think_positions) == chosen["⟦"]
    assert list(tokens.content_positions) == chosen["⟨"]
    assert list(tokens.response_positions) == [*chosen["«"], *range(end, len(ids))]
    assert list(tokens.prompt_positions) == [i for i in chosen[""] if i < end]


HEAD = "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant"
SIMPLE: Mapping[str, tuple[str, Sequence[str], str]] = {
    # template, tokens of its own, output with marks
    "<think>": (CHATML, ["<think>", "</think>"], "⟦<think>\n⟧⟨ab⟩⟦\n</think>⟧\n\nyes"),
    "[THINK]": (MISTRAL, ["[THINK]", "[/THINK]"], "⟦[THINK]a⟧⟨bc⟩⟦d[/THINK]⟧yes"),
    "<|begin_of_thought|>": (
        CHATML,
        [],
        "⟦<|begin_of_thought|>\n⟧⟨\nab\n⟩⟦\n<|end_of_thought|>⟧\n\n<|begin_of_solution|>yes",
    ),
    "<seed:think>": (
        SEED,
        ["<seed:think>", "</seed:think>"],
        "⟦<seed:think>a⟧⟨b⟩⟦c</seed:think>⟧yes",
    ),
    "◁think▷": (CHATML, [], "⟦◁think▷a⟧⟨b⟩⟦c◁/think▷⟧yes"),
    "harmony": (
        HARMONY,
        [],
        (
            "⟦<|channel|>analysis<|message|>a⟧⟨bc⟩⟦d<|end|><|start|>assistant<|channel|>final"
            "<|message|>⟧yes<|return|>"
        ),
    ),
    "harmony, to a tool": (
        HARMONY,
        [],
        (
            "⟦<|channel|>analysis<|message|>a⟧⟨bc⟩⟦d<|end|>⟧<|start|>assistant<|channel|>commentary"
            "<|message|>I look.<|end|><|start|>assistant to=functions.f<|message|>yes"
        ),
    ),
}


@pytest.mark.parametrize("name", SIMPLE)
def test_known_formats(make: Callable[..., Any], write: Write, name: str) -> None:
    """Found without being told, and protected token by token, the token before them included."""
    template, own, output = SIMPLE[name]
    tokenizer = make(template, own)
    path = write({"prompt": "why", "output": re.sub("[⟦⟧⟨⟩«»]", "", output)})
    head = tokenizer.apply_chat_template(
        [{"role": "user", "content": "why"}], add_generation_prompt=True, tokenize=False
    )
    special = [token for token in (*CHAT, *CHANNELS, *own) if head.endswith(token)]
    lead = special[0] if special else head[-1]
    expected = head.removesuffix(lead) + "⟦" + lead + output.removeprefix("⟦")
    check(tokenizer, path, expected, find_markers(path, tokenizer))


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.open)
def test_each_known_pair_is_put_together_and_found_again(
    make: Callable[..., Any], write: Write, known: Markers
) -> None:
    """From parts: its own white space; then the verbatim text gives the same markers back."""
    tokenizer = make(CHATML)
    parts = {"prompt": "why", "reasoning": "because", "response": "yes"}
    made = load_reasoning(write(parts), tokenizer, markers=known, keep_response=True).samples[0]
    text = tokenizer.decode(made.input_ids).removeprefix(HEAD + "\n")
    first, second, third = known.gaps
    assert text == f"{known.open}{first}because{second}{known.close}{third}yes"
    verbatim = write({"prompt": "why", "output": text})
    assert find_markers(verbatim, tokenizer) == known
    assert load_reasoning(verbatim, tokenizer, markers=known, keep_response=True).samples == (made,)
    thought = split_thinking(text, known)
    assert (thought.thinking, thought.response, thought.complete) == ("because", "yes", True)


def test_parts_in_the_harmony_format(make: Callable[..., Any], write: Write) -> None:
    tokenizer = make(HARMONY)
    path = write({"prompt": "why", "reasoning": "abcd", "response": "yes"})
    expected = (
        "<|start|>system<|message|>Channels: analysis, commentary, final.<|end|>"
        "<|start|>user<|message|>why<|end|><|start|>assistan⟦t<|channel|>analysis<|message|>a⟧⟨bc⟩"
        "⟦d<|end|><|start|>assistant<|channel|>final<|message|>⟧yes"
    )
    check(tokenizer, path, expected, find_markers(path, tokenizer))


# Several pairs, several blocks

REACT = Markers.of([("Thought:", "Action:"), ("Thought:", "Final Answer:")])
REACT_OUTPUT = (
    "⟦Thought: ⟧⟨I look⟩⟦.Action:⟧« f[x]\nObservation: 3»"
    "⟦\nThought: ⟧⟨So it is 3⟩⟦.Final Answer:⟧ 3"
)


def test_text_without_tags(make: Callable[..., Any], write: Write) -> None:
    path = write({"prompt": "why", "output": re.sub("[⟦⟧⟨⟩«»]", "", REACT_OUTPUT)})
    head = "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant⟦\n"
    check(make(CHATML), path, head + REACT_OUTPUT.removeprefix("⟦"), REACT)


def test_several_blocks_in_one_output(make: Callable[..., Any], write: Write) -> None:
    output = "⟦<think>a⟧⟨b⟩⟦c</think>⟧«cal»⟦l<think>d</think>⟧yes"
    path = write({"prompt": "why", "output": re.sub("[⟦⟧⟨⟩«»]", "", output)})
    tokenizer = make(CHATML, ["<think>", "</think>"])
    check(tokenizer, path, HEAD + "⟦\n" + output.removeprefix("⟦"), Markers())


def test_second_block_after_a_template_that_opens(make: Callable[..., Any], write: Write) -> None:
    """Only the first block is the template's; the model decides on the second."""
    tokenizer = make(OPENING, ["<think>", "</think>"])
    expected = HEAD + "\n⟦<think>\n⟧⟨abc⟩⟦d</think>⟧«cal»⟦l<think>e</think>⟧yes"
    for begin in ("<think>\n", "\n<think>", ""):
        path = write({"prompt": "why", "output": f"{begin}abcd</think>call<think>e</think>yes"})
        tokens = load_reasoning(path, tokenizer, window=1, keep_response=True).samples[0]
        if begin != "\n<think>":
            assert find_markers(path, tokenizer) == Markers()
            check(tokenizer, path, expected, Markers())
        assert len(tokens.think_positions) == len(marked(tokenizer, expected)[1]["⟦"])


CALL = {"name": "f", "arguments": {"x": 3, "y": 0.5}}
TOOL_USE = [
    {"role": "system", "content": "Use <think> and </think>."},
    {"role": "user", "content": "hello <think>"},
    {"role": "assistant", "content": "hi", "reasoning_content": "gone"},
    {"role": "user", "content": "why"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "look it up",
        "tool_calls": [CALL],
    },
    {"role": "tool", "content": "</think> 42"},
    {"role": "assistant", "content": "again"},
    {"role": "tool", "content": "43"},
]
RENDERED = (
    "<|im_start|>system\nUse <think> and </think>.<|im_end|>\n"
    "<|im_start|>user\nhello <think><|im_end|>\n"
    "<|im_start|>assistant\n«hi<|im_end|>\n"
    "<|im_start|>user\n»why<|im_end|>\n"
    "<|im_start|>assistant⟦\n<think>\n⟧⟨look it up⟩⟦\n</think>⟧«\n\n"
    '<tool_call>{"name": "f", "arguments": {"x": 3, "y": 0.5}}</tool_call><|im_end|>\n'
    "<|im_start|>tool\n»</think> 42<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>«\n\nagain<|im_end|>\n"
    "<|im_start|>tool\n»43<|im_end|>\n"
)
LAST = "<|im_start|>assistant⟦\n<think>s⟧⟨o it i⟩⟦s</think>⟧43"


def test_tool_use(make: Callable[..., Any], write: Write) -> None:
    """Blocks that the template keeps count; what others wrote, and empty blocks, do not."""
    tokenizer = make(HYBRID, ["<think>", "</think>"])
    expected = RENDERED + LAST
    answers: list[dict[str, Any]] = [{"output": "<think>so it is</think>43"}]
    path = write({"messages": TOOL_USE, **answers[0]})
    check(tokenizer, path, expected, find_markers(path, tokenizer))
    turn = {"role": "assistant", "content": "<think>so it is</think>43"}
    check(tokenizer, write({"messages": [*TOOL_USE, turn]}), expected, Markers())


def test_last_turn_in_parts(make: Callable[..., Any], write: Write) -> None:
    tokenizer = make(HYBRID, ["<think>", "</think>"])
    expected = HEAD + "⟦\n<think>\n⟧⟨so⟩⟦\n</think>⟧\n\n43"
    for name in ("reasoning_content", "reasoning", "thinking"):
        turn = {"role": "assistant", "content": "43", name: "so"}
        asked = {"role": "user", "content": "why"}
        check(tokenizer, write({"messages": [asked, turn]}), expected, Markers())
        turns = {"messages": [asked], "reasoning": "so", "response": "43"}
        check(tokenizer, write(turns), expected, Markers())


def test_tools_reach_the_template(make: Callable[..., Any], write: Write) -> None:
    tokenizer = make(HYBRID, ["<think>", "</think>"])
    sample = {"messages": TOOL_USE, "tools": [{"name": "f"}], "output": "<think>so</think>43"}
    (tokens,) = load_reasoning(write(sample), tokenizer).samples
    assert '# Tools: <think> before you call [{"name": "f"}]' in tokenizer.decode(tokens.input_ids)


def test_tool_use_in_the_harmony_format(make: Callable[..., Any], write: Write) -> None:
    tokenizer = make(HARMONY)
    messages = [
        {"role": "user", "content": "why"},
        {"role": "assistant", "thinking": "look", "content": "{}"},
        {"role": "tool", "content": "42"},
    ]
    path = write(
        {
            "messages": messages,
            "output": "<|channel|>analysis<|message|>ok<|end|><|start|>assistant<|channel|>final"
            "<|message|>42",
        }
    )
    expected = (
        "<|start|>system<|message|>Channels: analysis, commentary, final.<|end|>"
        "<|start|>user<|message|>why<|end|><|start|>assistan⟦t<|channel|>analysis<|message|>l⟧⟨oo⟩"
        "⟦k<|end|>⟧«<|start|>assistant<|channel|>commentary to=functions.f<|message|>{}<|call|>"
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>»42<|end|>"
        "<|start|>assistan⟦t<|channel|>analysis<|message|>o⟧⟦k<|end|><|start|>assistant<|channel|>"
        "final<|message|>⟧42"
    )
    check(tokenizer, path, expected, find_markers(path, tokenizer))


def test_earlier_blocks_that_a_template_opens(make: Callable[..., Any], write: Write) -> None:
    """A template that keeps all turns: each block's opening was the template's, not the model's."""
    tokenizer = make(OPENING, ["<think>", "</think>"])
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>\nab</think>yo"},
        {"role": "user", "content": "why"},
    ]
    expected = (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦<think>\n⟧⟨a⟩⟦b</think>⟧«yo"
        "<|im_end|>\n" + HEAD.replace("why", "»why") + "\n⟦<think>\n⟧⟨c⟩⟦d</think>⟧yes"
    )
    path = write({"messages": messages, "output": "cd</think>yes"})
    check(tokenizer, path, expected, Markers())


def test_spans_of_an_instruction_in_a_conversation(make: Callable[..., Any], write: Write) -> None:
    """System and users ask; what a tool or the model said earlier is not the prompt."""
    tokenizer = make(HYBRID, ["<think>", "</think>"])
    spec = {"prompt_spans": ["capitals", "why"], "response_spans": ["YES"]}
    messages = [
        {"role": "system", "content": "Use capitals."},
        *TOOL_USE[3:5],
        {"role": "tool", "content": "why capitals"},
    ]
    output = "<think>ab</think>call<think>c</think>why YES"
    sample = {"messages": messages, "output": output, "related_prompt_list": [spec]}
    (tokens,) = load_instruction(write(sample), tokenizer, window=1).samples
    text = [tokenizer.decode([i]) for i in tokens.input_ids]
    (spans,) = tokens.spans
    assert "".join(text[i] for i in spans.prompt) == "capitalswhy"
    assert max(spans.prompt) < tokens.input_ids.index(tokenizer.convert_tokens_to_ids("<think>"))
    assert "".join(text[i] for i in spans.related) == "YES"
    assert "".join(text[i] for i in tokens.thinking_positions) == "\nlook it up\nabc"
    assert "".join(text[i] for i in tokens.response_positions) == "why YES"
    tool_only = {**sample, "related_prompt_list": [{**spec, "prompt_spans": ["why capitals"]}]}
    with pytest.raises(RainError, match="the prompt does not contain the span 'why capitals'"):
        load_instruction(write(tool_only), tokenizer)


# Thinking that can be switched


def test_hybrid_template(make: Callable[..., Any], write: Write) -> None:
    tokenizer = make(HYBRID, ["<think>", "</think>"])
    path = write({"prompt": "why", "output": "<think>abc</think>yes"})
    expected = HEAD + "⟦\n<think>a⟧⟨b⟩⟦c</think>⟧yes"
    check(tokenizer, path, expected, Markers(), enable_thinking=True)
    check(tokenizer, path, expected, Markers())
    with pytest.raises(RainError, match=r"by rain\.chat_template_kwargs, such as"):
        load_reasoning(path, tokenizer, chat_template_kwargs={"enable_thinking": False})


def test_arguments_that_the_template_refuses(make: Callable[..., Any], write: Write) -> None:
    tokenizer = make("{{ 1 // budget }}" + CHATML)
    path = write({"prompt": "why", "output": "<think>abc</think>yes"})
    with pytest.raises(RainError, match="refuses this sample"):
        load_reasoning(path, tokenizer, chat_template_kwargs={"budget": 0})
    assert load_reasoning(path, tokenizer, chat_template_kwargs={"budget": 2}).samples


# Finding the markers


def found(path: Path, tokenizer: Any, **options: Any) -> str:
    return find_markers(path, tokenizer, options).open


def test_outputs_decide_before_template_and_tokenizer(
    make: Callable[..., Any], write: Write
) -> None:
    tokenizer = make(CHATML, ["<think>", "</think>", "[THINK]", "[/THINK]"])
    output = "[THINK]the tag <think> is</think> another[/THINK]yes <thinking>"
    assert found(write({"prompt": "p", "output": output}), tokenizer) == "[THINK]"
    path = write({"prompt": "p", "reasoning": "r"})
    message = r"more than one kind .*\(<think> … </think>; \[THINK\] … \[/THINK\]\); set rain.mark"
    with pytest.raises(RainError, match=message):
        find_markers(path, tokenizer)
    mixed = write({"prompt": "p", "output": output}, {"prompt": "p", "output": "<think>a</think>b"})
    with pytest.raises(RainError, match="more than one kind"):
        find_markers(mixed, tokenizer)


@pytest.mark.parametrize(
    ("template", "own", "wanted"),
    [
        (OPENING, ["<seed:think>", "</seed:think>"], "<think>"),
        (CHATML, ["<seed:think>", "</seed:think>"], "<seed:think>"),
        (HYBRID, [], "<think>"),
        (HARMONY, [], "<|channel|>analysis<|message|>"),
    ],
    ids=["the template opens", "the tokenizer knows", "the template speaks of it", "harmony"],
)
def test_without_verbatim_outputs(
    make: Callable[..., Any], write: Write, template: str, own: list[str], wanted: str
) -> None:
    path = write({"prompt": "p", "reasoning": "r"})
    assert found(path, make(template, own)) == wanted


def test_channel_tokens_alone_are_enough(make: Callable[..., Any], write: Write) -> None:
    path = write({"prompt": "p", "reasoning": "r"})
    assert found(path, make(CHATML, CHANNELS)) == "<|channel|>analysis<|message|>"


def test_the_template_is_asked_with_its_arguments(make: Callable[..., Any], write: Write) -> None:
    tokenizer = make(CHATML + "{% if thinking %}[THINK]{% endif %}", ["<think>", "</think>"])
    path = write({"prompt": "p", "reasoning": "r"})
    assert found(path, tokenizer, thinking=True) == "[THINK]"
    assert found(path, tokenizer, thinking=False) == "<think>"


def test_outputs_without_an_opening(make: Callable[..., Any], write: Write) -> None:
    """Where the template opens, outputs may begin after it; else the closing is all there is."""
    path = write({"prompt": "p", "output": "ab</think>c"})
    assert found(path, make(OPENING)) == "<think>"
    assert found(path, make(CHATML, ["[THINK]", "[/THINK]"])) == "<think>"
    loose = write({"prompt": "p", "output": "ab<|end|>c"})
    assert found(loose, make(CHATML, ["[THINK]", "[/THINK]"])) == "[THINK]"


def test_nothing_known(make: Callable[..., Any], write: Write) -> None:
    tokenizer = make(CHATML)
    with pytest.raises(RainError, match=r"no known thinking markers .* set rain\.markers"):
        find_markers(write({"prompt": "p", "output": "Thought: a Action: b"}), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(RainError, match="has no chat template"):
        find_markers(write({"prompt": "p", "output": "o"}), tokenizer)


def test_from_a_set_or_a_tokenizer_alone(make: Callable[..., Any], write: Write) -> None:
    """For commands that have only one of them; `<think>` where that is not clear."""
    assert written_markers(write({"prompt": "p", "output": "[THINK]a[/THINK]b"})) == KNOWN[1]
    assert written_markers(write({"prompt": "p", "output": "a</seed:think>b"})) == KNOWN[4]
    mixed = [{"prompt": "p", "output": f"{known.open}a{known.close}b"} for known in KNOWN[1:3]]
    assert written_markers(write(*mixed)) == Markers()
    assert written_markers(write({"prompt": "p", "reasoning": "r"})) == Markers()
    assert tokenizer_markers(make(HARMONY), {}) == KNOWN[2]
    assert tokenizer_markers(make(OPENING, ["[THINK]", "[/THINK]"]), {}) == KNOWN[0]
    assert tokenizer_markers(make(CHATML, ["[THINK]", "[/THINK]"]), {}) == KNOWN[1]
    assert tokenizer_markers(make(CHATML), {}) == Markers()


def test_data_check_sees_what_a_calibration_sees(write: Write, tmp_path: Path) -> None:
    path = write({"prompt": "why", "output": "[THINK]abc[/THINK]yes"})
    said = run("data", "check", path, "--window", 1)
    assert "1 of 1 samples usable" in said.output
    assert "marker: [THINK] | [/THINK]" in said.output
    tiny = Tiny.make(tmp_path / "tiny", "qwen3", num_hidden_layers=1)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = f"{tokenizer.chat_template}{{% if think %}}[THINK]{{% endif %}}"
    tokenizer.save_pretrained(tiny.folder / "reasoning")
    model = ("--model", tiny.folder / "reasoning")
    bare = write({"prompt": "why", "output": "abc[/THINK]yes"})
    told = run("data", "check", bare, *model, "--chat-template-kwargs", '{"think": true}')
    assert "1 of 1 samples usable" in told.output
    assert "comes without '[THINK]' before it" in run("data", "check", bare, *model).output


# Markers


def test_pairs_of_a_known_format_bring_its_white_space() -> None:
    assert Markers.of([("[THINK]", "[/THINK]")]) == KNOWN[1]
    assert Markers.of([(KNOWN[2].open, "<|end|>")]).loose
    assert Markers.of([("Thought:", "Action:")]).gaps == ("\n", "\n", "\n\n")
    assert not REACT.loose


def test_known_formats_do_not_get_in_each_others_way() -> None:
    """In no format's text does another one find a marker."""
    for one in KNOWN:
        for other in KNOWN:
            if one is not other:
                text = f"{one.open}a{one.close}b{one.pairs[-1][1]}"
                assert other.scan(text) == ([], []), (one.open, other.open)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Thought: a\nAction: b\nObservation: c\nThought: d\nFinal Answer: e", "a\n\nd|e|True"),
        ("Thought: a\nAction: b\nThought: c", "a\n\nc||False"),
        ("Thought: a\nAction: b", "a|b|True"),
        ("Action: b", "|Action: b|False"),
    ],
)
def test_outputs_with_several_blocks_taken_apart(text: str, parts: str) -> None:
    thought = split_thinking(text, REACT)
    assert f"{thought.thinking}|{thought.response}|{thought.complete}" == parts


def test_an_unclosed_later_block_is_no_answer() -> None:
    thought = split_thinking("a</think>b<think>c", Markers(), opened_by_template=True)
    assert (thought.closed, thought.thinking, thought.response) == (False, "a\n\nc", "")


# Samples of several messages


ASKED = {"role": "user", "content": "p"}
SAID = {"role": "assistant", "content": "<think>a</think>b"}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"messages": [ASKED], "prompt": "p"}, "fields 'prompt' and 'messages' are both given"),
    ({"messages": []}, "field 'messages' must end with a user's or a tool's message"),
    ({"messages": [{"role": "system", "content": "s"}]}, "must end with a user's"),
    ({"messages": [ASKED, SAID, SAID]}, "must end with a user's"),
    ({"messages": "p"}, "field 'messages' must be a list, found a string"),
    ({"messages": ["p"]}, r"field 'messages\[0\]' must be a JSON object"),
    ({"messages": [{"content": "p"}]}, r"field 'messages\[0\].role' is missing"),
    ({"messages": [{"role": "user"}]}, r"field 'messages\[0\].content' is missing or blank"),
    ({"messages": [{"role": "user", "content": [1]}]}, r"content' must be a string, found a list"),
    ({"messages": [ASKED, {"role": "assistant", "reasoning": "r"}]}, r"\[1\].content' is missing"),
    ({"messages": [ASKED, SAID], "output": "o"}, "the model's last turn is given twice"),
    (
        {"messages": [ASKED, {**SAID, "tool_calls": [1]}]},
        r"tool_calls': give the model's last",
    ),
    ({"messages": [{**ASKED, "x": ["\ud800"]}]}, r"messages\[0\].x\[0\]' has half of a surrogate"),
    ({"messages": [ASKED], "tools": ["\ud800"], "output": "o"}, r"tools\[0\]' has half of a surr"),
    ({"messages": [ASKED], "tools": {}, "output": "o"}, "field 'tools' must be a list"),
    ({"messages": [ASKED]}, "field 'reasoning' is missing or blank"),
]


@pytest.mark.parametrize(("sample", "message"), MISTAKES)
def test_unfit_conversations(write: Write, sample: dict[str, Any], message: str) -> None:
    path = write(sample)
    with pytest.raises(RainError, match=message) as caught:
        read_reasoning(path)
    assert str(caught.value).startswith(f"{path}:1: ")


def test_a_template_that_drops_a_message(make: Callable[..., Any], write: Write) -> None:
    tokenizer = make(MISTRAL, ["<think>", "</think>"])
    path = write({"messages": [{"role": "system", "content": "s"}, ASKED, SAID]})
    with pytest.raises(RainError, match="does not keep the prompt's text as it is"):
        load_reasoning(path, tokenizer)


# The whole way


def test_calibrate_and_verify_with_what_was_found(tmp_path: Path) -> None:
    """No setting names the markers; the template is told to open the block."""
    tiny = Tiny.make(tmp_path, "qwen3", num_hidden_layers=1)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = f"{tokenizer.chat_template}{{% if think %}}[THINK]{{% endif %}}"
    tokenizer.save_pretrained(tiny.folder / "reasoning")
    samples = [
        {"prompt": prompt, "output": f"{reasoning}[/THINK]{response}"}
        for prompt, reasoning, response in REASONING
    ]
    path = tiny.folder / "reasoning.jsonl"
    path.write_text("\n".join(json.dumps(sample) for sample in samples))
    options = {"think": True}
    summary = tiny.using(chat_template_kwargs=options, window=2).calibrate()
    header = CalibrationFile.open(summary.path).header
    assert header["data"]["markers"] == [["[THINK]", "[/THINK]"]]
    count = 0
    for _, reasoning, _ in REASONING:
        text = f"[THINK]⟨{reasoning}⟩[/THINK]"
        content = marked(tokenizer, text)[1]["⟨"]
        around = len(tokenizer(re.sub("[⟨⟩]", "", text))["input_ids"]) - len(content)
        count += around + min(4, len(content))
    assert header["data"]["reasoning"]["positions"] == count
    texts = texts_from_settings(header["settings"], str(path), None)
    assert (texts.markers, texts.window, texts.chat_template_kwargs) == (None, 2, options)
    model = tiny.folder / "reasoning"
    verify = ("verify", model, "--against", model, "--reasoning-data", path, "--window", 2)
    told = run(*verify, "--chat-template-kwargs", json.dumps(options))
    assert told.code == 0, told.output
    assert re.search(rf"L_think +0 +{count} positions", told.output), told.output
    named = run(*verify, "--markers", "[A]", "[/A]", "--markers", "[THINK]", "[/THINK]")
    assert "'[/THINK]' comes without '[A]' or '[THINK]' before it" in named.output
    assert "is not a JSON object" in run(*verify, "--chat-template-kwargs", "[]").output
    assert "is not JSON" in run(*verify, "--chat-template-kwargs", "{").output


def test_measuring_as_in_a_calibration_of_another_program() -> None:
    pairs = [{"open": "Thought:", "close": "Action:"}]
    assert texts_from_settings({"markers": pairs}, "p", 3).markers == Markers.of(
        [("Thought:", "Action:")]
    )
    for odd in (
        {"markers": "<think>"},
        {"markers": [{"open": "a", "close": "ab"}]},
        {"window": -1},
    ):
        assert texts_from_settings(odd, "p", 3) == Texts("p", 3)
