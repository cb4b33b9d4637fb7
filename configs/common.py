"""What every config shares: the fields with their defaults, and the argument string.

    --config=configs/joint.py:VARIANT,key=value     (see `parse_arg`)
    --config.optimizer.learning_rate=1e-3           (any field, from the command line)
"""

import difflib
from typing import Any

from ml_collections import ConfigDict

from jrm_jax.errors import UserError

TINY = "tiny_qwen3_vl"  # the backbone that comes with the code

# Real backbones, and where training starts: EditReward's published settings (learning rate 2e-6,
# 5 % warm-up then constant, clip 1.0, bfloat16, about 256 visual tokens a picture, 64 pairs a
# step), here as 64 groups.
REAL = (
    "qwen3_vl_8b", "qwen3_vl_4b", "qwen3_vl_2b", "qwen2_5_vl_7b", "qwen2_5_vl_3b",
    "qwen3_5_27b", "qwen3_5_9b", "qwen3_5_4b", "qwen3_5_2b", "qwen3_5_0_8b",
)  # fmt: skip


def nearest(word: str, known: tuple[str, ...]) -> str:
    """' (did you mean ...?)', or the list of what there is."""
    close = difflib.get_close_matches(word, known, 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def parse_arg(arg: str | None, variants: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """'VARIANT,key=value' -> {'variant': ..., key: value}; the types are those of the defaults.

    Raises:
        UserError: unknown variant or key, or a value of the wrong type.
    """
    parsed = {"variant": "", **options}
    for index, item in enumerate((arg or "").split(",") if arg else ()):
        key, equals, value = item.partition("=")
        if not equals:
            if index or key not in variants:
                raise UserError(f"config variant {key!r}: {nearest(key, variants)}")
            parsed["variant"] = key
            continue
        if key not in options:
            raise UserError(f"config option {key!r}: {nearest(key, tuple(options))}")
        kind = type(options[key])
        try:
            parsed[key] = value in ("1", "true", "True") if kind is bool else kind(value)
        except ValueError:
            words = f"config option {key}={value!r} must be of type {kind.__name__}"
            raise UserError(words) from None
    return parsed


def base() -> ConfigDict:
    """The default run: the tiny backbone on the built-in world."""
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 16  # groups per step, all hosts together
    config.accumulation = 1  # microbatches per step
    config.total_steps = 600
    config.eval_interval = 150  # steps between evaluations on `valid`
    # Steps between checkpoints. One is also saved where `valid` is better than in those before; 0:
    # only the end is saved, and what keep_interval asks for
    config.save_interval = 150
    config.keep_interval = 0  # checkpoints at multiples of so many steps are all kept; 0: none
    config.log_interval = 10
    config.best_metric = "auto"  # of `valid`; auto: pair_accuracy, else -teacher, -language
    config.trainable = (".*",)  # patterns of the parameters that learn; the others are frozen
    # What the backward pass computes again: none, dots (all but products), narrow (and the wide
    # products of MLPs), full; auto: the least that fits. This small model fits with none
    config.remat = "none"
    config.profile = ()  # steps to trace into WORKDIR/profile
    config.heartbeat_seconds = 60.0  # every process says where it is; 0: never
    config.watchdog_seconds = 1800.0  # without a sign of life the process ends; 0: never

    config.lora = ConfigDict()
    config.lora.rank = 0  # of the adapters; 0: none. With them, only what `trainable` names besides
    config.lora.alpha = 16.0  # the adapters' product counts alpha / rank
    config.lora.targets = (r"backbone/decoder/.*/kernel$",)

    config.backbone = ConfigDict()
    config.backbone.path = TINY  # packaged name, Hugging Face folder, or ORG/NAME[@REVISION]
    config.backbone.random = False  # True: random weights of that architecture
    config.backbone.compute_dtype = "float32"
    config.backbone.attention = "auto"  # auto, xla, splash or cudnn
    # layers per turn of a loop; 0: all on a CPU if they are fewer than 8, else 1
    config.backbone.scan_unroll = 0
    config.backbone.positions = "mrope"  # or 1d, as released EditReward weights were trained

    config.data = ConfigDict()
    config.data.path = ""  # a prepared data set; empty: the built-in world
    config.data.mixture = ()  # ((path, times seen per epoch), ...), instead of `path`
    config.data.cache = "runs/data"  # where the built-in world is drawn
    config.data.world = ConfigDict()
    config.data.world.kind = "edits"  # see data/world/prepare.py
    config.data.world.seed = 0
    config.data.world.train = 12_000
    config.data.world.valid = 256
    config.data.world.test = 512
    config.data.world.hard = 512
    # What becomes of labels and critiques of `train`; see data/world/life.py
    config.data.world.labelled = 1.0  # share of the groups that have labels
    config.data.world.pairs = 0  # labelled pairs of a group; 0: all
    config.data.world.flip = 0.0  # chance that a vote turns over
    config.data.world.vote_scale = 0.0  # points of gold that count one nat in a vote; 0: no chance
    config.data.world.critiqued = 1.0  # share of the groups that have critiques
    config.data.world.wrong_facts = 0.0  # share of what a critique states that is wrong
    config.data.world.score_correlation = 1.0  # of a critique's last line with gold; 0.4 to 1
    # So many groups of a batch have labels; the rest is drawn from all groups with critiques, for
    # these alone: labels of those do not count. 0: a batch is as it comes
    config.data.labelled = 0
    config.data.rubric = "Judge the edit."
    config.data.dimensions = ("overall",)
    config.data.programs = 6  # buckets of static sizes at most, chosen by what they cost
    # Instead, one bucket for each class: by number of candidates, and by visual tokens of the
    # largest picture. For runs that must have the same batches whatever their losses are.
    config.data.candidate_cuts = ()
    config.data.visual_cuts = ()
    config.data.round_to = 8  # token slots are multiples of this
    config.data.max_visual_tokens = 0  # per picture; 0: the cap of the backbone's folder
    # Caps of a group; one that exceeds them is an error, or left out; 0: no cap
    config.data.max_candidates = 0
    config.data.max_pictures = 0
    config.data.max_picture_tokens = 0  # visual tokens of its largest picture, after resizing
    config.data.max_prompt = 0  # tokens, those of its pictures included
    config.data.max_candidate = 0  # tokens of the longest candidate with its critique
    config.data.max_critique = 0  # tokens of the longest critique
    config.data.skip_large = False  # leave out what exceeds a cap, and say so
    config.data.share_prompt = True  # False: the prompt is repeated for each candidate
    config.data.workers = 0  # processes that decode ahead; 0: threads
    config.data.prefetch = 4

    config.loss = ConfigDict()
    config.loss.preference_weight = 3.0
    config.loss.language_weight = 1.0
    config.loss.first_weight = 4.0  # of the token that the reward token predicts; others have 1
    config.loss.language_end = 1.0  # times language_weight at the last step; from 1, in a line
    config.loss.through_reward = False  # True: critiques see their candidate by its reward token
    config.loss.words_weight = 0.0  # of a critique's words, all read off its reward token's state
    # off: a reward is a number; log_of_mean, mean_of_log: a Gaussian, whose deviation is an output
    # (`losses.preference_loss`)
    config.loss.gaussian = "off"
    config.loss.margin = 0.0
    config.loss.centering_weight = 0.01
    config.loss.score_line = True  # False: critiques' last lines, which state scores, are masked
    config.loss.facts_weight = 0.0  # of what critiques say, as facts (built-in world of kind facts)
    # Of the scores that critiques' last lines state, as soft preferences in any group that has them
    config.loss.teacher_weight = 0.0
    # Points of such a score that count one nat; 0: a tenth of the span of what the critiques of
    # training state, for each dimension
    config.loss.teacher_scale = 1.0
    # ((name, weight), ...): 'overall' where lines state other scores; (): mean of data.dimensions
    config.loss.teacher_mix = ()
    config.loss.chunk = 0  # critique positions per group at a time; 0: all

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"  # adam, or muon for the backbone's kernels
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.schedule = "cosine"  # constant, linear or cosine, after the warm-up
    config.optimizer.warmup_steps = 50
    config.optimizer.final_scale = 0.05
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.01
    config.optimizer.decay_patterns = ("kernel$",)
    config.optimizer.clip_norm = 1.0
    config.optimizer.groups = ()  # ((pattern, multiplier of the learning rate), ...)

    config.head = ConfigDict()
    config.head.scale = 1.0  # spread of the rewards before training
    config.head.hidden = ()  # widths of its hidden layers; none: it is one linear
    config.head.anew = False  # True: it starts anew, whatever the backbone's folder has

    config.mesh = ConfigDict()
    # -1: all devices that are left. Both: fsdp within a slice as far as it divides the kernels
    config.mesh.data = -1
    config.mesh.fsdp = -1
    config.mesh.tensor = 1
    return config


def real_backbone(config: ConfigDict, variant: str) -> ConfigDict:
    """EditReward's published settings as the starting point for a real backbone."""
    config.variant = variant
    config.backbone.path = ""  # must be given: a Hugging Face folder, or a name of the Hub
    config.backbone.compute_dtype = "bfloat16"
    config.backbone.scan_unroll = 1  # one layer is compiled, not all: minutes, and memory
    config.remat = "auto"
    config.batch_size = 64
    config.total_steps = 10_000
    config.eval_interval = config.save_interval = 500
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-6
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 500
    config.optimizer.weight_decay = 0.0
    config.optimizer.b2 = 0.999
    config.optimizer.groups = (("reward_head", 10.0),)
    config.data.rubric = (
        "You judge edits of a picture. Say how well the result does what the instruction asks and "
        "keeps everything else as it was: the right object, the right change, nothing added or "
        "lost, clean and plausible."
    )
    config.data.max_visual_tokens = 256
    config.data.round_to = 128
    config.data.workers = 8
    config.loss.preference_weight = 1.0
    config.loss.language_weight = 0.5
    config.loss.chunk = 512
    config.loss.first_weight = 1.0
    return config
