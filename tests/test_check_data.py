"""A config against its data: is there something to learn, and are they still the same."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from configs import discriminative, generative, joint
from jrm_jax import build, build_data
from jrm_jax.data import contents, store
from jrm_jax.data.contents import Contents, read_contents
from jrm_jax.data.schema import Candidate, PreferenceExample, Text
from jrm_jax.data.sizes import as_example
from jrm_jax.data.world.scenes import make_example
from jrm_jax.errors import UserError
from jrm_jax.run import check_data, ranking

CONFIGS = {"joint": joint, "discriminative": discriminative, "generative": generative}


def group(number, labelled=("overall",), critique=None, dimensions=("overall",), name=None):
    """Two texts of which the first is better, where labelled."""
    candidates = tuple(Candidate((Text(f"answer {i}"),), critique) for i in range(2))
    preference = np.full((2, 2, len(dimensions)), 0.5, np.float32)
    weight = np.zeros_like(preference)
    for r, dimension in enumerate(dimensions):
        if dimension in labelled:
            preference[0, 1, r], preference[1, 0, r] = 1, 0
            weight[0, 1, r] = weight[1, 0, r] = 1
    prompt = (Text(f"question {number}"),)
    return PreferenceExample(
        name or str(number), prompt, candidates, preference, weight, dimensions
    )


def write(folder, train, dimensions=("overall",), **splits):
    shutil.rmtree(folder, ignore_errors=True)
    store.write_dataset(
        folder, {"train": train, **splits}, dimensions, manifest={"layout": "jsonl"}
    )
    return folder


def read(folder, split="train", **options) -> Contents:
    return read_contents(folder, split, store.open_dataset(folder)[split], **options)


# What a split holds


def test_contents_are_counted_and_kept(tmp_path, monkeypatch):
    both = ("overall", "quality")
    train = [
        group(0, ("overall",), None, both),
        group(1, (), "Fine.", both),
        group(2, both, "", both),
    ]
    folder = write(tmp_path / "set", train, both, valid=train[:1])
    found = read(folder)
    assert found[0] == 3 and found[2:] == ({"overall": 2, "quality": 1}, 1)
    assert read(folder, "valid")[0] == 1
    moved = folder.rename(tmp_path / "moved")
    monkeypatch.setattr(contents, "_count", None)  # it travels with the folder
    assert read(moved) == found


def test_the_digest_is_of_what_is_learnt_from(tmp_path):
    folder = tmp_path / "set"

    def digest(*train):
        return read(write(folder, train)).digest

    first = digest(group(0), group(1))
    assert digest(group(0, name="other name"), group(1)) == first
    others = [
        digest(group(1), group(0)), digest(group(0)), digest(group(0), group(2)),
        digest(group(0), group(1, ())), digest(group(0), group(1, critique="Fine.")),
    ]  # fmt: skip
    assert len({first, *others}) == 6


def test_what_is_kept_elsewhere_is_not_believed_of_another_set(tmp_path, monkeypatch):
    """A folder that cannot be written, and a set of the same number of groups at its place."""
    fallback, beside = tmp_path / "cache", contents.write_cache
    folder = write(tmp_path / "set", [group(0), group(1)])
    monkeypatch.setattr(
        contents, "write_cache", lambda p, w: folder not in p.parents and beside(p, w)
    )
    first = read(folder, fallback=fallback)
    assert not list(folder.glob("contents-*")) and len(list(fallback.rglob("contents-*"))) == 1
    second = read(write(folder, [group(0), group(3)]), fallback=fallback)
    assert second.digest != first.digest


def test_a_damaged_record_is_named(tmp_path):
    folder = write(tmp_path / "set", [group(0)])
    with pytest.raises(UserError, match="record 0 of train is damaged"):
        read_contents(folder, "train", [{"record": b"{", "images": []}])


# Is there something to learn


LABELS, CRITIQUES = Contents(9, "", {"overall": 9}, 0), Contents(9, "", {"overall": 0}, 9)
BOTH, NONE = Contents(9, "", {"overall": 9}, 9), Contents(9, "", {"overall": 0}, 0)


@pytest.mark.parametrize(
    ("name", "train", "refused"),
    [
        ("generative", [LABELS], ("has a critique, ", "configs/discriminative.py")),
        ("generative", [NONE], ("has a critique, ", "nothing else")),
        ("discriminative", [CRITIQUES], ("has a label (", "in overall", "configs/generative.py")),
        ("joint", [NONE], ("has a label (", " or a critique, ")),
        ("joint", [NONE, NONE], ("has a label (", " or a critique, ")),
        ("generative", [LABELS, CRITIQUES], ()),
        ("discriminative", [NONE, LABELS], ()),
        ("joint", [BOTH], ()),
        ("joint", [LABELS, CRITIQUES], ()),
    ],
)
def test_data_that_teach_nothing_are_refused(name, train, refused):
    config = CONFIGS[name].get_config()
    if not refused:
        assert check_data.check_lessons(config, train, "edits") == []
        return
    with pytest.raises(UserError) as caught:
        check_data.check_lessons(config, train, "edits")
    for words in ("edits: no training group", *refused):
        assert words in str(caught.value)


def test_a_joint_run_says_which_half_learns_nothing():
    config = joint.get_config()
    (words,) = check_data.check_lessons(config, [CRITIQUES], "edits")
    assert "no labels: the reward head is not trained" in words
    (words,) = check_data.check_lessons(config, [LABELS], "edits")
    assert "no critiques" in words
    config.loss.language_weight, config.loss.words_weight = 0.0, 1.0  # also read critiques
    (words,) = check_data.check_lessons(config, [LABELS], "edits")
    assert "no critiques" in words


def test_a_dimension_without_labels_is_refused():
    config = discriminative.get_config()
    config.data.dimensions = ("overall", "quality")
    with pytest.raises(
        UserError, match=r"in quality, so .* stay random.*dimensions=.?\('overall',\)"
    ):
        check_data.check_lessons(config, [LABELS], "edits")


def build_from(folder, config):
    said = []
    config.data.path = str(folder)
    config.data.rubric = ""
    data = build_data.build_data(config, build.load_backbone_config(config), said.append)
    return data, said


def test_a_run_says_what_is_missing_before_it_starts(tmp_path):
    both = ("overall", "quality")
    groups = [group(i, both, None, both) for i in range(4)]
    folder = write(tmp_path / "edits", groups, both)
    _, said = build_from(folder, discriminative.get_config())
    assert len(said) == 2
    assert "those in quality are not used" in said[0]
    assert """--config.data.dimensions="('overall', 'quality')""" in said[0]
    assert "no split 'valid'" in said[1] and "jrm_jax.data.builders jsonl" in said[1]
    assert f"--split=valid --out={folder}" in said[1]
    write(folder, groups, both, valid=groups[:1])
    config = discriminative.get_config()
    config.data.dimensions = both
    assert build_from(folder, config)[1] == []
    with pytest.raises(UserError, match="no training group has a critique"):
        build_from(folder, generative.get_config())


SAYS = {"language_weight": 1.0, "teacher_weight": 0.5}


@pytest.mark.parametrize(
    "changes, line, metric, words",
    [
        ({}, "overall 5", "pair_accuracy", "no checkpoint is better than another"),
        ({"language_weight": 1.0}, "overall 5", "-language", "with the least language loss there"),
        (SAYS, "overall 5", "-teacher", "with the least teacher loss there"),
        (SAYS, "Fine.", "-language", "with the least language loss there"),
        (SAYS, None, "pair_accuracy", "no checkpoint is better than another"),
    ],
)
def test_without_labels_in_valid_another_loss_ranks_checkpoints(
    tmp_path, changes, line, metric, words
):
    """One of those for which it holds something."""
    rows = [stating(i, 0, 25) for i in range(4)]
    candidates = tuple(Candidate(c.parts, line, bool(line)) for c in rows[0].candidates)
    bare = dataclasses.replace(rows[0], candidates=candidates, weight=np.zeros_like(rows[0].weight))
    config = discriminative.get_config()
    config.loss.update({"teacher_scale": 0.0, **changes})
    data, said = build_from(write(tmp_path / "edits", rows, valid=[bare]), config)
    assert ranking.best_metric(config, data.measured) == metric
    (told,) = (line for line in said if "no group of split 'valid' has a label in overall" in line)
    assert words in told
    data, said = build_from(write(tmp_path / "judged", rows, valid=[bare, rows[0]]), config)
    assert ranking.best_metric(config, data.measured) == "pair_accuracy"
    assert not [line for line in said if "valid" in line]
    config.best_metric = "-centering"
    assert ranking.best_metric(config, ()) == "-centering"


def test_critiques_that_see_the_reward_token_alone_need_pictures_last(tmp_path):
    config = joint.get_config()
    config.loss.through_reward = True
    folder = write(tmp_path / "texts", [group(i, critique="Fine.") for i in range(4)])
    with pytest.raises(UserError, match="texts/train: .* that of '0' ends with text"):
        build_from(folder, config)
    example = make_example("train", 0, 0)
    check_data.check_example(config, example, "world")
    turned = dataclasses.replace(example, prompt=example.prompt[::-1])
    with pytest.raises(UserError, match="needs prompts that end with a picture"):
        check_data.check_example(config, turned, "world")
    config.loss.language_weight = 0.0  # nothing is written
    check_data.check_example(config, turned, "world")


def test_two_sets_of_one_name_have_a_scale_together(tmp_path):
    config = joint.get_config()
    config.loss.teacher_weight, config.loss.teacher_scale, config.data.rubric = 0.33, 0.0, ""
    folders = [
        write(tmp_path / one / "edits", [stating(i, 0, span) for i in range(4)])
        for one, span in (("a", 100), ("b", 10))
    ]
    config.data.mixture = tuple((str(folder), 1.0) for folder in folders)
    data = build_data.build_data(config, build.load_backbone_config(config), print)
    assert data.encoder.teacher_scale == pytest.approx((10.0,))


def test_a_set_that_is_seen_no_times_teaches_nothing(tmp_path):
    labelled = write(tmp_path / "a", [group(0)])
    said = write(tmp_path / "b", [group(1, (), "Fine.")])
    config = discriminative.get_config()
    config.data.mixture = ((str(labelled), 0.0), (str(said), 1.0))
    with pytest.raises(UserError, match="no training group has a label"):
        build_data.build_data(config, build.load_backbone_config(config), print)


def stating(number, *scores):
    """A labelled pair whose critiques end with scores."""
    one = group(number)
    candidates = [
        Candidate(c.parts, f"So.\noverall {score}", score_line=True)
        for c, score in zip(one.candidates, scores, strict=True)
    ]
    return dataclasses.replace(one, candidates=tuple(candidates))


def test_stated_scores_are_fed_in_nats_of_a_tenth_of_their_span(tmp_path):
    """Of 25 points 2.5 count one nat, where the scale is to be found; the same in other splits."""
    rows = [stating(i, 0, 25) for i in range(4)]
    folder = write(tmp_path / "edits", rows, valid=[stating(9, 5, 10)])
    config = joint.get_config()
    config.loss.teacher_weight, config.loss.teacher_scale = 0.33, 0.0
    data, said = build_from(folder, config)
    assert said == ["stated scores: points that count one nat: overall 2.5"]
    for sets, nats in ((data.train_sets, [0, 10]), (data.eval_sets["valid"], [2, 4])):
        row = data.encoder.encode_example(as_example(sets[0][0]))
        assert row.teacher[:, 0].tolist() == nats
    config.loss.teacher_scale = 5.0
    data, said = build_from(folder, config)
    row = data.encoder.encode_example(as_example(data.train_sets[0][0]))
    assert row.teacher[:, 0].tolist() == [0, 5] and said == []
    bare = write(tmp_path / "bare", [group(i) for i in range(4)])
    _, said = build_from(bare, config)  # without critiques its records are not read for scores
    assert "no critiques" in said[0] and not [*bare.glob("stated-*")]
    assert [*folder.glob("stated-*")]
    write(tmp_path / "more", [stating(i, 0, 1000) for i in range(4)])
    with pytest.raises(UserError, match="more/train: scores for overall .* lie 1000 points apart"):
        build_from(tmp_path / "more", config)


# Are they still the same


def stamp(**splits) -> dict:
    held = {split: Contents(groups, digest, {}, 0) for split, (groups, digest) in splits.items()}
    made = {"rubric": "Judge.", "data": contents.stamp(["edits"], [held])}
    return json.loads(json.dumps(made))  # as a checkpoint has it


def test_what_has_changed_is_said(tmp_path):
    before = stamp(train=(21, "a"), valid=(3, "b"))
    check_data.check_unchanged(tmp_path, before, before)
    check_data.check_unchanged(
        tmp_path, before, stamp(train=(21, "a"), valid=(3, "b"), test=(1, ""))
    )
    for now, words in (
        (stamp(train=(22, "c"), valid=(3, "b")), "edits/train had 21 groups, has 22;"),
        (stamp(train=(21, "c"), valid=(3, "b")), "edits/train has 21 groups as before, but others"),
        (stamp(train=(21, "a")), "edits/valid had 3 groups and is gone"),
        (stamp(train=(20, "a"), valid=(3, "x")), "has 20; edits/valid has 3 groups as before"),
    ):
        with pytest.raises(UserError) as caught:
            check_data.check_unchanged(tmp_path, before, now)
        assert words in str(caught.value) and "put the old ones back" in str(caught.value)


def test_a_split_that_only_some_sets_had_is_another_by_what_is_added():
    def told(**sets) -> list:
        held = [{split: Contents(9, split, {}, 0) for split in splits} for splits in sets.values()]
        return contents.stamp(list(sets), held)

    before = told(a=("train", "valid"), b=("train",), c=("valid",))
    assert contents.changes(before, before) == ""
    now = told(a=("train", "valid", "test"), b=("train", "hard"), c=("valid", "hard"))
    assert contents.changes(before, now) == ""
    now = told(a=("train", "valid"), b=("train", "valid"), c=("valid", "train"))
    assert contents.changes(before, now) == "b/valid has been added; c/train has been added"


def test_checkpoints_from_before_there_were_digests_go_on(tmp_path):
    now = stamp(train=(21, "a"))
    check_data.check_unchanged(tmp_path, {"rubric": "Judge."}, now)
    with pytest.raises(UserError, match="another protocol: rubric: Other. -> Judge."):
        check_data.check_unchanged(tmp_path, {"rubric": "Other."}, now)


def test_a_split_that_is_added_changes_no_batch_of_a_run(tmp_path):
    """Even where its groups need more room: they get a bucket of their own."""
    both = ("overall", "quality")
    groups = [group(i, both, None, both) for i in range(6)]
    folder, config = write(tmp_path / "edits", groups, both), discriminative.get_config()
    config.data.path, config.data.rubric, config.data.dimensions = str(folder), "", both
    backbone = build.load_backbone_config(config)
    before = build_data.build_data(config, backbone, lambda words: None)
    long = dataclasses.replace(groups[0], prompt=(*groups[0].prompt, Text("and more " * 60)))
    write(folder, groups, both, valid=[long])
    after = build_data.build_data(
        config, backbone, lambda words: None, buckets=before.train_plan.buckets
    )
    assert after.train_plan.buckets == before.train_plan.buckets == before.buckets
    for step in range(before.train_plan.steps_per_epoch):
        batches = (data.train_plan.batch(step) for data in (before, after))
        for one, other in zip(*batches, strict=True):
            np.testing.assert_array_equal(one, other)
    assert after.buckets[: len(before.buckets)] == before.buckets
    assert after.eval_plans["valid"].batch(0)[0] == after.buckets[-1] not in before.buckets
