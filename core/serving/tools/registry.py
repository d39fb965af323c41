"""The formats that can be chosen by name, and the one that a chat template speaks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.core.errors import ConfigError
from quire.core.serving.tools import argument_stream as heads
from quire.core.serving.tools import bare, formats
from quire.core.serving.tools.events import AnswerParser, new_call_id, short_call_id
from quire.core.serving.tools.harmony import HarmonyParser
from quire.core.serving.tools.marked import ContentTrimmer, MarkedParser, Region
from quire.core.serving.tools.plain_arguments import GemmaArguments, TaggedArguments

Tools = Sequence[Mapping[str, Any]]
MakeParser = Callable[[Tools, ContentTrimmer], AnswerParser]

AUTO, NONE = "auto", "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallForm:
    """How a call is written whose arguments are JSON, and which begins as no JSON does."""

    before_name: str
    after_name: str
    """Of the name, which is JSON too."""
    end: str
    between: str
    """Two calls."""


_HERMES_CALL = CallForm(
    before_name='<tool_call>\n{"name": ',
    after_name=', "arguments": ',
    end="}\n</tool_call>",
    between="\n",
)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How one family writes tool calls."""

    name: str
    make: MakeParser
    marks: tuple[str, ...] = ()
    """Tokens that must not be left out of the text."""
    signs: tuple[str, ...] = ()
    """All of these in a chat template: it is this format for sure."""
    make_id: Callable[[], str] = new_call_id
    call_form: CallForm | None = field(default=None, kw_only=True)
    """None: calls are not of a form that a grammar could describe."""


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How one family writes its thoughts."""

    name: str
    begin: str
    end: str
    begins_inside: bool = False
    """Without a word of the prompt, the answer begins with thoughts."""
    signs: tuple[str, ...] = ()
    is_harmony: bool = field(default=False, kw_only=True)


def _marked(*regions: Region, noise: tuple[str, ...] = ()) -> MakeParser:
    return lambda _, trimmer: MarkedParser(regions, trimmer, noise=noise)


_TOOL_CALL = ("<tool_call>", "</tool_call>")
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_ONE = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
_KIMI = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_KIMI_ONE = ("<|tool_call_begin|>", "<|tool_call_end|>")
_GEMMA = ("<start_function_call>", "<end_function_call>")
_HARMONY = ("<|channel|>", "<|message|>", "<|start|>")


def _qwen_coder(tools: Tools, trimmer: ContentTrimmer) -> AnswerParser:
    arguments = formats.qwen_coder_arguments(tools)
    return _plain(_TOOL_CALL, heads.QWEN_CODER_HEAD, arguments, "", trimmer)


def _glm(tools: Tools, trimmer: ContentTrimmer) -> AnswerParser:
    arguments = formats.glm_arguments(tools)
    return _plain(_TOOL_CALL, heads.GLM_HEAD, arguments, _TOOL_CALL[1], trimmer)


def _gemma(_: Tools, trimmer: ContentTrimmer) -> AnswerParser:
    code = Region("```tool_code\n", "```", formats.read_gemma_code, is_json=False)
    return _plain(_GEMMA, heads.GEMMA_HEAD, GemmaArguments, "", trimmer, code)


def _plain(
    marks: tuple[str, str],
    head: re.Pattern[str],
    arguments: Callable[[str], TaggedArguments | GemmaArguments],
    end: str,
    trimmer: ContentTrimmer,
    *others: Region,
) -> AnswerParser:
    """Calls between marks, whose arguments are no JSON."""
    read = formats.plain_reader(head, arguments, end)
    region = Region(*marks, read, is_json=False, head=head, make_reader=arguments)
    return MarkedParser([region, *others], trimmer)


def _llama(_: Tools, trimmer: ContentTrimmer) -> AnswerParser:
    return bare.LlamaParser(trimmer)


def _pythonic(_: Tools, trimmer: ContentTrimmer) -> AnswerParser:
    return bare.BareParser(bare.could_be_python, bare.read_pythonic, trimmer)


_DEEPSEEK_FORMAT = _marked(
    Region(*_DEEPSEEK_ONE, formats.read_deepseek, head=heads.DEEPSEEK_HEAD), noise=_DEEPSEEK
)

# In the order in which a template is asked: the telling ones first.
TOOL_FORMATS: dict[str, ToolFormat] = {
    one.name: one
    for one in (
        ToolFormat(
            "gpt_oss",
            lambda _, trimmer: HarmonyParser(trimmer),
            (*_HARMONY, "<|constrain|>"),
            _HARMONY,
        ),
        ToolFormat("deepseek_v3", _DEEPSEEK_FORMAT, (*_DEEPSEEK, *_DEEPSEEK_ONE), _DEEPSEEK[:1]),
        ToolFormat("deepseek_v31", _DEEPSEEK_FORMAT, (*_DEEPSEEK, *_DEEPSEEK_ONE)),
        ToolFormat(
            "kimi_k2",
            _marked(Region(*_KIMI_ONE, formats.read_kimi, head=heads.KIMI_HEAD), noise=_KIMI),
            (*_KIMI, *_KIMI_ONE),
            _KIMI[:1],
        ),
        ToolFormat(
            "mistral",
            _marked(Region("[TOOL_CALLS]", None, formats.read_mistral, head=heads.MISTRAL_HEAD)),
            ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
            ("[TOOL_CALLS]",),
            short_call_id,
        ),
        ToolFormat("glm45", _glm, _TOOL_CALL, ("<arg_key>", "<tool_call>")),
        ToolFormat(
            "qwen3_coder",
            _qwen_coder,
            _TOOL_CALL,
            ("<tool_call>", "<function=", "<parameter="),
        ),
        ToolFormat(
            "hermes",
            _marked(Region(*_TOOL_CALL, formats.read_json_call, head=heads.JSON_HEAD)),
            _TOOL_CALL,
            ("<tool_call>", '"arguments"'),
            call_form=_HERMES_CALL,
        ),
        ToolFormat("gemma", _gemma, (*_GEMMA, "<escape>"), _GEMMA[:1]),
        ToolFormat(
            "llama3_json",
            _llama,
            ("<|python_tag|>",),
            ("Environment: ipython", '"parameters"'),
        ),
        ToolFormat("llama4_json", _llama, ("<|python_tag|>",)),
        ToolFormat(
            "llama4_pythonic", _pythonic, ("<|python_start|>",), ("<|python_start|>", "[func_name1")
        ),
        ToolFormat("pythonic", _pythonic),
    )
}

_THINK = ("<think>", "</think>")
REASONING_FORMATS: dict[str, ReasoningFormat] = {
    one.name: one
    for one in (
        ReasoningFormat("gpt_oss", "", "", signs=_HARMONY, is_harmony=True),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]", signs=("[THINK]",)),
        ReasoningFormat("kimi", "◁think▷", "◁/think▷", signs=("◁/think▷",)),
        ReasoningFormat("deepseek_r1", *_THINK, True, ("</think>", "<｜Assistant｜><think>")),
        ReasoningFormat("deepseek_v3", *_THINK, False, ("</think>", "<｜Assistant｜>")),
        ReasoningFormat("glm45", *_THINK, False, ("</think>", "<|assistant|>", "/nothink")),
        ReasoningFormat("qwen3", *_THINK, False, _THINK),
        ReasoningFormat("kimi_k2", *_THINK),
    )
}


@dataclass(frozen=True, slots=True)
class Formats:
    """What a server reads in the answers of its model."""

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    shows_special_tokens: bool = False
    """Some of the marks are special tokens, which a text would leave out."""
    call_form: CallForm | None = None
    """How a grammar may describe calls; None: it cannot, as where marks are special tokens."""
    knows_reasoning_effort: bool = False
    """The template asks how much the model is to think."""
    said: tuple[str, ...] = ()
    """How the choice came about, for the log."""


def choose_formats(
    tool_parser: str, reasoning_parser: str, chat_template: str, special_tokens: frozenset[str]
) -> Formats:
    """Formats by name, or where the name is `auto` those that the template speaks for sure.

    Raises: ConfigError for an unknown name, with those that are known.
    """
    problems = unknown_formats(tool_parser, reasoning_parser)
    if problems:
        raise ConfigError("; ".join(problems))
    said: list[str] = []
    tools = _choose("tool_call_parser", tool_parser, TOOL_FORMATS, chat_template, said)
    reasoning = _choose(
        "reasoning_parser", reasoning_parser, REASONING_FORMATS, chat_template, said
    )
    marks = {*(tools.marks if tools else ())}
    if reasoning is not None:
        marks |= {*_HARMONY} if reasoning.is_harmony else {reasoning.begin, reasoning.end}
    return Formats(
        tools=tools,
        reasoning=reasoning,
        shows_special_tokens=bool(marks & special_tokens),
        call_form=_describable(tools, special_tokens),
        knows_reasoning_effort="reasoning_effort" in chat_template,
        said=tuple(said),
    )


def _describable(tools: ToolFormat | None, special_tokens: frozenset[str]) -> CallForm | None:
    form = None if tools is None else tools.call_form
    if form is None or any(mark in form.before_name + form.end for mark in special_tokens):
        return None
    return form


def unknown_formats(tool_parser: str, reasoning_parser: str) -> list[str]:
    """What is wrong with two names, in words."""
    return [
        f"{setting} is {name!r}; choose {AUTO}, {NONE}, {', '.join(sorted(known))}"
        for setting, name, known in (
            ("tool_call_parser", tool_parser, TOOL_FORMATS),
            ("reasoning_parser", reasoning_parser, REASONING_FORMATS),
        )
        if name not in (AUTO, NONE, *known)
    ]


def _choose(
    setting: str, name: str, known: Mapping[str, Any], template: str, said: list[str]
) -> Any:
    if name == NONE:
        return None
    if name != AUTO:
        return known[name]
    for one in known.values():
        if one.signs and all(sign in template for sign in one.signs):
            said.append(f"{setting}: {one.name} (the chat template writes {one.signs[0]})")
            return one
    return None
