"""Errors in the shape of OpenAI's API: {"error": {"message", "type", "param", "code"}}.

https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

from typing import Any

from stages.errors import printable

TYPES = {429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered, and why."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        server = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": printable(str(self)),
                "type": TYPES.get(self.status, server),
                "param": self.param and printable(self.param),
                "code": self.code,
            }
        }


def unsupported(name: str, what: str = "is not supported here") -> ApiError:
    """A part of the API that this server does not have, by name."""
    return ApiError(400, f"{name}: {what}", name, "unsupported_parameter")
