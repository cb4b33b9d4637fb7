"""The discriminative baseline: preference loss alone; no critique token is fed.

    python -m jrm_jax.main --config=configs/discriminative.py

Same backbone, data and optimizer as `configs/joint.py`, at a third of its time per step.
Variants as there.
"""

from configs import joint


def get_config(arg: str | None = None):
    config = joint.get_config(arg)
    config.name = "discriminative"
    config.loss.update({"language_weight": 0.0, "teacher_weight": 0.0, "teacher_scale": 1.0})
    return config
