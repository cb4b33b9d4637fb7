"""flow_grpo and Edit-R1: a factory that takes the device, and the function that it gives.

Both trainers have a table `score_functions` in `rewards.py`. Edit-R1 gives the source pictures to
every name that begins with "mllm_", so one line there is all:

    "mllm_jrm": jrm_score_edit_r1,          # JRM_SERVER=http://rewards:8080, JRM_TOKEN=...

flow_grpo gives them to `image_similarity` alone. Add "jrm": jrm_score to the table, and beside
`image_similarity`, in the loop below it:

    elif score_name == "jrm":
        scores, rewards = score_fns[score_name](images, prompts, metadata, ref_images=ref_images)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jrm_jax.adapters.grouping import score_edits
from jrm_jax.client import RewardClient


def jrm_score(
    device: Any = None, servers: str | Sequence[str] = "", failed: float | None = None, **options
) -> Callable[..., tuple[np.ndarray, dict[str, Any]]]:
    """The function for flow_grpo.

    Args:
        device: not used; rewards are computed elsewhere.
        servers: unset: the variable JRM_SERVER, several addresses with commas.
        failed: see `grouping.score_edits`.
        options: of `RewardClient`.
    """
    addresses = servers or os.environ.get("JRM_SERVER", "http://127.0.0.1:8080").split(",")
    client = RewardClient(addresses, **options)

    def score(images, prompts, metadata=None, only_strict=True, ref_images=None):
        """images, ref_images: [N, 3, h, w] in 0 to 1 or uint8 [N, h, w, 3], or a list of pictures.

        Without `ref_images` an edit is scored as text to image, unless its metadata holds the
        source as `image`.
        """
        if ref_images is None:
            ref_images = [dict(one or {}).get("image") for one in metadata or [None] * len(images)]
        elif len(ref_images) == 1 and len(images) > 1:
            ref_images = [ref_images[0]] * len(images)
        rewards, errors = score_edits(client, list(prompts), list(ref_images), list(images), failed)
        return rewards, {"errors": errors}

    return score


def jrm_score_edit_r1(device: Any = None, **options: Any) -> Callable[..., tuple]:
    """The same for Edit-R1, whose order of arguments is another.

    The function raises ValueError where it stands under a name to which Edit-R1 gives no sources.
    """
    score = jrm_score(device, **options)

    def edit_r1(ref_images, images, prompts, metadatas=None):
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError('Edit-R1 gives no source pictures to this name: call it "mllm_jrm"')
        return score(images, prompts, metadatas, ref_images=ref_images)

    return edit_r1
