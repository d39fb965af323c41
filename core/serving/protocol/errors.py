"""The body of every error."""

from __future__ import annotations

from quire.core.serving.protocol.base import ResponseBody


class ErrorDetail(ResponseBody):
    """What was wrong."""

    message: str
    type: str
    """`{invalid_request,authentication,not_found,rate_limit,server}_error`."""
    param: str | None
    """The field of the request, where there is one."""
    code: str | None
    """Stable and machine-readable: `model_not_found`, `queue_full`."""


class ErrorBody(ResponseBody):
    """As the OpenAI API reports errors."""

    error: ErrorDetail
