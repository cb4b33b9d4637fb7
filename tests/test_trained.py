"""What has trained a score and what has not, and where a run's reward head comes from."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from entry_point import Runner, small_backbone  # noqa: F401  a fixture
from export_case import family_run, give_head, make_folder, make_groups, write
from export_case import start as start_run
from safetensors.numpy import load_file, save_file
from test_export import classifier, torch_rewards

from configs import discriminative, generative, joint
from jrm_jax import build, build_data, export, reward_head
from jrm_jax.errors import UserError
from jrm_jax.model.config import load_config
from jrm_jax.optim import flatten
from jrm_jax.run import buckets
from jrm_jax.serving import trained
from jrm_jax.serving.reward_model import RewardModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_backbone):  # noqa: F811
    """An export, as far as a backbone's folder is concerned: a head for two named dimensions."""
    folder = tmp_path_factory.mktemp("export") / "two"
    shutil.copytree(small_backbone, folder)
    give_head(folder)
    path = folder / "model.safetensors"
    head = load_file(path)["score.weight"]
    save_file({**load_file(path), "score.weight": np.concatenate([head, 2 * head])}, path)
    name(folder, ["overall", "quality"])
    return folder


def name(folder, labels):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = {str(i): label for i, label in enumerate(labels)}
    path.write_text(json.dumps(config))


def start(folder, *dimensions, anew=False, config=None):
    config = config or joint.get_config()
    backbone = load_config(folder)
    wanted = build.abstract_reward_head(config, backbone.text.hidden, len(dimensions))
    return reward_head.read_head_start(folder, backbone, dimensions, anew, wanted)


@pytest.fixture(scope="module")
def columns(folder):
    return load_file(folder / "model.safetensors")["score.weight"]


@pytest.mark.parametrize(
    ("dimensions", "wanted", "words"),
    [
        (("overall", "quality"), (0, 1), "goes on for overall, quality"),
        (("quality", "overall"), (1, 0), "goes on for quality, overall"),
        (("quality",), (1,), "goes on for quality; overall is dropped"),
        (("overall", "style"), (0, None), "goes on for overall; style starts anew; quality is"),
    ],
)
def test_dimensions_of_an_export_are_found_by_their_names(
    folder, columns, dimensions, wanted, words
):
    found = start(folder, *dimensions)
    assert words in found.words and str(folder) in found.words
    assert found.is_whole == (None not in wanted)
    for column, index in zip(found.params["kernel"].T, wanted, strict=True):
        if index is None:
            assert np.isnan(column).all()
        else:
            np.testing.assert_array_equal(column, columns[index])


def test_names_that_clash_are_refused(folder):
    for dimensions in (("style",), ("style", "taste")):
        with pytest.raises(UserError) as caught:
            start(folder, *dimensions)
        assert f"scores overall, quality, this run {', '.join(dimensions)}" in str(caught.value)
        assert "--config.head.anew=True" in str(caught.value)
        found = start(folder, *dimensions, anew=True)
        assert found.params is None and found.is_export and "starts anew" in found.words


def test_a_head_without_names_goes_by_number(folder, tmp_path, columns):
    folder = shutil.copytree(folder, tmp_path / "unnamed")
    for labels in (["LABEL_0", "LABEL_1"], []):
        name(folder, labels)
        np.testing.assert_array_equal(start(folder, "style", "taste").params["kernel"], columns.T)
        found = start(folder, "style")
        assert found.params is None and "2 outputs without names: it starts anew" in found.words


def test_a_folder_without_a_head_needs_no_words(small_backbone):  # noqa: F811
    assert start(small_backbone, "overall") == reward_head.HeadStart()


def test_a_head_that_is_known_in_part_starts_as_said(folder, columns):
    config = joint.get_config()
    config.backbone.path, config.data.dimensions = str(folder), ("style", "overall")
    config.backbone.scan_unroll = 1
    backbone = build.load_backbone_config(config)
    encoder = build_data.make_run_encoder(config, backbone)

    mesh = build.make_mesh(config, backbone, jax.devices()[:1])
    state, _ = build.init_state(config, backbone, mesh, encoder)
    style_D, overall_D = np.asarray(state.trainable["reward_head"]["kernel"]).T
    np.testing.assert_array_equal(overall_D, columns[0])
    assert np.isfinite(style_D).all() and style_D.any()


# Why there is no score

WHOLE = reward_head.HeadStart(True, {"kernel": np.ones((4, 1), np.float32)})
NEW = reward_head.HeadStart()
PART = reward_head.HeadStart(True, {  # a plain export, for a run whose rewards are Gaussians
    "kernel": np.ones((4, 1), np.float32),
    "deviation": {"kernel": np.full((4, 1), np.nan, np.float32)},
})  # fmt: skip
GAUSSIAN = {"loss.gaussian": "log_of_mean"}
TAUGHT = {"preference": 5, "language": 5}


@pytest.mark.parametrize(
    ("config", "fields", "start", "step", "taught", "words"),
    [
        (joint, {}, NEW, 5, TAUGHT, ""),
        (joint, {}, NEW, 0, {}, "no step yet"),
        (joint, {}, WHOLE, 0, {}, ""),
        (generative, {}, NEW, 5, {"language": 5}, "preference_weight is 0"),
        (generative, {}, WHOLE, 5, {"language": 5}, "preference_weight is 0"),
        (joint, {}, NEW, 5, {"preference": 0, "language": 5}, "had a label"),
        (joint, {"loss.teacher_weight": 1.0}, NEW, 5, {"preference": 0, "teacher": 5}, ""),
        (discriminative, {"trainable": ("backbone",)}, NEW, 5, TAUGHT, "config.trainable"),
        (discriminative, {"trainable": ("backbone",)}, WHOLE, 5, TAUGHT, ""),
        (joint, {"optimizer.groups": (("reward_head", 0.0),)}, NEW, 5, TAUGHT, "optimizer.groups"),
        (joint, GAUSSIAN | {"trainable": ("^reward_head/deviation",)}, PART, 5, TAUGHT, ""),
        (joint, GAUSSIAN | {"trainable": ("^reward_head/kernel",)}, PART, 5, TAUGHT, "trainable"),
        (joint, GAUSSIAN | {"optimizer.groups": (("^reward_head/kernel", 0.0),)}, PART, 5, TAUGHT,
         ""),
        (joint, GAUSSIAN | {"trainable": ("^reward_head/deviation",)}, NEW, 5, TAUGHT,
         "reward_head/kernel"),
        (joint, {"lora.rank": 2}, NEW, 5, TAUGHT, ""),
        (joint, {"optimizer.groups": (("reward_head", 10.0),)}, NEW, 5, TAUGHT, ""),
    ],
)
def test_why_a_run_has_no_score(config, fields, start, step, taught, words):
    config = config.get_config()
    config.update_from_flattened_dict(fields)
    found = trained._why_no_score(config, lambda: start, step, taught)
    assert words in found and bool(words) == bool(found)


def test_a_frozen_leaf_is_read_where_the_folder_has_it(folder, columns):
    """Means from a plain export stay; the deviations, which it lacks, are the run's own."""
    config = joint.get_config()
    config.backbone.path, config.data.dimensions = str(folder), ("quality", "overall")
    config.loss.gaussian = "log_of_mean"
    backbone = load_config(folder)
    shapes = build.abstract_params(config, backbone)
    laid = {path: leaf for path, leaf in flatten(trained._here(shapes)).items()}
    paths = frozenset({"reward_head/kernel", "reward_head/deviation/kernel"})
    found = trained._load_frozen(
        config, folder, backbone, paths, None, lambda: build.head_start(config, backbone), laid
    )
    assert flatten(found).keys() == {"reward_head/kernel"}
    np.testing.assert_array_equal(found["reward_head"]["kernel"], columns[::-1].T)


def test_a_run_that_will_never_score_is_told_so_before_it_starts(folder, small_backbone):  # noqa: F811
    fixed = {"trainable": ("backbone",), "data.dimensions": ("overall", "quality")}
    for place, config, warns in (
        (folder, joint, False), (small_backbone, joint, True), (small_backbone, generative, False),
    ):  # fmt: skip
        config = config.get_config()
        config.update_from_flattened_dict(fixed | {"backbone.path": str(place)})
        words = build.head_start(config, load_config(place)).words
        assert ("WARNING" in words and "keep reward_head/kernel" in words) == warns, words


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"score.bias": 1}, {}),  # a classifier of another library
        ({"score.dense.weight": 4, "score.out_proj.weight": 1}, {}),
        ({}, {"reward_head": "linear"}),
        ({}, {"reward_head": {"hidden": 512}}),
        ({}, {"reward_head": {"hidden": ["wide"], "deviation": True}}),
        ({}, {"reward_head": {"deviation": True}}),  # of one row
    ],
)
def test_a_head_of_another_kind_is_refused_or_begun_anew(folder, tmp_path, tensors, said):
    folder = shutil.copytree(folder, tmp_path / "foreign")
    path = folder / "model.safetensors"
    more = {name: np.ones((rows, 8), np.float32) for name, rows in tensors.items()}
    kept = load_file(path)
    save_file(kept | {"score.weight": kept["score.weight"][:1]} | more, path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | said))
    with pytest.raises(UserError, match="start anew with --config.head.anew=True"):
        start(folder, "overall")
    found = start(folder, "overall", anew=True)
    assert found.params is None and "starts anew" in found.words


@pytest.mark.parametrize("text", [
    '{"stamp": {"rubric', "{}", "[]", "\0\0", '{"step": 3}',
])  # fmt: skip
@pytest.mark.parametrize("read", [trained.identify, trained.load_trained])
def test_a_damaged_card_of_an_export_is_one_line(tmp_path, text, read):
    (tmp_path / trained.STAMP).write_text(text)
    with pytest.raises(UserError, match="jrm.json is .*: export the model again, or copy"):
        read(tmp_path)


def test_older_checkpoints_tell_it_by_their_rewards():
    config = joint.get_config()
    assert trained._taught(config, 7, {"reward_mean": 0.5}) == {"preference": 7}
    assert trained._taught(config, 7, {"reward_mean": None}) == {"preference": 0}
    assert trained._taught(config, 7, {"reward_mean": 0.5, "taught": TAUGHT}) == TAUGHT
    config.loss.preference_weight = 0.0
    assert trained._taught(config, 7, {"reward_mean": 0.5}) == {"preference": 0}


def test_what_a_model_learnt_from_in_words():
    words = trained.describe_lessons({"taught": TAUGHT | {"facts": 0}})
    assert words == "the preference loss in 5 steps, the language loss in 5 steps"
    assert "no step" in trained.describe_lessons({"taught": {"preference": 0}})
    assert "unknown" in trained.describe_lessons({})


def test_a_generative_run_is_refused_by_all_that_score(tmp_path, small_backbone):  # noqa: F811
    """As a user trains it, and reads it afterwards."""
    from jrm_jax import evaluate, export, score

    runner = Runner(tmp_path, small_backbone)
    workdir = tmp_path / "run"
    splits = {f"data__world__{split}": 0 for split in ("valid", "test", "hard")}
    done = runner.run(workdir, "generative", total_steps=1, **splits)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    calls = {
        score: [f"--model={workdir}", "--instruction=x", "a.png"],
        export: [f"--checkpoint={workdir}", f"--out={out}"],
        evaluate: [f"--checkpoint={workdir}", "--benchmark=world", f"--out={out}.json"],
    }
    for command, arguments in calls.items():
        with pytest.raises(SystemExit) as caught:
            command.main(arguments)
        assert "its scores would come from random weights" in str(caught.value), command
        assert "\n" not in str(caught.value)
    assert not out.exists()
    found = trained.load_trained(workdir, scores=False)
    rest = {"preference": 0, "words": 0, "facts": 0, "teacher": 0}
    assert found.card["taught"] == {"language": 1, **rest}


# A backbone that cannot speak


def test_a_backbone_without_language_head_trains_and_scores(tmp_path):
    """Untied, its head not among its files; the same run with the head gives the same scores."""
    whole = make_folder(tmp_path, "qwen2_5_vl")
    bare = shutil.copytree(whole, tmp_path / "bare")
    tensors = load_file(bare / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, bare / "model.safetensors")
    group = make_groups(3)[2]
    found = []
    for folder in (whole, bare):
        workdir = start_run(tmp_path, folder, f"{folder.name}-run", discriminative, 1)
        found.append(RewardModel.load(workdir).score(*group))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5)
    out = write(workdir, tmp_path / "out", "--dtype=float32")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    again = RewardModel.load(out)
    np.testing.assert_allclose(again.score(*group), found[0], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="without a language head"):
        again.critique(*group)
    loaded, info = classifier(out, dtype=torch.float32)
    assert not info["missing_keys"]
    np.testing.assert_allclose(next(torch_rewards(loaded, [group])), found[0], rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="missing .*lm_head.weight"):
        start_run(tmp_path, bare, "joint-run")


@pytest.mark.parametrize("text", ["", "[", "3", '[{"candidates": 2}]', "[" * 100_000])
def test_a_run_without_its_buckets_can_be_read(tmp_path, capsys, text):
    encoder, backbone = model_of("qwen3_vl")
    path = tmp_path / buckets.RECORD
    assert trained._ladder_rows(trained._record(tmp_path), path, encoder, backbone) == []
    assert not capsys.readouterr().err  # an older run, which has none
    path.write_text(text)
    assert trained._ladder_rows(trained._record(tmp_path), path, encoder, backbone) == []
    assert f"WARNING: {path}: the record" in capsys.readouterr().err


def model_of(family):
    found = trained.load_trained(family_run(family))
    return found.encoder, found.config


def test_an_export_carries_the_buckets_of_its_training(tmp_path, capsys):
    workdir, out = family_run("qwen3_vl"), tmp_path / "out"
    found = trained.load_trained(workdir)
    assert found.buckets == buckets.read_record(workdir) != ()
    export.export(found, out, "float32", 10**9, check=False)
    assert trained.load_trained(out).buckets == found.buckets
    stamp = out / trained.STAMP
    card = json.loads(stamp.read_text())
    huge = [card["buckets"][0] | {"prompt": 10**9}]
    for rows in ([{"candidates": 2}], huge, None):  # a score needs none: said, and left out
        stamp.write_text(json.dumps(card | {"buckets": rows}))
        capsys.readouterr()
        assert trained.load_trained(out).card["buckets"] == []
        assert f"WARNING: {stamp}: the record" in capsys.readouterr().err
    del card["buckets"]  # older exports have none
    stamp.write_text(json.dumps(card))
    assert trained.load_trained(out).buckets == ()
