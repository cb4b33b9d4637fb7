"""The config's own check: every field, contradictions, and what counts for nothing."""

import math
import re

import pytest

from configs import discriminative, generative, joint
from configs.common import REAL, base
from jrm_jax import cli
from jrm_jax.errors import UserError
from jrm_jax.run.check_config import NAMES, RULES, check_config
from jrm_jax.shell.config_cli import fields_of
from jrm_jax.train import _is_due

FLAT = dict(fields_of(base()))


def changed(fields, config=None):
    """A config with these fields, of whatever type."""
    config = config or joint.get_config()
    with config.ignore_type():
        for name, value in fields.items():
            *parents, last = name.split(".")
            part = config
            for parent in parents:
                part = part[parent]
            part[last] = value
    return config


def refusal(fields, config=None) -> str:
    with pytest.raises(UserError) as caught:
        check_config(changed(fields, config))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("variant", ["", *REAL])
@pytest.mark.parametrize("config", [joint, discriminative, generative], ids=lambda c: c.__name__)
def test_what_comes_with_the_code_is_allowed_and_needs_no_words(config, variant):
    assert check_config(config.get_config(variant)) == []


@pytest.mark.parametrize("variant", generative.PRETRAINING)
def test_pretraining_is_allowed(variant):
    assert check_config(generative.get_config(variant)) == []


def test_every_field_has_a_rule():
    assert set(RULES) == set(FLAT)


# Bad values by kind of field; a field's own kind is found by what it allows.
WHOLE = (-1, -0.5, 2.5, math.nan, math.inf, "3", None, True)
NUMBERS = (-1.0, -0.5, math.nan, math.inf, "3", None)
WORDS = ("no such word", "", 3, None)
LISTS = ("word", 3, None, (3.5,), ("(",), (("a",),), (("a", -1.0),), ((3, 1.0),))
TRUTHS = (3, "yes", None)


def kind_of(name):
    value = FLAT[name]
    if isinstance(value, bool):
        return TRUTHS
    if isinstance(value, int | float):
        return WHOLE if isinstance(value, int) else NUMBERS
    return LISTS if isinstance(value, tuple) else WORDS


ALLOWED = {  # of the values above
    "mesh.data": (-1,), "mesh.fsdp": (-1,), "mesh.tensor": (-1,),
    "backbone.path": ("no such word", ""), "data.path": ("no such word", ""),
    "data.rubric": ("no such word", ""), "data.cache": ("no such word",),
    "data.dimensions": (("(",),),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_what_a_field_may_not_be_is_refused_with_what_it_may(name):
    for value in kind_of(name):
        if value in ALLOWED.get(name, ()):
            continue
        assert f"config.{name} is {value!r}: allowed is {RULES[name].words}" == refusal(
            {name: value}
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data.max_visual_tokens", 1), ("data.max_visual_tokens", 3), ("total_steps", -5),
        ("batch_size", 0), ("accumulation", 0), ("data.round_to", 0), ("data.prefetch", 0),
        ("data.world.train", 0), ("optimizer.learning_rate", 0.0), ("optimizer.eps", 0.0),
        ("optimizer.b1", 1.0), ("optimizer.b2", 1.5), ("lora.alpha", 0.0), ("head.scale", 0.0),
        ("mesh.tensor", 0), ("trainable", ()), ("lora.targets", ()), ("data.dimensions", ()),
        ("data.dimensions", "overall"), ("data.dimensions", ("",)), ("profile", (-1,)),
        ("data.candidate_cuts", (0,)), ("optimizer.groups", (("head",),)),
        ("optimizer.groups", (("(", 1.0),)), ("data.mixture", (("a", -1.0),)),
        ("data.mixture", ("a", "b")), ("best_metric", "language"), ("best_metric", "accuracy"),
        ("optimizer.schedule", "cosin"), ("optimizer.name", "adamw"), ("remat", "all"),
        ("backbone.attention", "flash"), ("backbone.compute_dtype", "float16"),
        ("backbone.positions", "2d"), ("data.world.kind", "pictures"),
        ("seed", 2**32), ("seed", 2**64), ("data.world.seed", 2**32), ("total_steps", 2**31),
        ("batch_size", 10**12), ("watchdog_seconds", 1e12), ("heartbeat_seconds", 1e10),
        ("loss.margin", 1e39),
        ("data.workers", 10**6), ("optimizer.learning_rate", 1e300),
        ("data.mixture", (("a", 0.0), ("b", 0))), ("data.mixture", (("a", 10**400),)),
        ("optimizer.groups", (("head", 1e39),)), ("loss.teacher_mix", (("a", 1e39),)),
        ("name", ""), ("name", 3), ("variant", None),
    ],
)  # fmt: skip
def test_values_out_of_range(name, value):
    assert f"config.{name} is {value!r}: allowed is " in refusal({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eval_interval", 0), ("save_interval", 0), ("log_interval", 0), ("total_steps", 0),
        ("heartbeat_seconds", 0), ("watchdog_seconds", 0.0), ("optimizer.clip_norm", 0.0),
        ("data.max_visual_tokens", 4), ("data.visual_cuts", (64, 128)), ("mesh.data", 8),
        ("optimizer.groups", (("reward_head", 0.0),)), ("profile", (0, 5)), ("data.rubric", ""),
        ("loss.first_weight", 0.0), ("optimizer.b1", 0.0), ("data.world.valid", 0),
        ("best_metric", "-language"), ("data.mixture", (("a", 1), ("b", 0.5))),
        ("seed", 2**32 - 1), ("watchdog_seconds", 1e8), ("data.mixture", (("a", 1), ("b", 0))),
        ("data.mixture", ()), ("total_steps", 2**31 - 1), ("variant", ""),
    ],
)  # fmt: skip
def test_values_at_the_edge_are_allowed(name, value):
    check_config(changed({name: value}))


def test_all_that_is_wrong_is_said_at_once():
    words = refusal({"seed": -1, "loss.margin": -1.0, "remat": "al"})
    assert [part.split(" is ")[0] for part in words.split("; ")] == [
        "config.seed", "config.remat", "config.loss.margin"
    ]  # fmt: skip


def test_unknown_and_missing_fields_of_a_users_file():
    config = joint.get_config()
    config.optimizer.lr = 1.0
    assert "config.optimizer.lr: no such field; " in refusal({}, config)
    config = joint.get_config()
    config.leaning_rate = 1.0
    words = refusal({}, config)
    assert words == (
        "config.leaning_rate: no such field; did you mean config.optimizer.learning_rate?"
    )
    config = joint.get_config()
    del config.loss.margin
    assert refusal({}, config) == "config.loss.margin is missing"
    config = joint.get_config()
    del config.variant
    assert refusal({}, config) == "config.variant is missing"
    assert tuple(NAMES) == ("name", "variant")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"data.mixture": ("a", "b")}, "config.data.mixture is ('a', 'b'): allowed is"),
        ({"data.path": None}, "config.data.path is None: allowed is a text"),
        ({"name": None}, "config.name is None: allowed is"),
    ],
)
def test_a_config_is_checked_before_its_runs_name_is_made_of_it(fields, words):
    assert cli.run_name(changed({"data.path": "/sets/edits"})) == "joint-edits"
    with pytest.raises(UserError, match=re.escape(words)):
        cli.run_name(changed(fields))
    config = joint.get_config()
    del config.name, config.variant
    with pytest.raises(UserError, match="config.name is missing; config.variant is missing"):
        cli.run_name(config)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"data.path": "a", "data.mixture": (("b", 1.0),)}, "names b: give one of the two"),
        ({"data.dimensions": ("a", "a")}, "allowed is each name once"),
        ({"loss.preference_weight": 0.0, "loss.language_weight": 0.0,
          "loss.centering_weight": 0.0}, "nothing would be learnt"),
        ({"loss.preference_weight": 0.0}, "config.loss.centering_weight is 0.01 and"),
        ({"loss.preference_weight": 0.0, "loss.centering_weight": 0.0, "loss.words_weight": 1.0},
         "config.loss.words_weight is 1.0 and"),
        ({"best_metric": "-words"}, "not measured while config.loss.words_weight is 0"),
        ({"batch_size": 6, "accumulation": 4}, "it must divide config.batch_size, 6"),
        ({"loss.through_reward": True, "data.share_prompt": False},
         "critiques would not see the instruction"),
        ({"loss.facts_weight": 1.0}, "'edits', whose critiques are words alone: give"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(fields, words):
    assert words in refusal(fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"data.path": "a", "data.world.train": 9, "data.cache": "b"},
         "config.data.cache, config.data.world.train count for nothing: there are other data"),
        ({"data.mixture": (("a", 1.0),), "data.world.seed": 3},
         "config.data.world.seed counts for nothing: there are other data"),
        ({"lora.alpha": 8.0}, "config.lora.alpha counts for nothing: lora.rank is 0"),
        ({"loss.language_weight": 0.0, "loss.language_end": 0.5},
         "config.loss.language_end counts for nothing: loss.language_weight is 0"),
        ({"optimizer.schedule": "constant", "optimizer.final_scale": 0.5},
         "config.optimizer.final_scale counts for nothing: optimizer.schedule is constant"),
        ({"loss.facts_weight": 1.0, "data.world.kind": "facts", "trainable": ("^backbone/",)},
         "config.loss.facts_weight counts for nothing: config.trainable does not name facts_head"),
        ({"loss.language_weight": 0.0, "loss.chunk": 64, "loss.through_reward": True},
         "config.loss.chunk, config.loss.through_reward count for nothing: loss.language_weight"),
        ({"loss.language_weight": 0.0, "loss.words_weight": 1.0, "loss.chunk": 64},
         "config.loss.chunk counts for nothing: loss.language_weight is 0"),
        ({"loss.language_weight": 0.0, "loss.score_line": False, "loss.first_weight": 2.0,
          "data.max_critique": 9}, "config.loss.score_line, config.loss.first_weight, "
         "config.data.max_critique count for nothing: loss.language_weight and loss.words_weight"),
        ({"save_interval": 0}, "the last step counts as the best"),
        ({"total_steps": 20}, "the learning rate stays below its peak"),
    ],
)  # fmt: skip
def test_what_counts_for_nothing_is_said(fields, words):
    (said,) = check_config(changed(fields))
    assert words in said


@pytest.mark.parametrize("fields", [
    {"loss.language_weight": 0.0, "loss.words_weight": 1.0, "loss.score_line": False,
     "loss.first_weight": 2.0},
    {"loss.facts_weight": 1.0, "data.world.kind": "facts"},
    {"loss.facts_weight": 1.0, "data.path": "a prepared world of that kind"},
    {"save_interval": 0, "eval_interval": 0},
])  # fmt: skip
def test_what_counts_is_not_said_to_count_for_nothing(fields):
    assert check_config(changed(fields)) == []


def test_an_interval_of_zero_is_never():
    assert not any(_is_due(step, 0) for step in range(5))
    assert [step for step in range(7) if _is_due(step, 3)] == [0, 3, 6]
