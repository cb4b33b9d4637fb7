"""A score under optimisation: best-of-n and online RL in the built-in world, where the truth is
known.

    python -m jrm_jax.rl --config=configs/rl.py --model=FOLDER_OR_RUN [--model=...]

puts your own models under pressure and writes WORKDIR/report.md. docs/rl.md has its own results.

    --config=configs/rl.py:comparison       the arms of the study, as docs/rl.md reports them
    --config=configs/rl.py:tiny             a few iterations, for the test that makes a run again
"""

from ml_collections import ConfigDict

from configs import study
from configs.common import parse_arg

# With full labels each is the README's run with what docs/rl.md lists for it; with noisy ones it is
# a cell of the study's second part, kept with `python -m jrm_jax.study ... --keep`.
ARMS = ("joint", "discriminative", "joint_words", "regression", "teacher", "joint_shuffled")
PRINT = 16 * "?"  # a run's fingerprint, at the end of its folder's name


def get_config(arg: str | None = None):
    parsed = parse_arg(arg, ("tiny", "comparison"))
    config = ConfigDict()
    config.name, config.variant = "rl", parsed["variant"]
    config.out = ""  # the page's files, its text beside them; empty: WORKDIR/report
    config.seed = 0  # of the first run of a model; the next ones count on
    config.seeds = 1  # runs of each reward
    # Rewards without a model: the gold score, which shows what the optimiser can do, and chance,
    # which shows how far a policy moves, and what that costs, when nothing is to be learnt.
    config.controls = ("gold", "chance")
    config.iterations = 200  # of RL; a run may become longer than it was to be at first
    config.groups = 16  # instructions of an iteration
    config.edits = 8  # of each
    config.problems = 1024  # instructions of `train` to draw from
    config.world_seed = "0/rl"  # of all instructions: none is one that a model was trained on
    config.eval_interval = 20  # iterations between evaluations on `test` and `hard`
    config.eval_problems = 32  # of each of the two, the same edits' noise each time
    config.save_interval = 20  # iterations between checkpoints
    config.log_interval = 5

    # The same for every reward. Chosen with gold alone as the reward, on instructions of `valid`
    # and `hard` with another seed than those that are reported.
    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2e-3  # of Adam, at first
    config.optimizer.slower = 50.0  # iterations after which it is half of that; 0: never
    config.optimizer.momentum = 0.97  # of Adam
    config.optimizer.clip_norm = 1.0  # of the gradient
    config.optimizer.clip = 0.2  # of the ratio, either way
    config.optimizer.kl_weight = 0.02  # of the divergence from the base, per nat
    config.optimizer.updates = 4  # of one iteration's edits
    config.optimizer.scale = "group"  # advantages are divided by the spread of: group or batch

    config.reward = ConfigDict()
    config.reward.ensemble = False  # all --model are one reward, the mean of their scores
    config.reward.penalty = 0.0  # times how unsure the reward is, taken off it
    config.reward.unsure = "spread"  # between the models; or deviation, as each says of itself

    config.best_of = ConfigDict()
    config.best_of.attempts = 256  # edits of each instruction
    config.best_of.problems = 32  # of `test` and of `hard`

    # What is measured of a model without a policy, as the study does it.
    part = study.get_config("regimes")
    config.known = ConfigDict({**part.measure, "world": {**part.world}})
    del config.known.world.seed

    # (arm, (folder, ...)): models by name, beside those of --model; a folder may hold wildcards.
    config.arms = ()

    # Fixed before the first run of the comparison. In gold score, 0 to 1.
    config.verdict = ConfigDict()
    # Joint over discriminative, at least this and above zero: at the peak of RL, at its end, and at
    # the largest of the divergences below that all runs reach.
    config.verdict.gain = 0.02
    config.verdict.confidence = 0.95
    config.verdict.draws = 2000  # of the bootstrap
    config.verdict.nats = (2.0, 5.0, 10.0, 20.0)  # where gold is compared at equal divergence
    config.verdict.collapse = 0.02  # a run whose last gold is so far below the base's, or lower

    if config.variant == "comparison":
        config.out, config.seeds = "docs/rl", 2
        # A budget of about five minutes of one core a run, so that all models fit into an evening.
        config.eval_problems, config.best_of.problems = 16, 16
        config.arms = (
            *((arm, (f"runs/{arm}", f"runs/{arm}-s?")) for arm in ARMS),
            *((f"{arm}, noisy", (f"runs/regimes/{arm}-n1600-f0.35-s?-{PRINT}",)) for arm in ARMS),
        )
    if config.variant == "tiny":
        config.iterations, config.eval_interval, config.save_interval = 4, 2, 2
        config.groups, config.edits, config.problems, config.eval_problems = 2, 2, 8, 2
        config.best_of.update({"attempts": 4, "problems": 2})
        config.log_interval, config.verdict.draws = 1, 50
        config.known.update({"batch_size": 4, "attack_groups": 4, "attack_steps": 1})
        config.known.world.update({"valid": 4, "test": 4, "hard": 4})
    return config
