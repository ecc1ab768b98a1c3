"""How the services answer: their shape of errors, and the parts that every resource has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

Handler = Callable[[Request, Exception], Response]


class ServiceError(Exception):
    """A refusal in the service's shape: `{"error": {"code", "message"}}`."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = headers

    def response(self) -> JSONResponse:
        error = {"code": self.code, "message": self.message}
        headers = {"x-ms-error-code": self.code, **(self.headers or {})}
        return JSONResponse({"error": error}, self.status, headers)


def bad(message: str) -> ServiceError:
    """400, as Azure ML says it."""
    return ServiceError(400, "UserError", message)


def missing(message: str) -> ServiceError:
    """404, as Azure ML says it."""
    return ServiceError(404, "UserError", message)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return error.response()


def _unknown(request: Request, error: Exception) -> Response:
    """A path or a method that the emulator does not play: strict, so that a test notices."""
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        return ServiceError(405, "MethodNotAllowed", f"{path} is not played here.").response()
    return ServiceError(404, "NotFound", f"{path} is not played here.").response()


HANDLERS: dict[Any, Handler] = {ServiceError: _refused, HTTPException: _unknown}


async def body(request: Request) -> dict[str, Any]:
    """The JSON object in the request.

    Raises:
        ServiceError: it is not one.
    """
    try:
        value = await request.json()
    except ValueError:
        raise bad("The request body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise bad("The request body is not an object.")
    return value


def now() -> str:
    return datetime.now(UTC).isoformat()


def system_data(created: str, changed: str) -> dict[str, str]:
    who = {"createdBy": "press", "createdByType": "Application"}
    return {**who, "createdAt": created, "lastModifiedAt": changed}
