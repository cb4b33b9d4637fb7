"""What the service says when it does not answer with scores: one table of reasons."""

from __future__ import annotations

from typing import Any

STATUS = {
    "unknown_reward": 400,
    "unauthorised": 401,
    "cross_site": 403,
    "receive_timeout": 408,
    "body_too_large": 413,
    "media_type": 415,
    "invalid": 422,
    "too_many": 422,  # groups, sources, candidates, characters, decoded bytes
    "picture_size": 422,
    "unscorable": 422,  # where the format has no place for one picture's error
    "queue_full": 429,
    "gone": 499,  # nginx's number: the caller hung up, nobody reads this answer
    "device": 500,
    "loading": 503,
    "draining": 503,
    "deadline": 504,
}


class Refused(Exception):
    """A request that is not answered. `reason` is a key of `STATUS`.

    retry_after: seconds after which another try makes sense; None: it does not.
    """

    def __init__(self, reason: str, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.reason, self.message, self.retry_after = reason, message, retry_after

    @property
    def status(self) -> int:
        """Of HTTP."""
        return STATUS[self.reason]

    def headers(self) -> dict[str, str]:
        found = {}
        if self.retry_after is not None:
            found["Retry-After"] = str(self.retry_after)
        if self.reason == "unauthorised":
            # Basic makes a browser ask: user name anything, the token as the password
            found["WWW-Authenticate"] = 'Bearer, Basic realm="jrm_jax", charset="UTF-8"'
        if self.reason in ("body_too_large", "receive_timeout", "draining"):
            found["Connection"] = "close"
        return found


def body(reason: str, message: str) -> dict[str, Any]:
    """JSON of a refusal. `detail` is where UniRL's and Flow-Factory's clients look."""
    return {"error": {"code": reason, "message": message}, "detail": message}
