"""Chat templates are foreign code: rendered as transformers does, and stopped when they run away."""

from __future__ import annotations

import threading
import time

import pytest
from text_fakes import byte_level_tokenizer

from quire.core.engine.chat import ChatRenderer, split_conversations
from quire.core.engine.tokenizer import TextCodec
from quire.core.errors import ConfigError, RequestError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a quire? <b>&amp; “é”</b>"},
]
TOOLS = [{"type": "function", "function": {"name": "fold", "parameters": {"type": "object"}}}]
SECTIONS = """\
{%- set ns = namespace(count=0) -%}
{%- for message in messages %}
    {%- if loop.first and tools %}{{ tools | tojson(indent=2) }}{% endif %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
{{ bos_token }}[{{ message['role'] | upper }} {{ ns.count }}] {{ message.content | trim }}
    {%- if message.role == 'assistant' %}{% generation %}<{{ message.content }}>{% endgeneration %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ eos_token }}{{ mood | default('calm') }}{% endif %}
"""
LOOPS = {
    "one loop": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    ),
    "much text": "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaa{% endfor %}{% endfor %}",
    "doubling": "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "large number": "{{ 10 ** (10 ** 10) }}",
    "large text": "{{ 'a' * 10 ** 12 }}",
    "wide filter": "{{ 'a' | center(10 ** 12) }}",
    "recursion": "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(500) }}",
    "wrong syntax": "{% for %}",
    "its own error": "{{ raise_exception('roles must alternate') }}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(byte_level_tokenizer())


@pytest.fixture(scope="module")
def chat(codec):
    chat = ChatRenderer(codec, time_limit_s=1.0, max_chars=100_000)
    yield chat
    chat.close()


@pytest.mark.parametrize("template", [None, SECTIONS])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("adds", [False, True])
def test_render_equals_transformers(chat, codec, template, tools, adds):
    """The same text as `apply_chat_template`, with the model's template and with another."""
    messages = [*MESSAGES, {"role": "assistant", "content": " Paper. ", "tool_calls": None}]
    expected = codec.tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=template,
        add_generation_prompt=adds,
        tokenize=False,
        mood="gay",
    )
    text = chat.render(
        messages,
        tools=tools,
        chat_template=template,
        add_generation_prompt=adds,
        template_variables={"mood": "gay"},
    )
    assert text == expected


@pytest.mark.parametrize("content", ["A quire is", "A quire is "])
def test_render_continued_message_equals_transformers(chat, codec, content):
    """The prompt ends in the middle of the last message."""
    messages = [*MESSAGES, {"role": "assistant", "content": content}]
    for template in (
        None,
        SECTIONS.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
    ):
        expected = codec.tokenizer.apply_chat_template(
            messages, chat_template=template, continue_final_message=True, tokenize=False
        )
        text = chat.render(
            messages,
            chat_template=template,
            add_generation_prompt=False,
            continue_final_message=True,
        )
        assert text == expected


@pytest.mark.parametrize("name", LOOPS)
def test_render_template_that_runs_away_is_refused_and_harms_nobody(chat, name):
    """Time, memory and text are bounded, whatever the template does; the next one works."""
    began = time.monotonic()
    with pytest.raises(RequestError) as refused:
        chat.render(MESSAGES, chat_template=LOOPS[name])
    assert refused.value.param == "chat_template"
    assert time.monotonic() - began < 20.0
    assert chat.render(MESSAGES, chat_template="{{ messages | length }}") == "2"


def test_render_own_template_goes_on_while_a_guest_loops(chat):
    """A request with a bad template of its own delays no other request."""
    chat.render(MESSAGES)
    errors = []

    def loop() -> None:
        try:
            chat.render(MESSAGES, chat_template=LOOPS["nested loops"])
        except RequestError as error:
            errors.append(error)

    guest = threading.Thread(target=loop)
    guest.start()
    for _ in range(3):
        assert chat.render(MESSAGES)
    assert guest.is_alive() or errors
    guest.join()
    assert len(errors) == 1


@pytest.mark.parametrize(
    "messages", [[], "text", None, [{"content": "x"}], ["text"], [{"role": 3, "content": "x"}]]
)
def test_render_messages_that_are_none_are_refused(chat, messages):
    """Malformed conversations name the field."""
    with pytest.raises(RequestError) as refused:
        chat.render(messages)
    assert refused.value.param == "messages"


def test_render_continuation_of_nothing_is_refused(chat):
    """Going on with a message and beginning one exclude each other."""
    with pytest.raises(RequestError, match="ask for one"):
        chat.render(MESSAGES, continue_final_message=True)


def test_renderer_takes_template_from_text_or_file(codec, tmp_path):
    """The operator gives a template or its file; a misspelt path is told at the start."""
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages[0].content }}!")
    for given in (str(path), "{{ messages[0].content }}!"):
        chat = ChatRenderer(codec, given)
        assert chat.render(MESSAGES) == "Be brief.!"
        chat.close()
    with pytest.raises(ConfigError, match="neither"):
        ChatRenderer(codec, str(tmp_path / "missing.jinja"))


def test_render_tool_given_as_function_becomes_schema(chat, codec):
    """Python functions with hints and a docstring are tools too."""

    def fold(times: int) -> str:
        """Folds a sheet.

        Args:
            times: How often.
        """
        return str(times)

    text = chat.render(MESSAGES, tools=[fold], chat_template="{{ tools[0].function.name }}")
    assert text == "fold"


def test_split_conversations_tells_one_from_many():
    """A list of messages is one conversation, a list of lists is many."""
    assert split_conversations(MESSAGES) == ([MESSAGES], False)
    assert split_conversations([MESSAGES, MESSAGES]) == ([MESSAGES, MESSAGES], True)
    with pytest.raises(RequestError):
        split_conversations([])
