"""Errors of a request that was made of another one name the fields that the client knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pydantic import ValidationError

from quire.core.errors import RequestError
from quire.core.serving.http.error_responses import failure_of


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Inside, what is refused under a name of `names` is refused under the name that it maps to.

    Raises: RequestError, also for what pydantic refuses.
    """
    try:
        yield
    except ValidationError as error:
        failure = failure_of(error)
        param = failure.param or ""
        raise RequestError(failure.message, param=names.get(param, param) or None) from error
    except RequestError as error:
        if error.param is None or error.param not in names:
            raise
        raise RequestError(str(error), param=names[error.param]) from error
