"""The study of joint training: which runs, what is measured, and what counts as a gain.

    python -m jrm_jax.study --config=configs/study.py

trains and measures what is missing, then writes `docs/study.md`, its figures and its page. All runs
start from `configs/joint.py` and differ from it by what `jrm_jax/study/cells.py` lists for an arm.

    --config=configs/study.py:tiny          a few steps, for the test that makes a cell again
    --config=configs/study.py:large         more data and steps, for a GPU
    --config=configs/study.py:regimes       the second part: few and noisy labels; docs/regimes.md
    --config=configs/study.py:regimes_tiny  a few steps of it, for the tests
"""

from ml_collections import ConfigDict

from configs.common import parse_arg

START = "study_qwen3_vl"  # the tiny backbone as it was when the cells were made

HEADLINE = ("discriminative", "joint")
CONTROLS = ("joint_shuffled", "regression", "joint_masked", "generative")
LONGER = ("discriminative_x2", "discriminative_x4")
TRIED = ("joint_words", "joint_through", "joint_fade", "joint_rate", "discriminative_rate")
HEAD = ("discriminative_head", "joint_head")
LONG = ("discriminative_long", "joint_long")
EVERY = 0  # stands for the largest size
REGIMES = ("regimes", "regimes_tiny")


def get_config(arg: str | None = None):
    parsed = parse_arg(arg, ("tiny", "large", *REGIMES))
    if parsed["variant"] in REGIMES:
        return regimes(parsed["variant"])
    config = ConfigDict()
    config.name, config.variant = "study", parsed["variant"]
    config.out = "docs/study"  # cells, figures and page; the text beside it, as OUT.md
    config.workdir = "runs/study"
    config.sizes = (400, 1600, 6400)  # training groups

    # (arms, groups, weight of the language or facts loss, seeds), the most telling first: seeds
    # run in the outer loop, arms in the inner one, and what stands in an earlier row is not
    # repeated.
    config.cells = (
        (HEADLINE, EVERY, 1.0, 2),
        (CONTROLS, EVERY, 1.0, 2),
        (HEADLINE, EVERY, 1.0, 5),
        (LONGER, EVERY, 1.0, 2),
        (HEADLINE, 1600, 1.0, 2),
        (("joint",), EVERY, 0.3, 2),
        (("joint",), EVERY, 3.0, 2),
        (HEADLINE, 400, 1.0, 2),
        # After the first results, which showed no gain: changes that might bring one.
        (TRIED, EVERY, 1.0, 1),
        (LONG, EVERY, 1.0, 2),
        (("joint_words", "joint_through"), EVERY, 1.0, 2),
        (HEAD, EVERY, 1.0, 1),
    )

    # Fields of the training config that every cell has.
    config.train = ConfigDict()
    config.train.total_steps = 400
    config.train.batch_size = 16
    config.train.eval_interval = 100
    config.train.save_interval = 100
    config.train.keep_interval = 100  # for the rank of the representation over training
    # Arms are compared on the same batches; buckets by cost differ with critiques and without.
    config.train.data = ConfigDict({"candidate_cuts": (3, 4)})
    config.train.backbone = ConfigDict({"path": START, "scan_unroll": 0})
    config.world = ConfigDict({"seed": 0, "valid": 256, "test": 512, "hard": 1024})

    # What is measured of a trained cell. A change here makes every cell anew.
    config.measure = ConfigDict()
    config.measure.batch_size = 16  # groups
    config.measure.max_tokens = 64  # of a generated critique
    config.measure.critiques = 48  # groups of `hard` whose critiques are kept
    config.measure.contests = 64  # instructions of `test` with many attempts, for best-of-n
    config.measure.attempts = 16
    config.measure.attack_groups = 128  # of `hard`
    config.measure.attack_radius = 2.0  # largest change of a pixel, of 255
    config.measure.attack_steps = 5
    config.measure.spectrum = 48  # singular values kept

    # Fixed before the first cell was run. The thresholds are in points of pair accuracy on `hard`.
    config.verdict = ConfigDict()
    config.verdict.gain = 3.0  # joint over discriminative: at least this ...
    config.verdict.confidence = 0.95  # ... and its interval above zero
    config.verdict.null = 1.0  # shuffled critiques: a gain below this, or an interval over zero
    config.verdict.draws = 2000  # of the bootstrap
    config.verdict.pairs = 4000  # of `hard`, at least

    if config.variant == "tiny":
        config.sizes = (16,)
        config.cells = ((HEADLINE, EVERY, 1.0, 1),)
        config.train.update({"total_steps": 2, "batch_size": 2, "backbone": {"scan_unroll": 1}})
        config.train.data.candidate_cuts = ()  # one bucket, one program
        config.train.optimizer = ConfigDict({"name": "adam"})  # quickly compiled
        config.train.eval_interval = config.train.save_interval = config.train.keep_interval = 2
        config.world.update({"valid": 4, "test": 4, "hard": 8})
        config.measure.update({"batch_size": 4, "max_tokens": 4, "critiques": 1, "contests": 1})
        config.measure.update({"attempts": 8, "attack_groups": 4, "attack_steps": 1})
        config.verdict.pairs = 10
    if config.variant == "large":
        config.out, config.workdir = "docs/study_large", "runs/study_large"
        config.sizes = (6400, 25_600, 102_400)
        config.cells = tuple(
            (arms, {400: 6400, 1600: 25_600}.get(size, size), weight, max(3, seeds))
            for arms, size, weight, seeds in config.cells
        )
        config.train.update({"total_steps": 3200, "batch_size": 32})
        config.train.eval_interval = config.train.save_interval = 400
        config.train.keep_interval = 800
    return config


# The second part. Its arms are in `jrm_jax/study/regimes.py`.
HEADLINE_ARMS = ("discriminative", "joint", "joint_words", "joint_shuffled", "words_shuffled")
RIVALS = ("teacher", "words_masked", "joint_teacher")
OTHER_CONTROLS = ("joint_masked", "joint_noisy", "words_noisy", "teacher_noisy")
OTHERS = ("joint_through", "regression", "staged", "staged_joint")
CURVES = ("discriminative", "joint", "joint_words", "teacher")
SIZES, FLIPS = (100, 400, 1600, 6400), (0.0, 0.2, 0.35)


def regimes(variant: str) -> ConfigDict:
    """One vote for each labelled group, wrong with a known chance; critiques of all 6,400."""
    config = ConfigDict()
    config.name, config.variant = "study", variant
    config.out, config.workdir = "docs/regimes", "runs/regimes"
    config.groups = 6400  # of training; all have critiques
    config.labelled_rows = 8  # of every batch, in every arm; with critiques as many rows besides
    config.stage_steps = 1600  # of critiques alone, 16 groups each, in the arms that begin so
    config.sizes, config.flips = SIZES, FLIPS
    config.headline = ConfigDict({"labelled": 1600, "flip": 0.35})

    # The length is chosen by the discriminative arm alone, learning rates by each arm of the claim
    # for itself, on `valid`, from these:
    # (arms, labelled groups, flips, ((learning rate, steps), ...)), seed 0.
    config.trials = (
        (
            ("discriminative",), 1600, (0.0, 0.35),
            ((1.5e-3, 400), (5e-4, 400), (1.5e-4, 400), (5e-4, 1600), (1.5e-4, 1600)),
        ),
        (("joint", "joint_words"), 1600, (0.35,), ((1.5e-3, 600), (5e-4, 600), (1.5e-4, 600))),
    )
    # (arms, labelled groups, flips, seeds), the most telling first: seeds run in the outer loop,
    # arms in the inner one, and what stands in an earlier row is not repeated.
    config.points = (
        (HEADLINE_ARMS, (1600,), (0.35,), 1),
        (("words_masked", "teacher"), (1600,), (0.35,), 1),
        (HEADLINE_ARMS, (1600,), (0.35,), 5),
        (RIVALS, (1600,), (0.35,), 5),
        (CURVES, SIZES, FLIPS, 3),
        (OTHER_CONTROLS, (1600,), (0.35,), 2),
        (OTHERS, (1600,), (0.35,), 2),
        # After teacher's first three seeds, which gained: is it so with a judge's scores, too?
        # After three of those, which all gained, but within a wide interval: five.
        (("teacher_noisy",), (1600,), (0.35,), 5),
        # After teacher's curves: scores that err beside few and many, right and wrong votes.
        (("teacher_noisy",), (100, 6400), (0.0, 0.35), 2),
        # After staged's first two seeds, which both gained: more of them, and is it what critiques
        # say, and is it their scores?
        (("staged",), (1600,), (0.35,), 5),
        (("staged_shuffled", "staged_masked"), (1600,), (0.35,), 2),
        # After joint_words' curves, above discriminative there: is it what critiques say?
        (("words_shuffled",), (100,), (0.0, 0.2), 2),
        (("joint_teacher", *OTHERS), SIZES, FLIPS, 2),
    )
    # What the whole plan costs on one quiet core of an AMD EPYC, written before the first cell of
    # the headline. A step of 8 groups without critiques takes about 0.4 s, one of 16 with them
    # 0.85 s; a cell of 600 steps 5 to 10 minutes with measuring: 298 points and 10 trials.
    config.budget_hours = 45.0
    config.budget_words = (
        "Before the first trial it said 30, then 26 for 251 points. After four trials critiques of "
        "other examples came to it for the second arm, too, with five seeds, and a third seed of "
        "the curves: 31. After the last trial it became 600 steps instead of 400."
    )

    config.train = ConfigDict()
    # The length and the learning rate, and how they were chosen from the trials; the page says it.
    config.chosen = (
        "The rate is the best of the three at both kinds of votes. In 1,600 steps at that rate the "
        "arm is at its best after 500 with correct votes and after 200 with noisy ones, and loses "
        "from there on: it learns the votes by heart. So 600 steps are enough at both. Arms that "
        "write have hardly learnt to at that rate; each of the claim's has the best of three."
    )
    config.train.total_steps = 600
    config.train.eval_interval = config.train.save_interval = 100
    config.train.data = ConfigDict({"programs": 1, "candidate_cuts": ()})
    config.train.optimizer = ConfigDict({"learning_rate": 1.5e-4})
    config.train.backbone = ConfigDict({"path": START, "scan_unroll": 0})
    # (arms, their learning rate where it is another); controls have that of what they control
    config.rates = (
        (("joint", "joint_shuffled", "joint_masked", "joint_noisy", "joint_through",
          "joint_teacher", "staged_joint"), 5e-4),
        (("joint_words", "words_shuffled", "words_masked", "words_noisy"), 1.5e-3),
    )  # fmt: skip
    config.world = ConfigDict({"seed": 0, "valid": 256, "test": 512, "hard": 1024})

    config.measure = get_config().measure
    # What is kept of a trial, of a point, and of the headline's points of these seeds.
    config.parts = ConfigDict()
    config.parts.trial = ("valid",)
    config.parts.point = ("valid", "test", "hard", "states")
    config.parts.whole = (*config.parts.point, "pulls", "contests", "critiques", "attack", "cost")
    config.whole_seeds = (1,)

    # Fixed before the headline's first cell was run; points of pair accuracy on `hard` there.
    config.verdict = ConfigDict()
    # each over discriminative, and the same with critiques of other examples:
    config.verdict.arms = (("joint", "joint_shuffled"), ("joint_words", "words_shuffled"))
    config.verdict.gain = 3.0  # at least this ...
    config.verdict.confidence = 0.95  # ... and an interval above zero, corrected for two arms
    config.verdict.null = 1.0  # of the latter: a gain below this, or an interval over zero
    config.verdict.seeds = 5
    config.verdict.draws = 2000  # of the bootstrap
    # accuracies on `hard` at which labels are counted; a rule without a model has 0.592 (to 0.601)
    config.verdict.efficiency = (0.62, 0.66)
    # at the headline, besides those over discriminative: what scores add to joint training, and
    # writing to scores, asked after teacher had gained; and what a gain of staged is, asked after
    # it had gained with two seeds
    config.verdict.beside = (
        ("joint_teacher", "joint"), ("joint_teacher", "teacher"), ("staged", "staged_shuffled"),
        ("staged", "staged_masked"), ("staged_joint", "staged"), ("staged", "teacher"),
    )  # fmt: skip
    config.verdict.advice_seeds = 3  # from which an arm is recommended

    if variant == "regimes_tiny":
        config.groups, config.labelled_rows, config.stage_steps = 32, 2, 2
        config.sizes, config.flips = (8, 32), (0.35,)
        config.headline.labelled = 8
        config.trials, config.points = (), ((("joint_teacher", "staged"), (8,), (0.35,), 1),)
        config.rates = ()
        config.train.total_steps = config.train.eval_interval = config.train.save_interval = 2
        config.train.backbone.scan_unroll = 1
        config.train.optimizer.update({"name": "adam", "learning_rate": 1.5e-3})
        config.world.update({"valid": 4, "test": 4, "hard": 8})
        config.measure.update({"batch_size": 4, "max_tokens": 4, "critiques": 1, "contests": 1})
        config.measure.update({"attempts": 8, "attack_groups": 4, "attack_steps": 1})
        config.whole_seeds = ()
    return config
