"""What a request may ask for. Each field is a flag of the command, with its default."""

from __future__ import annotations

import argparse
import dataclasses
import math

from jrm_jax.errors import UserError
from jrm_jax.shell.arguments import Parser

MOST = 10_000  # entries of a list that are looked at, whatever a limit says


def _limit(default: int | float, words: str) -> int | float:
    return dataclasses.field(default=default, metadata={"help": words})


@dataclasses.dataclass(frozen=True)
class Limits:
    """Numbers of things, bytes and seconds; all are larger than zero."""

    max_body_bytes: int = _limit(64 << 20, "bytes of one request's body (413)")
    max_waiting_bytes: int = _limit(512 << 20, "bytes of the bodies of all requests at once (429)")
    max_groups: int = _limit(256, "groups of a request (422)")
    max_sources: int = _limit(8, "source pictures of a group (422)")
    max_candidates: int = _limit(64, "candidates of a group (422)")
    max_instruction: int = _limit(4_000, "characters of an instruction (422)")
    max_pixels: int = _limit(4096 * 4096, "pixels of a picture (422)")
    max_decoded_bytes: int = _limit(
        2 << 30,
        "bytes of decoded pictures, 3 a pixel, a picture that is named twice counting twice: of a"
        " request (422), and of all requests at once (they wait)",
    )
    max_queue: int = _limit(1024, "groups that wait or are being scored, of all callers (429)")
    max_critique_queue: int = _limit(8, "critique requests that wait or are being written (429)")
    critique_tokens: int = _limit(128, "tokens of a critique at most")
    wait_ms: float = _limit(5.0, "milliseconds that a batch with room waits for groups on the way")
    deadline_s: float = _limit(60.0, "seconds after which an unanswered request is dropped (504)")
    receive_s: float = _limit(30.0, "seconds in which a request's head, and its body, arrive (408)")
    drain_s: float = _limit(30.0, "seconds that accepted requests have after SIGTERM")

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not math.isfinite(value):
                raise UserError(f"--{name}={value}: must be a finite number")
            if value <= 0 and name != "wait_ms":
                raise UserError(f"--{name}={value}: must be larger than zero")
        for name in ("max_groups", "max_sources", "max_candidates"):
            if getattr(self, name) > MOST:
                raise UserError(f"--{name}={getattr(self, name)}: must be at most {MOST:,}")
        if self.wait_ms < 0:
            raise UserError(f"--wait_ms={self.wait_ms}: must not be negative")
        if self.max_decoded_bytes < 3 * self.max_pixels:
            raise UserError(
                f"--max_decoded_bytes={self.max_decoded_bytes} cannot hold one picture of"
                f" --max_pixels={self.max_pixels}: at least 3 bytes a pixel"
            )
        if self.max_groups > self.max_queue:
            raise UserError(
                f"--max_queue={self.max_queue} cannot hold one request of --max_groups="
                f"{self.max_groups}"
            )


def add_flags(parser: Parser) -> None:
    """One flag for each field."""
    for field in dataclasses.fields(Limits):
        kind = float if isinstance(field.default, float) else int
        words = f"{field.metadata['help']}; default {field.default:,}"
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=words)


def from_flags(args: argparse.Namespace) -> Limits:
    """
    Raises:
        UserError: a limit that is not finite and larger than zero, or limits at odds.
    """
    return Limits(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Limits)})
