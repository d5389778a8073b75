"""A sample's request: one prompt, or a conversation of several messages with tools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from rain_mergekit.errors import RainError
from rain_mergekit.system.json_fields import JsonFields, require_texts

Message: TypeAlias = Mapping[str, Any]
# Under these names a message holds its thinking, apart from its content.
_THINKING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Conversation:
    """`messages` end before the model's last turn; none where there is only a prompt.

    `prompt` is the last message's text. `answer` is the model's last turn, (output, reasoning,
    response), where the messages held it.
    """

    prompt: str
    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] = ()
    answer: tuple[str | None, str | None, str | None] | None = None


def parse_conversation(fields: JsonFields) -> Conversation:
    """The sample's `prompt`, or its `messages` and `tools`; RainError names the field."""
    if fields.value("messages") is None:
        return Conversation(fields.required("prompt"))
    if fields.text("prompt") is not None:
        raise RainError(
            f"{fields.source}: fields 'prompt' and 'messages' are both given; keep one of them"
        )
    items = [JsonFields(fields.source, v, label) for label, v in fields.items("messages")]
    messages = [_message(item) for item in items]
    tools = fields.items("tools", optional=True)
    for label, value in tools:
        require_texts(fields.source, label, value)
    answer = None
    if messages and messages[-1]["role"] == "assistant":
        answer = _answer(items.pop())
        messages.pop()
    if not messages or messages[-1]["role"] in ("assistant", "system"):
        raise RainError(
            f"{fields.source}: field 'messages' must end with a user's or a tool's message, and "
            "perhaps one of the assistant after it"
        )
    prompt = str(messages[-1]["content"])
    return Conversation(prompt, tuple(messages), tuple(value for _, value in tools), answer)


def _message(item: JsonFields) -> Message:
    """The message unchanged, for the chat template; only the fields used here are checked."""
    role = item.required("role", "user, assistant, system or tool")
    content = item.text("content")
    if content is None and role != "assistant":
        item.required("content", "what this message says, as one string")
    require_texts(item.source, item.path, item.raw)
    return {**item.raw, "content": content or ""}


def _answer(item: JsonFields) -> tuple[str | None, str | None, str | None]:
    """The model's last turn: verbatim, or thinking and content apart."""
    if item.raw.get("tool_calls"):
        raise RainError(
            f"{item.source}: field '{item.path}.tool_calls': give the model's last turn as it "
            "wrote it, calls and markers included, as the sample's 'output'"
        )
    thinking = next((text for name in _THINKING if (text := item.text(name))), None)
    content = item.required("content", "the model's last turn")
    return (content, None, None) if thinking is None else (None, thinking, content)
