"""Token positions of calibration samples, with real tokenizers and chat templates."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rain_mergekit.errors import RainError
from rain_mergekit.text.calibration_sets import load_instruction, load_reasoning
from rain_mergekit.text.markers import Markers
from rain_mergekit.text.token_positions import InstructionTokens, ReasoningTokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    Write = Callable[..., Path]

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENING = TURNS + "{{ '<think>\n' }}"  # as text, jinja would drop the line's end
STRIPPING = TURNS.replace("m['content']", "m['content'] | trim")
HEAD = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CORPUS = [
    "say hello to the other user, please use uppercase letters",
    "HELLO OTHER user straße 漢字",
]


def _saved(backend: Tokenizer, template: str, folder: Path) -> PreTrainedTokenizerFast:
    """Saved and loaded the way a checkpoint's tokenizer is."""
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return _reloaded(backend, template, folder)


def _reloaded(backend: Tokenizer, template: str, folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, chat_template=template
    )
    tokenizer.save_pretrained(folder)
    return cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(folder))


def _byte_bpe(template: str, folder: Path) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
    )
    return _saved(backend, template, folder)


def _word_level(template: str, folder: Path) -> PreTrainedTokenizerFast:
    words = ["<unk>", "\n", "\n\n", "user", "assistant", "say", "moon", "MOON", "one", "two", "."]
    vocab = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocab, words[0]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+"), "isolated"),
            pre_tokenizers.Split(" ", "removed"),
        ]
    )
    return _saved(backend, template, folder)


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return _byte_bpe(TURNS, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="session")
def opening(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return _byte_bpe(OPENING, tmp_path_factory.mktemp("opening"))


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return _word_level(TURNS, tmp_path_factory.mktemp("words"))


@pytest.fixture
def template(tmp_path: Path) -> Callable[[str], PreTrainedTokenizerFast]:
    return lambda text: _byte_bpe(text, tmp_path / "tokenizer")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*samples: dict[str, Any]) -> Path:
        path = tmp_path / "set.jsonl"
        path.write_text("\n".join(json.dumps(sample) for sample in samples))
        return path

    return write


def _text(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> str:
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _at(
    tokenizer: PreTrainedTokenizerFast,
    tokens: ReasoningTokens | InstructionTokens,
    positions: tuple[int, ...],
) -> list[str]:
    return [_text(tokenizer, [tokens.input_ids[i]]) for i in positions]


def _instruction(prompt: str, output: str, *specs: dict[str, Any], **more: object) -> Any:
    return {"prompt": prompt, "output": output, "related_prompt_list": list(specs), **more}


def _spec(prompt: str, response: str, *unrelated: str, name: str = "i") -> dict[str, Any]:
    return {
        "instruction_id": name,
        "prompt_spans": [prompt],
        "response_spans": [response],
        "unrelated_response_spans": list(unrelated),
    }


PARTS = {"prompt": "say hello", "reasoning": "so\nhello", "response": "HELLO"}


def test_assembled_text(bpe: PreTrainedTokenizerFast, write: Write) -> None:
    data = load_reasoning(write(PARTS), bpe, keep_response=True)
    expected = HEAD.format("say hello") + "<think>\nso\nhello\n</think>\n\nHELLO"
    assert _text(bpe, data.samples[0].input_ids) == expected


@pytest.mark.parametrize("tail", ["<think>", "<think>\n", "<think>\n\n", "<think> "])
def test_assembled_text_after_a_template_that_opens(
    template: Callable[[str], PreTrainedTokenizerFast], write: Write, tail: str
) -> None:
    tokenizer = template(TURNS + "{{ " + repr(tail) + " }}")
    data = load_reasoning(write(PARTS), tokenizer, keep_response=True)
    gap = "\n" if tail == "<think>" else ""
    expected = HEAD.format("say hello") + tail + gap + "so\nhello\n</think>\n\nHELLO"
    assert _text(tokenizer, data.samples[0].input_ids) == expected


def test_output_is_verbatim(bpe: PreTrainedTokenizerFast, write: Write) -> None:
    output = "<think>  so hello</think>HELLO \n<|im_end|>"
    data = load_reasoning(write({"prompt": "p", "output": output}), bpe, keep_response=True)
    assert _text(bpe, data.samples[0].input_ids) == HEAD.format("p") + output


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("so</think>A", "<think>\nso</think>A"),
        ("<think>\nso</think>A", "<think>\nso</think>A"),
        ("<think>\n\nso</think>A", "<think>\n\nso</think>A"),
        ("<think>so</think>A", "<think>\nso</think>A"),
        ("\n<think>so</think>A", "<think>\nso</think>A"),
    ],
)
def test_output_after_a_template_that_opens(
    opening: PreTrainedTokenizerFast, write: Write, output: str, expected: str
) -> None:
    path = write({"prompt": "p", "output": output})
    data = load_reasoning(path, opening, keep_response=True)
    assert _text(opening, data.samples[0].input_ids) == HEAD.format("p") + expected


def test_reasoning_ends_with_the_close_marker(bpe: PreTrainedTokenizerFast, write: Write) -> None:
    kept = load_reasoning(write(PARTS), bpe, keep_response=True).samples[0]
    cut = load_reasoning(write(PARTS), bpe).samples[0]
    assert _text(bpe, cut.input_ids).endswith("hello\n</think>")
    assert cut.response_positions == ()
    assert kept.input_ids[: len(cut.input_ids)] == cut.input_ids
    assert kept.think_positions == cut.think_positions
    assert kept.content_positions == cut.content_positions
    assert _at(bpe, kept, kept.response_positions)[0].startswith("\n")
    after = tuple(range(len(cut.input_ids), len(kept.input_ids)))
    assert kept.response_positions == after


def test_think_positions_and_content(words: PreTrainedTokenizerFast, write: Write) -> None:
    thinking = "one one one two moon two . . ."
    path = write({"prompt": "say moon", "output": f"<think>{thinking}</think>moon"})
    tokens = load_reasoning(path, words, window=3).samples[0]
    chosen = _at(words, tokens, tokens.think_positions)
    assert chosen == ["\n", "<think>", "one", "one", "one", ".", ".", ".", "</think>"]
    assert _at(words, tokens, tokens.content_positions) == ["two", "moon", "two"]


def test_token_before_the_marker_only_if_the_template_does_not_open(
    bpe: PreTrainedTokenizerFast, opening: PreTrainedTokenizerFast, write: Write
) -> None:
    for tokenizer, before in ((bpe, 1), (opening, 0)):
        tokens = load_reasoning(write(PARTS), tokenizer, window=0).samples[0]
        marker = tokens.input_ids.index(tokenizer.convert_tokens_to_ids("<think>"))
        end = len(tokens.input_ids) - 1
        assert tokens.think_positions == (*range(marker - before, marker + 1), end)


@pytest.mark.parametrize("window", [0, 1, 2, 3, 4, 50])
def test_short_thinking(words: PreTrainedTokenizerFast, write: Write, window: int) -> None:
    path = write({"prompt": "say", "output": "<think>one two .</think>moon moon"})
    tokens = load_reasoning(path, words, window=window, keep_response=True).samples[0]
    marker = _at(words, tokens, tuple(range(len(tokens.input_ids)))).index("<think>")
    inside = {marker + 1 + i for i in range(3) if i < window or i >= 3 - window}
    assert set(tokens.think_positions) == {marker - 1, marker, marker + 4} | inside
    assert set(tokens.content_positions) == set(range(marker + 1, marker + 4)) - inside


def test_empty_thinking(words: PreTrainedTokenizerFast, write: Write) -> None:
    path = write({"prompt": "say", "output": "<think></think>moon"})
    tokens = load_reasoning(path, words).samples[0]
    assert _at(words, tokens, tokens.think_positions) == ["\n", "<think>", "</think>"]
    assert tokens.content_positions == ()


def test_markers_of_several_tokens(bpe: PreTrainedTokenizerFast, write: Write) -> None:
    markers = Markers("[THINK]", "[/THINK]")
    path = write({"prompt": "say", "output": "[THINK] 123456789 [/THINK] MOON"})
    tokens = load_reasoning(path, bpe, markers=markers, window=2).samples[0]
    chosen = "".join(_at(bpe, tokens, tokens.think_positions))
    before = chosen.index("[THINK]")
    assert before > 0  # the one token before the marker
    assert chosen[before:] == "[THINK] 19 [/THINK]"
    assert "".join(_at(bpe, tokens, tokens.content_positions)) == "2345678"
    assert len(bpe.tokenize("[THINK]")) > 1


def test_a_token_that_holds_marker_and_text(tmp_path: Path, write: Write) -> None:
    # ">\n" as one token: it is of the marker, and the window starts after it
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r">\n+|[^>\n]|."), "isolated")
    backend.decoder = decoders.Fuse()
    letters = list(">\n.</|_abcdefghijklmnopqrstuvwxyz")
    vocab = {token: i for i, token in enumerate([*letters, ">\n"])}
    backend.model = models.BPE(vocab, [(">", "\n")])
    loaded = _reloaded(backend, "{{ messages[0]['content'] }}.", tmp_path / "tokenizer")
    path = write({"prompt": "p", "output": "<think>\nabcd</think>\n\nef"})
    tokens = load_reasoning(path, loaded, window=1, keep_response=True).samples[0]
    chosen = _at(loaded, tokens, tokens.think_positions)
    assert "".join(chosen) == ".<think>\nad</think>\n"
    assert _at(loaded, tokens, tokens.response_positions) == ["\n", "e", "f"]


def test_spans_do_not_leak_between_prompt_thinking_and_response(
    words: PreTrainedTokenizerFast, write: Write
) -> None:
    sample = _instruction(
        "say moon .", "<think>moon .</think>one moon . two", _spec("moon", "moon", ".")
    )
    tokens = load_instruction(write(sample), words).samples[0]
    every = _at(words, tokens, tuple(range(len(tokens.input_ids))))
    marker = every.index("</think>")
    (spans,) = tokens.spans
    assert every.count("moon") == 3
    assert spans.prompt == (every.index("moon"),)
    assert spans.related == (every.index("moon", marker),)
    assert spans.unrelated == (every.index(".", marker),)


def test_instruction_parts(words: PreTrainedTokenizerFast, write: Write) -> None:
    sample = _instruction("say", "<think>one two one</think>moon", _spec("say", "moon"))
    tokens = load_instruction(write(sample), words, window=1).samples[0]
    assert _at(words, tokens, tokens.thinking_positions) == ["one", "two", "one"]
    assert _at(words, tokens, tokens.think_positions) == ["\n", "<think>", "one", "one", "</think>"]
    assert _at(words, tokens, tokens.response_positions) == ["moon"]
    assert tokens.spans[0].unrelated == ()


def test_template_words_are_not_the_prompt(words: PreTrainedTokenizerFast, write: Write) -> None:
    # "user" is also the role that the template writes before the prompt
    sample = _instruction("user", "<think>one</think>moon", _spec("user", "moon"))
    tokens = load_instruction(write(sample), words).samples[0]
    every = _at(words, tokens, tuple(range(len(tokens.input_ids))))
    assert every[:4] == ["<|im_start|>", "user", "\n", "user"]
    assert tokens.spans[0].prompt == (3,)


def test_every_occurrence_counts(words: PreTrainedTokenizerFast, write: Write) -> None:
    sample = _instruction(
        "say moon one moon", "<think>one</think>MOON one MOON two", _spec("moon", "MOON")
    )
    (spans,) = load_instruction(write(sample), words).samples[0].spans
    assert len(spans.prompt) == 2
    assert spans.prompt[1] - spans.prompt[0] == 2
    assert len(spans.related) == 2
    assert spans.related[1] - spans.related[0] == 2


def test_overlapping_occurrences(words: PreTrainedTokenizerFast, write: Write) -> None:
    sample = _instruction("say", "<think>.</think>one . one . one", _spec("say", "one . one"))
    tokens = load_instruction(write(sample), words).samples[0]
    assert tokens.spans[0].related == tokens.response_positions


def test_unrelated_is_the_union_without_related(
    words: PreTrainedTokenizerFast, write: Write
) -> None:
    sample = _instruction(
        "say moon",
        "<think>.</think>one two MOON .",
        _spec("moon", "MOON", "one", name="a"),
        _spec("say", "two MOON", name="b"),
        unrelated_response_spans=["two", "."],
    )
    tokens = load_instruction(write(sample), words).samples[0]
    named = {spans.instruction_id: spans for spans in tokens.spans}
    assert _at(words, tokens, named["a"].unrelated) == ["one", "two", "."]
    assert _at(words, tokens, named["b"].unrelated) == ["."]


def test_span_that_starts_inside_a_token(bpe: PreTrainedTokenizerFast, write: Write) -> None:
    sample = _instruction("say hello", "<think>x</think>the other", _spec("ello", "ther"))
    tokens = load_instruction(write(sample), bpe).samples[0]
    (spans,) = tokens.spans
    assert _at(bpe, tokens, spans.prompt) == [" hello"]
    assert _at(bpe, tokens, spans.related) == [" other"]


def test_characters_of_several_tokens(bpe: PreTrainedTokenizerFast, write: Write) -> None:
    sample = _instruction("sag 🦊é x", "<think>🦊</think>é🦊é", _spec("🦊", "🦊"))
    tokens = load_instruction(write(sample), bpe).samples[0]
    (spans,) = tokens.spans
    for positions in (spans.prompt, spans.related):
        assert len(positions) > 1
        assert "🦊" in _text(bpe, [tokens.input_ids[i] for i in positions])


def test_template_that_strips_the_prompt(
    template: Callable[[str], PreTrainedTokenizerFast], write: Write
) -> None:
    tokenizer = template(STRIPPING)
    sample = _instruction("\n say hello \n", "<think>x</think>moon", _spec("say", "moon"))
    tokens = load_instruction(write(sample), tokenizer).samples[0]
    assert _text(tokenizer, tokens.input_ids).startswith(HEAD.format("say hello"))
    assert _at(tokenizer, tokens, tokens.spans[0].prompt)[0].startswith("s")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("so A", "no '<think>' after the prompt"),
        ("so</think>A", "'</think>' comes without '<think>' before it"),
        ("<think>so A", "the block is not closed by '</think>'"),
        ("<think>a<think>b</think>", "'<think>' comes again before '</think>'"),
        ("<think>a</think><think>b", "the block is not closed by '</think>'"),
        ("<think>a</think>b</think>", "'</think>' comes without '<think>' before it"),
        ("</think>so<think>A", "'</think>' comes without '<think>' before it"),
    ],
)
def test_skipped_outputs(
    bpe: PreTrainedTokenizerFast, write: Write, output: str, reason: str
) -> None:
    path = write({"prompt": "p", "output": output}, PARTS)
    data = load_reasoning(path, bpe)
    assert (data.path, data.total, len(data.samples)) == (str(path), 2, 1)
    assert data.samples[0].source == f"{path}:2"
    assert data.skipped == ((f"{path}:1", reason),)


@pytest.mark.parametrize(
    ("field", "text", "reason"),
    [
        ("reasoning", "a <think> b", "'<think>' comes again before '</think>'"),
        ("reasoning", "a </think> b", "'</think>' comes without '<think>' before it"),
        ("reasoning", "a </think> b <think> c", "holds markers of its own"),
        ("response", "a <think> b </think> c", "holds markers of its own"),
    ],
)
def test_parts_that_hold_markers_are_skipped(
    opening: PreTrainedTokenizerFast, write: Write, field: str, text: str, reason: str
) -> None:
    data = load_reasoning(write(PARTS, {**PARTS, field: text}), opening)
    ((_, found),) = data.skipped
    assert reason in found


def test_prompt_that_holds_markers_is_only_a_prompt(
    bpe: PreTrainedTokenizerFast, opening: PreTrainedTokenizerFast, write: Write
) -> None:
    for tokenizer in (bpe, opening):
        path = write({**PARTS, "prompt": "what are <think> and </think>"})
        tokens = load_reasoning(path, tokenizer).samples[0]
        chosen = [tokens.input_ids[i] for i in tokens.think_positions]
        marker = cast("int", tokenizer.convert_tokens_to_ids("<think>"))
        assert tokens.input_ids.count(marker) == 2
        assert chosen.count(marker) == 1


def test_too_long_samples_are_skipped(words: PreTrainedTokenizerFast, write: Write) -> None:
    short, long = (
        {"prompt": "say", "output": f"<think>{'one ' * n}</think>moon moon"} for n in (3, 9)
    )
    path = write(short, long)
    size = len(load_reasoning(write(short), words).samples[0].input_ids)
    data = load_reasoning(write(short, long), words, max_tokens=size)
    assert len(data.samples) == 1
    assert data.skipped == ((f"{path}:2", f"{size + 6} tokens, more than max_tokens = {size}"),)
    with pytest.raises(RainError, match=r"none of its 2 samples can be used .*:1: .*max_tokens"):
        load_reasoning(path, words, max_tokens=size - 1)
    with pytest.raises(RainError, match="max_tokens"):
        load_reasoning(path, words, max_tokens=size, keep_response=True)


def test_instructions_are_skipped_one_by_one(words: PreTrainedTokenizerFast, write: Write) -> None:
    output = "<think>two</think>moon one"
    path = write(
        _instruction(
            "say moon",
            output,
            _spec("say", "MOON", name="a"),
            _spec("MOON", "moon", name="b"),
            _spec("say", "moon", "three", name="c"),
            {"prompt_spans": ["say"], "response_spans": []},
            _spec("say", "moon", name="good"),
        ),
        _instruction("say", output, _spec("say", "MOON", name="a")),
        _instruction("say", output),
        _instruction("say", output, _spec("say", "moon"), unrelated_response_spans=["three"]),
    )
    data = load_instruction(path, words)
    assert [spans.instruction_id for spans in data.samples[0].spans] == ["good"]
    assert (data.total, len(data.samples)) == (4, 1)
    nowhere = "the response or thinking does not contain the span 'three'"
    assert data.skipped == (
        (f"{path}:1", "instruction 'a': the response does not contain the span 'MOON'"),
        (f"{path}:1", "instruction 'b': the prompt does not contain the span 'MOON'"),
        (
            f"{path}:1",
            "instruction 'c': the response or thinking does not contain the span 'three'",
        ),
        (f"{path}:1", "instruction 'related_prompt_list[3]': its response_spans are empty"),
        (f"{path}:2", "instruction 'a': the response does not contain the span 'MOON'"),
        (f"{path}:3", "it lists no instruction"),
        (f"{path}:4", nowhere),
    )


def test_unrelated_spans_may_be_in_the_thinking(
    words: PreTrainedTokenizerFast, write: Write
) -> None:
    """Only where the response has them not: there they are what they were."""
    output = "<think>two one</think>moon one"
    path = write(
        _instruction("say", output, _spec("say", "moon", "two"), _spec("say", "moon", "one"))
    )
    sample = load_instruction(path, words).samples[0]
    ids = [[sample.input_ids[i] for i in spans.unrelated] for spans in sample.spans]
    two, one = (words.convert_tokens_to_ids(word) for word in ("two", "one"))
    assert ids == [[two], [one]]
    assert sample.spans[0].unrelated[0] in sample.thinking_positions
    assert sample.spans[1].unrelated[0] in sample.response_positions


def test_nothing_usable(words: PreTrainedTokenizerFast, write: Write) -> None:
    path = write(_instruction("say", "<think>one</think>moon", _spec("x", "moon")))
    with pytest.raises(
        RainError, match=r"none of its 1 sample can .*does not contain the span 'x'"
    ):
        load_instruction(path, words)


def test_template_that_changes_the_prompt(
    template: Callable[[str], PreTrainedTokenizerFast], write: Write
) -> None:
    tokenizer = template(TURNS.replace("m['content']", "m['content'] | upper"))
    with pytest.raises(RainError, match="does not keep the prompt's text"):
        load_reasoning(write(PARTS), tokenizer)


def test_template_whose_frame_depends_on_the_prompt(
    template: Callable[[str], PreTrainedTokenizerFast], write: Write
) -> None:
    tokenizer = template("{{ messages[0]['content'] | length }}\n" + TURNS)
    sample = _instruction("say hello", "<think>x</think>moon", _spec("hello", "moon"))
    repeated = _instruction("user", "<think>x</think>moon", _spec("user", "moon"))
    path = write(sample, repeated)
    data = load_instruction(path, tokenizer)
    assert _at(tokenizer, data.samples[0], data.samples[0].spans[0].prompt) == [" hello"]
    reason = "the chat template does not keep the prompt's text as it is"
    assert data.skipped == ((f"{path}:2", reason),)


def test_template_that_closes_the_block_itself(
    template: Callable[[str], PreTrainedTokenizerFast], write: Write
) -> None:
    tokenizer = template(TURNS + "<think>\n\n</think>\n\n.")
    with pytest.raises(RainError, match="a thinking block of its own after the prompt"):
        load_reasoning(write(PARTS), tokenizer)


def test_template_that_tells_the_model_about_markers(
    template: Callable[[str], PreTrainedTokenizerFast], write: Write
) -> None:
    tokenizer = template("Think in <think> and </think>.\n" + TURNS)
    tokens = load_reasoning(write(PARTS), tokenizer, window=0).samples[0]
    marker = tokenizer.convert_tokens_to_ids("<think>")
    places = [i for i, token in enumerate(tokens.input_ids) if token == marker]
    assert tokens.think_positions == (places[1] - 1, places[1], len(tokens.input_ids) - 1)


@pytest.mark.parametrize(
    "error", ["{{ raise_exception('only tools') }}", "{{ messages[0].x.y }}", "{{ 1 // 0 }}"]
)
def test_template_that_refuses_a_sample(
    template: Callable[[str], PreTrainedTokenizerFast], write: Write, error: str
) -> None:
    condition = "{% if 'bad' in messages[0]['content'] %}" + error + "{% endif %}"
    path = write(PARTS, {**PARTS, "prompt": "bad"})
    with pytest.raises(RainError, match=r"set\.jsonl:2: the chat template of .* refuses"):
        load_reasoning(path, template(condition + TURNS))
    with pytest.raises(RainError, match=r"set\.jsonl:1: the chat template of .* refuses"):
        load_reasoning(path, template("{{ raise_exception('never') }}"))


def test_tokenizer_without_chat_template(
    template: Callable[[str], PreTrainedTokenizerFast], write: Write
) -> None:
    tokenizer = template(TURNS)
    tokenizer.chat_template = None
    for load in (load_reasoning, load_instruction):
        with pytest.raises(RainError, match="has no chat template"):
            load(write(PARTS), tokenizer)


def test_slow_tokenizer(bpe: PreTrainedTokenizerFast, write: Write) -> None:
    from transformers import ByT5Tokenizer  # noqa: PLC0415 - slow to import

    with pytest.raises(RainError, match="fast tokenizer"):
        load_reasoning(write(PARTS), ByT5Tokenizer(chat_template=bpe.chat_template))


def test_normalizer_that_composes_and_drops(tmp_path: Path, write: Write) -> None:
    # "e" + accent becomes one character; a soft hyphen becomes nothing, so it has no token
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace("\u00ad", "")]
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = _saved(backend, TURNS, tmp_path / "tokenizer")
    specs = (_spec("e\u0301", "moon", name="a"), _spec("say", "\u00ad", name="b"))
    path = write(_instruction("say e\u0301z", "<think>x</think>a moon \u00ad", *specs))
    data = load_instruction(path, tokenizer)
    tokens = data.samples[0]
    ids = [tokens.input_ids[i] for i in tokens.spans[0].prompt]
    table = _Reference(tokenizer, tuple(ids))
    assert table.text.strip() == "\u00e9".encode()
    assert data.skipped == ((f"{path}:1", "instruction 'b': no token holds one of its spans"),)


def test_tokenizer_that_loses_words(tmp_path: Path, write: Write) -> None:
    # without an unknown token, BPE drops what it has no symbol for, silently
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer = _saved(backend, TURNS, tmp_path / "tokenizer")
    with pytest.raises(RainError, match=r"loses \d+% of the text"):
        load_reasoning(write(PARTS), tokenizer)


def test_tokenizer_that_has_nothing_for_a_marker(tmp_path: Path, write: Write) -> None:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace("<think>", "")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = _reloaded(backend, TURNS, tmp_path / "tokenizer")
    long = {**PARTS, "prompt": "say hello " * 60}  # of a short text the marker is a large part
    with pytest.raises(RainError, match="the tokenizer drops the marker '<think>'"):
        load_reasoning(write(long), tokenizer)


@pytest.mark.parametrize("pair", [("", "b"), ("a", " "), ("a", "a"), ("think", "/think")])
def test_unfit_markers(pair: tuple[str, str]) -> None:
    with pytest.raises(RainError, match="thinking markers"):
        Markers(*pair)


def test_unfit_options(words: PreTrainedTokenizerFast, write: Write) -> None:
    with pytest.raises(RainError, match="window must be 0 or more"):
        load_reasoning(write(PARTS), words, window=-1)
    with pytest.raises(RainError, match="max_tokens must be 1 or more"):
        load_reasoning(write(PARTS), words, max_tokens=0)


class _Reference:
    """Slow and independent: bytes of each token one after another, no offsets."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> None:
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        other = [byte for byte in range(256) if byte not in plain]
        table = {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(other)}
        names = tokenizer.convert_ids_to_tokens(list(ids))
        parts = [
            name.encode() if name in SPECIAL else bytes(table[char] for char in name)
            for name in names
        ]
        self.text = b"".join(parts)
        self.ends = [sum(map(len, parts[: i + 1])) for i in range(len(parts))]
        self.starts = [end - len(part) for end, part in zip(self.ends, parts, strict=True)]

    def touching(self, span: bytes, start: int, end: int) -> set[int]:
        """Tokens with a byte of some occurrence of ``span`` in text[start:end]."""
        at = [i for i in range(start, end - len(span) + 1) if self.text.startswith(span, i)]
        return {
            token
            for token, (first, last) in enumerate(zip(self.starts, self.ends, strict=True))
            if any(first < i + len(span) and last > i for i in at)
        }


TEXT = st.text(alphabet="abehlo .-\nßé漢🦊", min_size=1, max_size=25).filter(
    lambda t: t.strip() != ""
)


@st.composite
def _sliced(draw: st.DrawFn, text: str) -> str:
    start = draw(st.integers(0, len(text) - 1))
    span = text[start : draw(st.integers(start + 1, len(text)))]
    return span if span.strip() else text


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), prompt=TEXT, thinking=TEXT, answer=TEXT, window=st.integers(0, 6))
def test_positions_against_a_slow_reference(
    bpe: PreTrainedTokenizerFast,
    write: Write,
    data: st.DataObject,
    prompt: str,
    thinking: str,
    answer: str,
    window: int,
) -> None:
    spans = [data.draw(_sliced(text)) for text in (prompt, answer, answer)]
    output = f"<think>{thinking}</think>{answer}"
    path = write(_instruction(prompt, output, _spec(*spans)))
    tokens = load_instruction(path, bpe, window=window).samples[0]

    head, full = HEAD.format(prompt).encode(), (HEAD.format(prompt) + output).encode()
    reference = _Reference(bpe, tokens.input_ids)
    assert reference.text == full
    begin = len(b"<|im_start|>user\n")
    after = len(full) - len(answer.encode())
    i, r, u = (span.encode() for span in spans)
    related = reference.touching(r, after, len(full))
    (found,) = tokens.spans
    assert set(found.prompt) == reference.touching(i, begin, begin + len(prompt.encode()))
    assert set(found.related) == related
    assert set(found.unrelated) == reference.touching(u, after, len(full)) - related

    first = reference.starts.index(len(head))
    last = reference.ends.index(after)
    think = {first - 1, first, last}
    think |= {t for t in range(first, last) if t - first <= window or last - t <= window}
    assert set(tokens.think_positions) == think
    assert tokens.thinking_positions == tuple(range(first + 1, last))
    assert tokens.response_positions == tuple(range(last + 1, len(tokens.input_ids)))
