"""The one way in which a request is refused."""

from __future__ import annotations

import json


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: What is wrong, for the client's developer.
        code: OpenAI's name of the error.
        param: The field that is wrong.
        headers: Headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}

    def body(self) -> bytes:
        """The answer, in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()
