"""What every request body keeps to: each field is honoured, or refused by its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from quire.core.errors import RequestError

Count = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
"""A whole number that fits the engine's columns; its real range is checked by SamplingParams."""
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class RequestBody(BaseModel):
    """A body from a client; unknown fields, numbers in quotes, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Known fields that are not supported, each with the values that ask for nothing."""
    ignored_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that say something about the caller and change nothing about the answer."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        """Takes out what asks for nothing, so that the rest is known or an error."""
        if not isinstance(data, dict):
            return data
        asked = list(_asked_of(data, cls.neutral_values))
        if asked:
            raise RequestError(
                f"{', '.join(asked)} {'is' if len(asked) == 1 else 'are'} not supported by this "
                "server; leave out what asks for it",
                param=asked[0],
            )
        known = {*cls.neutral_values, *cls.ignored_fields}
        return {name: value for name, value in data.items() if name not in known}


class ResponseBody(BaseModel):
    """A body to a client. Fields that were not set are left out of the JSON."""

    model_config = ConfigDict(extra="forbid")

    def to_json(self) -> bytes:
        """The body as UTF-8 JSON."""
        return self.model_dump_json(exclude_unset=True).encode()


def _asked_of(data: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    for name, values in neutral.items():
        if name in data and not any(_is_same(data[name], value) for value in (None, *values)):
            yield name


def _is_same(given: Any, neutral: Any) -> bool:
    """Equal and of one type: True is not 1."""
    return type(given) is type(neutral) and bool(given == neutral)
