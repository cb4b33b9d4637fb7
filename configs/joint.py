"""Joint reward modelling: preference ranking and critiques, one backbone, one step.

    python -m jrm_jax.main --config=configs/joint.py

trains the packaged tiny backbone on the built-in world. README.md says what to expect.

    python -m jrm_jax.main --config=configs/joint.py:qwen3_vl_8b \\
        --config.backbone.path=FOLDER --config.data.path=DATA

trains a real one (also qwen3_vl_4b, qwen3_vl_2b, qwen2_5_vl_7b, qwen2_5_vl_3b, and of Qwen3.5
qwen3_5_27b, qwen3_5_9b, qwen3_5_4b, qwen3_5_2b, qwen3_5_0_8b) from its Hugging Face folder, on a
data set prepared by `python -m jrm_jax.data.builders`.
"""

from configs.common import REAL, base, parse_arg, real_backbone


def get_config(arg: str | None = None):
    parsed = parse_arg(arg, REAL)
    config = base()
    config.name, config.variant = "joint", parsed["variant"]
    if not parsed["variant"]:
        return config
    real_backbone(config, parsed["variant"])
    # Where critiques end with scores, these are soft preferences, too: what won with few and noisy
    # labels (docs/regimes.md: +4.4 points without language, +3.4, from -0.2 to +6.9, beside it).
    # There, too, they had a third of the weight of votes. Where no critique states a score, a run
    # says so and learns all else.
    config.loss.teacher_weight, config.loss.teacher_scale = 0.33, 0.0
    return config
