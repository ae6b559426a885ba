"""Chats: a conversation as the text of a chat template, and where in it the assistant's turns stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from adamerge.errors import DataError

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
"""From which character to which."""


def chat_ids(tokenizer: Any, messages: Messages) -> list[int]:
    """Returns the tokens of a conversation in the tokenizer's template.

    Raises:
        DataError: there is no template, or it refuses the conversation.
    """
    return list(tokenizer(chat_text(tokenizer, messages), add_special_tokens=False)["input_ids"])


def chat_tokens(tokenizer: Any, messages: Messages) -> tuple[list[int], list[bool]]:
    """Returns a conversation's tokens in the tokenizer's template, and which belong to assistant turns.

    A turn's end mark belongs to it, and is predicted too.

    Raises:
        DataError: there is no template, it refuses the conversation, or does not show where a turn stands.
    """
    text, turns = chat_spans(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), within(encoded["offset_mapping"], turns)


def chat_text(template: Any, messages: Messages, **options: Any) -> str:
    """Returns the conversation as the text that the template makes of it.

    Args:
        template: a tokenizer or processor with a chat template.
        messages: with ``role`` and ``content`` each.
        options: of ``apply_chat_template``.

    Raises:
        DataError: there is no template, or it refuses the conversation.
    """
    if not template.chat_template:
        raise DataError("the tokenizer has no chat template", todo="give {prompt, response} samples instead")
    try:
        text: str = template.apply_chat_template([dict(message) for message in messages], tokenize=False, **options)
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise DataError(
            f"the chat template refuses the conversation: {error}", todo="mend the roles and contents of its turns"
        ) from error
    return text


def chat_spans(template: Any, messages: Messages) -> tuple[str, list[Span]]:
    """Returns the conversation as text, and where each assistant's turn stands in it, from content to end mark.

    Args:
        template: a tokenizer or processor with a chat template.
        messages: with ``role`` and ``content`` each.

    Raises:
        DataError: there is no template, it refuses the conversation, or does not show where a turn stands.
    """
    text = chat_text(template, messages)
    turns = []
    for i, message in enumerate(messages):
        if message.get("role") == "assistant":
            span = _between(template, messages, i, text) or _of_content(template, messages, i, text)
            if span is None:
                raise DataError(
                    f"the chat template writes turn {i} differently when others follow, or not as it is given: it is unclear"
                    " what is a response",
                    todo="pass backbone.response_only=false to predict all tokens, or give {prompt, response} samples",
                )
            turns.append(span)
    return text, turns


def within(offsets: Sequence[Span], turns: Sequence[Span]) -> list[bool]:
    """Returns which tokens, of characters ``start`` to ``end`` each, lie inside one of the turns."""
    return [any(first <= start < end <= last for first, last in turns) for start, end in offsets]


def _between(template: Any, messages: Messages, i: int, text: str) -> Span | None:
    """Returns what the turn adds to the conversation before it, where the text goes on just so."""
    try:
        start = chat_text(template, messages[:i], add_generation_prompt=True)
        end = chat_text(template, messages[: i + 1]).rstrip()
    except DataError:  # a template may ask for a turn before the assistant's
        return None
    return (len(start), len(end)) if text.startswith(start) and text.startswith(end) else None


def _of_content(template: Any, messages: Messages, i: int, text: str) -> Span | None:
    """Returns what changes with the turn's content, and its end mark: for templates that write a last turn differently.

    Those of reasoning models put a block of thoughts into the last turn, and leave it out of the turns before.
    """
    mark = "@0@"
    while mark in text:
        mark += "0@"
    content: Any = [{"type": "text", "text": mark}] if isinstance(messages[i]["content"], list) else mark
    marked = [*messages[:i], {**messages[i], "content": content}, *messages[i + 1 :]]
    before, _, after = chat_text(template, marked).partition(mark)
    if not (text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text)):
        return None
    if mark in after or len(before) + len(after) == len(text):  # written twice, or not at all
        return None
    end = len(text) - len(after)
    try:
        own = chat_text(template, marked[: i + 1]).partition(mark)[2].rstrip()
    except DataError:
        own = ""
    return len(before), end + (len(own) if after.startswith(own) else 0)
