"""Joint reward models for image edits, in JAX. `from jrm_jax import RewardModel`."""


def __getattr__(name: str):
    # imported when asked for: the entry point sets up memory and processes before jax loads
    if name == "RewardModel":
        from jrm_jax.serving.reward_model import RewardModel

        return RewardModel
    raise AttributeError(f"module 'jrm_jax' has no attribute {name!r}")
