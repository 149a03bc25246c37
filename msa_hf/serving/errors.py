"""What a request can end with, as errors in OpenAI's form."""

from __future__ import annotations

from typing import Any

from ..modeling.errors import MSAError
from ..store.errors import (
    DocumentExistsError,
    HistoryError,
    StoreLockedError,
    StoreWriteError,
    UnknownDocumentError,
)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """A request that is not answered, with its HTTP status; `param` is the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def to_dict(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        own = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": own}


def queue_full() -> RequestError:
    return RequestError(
        429, "too many requests wait for an answer; try again later", None, "queue_full", {"Retry-After": "1"}
    )


def shutting_down() -> RequestError:
    return RequestError(503, "the server is shutting down", None, "shutting_down", {"Retry-After": "5"})


def timed_out() -> RequestError:
    return RequestError(504, "the request took longer than the server allows", None, "timeout")


def request_error(error: Exception) -> RequestError:
    """The answer to an error of the library. Raises it again if it is none that a request can cause."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, UnknownDocumentError):
        return RequestError(404, str(error), "id", "document_not_found")
    if isinstance(error, DocumentExistsError):
        return RequestError(409, str(error), "documents", "document_exists")
    if isinstance(error, HistoryError):
        return RequestError(409, "documents were erased while they were read; try again", None, "erased")
    if isinstance(error, StoreLockedError):
        return RequestError(503, str(error), None, "locked", {"Retry-After": "1"})
    if isinstance(error, StoreWriteError):
        return RequestError(507, str(error), None, "disk")
    if isinstance(error, ValueError) and not isinstance(error, (MSAError, UnicodeError)):
        return RequestError(400, str(error))
    raise error
