"""Chats: the assistant's turns are found in the text of any template that shows them."""

import pytest
from pico import CHAT, tokenizer

from adamerge.backbones.chat_templates import chat_ids, chat_spans, chat_tokens
from adamerge.errors import DataError

# as models that reason do it: thoughts are written of the turns behind the last question alone, be they empty
THOUGHTS = (
    "{% set last = namespace(user=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set last.user = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{% set words = m['content'].split('</think>')[-1].lstrip() %}"
    "<s>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.index0 > last.user %}"
    "<think>{{ m['content'].split('</think>')[0].split('<think>')[-1] if '</think>' in m['content'] else '' }}</think>\n"
    "{% endif %}{{ words }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
FIRST = "{{ messages[0]['role'] }}: " + CHAT  # no empty conversation
ALTERNATES = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a user must begin') }}{% endif %}" + CHAT


def messages(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture
def chats(tmp_path):
    made = tokenizer(tmp_path)

    def of(template):
        made.chat_template = template
        return made

    return of


def said(template, turns) -> list[str]:
    text, spans = chat_spans(template, turns)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        (CHAT, messages("ab", "cd", "e", "f"), ["cd</s>", "f</s>"]),
        (THOUGHTS, messages("ab", "cd"), ["<think></think>\ncd</s>"]),
        (THOUGHTS, messages("ab", "cd", "e", "f"), ["cd</s>", "<think></think>\nf</s>"]),
        (THOUGHTS, messages("ab", "cd", "e", "f", "g", "h"), ["cd</s>", "f</s>", "<think></think>\nh</s>"]),
        (THOUGHTS, messages("ab", "<think>x</think>\ncd", "e", "f"), ["cd</s>", "<think></think>\nf</s>"]),
        (THOUGHTS, messages("ab", "cd", "e", "<think>x</think>\nf"), ["cd</s>", "<think>x</think>\nf</s>"]),
        (THOUGHTS, messages("a", "a", "a", "a"), ["a</s>", "<think></think>\na</s>"]),
        (THOUGHTS, messages("@0@", "cd", "@0@0@", "f"), ["cd</s>", "<think></think>\nf</s>"]),
        ("{{ messages | length }}" + CHAT, messages("ab", "cd", "e", "f"), ["cd</s>", "f</s>"]),
        (FIRST, messages("ab", "cd", "e", roles=("assistant", "user")), ["ab</s>", "e</s>"]),
    ],
)
def test_turns_are_from_their_content_to_their_end_mark(chats, template, turns, expected):
    assert said(chats(template), turns) == expected


def test_tokens_inside_the_turns_are_predicted(chats):
    ids, predicted = chat_tokens(chats(THOUGHTS.replace("think", "s")), messages("ab", "cd", "e", "f"))
    tokens = chats(THOUGHTS).convert_ids_to_tokens(ids)
    found = [token for token, counted in zip(tokens, predicted, strict=True) if counted]
    assert [token for token in found if len(token) == 1] == ["c", "d", "f"] and found[2] == "</s>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}" + CHAT.replace("m['content'] }}", "m['content'] | length }}"),
        "{{ messages | length }}" + CHAT.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['content'] }}"),
        "{{ messages | length }}" + CHAT.replace("m['content'] }}", "m['content'] if loop.last else '' }}"),
    ],
    ids=["the length alone", "twice", "only the last"],
)
def test_a_template_that_does_not_show_a_turn_names_the_ways_out(chats, template):
    with pytest.raises(DataError, match="turn 1 differently") as found:
        chat_spans(chats(template), messages("ab", "cd", "e", "f"))
    assert "response_only=false" in str(found.value)
    assert chat_ids(chats(template), messages("ab", "cd", "e", "f")), "which needs no turn"


def test_a_conversation_that_the_template_refuses(chats):
    for function in (chat_ids, chat_tokens):
        with pytest.raises(DataError, match="the chat template refuses the conversation: a user must begin"):
            function(chats(ALTERNATES), messages("ab", "cd", roles=("assistant", "user")))
        with pytest.raises(DataError, match="the tokenizer has no chat template"):
            function(chats(None), messages("ab", "cd"))
    with pytest.raises(DataError, match="the chat template refuses the conversation"):
        chat_ids(chats(CHAT), [])
