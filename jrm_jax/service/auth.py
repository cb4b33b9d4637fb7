"""Who may ask: tokens in a file, and addresses that need them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import socket
from pathlib import Path

from jrm_jax.errors import UserError
from jrm_jax.errors import one_line as words_of

SHORTEST = 16  # characters; `openssl rand -hex 32` gives 64


class Tokens:
    """Digests of the tokens that are accepted. They are compared in constant time."""

    def __init__(self, tokens: list[str]):
        self._digests = [_digest(token.encode()) for token in tokens]

    def accept(self, authorization: bytes) -> bool:
        """Whether the value of an Authorization header carries a token: `Bearer TOKEN`, or Basic
        with the token as the password, which is what a browser can send."""
        scheme, _, value = authorization.partition(b" ")
        value = value.strip()
        if scheme.lower() == b"basic":
            try:
                value = base64.b64decode(value, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        given = _digest(value)
        # all are compared, whether one has matched or not
        return sum(hmac.compare_digest(given, known) for known in self._digests) > 0


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def read_tokens(path: Path) -> Tokens:
    """One token a line; empty lines and lines that begin with # are left out.

    Raises:
        UserError: no such file, no token in it, or one that is short enough to be guessed.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--token_file={path} cannot be read: {words_of(error)}") from error
    tokens = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not tokens:
        raise UserError(f"--token_file={path} holds no token: openssl rand -hex 32 > {path}")
    for number, token in enumerate(tokens, 1):
        if len(token) < SHORTEST or not token.isascii() or len(token.split()) > 1:
            raise UserError(
                f"--token_file={path}: token {number} must be at least {SHORTEST} ASCII characters"
                " without blanks"
            )
    return Tokens(tokens)


def is_public(host: str) -> bool:
    """Whether other machines can reach what listens there.

    Raises:
        UserError: no such host.
    """
    try:
        found = socket.getaddrinfo(host or None, None, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"--host={host}: {error.strerror or error}") from error
    addresses = {str(entry[4][0]).partition("%")[0] for entry in found}
    return not all(ipaddress.ip_address(address).is_loopback for address in addresses)
