"""verl-omni: a `compute_score` that finds the source picture by its name.

In its config, with the path of this file and the folder of the data set's pictures:

    reward.custom_reward_function.path=.../jrm_jax/adapters/verl_omni.py
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.servers=http://rewards:8080
    +reward.custom_reward_function.reward_kwargs.images=/data/edits/images
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jrm_jax.client import AsyncRewardClient, first_column

# What verl-omni adds where it runs a reward model of its own, too.
OF_ITS_MODEL = ("reward_router_address", "reward_model_tokenizer", "model_name", "sampling_params")
_CLIENTS: dict[asyncio.AbstractEventLoop, dict[Any, AsyncRewardClient]] = {}


async def compute_score(
    data_source: str,
    solution_image: Any,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None,
    servers: str = "http://127.0.0.1:8080",
    images: str = "",
    failed: float | None = None,
    **options: Any,
) -> dict[str, float]:
    """{"score": ..., and one entry for each dimension}; every answer has the same entries, as
    verl-omni makes a column of each.

    Args:
        solution_image: uint8 [3, h, w].
        ground_truth: the instruction, where `extra_info` has no `instruction`.
        extra_info: `image` or `images`: the source's name in `images`; none: text to image.
        images: folder of the sources.
        failed: stands for an edit without a score; None: it raises.
        options: of `RewardClient`.

    Raises:
        RewardError: the edit has no score. ValueError: a name that leaves the folder.
    """
    info = dict(extra_info or {})
    instruction = info.get("instruction") or ground_truth
    names = info.get("image") or info.get("images") or []
    sources = [_find(images, name) for name in ([names] if isinstance(names, str) else names)]
    client = _client(servers, {k: v for k, v in options.items() if k not in OF_ITS_MODEL})
    (scores,) = await client.score_groups([(instruction, sources, [solution_image])])
    ((reward,),) = first_column([scores], failed)
    if scores.errors[0] is not None:
        return dict.fromkeys(("score", *scores.dimensions), float(reward))
    columns = zip(scores.dimensions, scores.reward_KR[0].tolist(), strict=True)
    return {"score": float(reward), **dict(columns)}


def _client(servers: str, options: dict[str, Any]) -> AsyncRewardClient:
    """One for each event loop, to which its connections belong; those of loops that were closed
    are dropped."""
    for loop in [loop for loop in _CLIENTS if loop.is_closed()]:
        _CLIENTS.pop(loop, None)
    known = _CLIENTS.setdefault(asyncio.get_running_loop(), {})
    key = servers, *sorted(options.items())
    if key not in known:
        known[key] = AsyncRewardClient(servers.split(","), **options)
    return known[key]


def _find(folder: str, name: str) -> Path:
    root = Path(folder).resolve()
    path = (root / name).resolve()
    if not folder or root not in path.parents:
        raise ValueError(f"the source {name!r} is not in the folder images={folder!r}")
    return path
