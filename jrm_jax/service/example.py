"""The page's example: one group of the built-in world."""

from __future__ import annotations

import base64
import functools
from typing import Any

from jrm_jax.data.world import scenes

INDEX = 3  # of the split `test`; any other would do


@functools.cache
def make() -> dict[str, Any]:
    """`instruction`, `source` and `candidates`: data: URIs of PNG files."""
    drawn = scenes.make_example("test", INDEX, 0)
    words, source = drawn.prompt
    return {
        "instruction": words.text,
        "source": _uri(source.data),
        "candidates": [_uri(candidate.parts[0].data) for candidate in drawn.candidates],
    }


def _uri(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
