"""What one request wants of tools and thoughts, and who reads the answer for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from quire.core.errors import RequestError
from quire.core.sampling_params import SamplingParams, StructuredOutputsParams, ThinkingLimit
from quire.core.serving.tools.events import AnswerParser, as_json, new_call_id, read_json
from quire.core.serving.tools.guaranteed import CallListParser, NamedCallParser
from quire.core.serving.tools.harmony import HarmonyParser
from quire.core.serving.tools.marked import ContentTrimmer
from quire.core.serving.tools.reasoning import PlainParser, ReasoningParser, is_open
from quire.core.serving.tools.registry import Formats
from quire.core.serving.tools.schemas import arguments_schema, call_list_schema

ToolMode = Literal["none", "auto", "required", "named"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPlan:
    """How the answers to one request are asked for and read. Made before the prompt is known."""

    formats: Formats
    mode: ToolMode = "none"
    tools: Sequence[Mapping[str, Any]] = ()
    """As the OpenAI API has them; of a named choice that one alone."""
    is_parallel: bool = True
    max_thinking_tokens: int | None = None

    def apply(self, params: SamplingParams, prompt: str) -> None:
        """Writes into `params` what the answer needs: a grammar, and marks that must be seen.

        Raises: RequestError for a form that contradicts the tools, and for a bound of thoughts that
        nobody knows how to end.
        """
        if self.is_reading and self.formats.shows_special_tokens:
            params.skip_special_tokens = False
        if self.max_thinking_tokens is not None:
            params.thinking_limit = self._limit(prompt, self.max_thinking_tokens)
        asked = params.structured_outputs
        if self.mode != "none" and isinstance(asked, StructuredOutputsParams):
            params.structured_outputs = self._calls_or(asked)
        if self.mode == "required":
            functions = [tool["function"] for tool in self.tools]
            schema = call_list_schema(functions, is_parallel=self.is_parallel)
            params.structured_outputs = StructuredOutputsParams(json=schema)
        elif self.mode == "named":
            schema = arguments_schema(self.tools[0]["function"])
            params.structured_outputs = StructuredOutputsParams(json=schema)
        if isinstance(params.structured_outputs, StructuredOutputsParams) and self._thinks(prompt):
            assert self.formats.reasoning is not None
            params.structured_outputs.starts_after = self.formats.reasoning.end

    def _calls_or(self, asked: StructuredOutputsParams) -> StructuredOutputsParams:
        """A form by which an answer is calls, or else what was asked for."""
        form, written = self.formats.call_form, asked.json
        if self.mode != "auto" or form is None or asked.forms[0] not in ("json", "json_object"):
            raise RequestError(
                f"the answer's form is asked for and tool_choice is {self.mode}; no grammar is "
                "known for either of this form and this model's calls: leave one out, or set "
                "tool_choice to none",
                param="response_format",
            )
        structures = [
            {
                "begin": f"{form.before_name}{as_json(tool['function']['name'])}{form.after_name}",
                "schema": arguments_schema(tool["function"]),
                "end": form.end,
            }
            for tool in self.tools
        ]
        schema = read_json(written) if isinstance(written, str) else written
        tag = {
            "structures": structures,
            "otherwise": {"type": "object"} if asked.json_object else schema,
            "between": form.between if self.is_parallel else None,
        }
        return replace(asked, json=None, json_object=None, structural_tag=tag)

    def _limit(self, prompt: str, max_tokens: int) -> ThinkingLimit | None:
        reasoning = self.formats.reasoning
        if reasoning is None or reasoning.is_harmony:
            raise RequestError(
                "a budget of thoughts needs a model whose thoughts stand between two marks, and "
                "this server knows of none; leave thinking_token_budget (thinking.budget_tokens) "
                "out, or start the server with --reasoning-parser",
                param="thinking_token_budget",
            )
        if is_open(prompt, reasoning.begin, reasoning.end) is False:
            return None
        begin = None if self._thinks(prompt) else reasoning.begin
        return ThinkingLimit(begin=begin, end=reasoning.end, max_tokens=max_tokens)

    @property
    def is_reading(self) -> bool:
        """Whether there is anything to be found in the answers."""
        return self.mode != "none" or self.formats.reasoning is not None

    def parser(self, prompt: str) -> AnswerParser:
        """A parser for one answer to `prompt`."""
        reasoning = self.formats.reasoning
        if self._is_harmony and self.mode in ("none", "auto"):
            return HarmonyParser(self._trimmer(), has_tools=self.mode == "auto")
        inner = self._inner()
        if reasoning is None or reasoning.is_harmony:
            return inner
        is_inside = self._thinks(prompt)
        return ReasoningParser(reasoning.begin, reasoning.end, inner, is_inside=is_inside)

    def _inner(self) -> AnswerParser:
        if self.mode == "named":
            return NamedCallParser(self.tools[0]["function"]["name"])
        if self.mode == "required":
            return CallListParser()
        if self.mode == "auto" and self.formats.tools is not None:
            return self.formats.tools.make(self.tools, self._trimmer())
        return PlainParser()

    def _trimmer(self) -> ContentTrimmer:
        tools = self.formats.tools
        make_id = new_call_id if tools is None else tools.make_id
        return ContentTrimmer(is_parallel=self.is_parallel, make_id=make_id)

    @property
    def _is_harmony(self) -> bool:
        formats = self.formats
        return (formats.reasoning is not None and formats.reasoning.is_harmony) or (
            formats.tools is not None and formats.tools.name == "gpt_oss" and self.mode == "auto"
        )

    def _thinks(self, prompt: str) -> bool:
        """Whether the answer begins within thoughts that the prompt has opened."""
        reasoning = self.formats.reasoning
        if reasoning is None or reasoning.is_harmony:
            return False
        opened = is_open(prompt, reasoning.begin, reasoning.end)
        return reasoning.begins_inside if opened is None else opened
