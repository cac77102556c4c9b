"""What went wrong, as OpenAI's API says it: a status, and an `error` object that names the field that is to blame."""

from __future__ import annotations

from typing import Any

from pixtral_runtime.errors import InputError, Option, PixtralError
from pixtral_runtime.inputs.openai_chat import FieldError

FIELDS = {
    "json_schema": "response_format",
    "max_new_tokens": "max_tokens",
    "seed": "seed",
    "temperature": "temperature",
    "top_p": "top_p",
}
"""Settings of the library that a request sets, by the names that the API has for them."""
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Problem(Exception):
    """A request that gets no answer. `field` is its own part that is to blame, `retry_s` when to come again."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        field: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.code, self.retry_s = status, field, code, retry_s

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}


def problem_of(error: PixtralError) -> Problem:
    """The client's fault where the input is, or a setting that a request has; ours otherwise."""
    hint = client_hint(error)
    message = f"{error} ({hint})" if hint else str(error)
    named = next((FIELDS[option.name] for option in error.options if option.name in FIELDS), None)
    if named is None and not isinstance(error, InputError):
        return Problem(500, message)
    return Problem(400, message, field=error.field if isinstance(error, FieldError) else named)


def client_hint(error: PixtralError) -> str:
    """What a client can do about it."""
    return "; ".join(filter(None, map(_remedy, error.remedies)))


def _remedy(remedy: Option | str) -> str:
    """A remedy as a client can follow it. Commands are for whoever runs the server."""
    if isinstance(remedy, str):
        return "" if remedy.startswith("pixtral ") else remedy
    if remedy.name == "image_tokens":
        return '"detail": "low" for smaller images'
    return f"{FIELDS[remedy.name]}: {remedy.value}" if remedy.name in FIELDS else ""
