"""What the arguments of every command have in common: files and folders are local."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from jrm_jax.errors import UserError

# Arguments that are words or addresses, by the last word of their name; others may be places.
NOT_PLACES = ("instruction", "rubric", "name", "url", "server", "address")
_ADDRESS = re.compile(r"(?:^|[\s'\"(\[{,=])([A-Za-z][A-Za-z0-9+.-]+):/(\S*)")
_HUB = "a model of the Hub goes by its name, ORG/NAME or ORG/NAME@REVISION"
ADVICE = {
    "gs": "mount the bucket (gcsfuse; launch/README.md does it for TPU pods) and give the folder",
    "s3": "mount the bucket (mount-s3, s3fs) and give the folder",
    "hf": f"{_HUB}, data sets as a folder: hf download --repo-type=dataset",
    "huggingface.co": f"{_HUB}, data sets as a folder: hf download --repo-type=dataset",
    "file": "give the path alone",
}


def check_place(name: str, value: str, shown: str = "") -> None:
    """
    Args:
        shown: what the message says of them; NAME=VALUE unless given.

    Raises:
        UserError: `value` holds an address such as gs://bucket/run where a file or folder is meant,
            or begins with a ~ that the shell has left as it is.
    """
    if re.match(r"~(?:[\w.-]*/|$)", value) and _is_place(name):
        whole = os.path.expanduser(value)
        raise UserError(f"{shown or f'{name}={value}'}: the shell does not know ~ there: {whole}")
    found = _ADDRESS.search(value)
    if found and _is_place(name):
        host = found[2].lstrip("/").split("/")[0]
        how = ADVICE.get(found[1].lower(), ADVICE.get(host, "download it and give the local path"))
        raise UserError(f"{shown or f'{name}={value}'}: files and folders must be local; {how}")


def _is_place(name: str) -> bool:
    return re.split(r"[._-]", name)[-1] not in NOT_PLACES


def check_places(argv: Iterable[str]) -> None:
    """The same of a command's arguments, before anything reads them: --NAME=VALUE, --NAME VALUE,
    and values without a name.

    Raises:
        UserError: see `check_place`.
    """
    before = ""
    for word in argv:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            check_place(before, word, f"{before} {word}".strip())
            before = before if _is_place(before) else ""  # words are one argument, places several
        elif equals:
            check_place(name, value)
            before = ""
        else:
            before = word


def check_least(args: argparse.Namespace, least: Mapping[str, float]) -> None:
    """
    Args:
        least: of numbers that are given, by name; others may be None.

    Raises:
        UserError: one is less, or not finite.
    """
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not (bound <= value < math.inf):
            raise UserError(f"--{name}={value}: at least {bound:g}")


class Parser(argparse.ArgumentParser):
    """Refuses addresses of places in one line."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        try:
            check_places(sys.argv[1:] if args is None else args)
        except UserError as error:
            self.refuse(error)
        return super().parse_known_args(args, namespace)

    def refuse(self, error: UserError) -> NoReturn:
        self.exit(1, f"error: {' '.join(str(error).split())}\n")
