"""Errors as OpenAI's API answers them: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping
from typing import Any

from gazelle.base.errors import UserError

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
          404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a request is refused with.

    Args:
        status: of HTTP.
        message: one sentence or two for people.
        code: for programs.
        param: the field of the request that is at fault.
        headers: of the answer, such as Retry-After.
    """

    def __init__(self, status: int, message: str, code: str, *, param: str | None = None,
                 headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refused(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that cannot be answered as it is."""
    return ApiError(400, message, code, param=param)


def busy(seconds: int) -> ApiError:
    """All places are taken."""
    return ApiError(429, f"The server is at capacity; try again in {seconds} s.", "queue_full",
                    headers={"retry-after": str(seconds)})


def unavailable(message: str, code: str) -> ApiError:
    """The server cannot answer now."""
    return ApiError(503, message, code, headers={"retry-after": "5"})


def from_user_error(error: UserError) -> ApiError:
    """A mistake that the rooms below found in what was asked for."""
    found = f"; found {error.found}" if error.found else ""
    expected = f"; expected {error.expected}" if error.expected else ""
    return refused(f"{error.what[:1].upper()}{error.what[1:]}{found}{expected}.", param=error.where or None)
