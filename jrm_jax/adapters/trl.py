"""TRL's GRPO trainer: a reward function for pictures.

    from jrm_jax.adapters.trl import make_reward
    GRPOTrainer(..., reward_funcs=[make_reward("http://rewards:8080", source="image")])

TRL calls it with `prompts`, `completions` and the data set's columns as lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jrm_jax.adapters.grouping import score_edits
from jrm_jax.client import RewardClient


def make_reward(
    servers: str | Sequence[str],
    source: str = "image",
    edited: str = "",
    instruction: str = "",
    failed: float | None = None,
    **options: Any,
) -> Callable[..., list[float | None]]:
    """The function. TRL logs it as `jrm`.

    Args:
        source: column with the picture (or pictures) that was edited; rows without it, or a data
            set that has none, are text to image.
        edited: column with the edited picture; unset: the completion is the picture, or a message
            with one.
        instruction: column with the instruction; unset: the text of the prompt.
        failed: stands for an edit without a score; None: it raises.
        options: of `RewardClient`.
    """
    client = RewardClient(servers, **options)

    def jrm(prompts: list, completions: list, **columns: Any) -> list[float | None]:
        count = len(completions)
        edits = columns[edited] if edited else [_part(one, "image") for one in completions]
        words = columns[instruction] if instruction else [_part(one, "text") for one in prompts]
        sources = columns.get(source) or [None] * count
        rewards, _ = score_edits(client, words, sources, edits, failed)
        return rewards.tolist()

    return jrm


def _part(said: Any, kind: str) -> Any:
    """The last text or picture of a completion or prompt: itself, or a part of its messages."""
    if not isinstance(said, list):
        return said
    for message in reversed(said):
        content = message["content"]
        if isinstance(content, str):
            if kind == "text" and message.get("role") != "system":
                return content
            continue
        for part in reversed(content):
            if part.get("type") == kind and part.get(kind) is not None:
                return part[kind]
    raise ValueError(f"no {kind} in {said!r:.200}")
