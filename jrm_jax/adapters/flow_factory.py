"""Flow-Factory: its remote client with the source pictures, which the one it ships leaves out.

    rewards:
      - name: jrm
        reward_model: jrm_jax.adapters.flow_factory.JRMReward
        server_url: http://rewards:8080
        batch_size: 16

It sends what Flow-Factory itself sends (`POST /compute`, JSON), so the server needs no token or a
proxy that adds one. A failed item fails the request, which Flow-Factory raises after its tries.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

MODULE = "flow_factory.rewards.my_reward_remote"  # where its remote client lives


def make_reward(base: type) -> type:
    """The subclass of Flow-Factory's `RemotePointwiseRewardModel`."""

    class JRMReward(base):
        """Rewards of edits: `condition_images` are the sources of each."""

        required_fields = ("prompt", "image", "condition_images")
        use_tensor_inputs = False

        def __call__(self, prompt, image=None, condition_images=None, **others: Any):
            # videos are not scored; other fields are the data set's own and stay here
            return super().__call__(prompt=prompt, image=image, condition_images=condition_images)

    return JRMReward


def __getattr__(name: str) -> type:
    if name != "JRMReward":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _found()


@functools.cache
def _found() -> type:
    return make_reward(importlib.import_module(MODULE).RemotePointwiseRewardModel)
