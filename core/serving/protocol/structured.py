"""The fields that ask for a form of the output: OpenAI's `response_format`, and vLLM's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from quire.core.errors import RequestError
from quire.core.sampling_params import StructuredOutputsParams
from quire.core.serving.protocol.base import RequestBody


class JsonSchemaFormat(RequestBody):
    """A schema with a name."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None
    """Output always fits, strict or not."""


class ResponseFormat(RequestBody):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None

    def to_params(self) -> StructuredOutputsParams | None:
        """What the engine is asked for. Raises: RequestError for a part that is missing."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if self.type == "structural_tag":
            tag = {"structures": self.structures, "triggers": self.triggers}
            return StructuredOutputsParams(structural_tag=tag)
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise RequestError(
                "response_format of type json_schema needs json_schema with a schema",
                param="response_format",
            )
        return StructuredOutputsParams(json=self.json_schema.schema_)


class StructuredOutputs(RequestBody):
    """vLLM's record of forms."""

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    starts_after: str | None = None

    def to_params(self) -> StructuredOutputsParams:
        """What the engine is asked for. Raises: RequestError unless one form is given."""
        fields = self.model_dump(exclude={"json_"})
        return StructuredOutputsParams(json=self.json_, **fields)


class StructuredFields(RequestBody):
    """Ways to ask for a form; at most one."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    def structure(self) -> StructuredOutputsParams | None:
        """The form that is asked for. Raises: RequestError for more than one, or a bad one."""
        given = dict(self._asked())
        if len(given) > 1:
            raise RequestError(
                f"the form of the output is asked for by {' and '.join(given)}; give one of them",
                param=list(given)[1],
            )
        if not given:
            return None
        params = next(iter(given.values()))
        if self.guided_whitespace_pattern is not None:
            params.whitespace_pattern = self.guided_whitespace_pattern
        return params

    def _asked(self) -> Iterator[tuple[str, StructuredOutputsParams]]:
        if self.response_format is not None:
            params = self.response_format.to_params()
            if params is not None:
                yield "response_format", params
        if self.structured_outputs is not None:
            yield "structured_outputs", self.structured_outputs.to_params()
        for name, form in _GUIDED.items():
            value = getattr(self, name)
            if value is not None:
                yield name, StructuredOutputsParams(**{form: value})


_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
