"""The whole config, before anything starts: what each field may be, and what contradicts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jrm_jax import optim
from jrm_jax.build import DTYPES
from jrm_jax.data.stated import plain
from jrm_jax.data.world import describe, life, scenes
from jrm_jax.errors import UserError
from jrm_jax.losses import GAUSSIAN
from jrm_jax.model.attention import IMPLEMENTATIONS
from jrm_jax.model.layers import REMAT
from jrm_jax.model.rope import POSITIONS
from jrm_jax.run import unused_fields
from jrm_jax.run.ranking import METRICS
from jrm_jax.shell.config_cli import fields_of

LARGEST, LARGEST_SEED = 2**31 - 1, 2**32 - 1  # what JAX counts with; keys of 64 bits need more
HUGE = 1e38  # more would be infinite in float32
YEARS = 1e8  # seconds that every clock can wait for

class Rule(NamedTuple):
    """Whether a value is allowed, and what is, in words."""

    allows: Callable[[Any], bool]
    words: str


def _number(value: Any) -> bool:
    """Not NaN, and not too large for float32."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -HUGE < value < HUGE


def _from_0(words: str = "") -> Rule:
    words = f"from 0 to below {HUGE:g}{f', {words}' if words else ''}"
    return Rule(lambda value: _number(value) and value >= 0, words)


def _within(low: float, high: float) -> Rule:
    """`high` is not in it."""
    words = f"from {low:g} to below {high:g}"
    return Rule(lambda value: _number(value) and low <= value < high, words)


def _between(low: float, high: float, words: str = "") -> Rule:
    words = f"from {low:g} to {high:g}{f', {words}' if words else ''}"
    return Rule(lambda value: _number(value) and low <= value <= high, words)


def _one_of(names: Any) -> Rule:
    return Rule(lambda value: value in tuple(names), f"one of {', '.join(names)}")


def _each(allows: Callable[[Any], bool], words: str, least: int = 0) -> Rule:
    """Of a list with at least so many entries."""
    return Rule(
        lambda value: isinstance(value, list | tuple) and len(value) >= least
        and all(map(allows, value)), words,
    )  # fmt: skip


def _pair(first: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """An entry (what `first` allows, a number from 0)."""
    return lambda e: (
        isinstance(e, list | tuple) and len(e) == 2 and first(e[0]) and _number(e[1]) and e[1] >= 0
    )


def _is_mix(value: Any) -> bool:
    """Names are as `stated.plain` compares them."""
    if not isinstance(value, list | tuple) or not all(map(_pair(_is_name), value)):
        return False
    names = {plain(name) for name, _ in value}
    return len(names) == len(value) and "" not in names and (not value or any(w for _, w in value))


def _is_mixture(value: Any) -> bool:
    pairs = isinstance(value, list | tuple) and all(map(_pair(_is_name), value))
    return pairs and (not value or any(weight for _, weight in value))


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_whole(value: Any, low: int = 0, high: int = LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_count(value: Any) -> bool:
    return _is_whole(value, 1)


def _whole(low: int, words: str = "", high: int = LARGEST) -> Rule:
    words = f"a whole number from {low} to {high}{f', {words}' if words else ''}"
    return Rule(lambda value: _is_whole(value, low, high), words)


ABOVE = Rule(lambda value: _number(value) and value > 0, f"a number above 0 and below {HUGE:g}")
FRACTION = _within(0, 1)
SHARE = _between(0, 1)
COUNT = _whole(1)
WEIGHT = _from_0("0: off")
NEVER = _between(0, YEARS, "0: never")
SEED = _whole(0, high=LARGEST_SEED)
INTERVAL = _whole(0, "0: never but at the end")
TEXT = Rule(lambda value: isinstance(value, str), "a text")
TRUTH = Rule(lambda value: isinstance(value, bool), "True or False")
PATTERNS = _each(_is_pattern, "a list of one or more regular expressions", 1)
SIDE = Rule(lambda value: _is_count(value) or value == -1, "-1 (what is left), or 1 or more")
EXAMPLES = _whole(0, "0: no such split")

RULES = {
    "seed": SEED,
    "batch_size": COUNT,
    "accumulation": COUNT,
    "total_steps": _whole(0),
    "eval_interval": INTERVAL,
    "save_interval": INTERVAL,
    "keep_interval": _whole(0, "0: none"),
    "log_interval": INTERVAL,
    "best_metric": _one_of(("auto", *METRICS)),
    "trainable": PATTERNS,
    "remat": _one_of(("auto", *REMAT)),
    "profile": _each(_is_whole, "a list of steps"),
    "heartbeat_seconds": NEVER,
    "watchdog_seconds": NEVER,
    "lora.rank": _whole(0, "0: none"),
    "lora.alpha": ABOVE,
    "lora.targets": PATTERNS,
    "backbone.path": TEXT,
    "backbone.random": TRUTH,
    "backbone.compute_dtype": _one_of(DTYPES),
    "backbone.attention": _one_of(IMPLEMENTATIONS),
    "backbone.scan_unroll": _whole(0, "0: all on a CPU if they are fewer than 8, else 1"),
    "backbone.positions": _one_of(POSITIONS),
    "data.path": TEXT,
    "data.mixture": Rule(
        _is_mixture, "a list of pairs (folder, times per epoch from 0), one of them above 0"
    ),
    "data.cache": Rule(_is_name, "a folder"),
    "data.world.kind": _one_of((*scenes.KINDS_OF_EXAMPLE, *describe.KINDS)),
    "data.world.seed": SEED,
    "data.world.train": COUNT,
    "data.world.valid": EXAMPLES,
    "data.world.test": EXAMPLES,
    "data.world.hard": EXAMPLES,
    "data.world.labelled": SHARE,
    "data.world.pairs": _whole(0, "0: all"),
    "data.world.flip": SHARE,
    "data.world.vote_scale": _from_0("0: no chance"),
    "data.world.critiqued": SHARE,
    "data.world.wrong_facts": SHARE,
    "data.world.score_correlation": _between(life.LEAST_CORRELATION, 1),
    "data.labelled": _whole(0, "0: as they come"),
    "data.rubric": TEXT,
    "data.dimensions": _each(_is_name, "a list of one or more names, each once", 1),
    "data.programs": COUNT,
    "data.candidate_cuts": _each(_is_count, "a list of whole numbers from 1"),
    "data.visual_cuts": _each(_is_count, "a list of whole numbers from 1"),
    "data.round_to": COUNT,
    "data.max_visual_tokens": Rule(
        lambda value: _is_whole(value) and not 0 < value < 4,
        "a whole number from 4, or 0: the cap of the backbone's folder",
    ),
    "data.max_candidates": _whole(0, "0: no cap"),
    "data.max_pictures": _whole(0, "0: no cap"),
    "data.max_picture_tokens": _whole(0, "0: no cap"),
    "data.max_prompt": _whole(0, "0: no cap"),
    "data.max_candidate": _whole(0, "0: no cap"),
    "data.max_critique": _whole(0, "0: no cap"),
    "data.skip_large": TRUTH,
    "data.share_prompt": TRUTH,
    "data.workers": _whole(0, "0: threads", 1024),
    "data.prefetch": COUNT,
    "loss.preference_weight": WEIGHT,
    "loss.language_weight": WEIGHT,
    "loss.first_weight": _from_0(),
    "loss.language_end": _from_0(),
    "loss.through_reward": TRUTH,
    "loss.words_weight": WEIGHT,
    "loss.gaussian": _one_of(GAUSSIAN),
    "loss.margin": _from_0(),
    "loss.centering_weight": WEIGHT,
    "loss.score_line": TRUTH,
    "loss.facts_weight": WEIGHT,
    "loss.teacher_weight": WEIGHT,
    "loss.teacher_scale": _from_0("0: found in the data"),
    "loss.teacher_mix": Rule(
        _is_mix, "a list of pairs (name of a score, weight), each name once, one weight above 0"
    ),
    "loss.chunk": _whole(0, "0: all"),
    "optimizer.name": _one_of(optim.SCALINGS),
    "optimizer.learning_rate": ABOVE,
    "optimizer.schedule": _one_of(optim.SCHEDULES),
    "optimizer.warmup_steps": _whole(0),
    "optimizer.final_scale": _from_0(),
    "optimizer.b1": FRACTION,
    "optimizer.b2": FRACTION,
    "optimizer.eps": ABOVE,
    "optimizer.weight_decay": _from_0("0: none"),
    "optimizer.decay_patterns": _each(_is_pattern, "a list of regular expressions"),
    "optimizer.clip_norm": _from_0("0: none"),
    "optimizer.groups": _each(_pair(_is_pattern), "a list of pairs (regular expression, number)"),
    "head.scale": ABOVE,
    "head.hidden": _each(_is_count, "a list of whole numbers from 1"),
    "head.anew": TRUTH,
    "mesh.data": SIDE,
    "mesh.fsdp": SIDE,
    "mesh.tensor": SIDE,
}
NAMES = {"name": Rule(_is_name, "a text of one letter or more"), "variant": TEXT}


def check_config(config: ConfigDict) -> list[str]:
    """What is to be said of a config that may be trained.

    Raises:
        UserError: every field that is unknown, missing or not allowed, with what is; or fields that
            contradict each other.
    """
    fields, rules = dict(fields_of(config)), {**NAMES, **RULES}
    wrong = [f"config.{name}: no such field; {_near(name)}" for name in fields if name not in rules]
    wrong += [f"config.{name} is missing" for name in rules if name not in fields]
    wrong += [
        f"config.{name} is {fields[name]!r}: allowed is {rule.words}"
        for name, rule in rules.items()
        if name in fields and not rule.allows(fields[name])
    ]
    if wrong:
        raise UserError("; ".join(wrong))
    wrong = list(_contradictions(config))
    if wrong:
        raise UserError("; ".join(wrong))
    return list(unused_fields.describe(config))


def _near(name: str) -> str:
    last = {known.rpartition(".")[2]: known for known in RULES}
    close = difflib.get_close_matches(name, RULES, 1, 0.7)
    close = close or [last[n] for n in difflib.get_close_matches(name.rpartition(".")[2], last, 1)]
    return f"did you mean config.{close[0]}?" if close else "configs/common.py lists them"


def _contradictions(config: ConfigDict) -> Iterator[str]:
    loss, data = config.loss, config.data
    if data.path and data.mixture:
        yield (
            f"config.data.path is {data.path!r} and config.data.mixture names "
            f"{', '.join(path for path, _ in data.mixture)}: give one of the two"
        )
    if len(set(data.dimensions)) < len(data.dimensions):
        yield f"config.data.dimensions is {tuple(data.dimensions)}: allowed is each name once"
    if not loss.preference_weight and not loss.language_weight:
        yield (
            "config.loss.preference_weight and config.loss.language_weight are 0: nothing would "
            "be learnt; at least one must be above 0"
        )
    for name in ("centering_weight", "words_weight", "facts_weight", "teacher_weight"):
        if loss[name] and not loss.preference_weight:
            yield (
                f"config.loss.{name} is {loss[name]} and config.loss.preference_weight is 0: this "
                "loss is read off scored states, so both must be above 0, or this one 0"
            )
    if loss.through_reward and loss.language_weight and not data.share_prompt:
        yield (
            "config.loss.through_reward is True and config.data.share_prompt is False: critiques "
            "would not see the instruction, which stands before the reward token then; leave "
            "share_prompt as it is"
        )
    if data.labelled > config.batch_size:
        yield (
            f"config.data.labelled is {data.labelled}: allowed is up to config.batch_size, "
            f"{config.batch_size}"
        )
    if data.labelled and (data.programs != 1 or data.candidate_cuts or data.visual_cuts):
        yield (
            f"config.data.labelled is {data.labelled}, so that large and small groups stand in one "
            "batch: give config.data.programs=1 and no candidate_cuts or visual_cuts"
        )
    if life.of_config(data.world) != life.LIKE_PACKAGED and data.world.kind in describe.KINDS:
        yield (
            f"config.data.world.kind is {data.world.kind!r}, which has no labels and no critiques "
            f"that could be {life.of_config(data.world).words}: leave these fields as they are"
        )
    if loss.facts_weight and data.world.kind != "facts" and not (data.path or data.mixture):
        yield (
            f"config.loss.facts_weight is {loss.facts_weight} and config.data.world.kind is "
            f"{data.world.kind!r}, whose critiques are words alone: give "
            "--config.data.world.kind=facts, or 0"
        )
    needs = METRICS.get(config.best_metric)
    if needs and not loss[needs]:
        yield (
            f"config.best_metric is {config.best_metric!r}, which is not measured while "
            f"config.loss.{needs} is 0: allowed is auto, or a metric of a loss that is on"
        )
    if config.batch_size % config.accumulation:
        yield (
            f"config.accumulation is {config.accumulation}: it must divide config.batch_size, "
            f"{config.batch_size}"
        )
