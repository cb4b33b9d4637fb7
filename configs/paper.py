"""The recipe of Joint Reward Modeling (arXiv 2602.07533), as far as it is known.

    python -m jrm_jax.main --config=configs/paper.py:qwen3_vl_8b,groups=200000 \\
        --config.backbone.path=FOLDER --config.data.path=DATA

Variants: qwen3_vl_8b (as without one), qwen3_vl_4b, and tiny, which trains the packaged backbone on
the built-in world in minutes with these losses and this head. `groups`: of your data, from which
ten epochs are counted; as published, 200,000 pairs.

The paper says (read in a digest of its first versions, docs/training.md): the backbone; Gaussian
rewards, -log of the expected sigmoid of their difference; 0.3 times that and 0.7 times the loss of
critiques; a small MLP on the state of one appended token; two outputs, instruction following and
visual quality; AdamW 0.9 / 0.95, 2e-6, 5 % warm-up, then cosine; ten epochs; 64 pairs a step; 256
visual tokens; bfloat16.

Guesses:
- The expectation is exact here (quadrature). EditReward's code, which the paper goes on from, takes
  the mean of -log over samples instead; that is --config.loss.gaussian=mean_of_log, and then
  deviations can only shrink.
- The MLP's layers (1024, 16; ReLU, biases) are those of EditReward's code, without its dropout;
  --config.head.hidden="()" is the one linear that serving engines expect.
- Each dimension has a mean and a deviation of its own, and a loss of its own where data label it.
  EditReward's code averages both dimensions before one loss.
- One number of two dimensions: what the paper makes of them is not known. Here *the* reward of
  `jrm_jax.score`, the service and its clients is the first one's, instruction following, alone;
  the other stands beside it (docs/training.md tells how to put them together).
- 64 pairs a step are 64 groups a step here: the same where every group is one pair.
- A weight of 0.7 means something only together with what it multiplies: here the mean over pairs
  and the mean over tokens.
- No weight decay and a clip at 1.0, from EditReward; the rate ends at 0, and all parameters have
  the same one; nothing pulls rewards to zero (loss.centering_weight).
- The learning rate of `tiny`, its optimizer and its length are those of configs/joint.py, its two
  dimensions those of the built-in world: 2e-6 is for trained backbones.
"""

from configs.common import base, parse_arg, real_backbone
from jrm_jax.errors import UserError

EPOCHS = 10
VARIANTS = ("qwen3_vl_8b", "qwen3_vl_4b", "tiny")


def get_config(arg: str | None = None):
    parsed = parse_arg(arg, VARIANTS, groups=200_000)
    if parsed["groups"] < 1:
        raise UserError(f"config option groups={parsed['groups']} must be 1 or more")
    config, variant = base(), parsed["variant"] or VARIANTS[0]
    if variant == "tiny":
        config.variant = variant
        config.data.dimensions = ("following", "preservation")
        config.head.hidden = (64, 16)
        config.loss.first_weight = 1.0
    else:
        real_backbone(config, variant)
        config.data.dimensions = ("instruction_following", "visual_quality")
        config.head.hidden = (1024, 16)
        config.total_steps = -(-EPOCHS * parsed["groups"] // config.batch_size)
        config.optimizer.schedule = "cosine"
        config.optimizer.final_scale = 0.0
        config.eval_interval = config.save_interval = min(500, config.total_steps)
        config.optimizer.warmup_steps = min(-(-config.total_steps // 20), config.total_steps - 1)
        config.optimizer.b2 = 0.95
        config.optimizer.groups = ()
    config.name = "paper"
    config.loss.gaussian = "log_of_mean"
    config.loss.preference_weight, config.loss.language_weight = 0.3, 0.7
    config.loss.centering_weight = 0.0
    return config
