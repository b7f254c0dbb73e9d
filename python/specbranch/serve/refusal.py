"""What a request gets instead of an answer, as OpenAI's error JSON."""

from __future__ import annotations

from typing import Any

from specbranch.core.errors import SpecBranchError
from specbranch.core.generation import GenerationFailed

TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}  # of all others: invalid_request_error


class Refusal(Exception):
    """status: of HTTP. param: the field at fault. code: OpenAI's word for it, where there is one."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: Exception) -> Refusal:
    """Bad input that only the engine finds is the client's fault, anything else is ours."""
    if isinstance(error, Refusal):
        return error
    message = " ".join(str(error).split())
    if isinstance(error, SpecBranchError):
        return Refusal(400, message)
    named = isinstance(error, GenerationFailed)
    return Refusal(500, message if named else f"{type(error).__name__}: {message}".rstrip(": "))
