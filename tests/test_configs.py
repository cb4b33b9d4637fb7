"""Configs: all of them build; what is mistyped is refused in one line with a suggestion."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import discriminative, generative, joint, paper
from configs.common import REAL, TINY, base, parse_arg
from jrm_jax import build
from jrm_jax.data.world import describe
from jrm_jax.errors import UserError
from jrm_jax.run.check_config import check_config
from jrm_jax.shell import config_cli
from jrm_jax.shell.packaged import CONFIGS, config_names, find_config, load_config_module

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"joint": joint, "discriminative": discriminative, "generative": generative}


def same_fields(config: ConfigDict, other: ConfigDict) -> bool:
    names, wanted = (dict(config_cli.fields_of(tree)).keys() for tree in (config, other))
    return names - {"name", "variant"} == wanted


@pytest.mark.parametrize("variant", [None, "", *REAL])
@pytest.mark.parametrize("name", MODULES)
def test_every_config_builds(name, variant):
    config = MODULES[name].get_config(*([] if variant is None else [variant]))
    assert (config.name, config.variant) == (name, variant or "")
    assert same_fields(config, base())
    assert (config.backbone.path == TINY) == (not variant)
    weights = (config.loss.preference_weight > 0, config.loss.language_weight > 0)
    assert weights == {
        "joint": (True, True), "discriminative": (True, False), "generative": (False, True)
    }[name]  # fmt: skip
    assert config.total_steps % config.save_interval == 0
    config.lock().to_json_best_effort()


def test_describe_pretrains_from_random_weights_and_the_others_go_on():
    variants = ("describe", "describe_lookups", "describe_comparisons", "describe_changes")
    for variant, kind in zip(variants, describe.KINDS, strict=True):
        config = generative.get_config(variant)
        assert config.variant == variant and config.backbone.random == (kind == "descriptions")
        assert config.data.world.kind == kind and not config.loss.preference_weight
        assert same_fields(config, base())
    for module in (joint, discriminative):
        with pytest.raises(UserError, match="config variant 'describe'"):
            module.get_config("describe")


def test_the_recipe_of_the_paper():
    for variant in (None, "qwen3_vl_8b", "qwen3_vl_4b", "tiny", "qwen3_vl_8b,groups=6400"):
        config = paper.get_config(variant)
        name, _, groups = (variant or "qwen3_vl_8b").partition(",groups=")
        assert (config.name, config.variant) == ("paper", name) and same_fields(config, base())
        assert (config.loss.preference_weight, config.loss.language_weight) == (0.3, 0.7)
        assert config.loss.gaussian == "log_of_mean" and len(config.data.dimensions) == 2
        assert len(config.head.hidden) == 2 and not check_config(config)
        if name == "tiny":
            continue
        assert config.total_steps == 10 * int(groups or 200_000) / 64 and config.batch_size == 64
        rates = [float(build.make_schedule(config, config.total_steps)(step))
                 for step in (-(-config.total_steps // 20), config.total_steps)]  # fmt: skip
        assert rates == pytest.approx([2e-6, 0.0], abs=1e-9)
        assert (config.optimizer.b1, config.optimizer.b2) == (0.9, 0.95)
        assert config.data.max_visual_tokens == 256 and config.backbone.path == ""
    with pytest.raises(UserError, match="config variant 'qwen3_vl_2b'"):
        paper.get_config("qwen3_vl_2b")


def test_the_baselines_differ_from_joint_in_their_losses_only():
    wanted = joint.get_config().to_dict()
    for module in (discriminative, generative):
        found = module.get_config().to_dict()
        assert [k for k in wanted if wanted[k] != found[k]] == ["loss", "name"]


def test_parse_arg():
    options = {"steps": 3, "rate": 0.5, "fast": False, "word": "a"}
    assert parse_arg(None, REAL, **options) == {"variant": "", **options}
    found = parse_arg("qwen3_vl_8b,steps=7,rate=2,fast=true,word=b=c", REAL, **options)
    assert found == {
        "variant": "qwen3_vl_8b", "steps": 7, "rate": 2.0, "fast": True, "word": "b=c"
    }  # fmt: skip
    assert parse_arg("steps=7", REAL, **options)["variant"] == ""


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("qwen3_vl_8", "config variant 'qwen3_vl_8': did you mean 'qwen3_vl_8b'"),
        ("zzz", "known: qwen3_vl_8b, qwen3_vl_4b"),
        ("qwen3_vl_8b,qwen3_vl_4b", "config variant 'qwen3_vl_4b'"),
        ("qwen3_vl_8b,step=3", "config option 'step': did you mean 'steps'"),
        ("steps=many", "steps='many' must be of type int"),
    ],
)
def test_parse_arg_refuses(arg, words):
    with pytest.raises(UserError) as caught:
        parse_arg(arg, REAL, steps=3)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# The command line. The name of a case, its arguments, and what the one line must say.
JOINT = "--config=configs/joint.py"
REFUSED = {
    "field": (
        (JOINT, "--config.los.margin=1"),
        ("--config.los.margin: there is no such field", "did you mean config.loss.margin?"),
    ),
    "subfield": ((JOINT, "--config.loss.margn=1"), ("did you mean config.loss.margin?",)),
    "short form": (
        (JOINT, "--config.optimizer.lr=1"), ("did you mean config.optimizer.learning_rate?",)
    ),
    "switch": ((JOINT, "--noconfig.data.skip_lrge"), ("did you mean config.data.skip_large?",)),
    "no config": ((), ("--config", "configs/joint.py")),
    "no such file": (
        ("--config=configs/jont.py",), ("configs/jont.py: no such file", "configs/joint.py?")
    ),
    "no such file, field": (
        ("--config=configs/jont.py", "--config.seed=1"),
        ("configs/jont.py: no such file",),
    ),
    "bucket": ((JOINT, "--config.data.path=gs://b/set"), ("must be local; mount the bucket",)),
    "address in a file": (("--config={folder}/own.py",), ("config.data.cache=s3://", "must be")),
    "word for int": ((JOINT, "--config.batch_size=abc"), ("config.batch_size", "'abc'")),
    "fraction for int": ((JOINT, "--config.total_steps=1.5"), ("config.total_steps", "'1.5'")),
    "value for group": ((JOINT, "--config.loss=3"), ("config.loss", "'3'")),
    "variant": ((f"{JOINT}:qwen3_vl_8",), ("'qwen3_vl_8'", "did you mean 'qwen3_vl_8b'")),
    "flag": (("--confg=configs/joint.py",), ("'confg'", "config ?")),
    "argument": ((JOINT, "workdir"), ("unexpected argument 'workdir'",)),
    "range": (
        (JOINT, "--config.optimizer.learning_rate=-1", "--config.eval_interval=-2"),
        ("config.optimizer.learning_rate is -1.0: allowed is a number above 0",
         "config.eval_interval is -2: allowed is a whole number from 0"),
    ),
    "a field before its config": (
        ("--config.eval_interval=-2", "--config", "joint"), ("config.eval_interval is -2",)
    ),
    "no backbone": (
        (f"{JOINT}:qwen3_vl_8b",),
        ("config.backbone.path is not set", "qwen3_vl_8b", "--config.backbone.path=FOLDER"),
    ),
    "no such backbone": (
        (f"{JOINT}:qwen2_5_vl_7b", "--config.backbone.path=/nowhere"),
        ("'/nowhere' is no folder",),
    ),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """All cases run at the same time: each mostly waits for imports."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "own.py").write_text(
        "from configs import joint\n\n\ndef get_config():\n    config = joint.get_config()\n"
        "    config.data.cache = 's3://bucket/world'\n    return config\n"
    )

    def run(name):
        workdir = folder / name.replace(" ", "_")
        words = [word.format(folder=folder) for word in REFUSED[name][0]]
        command = [sys.executable, "-m", "jrm_jax.main", *words]
        done = subprocess.run(
            [*command, f"--workdir={workdir}"],
            capture_output=True, text=True, cwd=ROOT, timeout=300, env={**os.environ},
        )  # fmt: skip
        return done, workdir

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(REFUSED, pool.map(run, REFUSED), strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_the_command_line_refuses_in_one_line(refusals, name):
    done, workdir = refusals[name]
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert len(lines[0]) < 300 and "Traceback" not in lines[0] and "\\n" not in lines[0]
    for words in REFUSED[name][1]:
        assert words in lines[0], lines[0]
    # what could not start may be corrected and run again
    assert not (workdir / "config.json").exists()


# Near misses, in the parser itself

FIELDS = list(dict(config_cli.fields_of(joint.get_config())))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lr", "config.optimizer.learning_rate?"),
        ("learning_rate", "did you mean config.optimizer.learning_rate?"),
        ("optimizer.rate", "did you mean config.optimizer.learning_rate"),
        ("bs", "did you mean config.batch_size?"),
        ("max_steps", "did you mean config.total_steps"),
        ("wd", "did you mean config.optimizer.weight_decay?"),
        ("model.path", "config.backbone.path"),
        ("data.dimension", "did you mean config.data.dimensions?"),
        ("optimizer.zzz", "config.optimizer has b1, b2, clip_norm"),
        ("zzz", "config has accumulation, batch_size, best_metric"),
        ("batch_size.x", "--help lists the fields"),
    ],
)
def test_a_field_that_is_not_there_brings_a_suggestion(name, words):
    with pytest.raises(UserError) as caught:
        config_cli.check_field(name, FIELDS)
    assert words in str(caught.value), caught.value
    for known in ("seed", "optimizer", "data.world.seed"):
        config_cli.check_field(known, FIELDS)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("jrm_jax.main", "--help"), ("--workdir", "optimizer.learning_rate = 0.0015")),
        (
            ("jrm_jax.main", "--config=joint:qwen3_vl_8b", "-h"),
            ("optimizer.learning_rate = 2e-06", "batch_size = 64", "groups per step, all hosts"),
        ),
        (("jrm_jax.aot", "--helpfull"), ("--topology", "loss.chunk = 0")),
        (
            ("jrm_jax.rl", "--help"),
            ("--model", "--report", "reward.penalty = 0.0", "iterations between evaluations on"),
        ),
        (("jrm_jax.study", "--help"), ("--minutes", "measure.attempts = 16", "study.py")),
    ],
    ids=lambda value: value[0].removeprefix("jrm_jax."),
)
def test_help_shows_the_flags_and_the_fields(command, words):
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0 and not done.stderr
    for each in (*words, "--config", "discriminative"):
        assert each in done.stdout, done.stdout


# Configs that come with the code, found from anywhere


def test_a_packaged_config_is_known_by_its_name(tmp_path, monkeypatch):
    assert find_config("configs/joint.py") == "configs/joint.py"  # here it is a file
    monkeypatch.chdir(tmp_path)
    assert {"joint", "discriminative", "study"} <= set(config_names())
    assert "common" not in config_names()
    for words in ("joint", "joint.py", "configs/joint.py", "configs/joint"):
        assert find_config(words) == str(CONFIGS / "joint.py")
        assert find_config(f"{words}:qwen3_vl_8b,a=b") == f"{CONFIGS / 'joint.py'}:qwen3_vl_8b,a=b"
    (tmp_path / "joint.py").write_text("")
    assert find_config("joint.py") == "joint.py"  # the user's own comes first
    for words in ("jont", "other/joint.py", "../configs/joint.py", ""):
        with pytest.raises(UserError, match="no such file"):
            find_config(words)


def test_packaged_configs_do_not_mind_a_folder_of_the_same_name(tmp_path):
    """`python -m` looks for modules in the working directory first."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("mine = True")
    done = subprocess.run(
        [sys.executable, "-m", "jrm_jax.main", "--config=discriminative", "--help"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0 and "loss.language_weight = 0.0" in done.stdout, done.stderr


def test_a_module_of_the_configs_is_loaded_by_its_name():
    assert load_config_module("common").base().to_dict() == base().to_dict()
