"""The generative baseline: critique loss alone; and the pretraining of the tiny backbone.

    python -m jrm_jax.main --config=configs/generative.py

trains on the critiques of the built-in world and reports their loss per token. Variants as in
`configs/joint.py`, and

    python -m jrm_jax.main --config=configs/generative.py:describe

which pretrains the tiny backbone from random weights on descriptions of single pictures, and then

    python -m jrm_jax.main --config=configs/generative.py:describe_lookups
    python -m jrm_jax.main --config=configs/generative.py:describe_comparisons
    python -m jrm_jax.main --config=configs/generative.py:describe_changes

which go on, each from a folder with the weights before, to one thing in one picture, to pairs of
pictures and to all that differs between them. None has instructions, edits asked for, critiques or
preferences.
`python -m jrm_jax.benchmarks.make_tiny_backbone` documents how the packaged folder was made.
"""

from configs import joint
from configs.common import REAL, base, parse_arg

# variant: (kind of data, training examples, steps, learning rate, random weights, longest text)
PRETRAINING = {
    "describe": ("descriptions", 10_240, 600, 1.5e-3, True, 40),
    "describe_lookups": ("lookups", 12_800, 800, 1.5e-3, False, 16),
    "describe_comparisons": ("comparisons", 25_600, 1600, 1.5e-3, False, 16),
    "describe_changes": ("changes", 51_200, 3200, 1.5e-3, False, 16),
}


def get_config(arg: str | None = None):
    parsed = parse_arg(arg, (*PRETRAINING, *REAL))
    if parsed["variant"] not in PRETRAINING:
        config = joint.get_config(arg)
    else:
        config = base()
        config.variant = parsed["variant"]
        kind, train, steps, rate, config.backbone.random, longest = PRETRAINING[config.variant]
        config.data.world.kind = kind
        config.data.world.update({"train": train, "valid": 256, "test": 0, "hard": 0})
        config.data.max_critique = longest  # the few longer descriptions would widen every batch
        config.data.skip_large = True
        config.batch_size = 16
        config.total_steps = steps
        config.eval_interval = config.save_interval = 100
        config.optimizer.learning_rate = rate
        config.optimizer.warmup_steps = 50
        config.loss.first_weight = 1.0
    config.name = "generative"
    config.loss.update({"preference_weight": 0.0, "centering_weight": 0.0})
    config.loss.update({"teacher_weight": 0.0, "teacher_scale": 1.0})
    return config
