"""Fields of a config that count for nothing: said, not refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from jrm_jax import optim
from jrm_jax.data.stated import OVERALL, plain
from jrm_jax.run.check_data import reads_critiques
from jrm_jax.run.workdir import defaults
from jrm_jax.shell.config_cli import fields_of
from jrm_jax.shell.packaged import load_config_module

# (fields that count for nothing, when, in words why); said where one is not at a default
UNUSED: tuple[tuple[tuple[str, ...], Callable[[ConfigDict], bool], str], ...] = (
    (
        ("data.cache", *(f"data.world.{name}" for name in defaults().data.world)),
        lambda c: bool(c.data.path or c.data.mixture), "there are other data",
    ),
    (
        ("data.programs",), lambda c: bool(c.data.candidate_cuts or c.data.visual_cuts),
        "data.candidate_cuts or data.visual_cuts make the buckets",
    ),
    (("lora.alpha", "lora.targets"), lambda c: not c.lora.rank, "lora.rank is 0"),
    (
        ("loss.margin", "loss.gaussian", "head.scale", "head.hidden", "head.anew"),
        lambda c: not c.loss.preference_weight, "loss.preference_weight is 0",
    ),
    (
        ("loss.language_end", "loss.chunk", "loss.through_reward"),
        lambda c: not c.loss.language_weight, "loss.language_weight is 0",
    ),
    (
        ("loss.score_line", "loss.first_weight", "data.max_critique"),
        lambda c: not reads_critiques(c), "loss.language_weight and loss.words_weight are 0",
    ),
    (
        ("loss.teacher_scale", "loss.teacher_mix"), lambda c: not c.loss.teacher_weight,
        "loss.teacher_weight is 0",
    ),
    (
        ("loss.teacher_mix",),
        lambda c: c.loss.teacher_weight and OVERALL not in map(plain, c.data.dimensions),
        "it makes 'overall', which is not among data.dimensions",
    ),
    (
        # the head begins with a kernel of zeros: frozen, it hands no gradient on
        ("loss.facts_weight",),
        lambda c: not c.lora.rank and not optim.matching(c.trainable, ["facts_head/kernel"]),
        "config.trainable does not name facts_head (add '^facts_head/')",
    ),
    (("optimizer.decay_patterns",), lambda c: not c.optimizer.weight_decay,
     "optimizer.weight_decay is 0"),
    (("optimizer.final_scale",), lambda c: c.optimizer.schedule == "constant",
     "optimizer.schedule is constant"),
)  # fmt: skip


def describe(config: ConfigDict) -> Iterator[str]:
    """A line for each reason why fields of an allowed config count for nothing, and of lengths that
    a run never comes to. A field that has the value of a config that comes with the code is left
    out: nobody has set it."""
    real = load_config_module("joint").get_config("qwen3_vl_8b")
    usual = [dict(fields_of(each)) for each in (defaults(), real)]
    fields = dict(fields_of(config))
    for names, is_unused, why in UNUSED:
        changed = [name for name in names if all(fields[name] != u[name] for u in usual)]
        if changed and is_unused(config):
            words = ", ".join(f"config.{name}" for name in changed)
            yield f"{words} {'counts' if len(changed) == 1 else 'count'} for nothing: {why}"
    if 0 < config.total_steps < config.optimizer.warmup_steps:
        yield (
            f"config.optimizer.warmup_steps is {config.optimizer.warmup_steps}, more than "
            f"config.total_steps, {config.total_steps}: the learning rate stays below its peak"
        )
    if not config.save_interval and 0 < config.eval_interval < config.total_steps:
        yield (
            "config.save_interval is 0: the last step counts as the best, whatever is measured "
            "before it"
        )
