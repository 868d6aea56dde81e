"""Errors that clients see, and the one place that turns them into HTTP."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

ERROR_TYPES = {
    HTTPStatus.UNAUTHORIZED: "AuthenticationError",
    HTTPStatus.FORBIDDEN: "PermissionDeniedError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.CONFLICT: "ConflictError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableError",
    HTTPStatus.INTERNAL_SERVER_ERROR: "InternalServerError",
    HTTPStatus.INSUFFICIENT_STORAGE: "InsufficientStorageError",
}
"""vLLM's names, so that trimtab's errors and vLLM's read alike; any other is a BadRequestError."""


class ApiError(Exception):
    """A request that is refused, or that failed.

    It is no `ValueError`: raised inside a pydantic validator, it reaches the client as it is,
    instead of being listed among the validation errors of every other branch of a union.
    """

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The OpenAI-shaped body."""
        return {
            "error": {
                "message": self.message,
                "type": ERROR_TYPES.get(self.status, "BadRequestError"),
                "param": self.param,
                "code": self.status.value,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, message, param)


async def respond(_request: Request, error: Exception) -> JSONResponse:
    """Starlette's handler for `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


def shorten(text: str, limit: int = 80) -> str:
    """Quote a client's own text in a message without repeating megabytes of it."""
    return repr(text if len(text) <= limit else text[:limit] + "...")
