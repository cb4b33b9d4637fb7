"""The generative baseline: critique loss alone; and the pretraining of the tiny backbone.

    python -m jrm_jax.main --config=configs/generative.py

trains on the critiques of the built-in world and reports their loss per token. Variants as in
`configs/joint.py`, and

    python -m jrm_jax.main --config=configs/generative.py:describe

which pretrains the tiny backbone from random weights on descriptions of single pictures: no
instructions, no edits asked for, no critiques, no preferences.
`python -m jrm_jax.benchmarks.make_tiny_backbone` documents how the packaged folder was made of it.
"""

from configs import joint
from configs.common import REAL, base, parse_arg


def get_config(arg: str | None = None):
    parsed = parse_arg(arg, ("describe", *REAL))
    if parsed["variant"] != "describe":
        config = joint.get_config(arg)
    else:
        config = base()
        config.variant = "describe"
        config.backbone.random = True
        config.data.world.kind = "descriptions"
        config.data.world.train = 20_480
        config.data.world.valid = 256
        config.data.world.test = config.data.world.hard = 0
        config.data.max_critique = 48  # the few longer descriptions would widen every batch
        config.data.skip_large = True
        config.batch_size = 16
        config.total_steps = 1000
        config.eval_interval = config.save_interval = 250
        config.optimizer.learning_rate = 1.5e-3
        config.optimizer.warmup_steps = 50
    config.name = "generative"
    config.loss.preference_weight = 0.0
    config.loss.centering_weight = 0.0
    return config
