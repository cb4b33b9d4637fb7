"""Batches that hold equally many groups with labels, whatever stands beside them."""

import pickle

import numpy as np
import pytest
from test_plan import make_sizes

from configs.joint import get_config
from jrm_jax import build_data
from jrm_jax.data import store
from jrm_jax.data.buckets import make_buckets
from jrm_jax.data.contents import find_lessons
from jrm_jax.data.pipeline import HostBatch
from jrm_jax.data.plan import LabelledPlan, Source
from jrm_jax.data.world import scenes
from jrm_jax.data.world.life import Life, make_lifelike
from jrm_jax.errors import UserError
from jrm_jax.run.check_config import check_config

COUNT = 60


def make_plan(labelled, batch, count=4, seed=7, sources=1, critiqued=range(COUNT)):
    sizes = [make_sizes(COUNT, seed=s) for s in range(sources)]
    (bucket,) = make_buckets(sizes, language=True, candidate_cuts=())
    which = ([np.asarray(w, int)] * sources for w in (labelled, critiqued))
    return LabelledPlan([Source(s) for s in sizes], *which, bucket, batch, count, seed)


def test_the_labelled_rows_do_not_depend_on_the_others():
    labelled = list(range(0, COUNT, 5))
    alone, beside = make_plan(labelled, 4), make_plan(labelled, 10)
    seen = []
    for step in range(18):
        few, many = alone.batch(step)[1], beside.batch(step)[1]
        assert len(few) == 4 and len(many) == 10
        assert (many[:4] == few).all() and set(few) <= set(labelled)
        seen += [*few]
    assert {seen.count(i) for i in labelled} == {seen.count(labelled[0])}
    rest = np.concatenate([beside.batch(step)[1][4:] for step in range(10)])
    assert set(rest) == set(range(COUNT))  # critiques of labelled groups, too
    few = make_plan(labelled, 10, critiqued=range(0, COUNT, 3))
    rest = np.concatenate([few.batch(step)[1][4:] for step in range(10)])
    assert set(rest) - {-1} == set(range(0, COUNT, 3))


def test_where_all_have_labels_other_groups_stand_beside():
    plan = make_plan(range(COUNT), 8)
    twice = [len(set(ids)) < len(ids) for ids in (plan.batch(s)[1] for s in range(14))]
    assert sum(twice) < 7


def test_two_data_sets_and_copies():
    plan = make_plan([3, 4, 5, 6], 6, sources=2)
    again = pickle.loads(pickle.dumps(plan))
    for step in range(6):
        ids = plan.batch(step)[1]
        assert all(plan.locate(i)[1] in (3, 4, 5, 6) for i in ids[:4])
        assert (again.batch(step)[1] == ids).all()
    with pytest.raises(UserError, match="mixture is empty"):
        make_plan([], 6)


class Labels:
    """Stands in for an encoder: what `HostBatch` does to labels is asked."""

    def encode_example(self, example):
        return example


def test_labels_beside_do_not_count(monkeypatch):
    from jrm_jax.data import pipeline

    def lay(encoded, bucket, encoder, ids):
        return {"preference_weight": np.stack([e.weight for e in encoded])}

    monkeypatch.setattr(pipeline, "assemble_batch", lay)
    monkeypatch.setattr(pipeline, "as_example", lambda record: record)
    plan = make_plan(range(0, COUNT, 2), 8)
    examples = [scenes.make_example("train", i, 0, pixels=48) for i in range(4)]
    four = next(e for e in examples if len(e.candidates) == 4)
    whole = HostBatch(plan, ([four] * COUNT,), Labels())(0)["preference_weight"]
    assert whole[:4].any(axis=(1, 2, 3)).all() and not whole[4:].any()
    for process in (0, 1):
        half = HostBatch(plan, ([four] * COUNT,), Labels(), process, 2)(0)["preference_weight"]
        assert (half == whole[4 * process : 4 * process + 4]).all()


def test_groups_with_labels_are_found_once(tmp_path):
    life = Life(labelled=0.5, critiqued=0.25)
    made = [scenes.make_example("train", i, 0, pixels=48) for i in range(8)]
    made = [make_lifelike(e, life, i, 0, 8) for i, e in enumerate(made)]
    store.write_dataset(tmp_path / "set", {"train": made}, made[0].dimensions, manifest={})
    records = store.open_dataset(tmp_path / "set")["train"]
    labelled, critiqued = find_lessons(tmp_path / "set", "train", records, ("following",))
    assert labelled.tolist() == np.flatnonzero([e.weight.any() for e in made]).tolist()
    told = [e.candidates[0].critique is not None for e in made]
    assert critiqued.tolist() == np.flatnonzero(told).tolist()
    assert (len(labelled), len(critiqued)) == (4, 2)
    # of other dimensions, too, without reading a record again
    unread = [None] * len(records)
    labelled, again = find_lessons(tmp_path / "set", "train", unread, ("following", "overall"))
    assert len(labelled) == 4 and again.tolist() == critiqued.tolist()
    assert not len(find_lessons(tmp_path / "set", "train", unread, ("beauty",))[0])


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"labelled": 17, "programs": 1}, "allowed is up to config.batch_size, 16"),
        ({"labelled": 8}, "give config.data.programs=1"),
        ({"labelled": 8, "programs": 1, "visual_cuts": (9,)}, "no candidate_cuts or visual_cuts"),
        ({"labelled": -1}, "allowed is a whole number from 0"),
    ],
)
def test_what_a_batch_cannot_hold(fields, words):
    config = get_config()
    config.data.update(fields)
    with pytest.raises(UserError, match=words):
        check_config(config)


@pytest.mark.parametrize(
    "lessons, words",
    [
        (([], [0, 1]), "no training group has a label for the 4 rows"),
        (([0, 1], []), "no training group has a critique for the 12 rows"),
    ],
)
def test_rows_that_nothing_could_fill(lessons, words):
    config = get_config()
    config.data.labelled = 4
    sizes = make_sizes(4)
    buckets = make_buckets([sizes], language=True, candidate_cuts=())
    with pytest.raises(UserError, match=words):
        build_data._train_plan(config, [Source(sizes)], [lessons], buckets, True)


@pytest.mark.parametrize("source", [{"weight": 0.0}, {"kept": np.array([2, 3])}])
def test_labels_that_are_not_trained_on_fill_no_rows(source):
    """Of a set with weight 0, or of groups that are left out because they are too large."""
    config = get_config()
    config.data.labelled = 4
    sizes = make_sizes(4)
    buckets = make_buckets([sizes], language=True, candidate_cuts=())
    sources = [Source(sizes, **source), Source(sizes)]
    lessons = [([0, 1], [2, 3]), ([], [0, 1, 2, 3])]
    with pytest.raises(UserError, match="no training group has a label for the 4 rows"):
        build_data._train_plan(config, sources, lessons, buckets, True)
