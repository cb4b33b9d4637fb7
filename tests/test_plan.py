"""Sizes, buckets and the seeded plan."""

import collections
import os
import pickle
import stat
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jrm_jax.data import sizes as sizes_module
from jrm_jax.data.buckets import Bucket, assign, make_buckets, needs, select
from jrm_jax.data.plan import EvalPlan, Plan, Source
from jrm_jax.data.schema import Candidate, PreferenceExample, Text, to_record
from jrm_jax.data.sizes import Sizes, measure
from jrm_jax.errors import UserError


def make_sizes(count, seed=0, largest=4, images=True):
    rng = np.random.default_rng(seed)
    number = rng.integers(2, largest + 1, count)
    candidate = rng.integers(5, 30, count)
    critique = rng.integers(0, 20, count)
    patches = 4 * rng.integers(1, 40, count) if images else np.zeros(count)
    rows = [
        number, (number + 1) * bool(images), patches, rng.integers(5, 50, count), candidate,
        candidate + np.maximum(critique - 1, 0), critique,
    ]  # fmt: skip
    return from_rows(np.stack(rows, axis=1))


def from_rows(rows):
    """Sizes of groups whose candidates and pictures are all as large as the largest."""
    k, i, n, _, candidate, answer, _ = columns = np.asarray(rows, int).reshape(-1, 7).T
    return Sizes.from_rows(np.stack([*columns, i * n, k * candidate, k * answer], axis=1))


def slots(bucket):
    return bucket.decoder_slots + bucket.tower_slots


def make_plan(count=103, batch=8, seed=5, weight=1.0, **kwargs):
    sizes = make_sizes(count)
    buckets = make_buckets([sizes], language=True, visual_cuts=(10,), **kwargs)
    return Plan([Source(sizes, weight)], buckets, batch, seed), sizes, buckets


@pytest.mark.parametrize("language", [True, False])
def test_buckets_hold_their_classes_and_no_more(language):
    train, valid = make_sizes(300), make_sizes(40, seed=1)
    buckets = make_buckets([train, valid], language=language, visual_cuts=(10, 20), round_to=8)
    assert 2 <= len(buckets) <= 6
    for bucket in buckets:
        assert bucket.prompt % 8 == bucket.candidate % 8 == bucket.critique % 8 == 0
        assert bucket.patches % 4 == 0
        assert (bucket.critique > 0) == language
    assert list(buckets) == sorted(buckets, key=slots)
    for sizes in (train, valid):
        table, chosen = needs(sizes, language), assign(sizes, buckets, language)
        for row, index in zip(table, chosen, strict=True):
            fitting = [b for b in buckets if all(row <= np.asarray([*vars(b).values()]))]
            assert buckets[index] in fitting
            assert slots(buckets[index]) == min(map(slots, fitting))
    # the maxima are tight: every bucket's K and N are reached by an example
    both = np.concatenate([needs(train, language), needs(valid, language)])
    for bucket in buckets:
        assert bucket.candidates in both[:, 0] and bucket.patches in both[:, 2]


def test_small_pairs_get_their_own_bucket():
    rows = [[2, 3, 16, 20, 10, 15, 6]] * 5 + [[4, 5, 64, 20, 10, 15, 6]] * 5 + [[3, 4, 64, 20] * 2]
    rows[-1] = [3, 4, 64, 20, 10, 15, 6]
    sizes = from_rows(rows)
    small, large = make_buckets([sizes], language=True)
    assert small == Bucket(2, 3, 16, 24, 16, 8) and large == Bucket(4, 5, 64, 24, 16, 8)
    assert assign(sizes, (small, large), True).tolist() == [0] * 5 + [1] * 6
    (one,) = make_buckets([sizes], language=True, min_examples=7)
    assert one == large
    (wide,) = make_buckets([sizes], language=False, candidate_cuts=(), round_patches=128)
    assert wide == Bucket(4, 5, 128, 24, 16, 0)
    with pytest.raises(UserError, match="multiple of merge"):
        make_buckets([sizes], language=True, round_patches=6)


def test_an_outlier_has_a_bucket_of_its_own():
    row = [2, 3, 16, 40, 10, 15, 6]
    outliers = {3: 9000, 4: 2000}  # by the column that is large: prompt, candidate
    for column, value in outliers.items():
        rows = [list(row) for _ in range(49)] + [list(row)]
        rows[-1][column] = value
        rows[-1][5] = max(rows[-1][4:6])
        sizes = from_rows(rows)
        small, large = make_buckets([sizes], language=True)
        assert small == Bucket(2, 3, 16, 40, 16, 8)
        assert assign(sizes, (small, large), True).tolist() == [0] * 49 + [1]
        assert len(make_buckets([sizes], language=True, min_examples=2)) == 1
    varied = from_rows([[2, 3, 16, 20 + 3 * i, 10, 15, 6] for i in range(50)])
    assert len(make_buckets([varied], language=True)) == 1  # a range is no reason to cut


def test_an_example_without_a_bucket_is_an_error():
    with pytest.raises(UserError, match="1 examples fit no bucket, the first is 1"):
        assign(
            from_rows([[2, 3, 4, 5, 6, 7, 8], [3, 3, 4, 5, 6, 7, 8]]),
            [Bucket(2, 9, 9, 9, 9, 9)],
            True,
        )


def test_oversized_examples_are_counted_and_listed():
    sizes = make_sizes(50)
    caps = Bucket(0, 0, 100, 0, 0, 0)
    large = np.flatnonzero(sizes.patches > 100)
    kept, words = select(sizes, caps, True, True, "train")
    assert sorted([*kept, *large]) == list(range(50)) and len(large)
    assert f"train: {len(large)} of 50 examples are too large (patches up to" in words
    assert str(large[0]) in words
    with pytest.raises(UserError, match="lower the pixel cap.*skip_large=True"):
        select(sizes, caps, True, False, "train")
    for field, cap in (("candidates", 3), ("images", 4), ("prompt", 30), ("candidate", 30)):
        caps = Bucket(**(dict.fromkeys(vars(caps), 0) | {field: cap}))
        kept, words = select(sizes, caps, True, True, "train")
        column = list(vars(caps)).index(field)
        assert (needs(sizes, True)[kept, column] <= cap).all() and 0 < len(kept) < 50
        assert f"({field} up to {needs(sizes, True)[:, column].max()} > {cap})" in words
    with pytest.raises(UserError, match="50 of 50"):
        select(sizes, Bucket(1, 0, 0, 0, 0, 0), True, True, "train")
    assert select(sizes, Bucket(0, 0, 0, 0, 0, 0), True, False, "x")[1] is None
    buckets = make_buckets([sizes], language=True)
    plan = EvalPlan([Source(sizes, kept=kept)], buckets, 4)
    seen = np.concatenate([plan.batch(step)[1] for step in range(len(plan))])
    assert sorted(seen[seen >= 0]) == kept.tolist()


def epoch_of(plan, number):
    length = plan.steps_per_epoch
    return [plan.batch(step) for step in range(number * length, (number + 1) * length)]


def test_an_epoch_holds_every_example_once_and_fillers_weigh_nothing():
    plan, sizes, buckets = make_plan()
    table, home = needs(sizes, True), assign(sizes, buckets, True)
    lengths = set()
    for number in range(3):
        batches = epoch_of(plan, number)
        for bucket, ids in batches:
            assert ids.shape == (8,) and ids.dtype == np.int64 and ids[0] >= 0
            assert bucket.fits(table[ids[ids >= 0]]).all()
        ids = np.array(flat(batches))
        assert sorted(ids[ids >= 0]) == list(range(103))
        assert (ids < 0).sum() < 8 * len(buckets)
        stands = {int(i): buckets.index(bucket) for bucket, batch in batches for i in batch}
        guests = collections.Counter(b for i, b in stands.items() if i >= 0 and home[i] != b)
        assert all(count < 8 for count in guests.values()) and all(
            home[i] <= b for i, b in stands.items() if i >= 0
        )
        for bucket, batch in batches:  # places stay empty only where nothing cheaper fits
            if (batch < 0).any():
                cheaper = [i for i, b in stands.items() if i >= 0 and b < buckets.index(bucket)]
                assert not bucket.fits(table[cheaper]).any()
        lengths.add(len(batches))
    assert len(lengths) == 1
    assert plan.epoch(plan.steps_per_epoch) == 1


def test_one_large_group_among_pairs_comes_once_an_epoch():
    rows = [[2, 3, 16, 20, 10, 15, 6]] * 31 + [[64, 65, 16, 20, 10, 15, 6]]
    sizes = from_rows(rows)
    buckets = make_buckets([sizes], language=True)
    assert len(buckets) == 2
    plan = Plan([Source(sizes)], buckets, 16, 0)
    assert plan.steps_per_epoch == 2
    for number in range(4):
        batches = epoch_of(plan, number)
        assert sorted(flat(batches)) == list(range(32))  # 15 pairs stand beside the large group
    narrow = [Bucket(2, 3, 16, 99, 99, 8), Bucket(64, 65, 16, 24, 16, 8)]  # now nothing fits there
    rows = [[2, 3, 16, 50, 10, 15, 6]] * 31 + rows[31:]
    plan = Plan([Source(from_rows(rows))], narrow, 16, 0)
    ids = np.array(flat(epoch_of(plan, 0)))
    assert plan.steps_per_epoch == 3 and sorted(ids) == [-1] * 16 + list(range(32))
    # several epochs of different members, resumed anywhere
    mixed = Plan([Source(sizes, 0.3)], buckets, 16, 0)
    whole = [mixed.batch(step)[1].tolist() for step in range(30)]
    again = Plan([Source(sizes, 0.3)], buckets, 16, 0)
    assert [again.batch(step)[1].tolist() for step in range(29, -1, -1)] == whole[::-1]


def flat(batches):
    return np.concatenate([ids for _, ids in batches]).tolist()


def test_plan_depends_on_seed_and_step_alone():
    plan, sizes, buckets = make_plan()
    steps = 3 * plan.steps_per_epoch
    whole = [plan.batch(step) for step in range(steps)]
    again = Plan([Source(sizes)], buckets, 8, 5)
    for step in reversed(range(steps)):  # any order, from a copy as a worker has it
        again = pickle.loads(pickle.dumps(again)) if step % 7 == 0 else again
        bucket, ids = again.batch(step)
        assert bucket == whole[step][0] and ids.tolist() == whole[step][1].tolist()
    assert flat(epoch_of(plan, 0)) != flat(epoch_of(plan, 1))
    other = Plan([Source(sizes)], buckets, 8, 6)
    assert flat(epoch_of(plan, 0)) != flat(epoch_of(other, 0))
    first = [bucket for bucket, _ in epoch_of(plan, 0)]
    assert first != sorted(first)  # buckets come mixed


def test_plan_is_the_same_on_every_machine():
    """A frozen sample: changes only where the plan itself is changed, never with NumPy."""
    sizes = from_rows([[2, 3, 4, 8, 8, 8, 8]] * 12)
    plan = Plan([Source(sizes)], [Bucket(2, 3, 4, 8, 8, 8)], 4, 1)
    assert flat(epoch_of(plan, 0)) == [7, 5, 8, 1, 4, 3, 0, 11, 9, 2, 10, 6]


def test_mixture_weights():
    parts = [make_sizes(40), make_sizes(10, seed=1), make_sizes(30, seed=2)]
    buckets = make_buckets(parts, language=True)
    sources = [Source(parts[0], 1), Source(parts[1], 3), Source(parts[2], 0.4)]
    plan = Plan(sources, buckets, 4, 0)
    rotated = collections.Counter()
    step = 0
    for epoch in range(5):
        counts = collections.Counter(plan._members_of(epoch).tolist())
        assert [counts[i] for i in range(40)] == [1] * 40
        assert [counts[i] for i in range(40, 50)] == [3] * 10
        assert sum(counts[i] for i in range(50, 80)) == 12
        rotated.update({i: counts[i] for i in range(50, 80)})
        seen = collections.Counter()
        while plan.epoch(step) == epoch:
            seen.update(plan.batch(step)[1].tolist())
            step += 1
        del seen[-1]  # fillers
        assert seen == counts
    assert [rotated[i] for i in range(50, 80)] == [2] * 30  # 5 epochs of 0.4: all, twice
    thirds = [set(plan._members_of(epoch)) for epoch in (0, 5)]
    assert thirds[0] != thirds[1]  # where the rotation begins again, the order is another
    assert plan.locate(45) == (1, 5) and plan.locate(50) == (2, 0) and plan.locate(0) == (0, 0)
    fresh = Plan(sources, buckets, 4, 0)
    assert fresh.batch(step - 1)[1].tolist() == plan.batch(step - 1)[1].tolist()


def test_threads_that_come_to_new_epochs_together_get_the_same_batches(monkeypatch):
    """Batches are made by several threads; with a fraction an epoch's end is found on the way."""
    parts = [make_sizes(40), make_sizes(30, seed=1)]
    buckets = make_buckets(parts, language=True)
    sources = [Source(parts[0], 1), Source(parts[1], 0.4)]
    alone = Plan(sources, buckets, 4, 0)
    expected = [alone.batch(step)[1].tolist() for step in range(100)]
    length = Plan._length

    def slow(plan, epoch):
        time.sleep(0.005)  # both threads are in here
        return length(plan, epoch)

    monkeypatch.setattr(Plan, "_length", slow)
    shared = Plan(sources, buckets, 4, 0)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda step: shared.batch(step)[1].tolist(), range(100)))
    assert found == expected


@pytest.mark.parametrize("weight", [1, 0.1])
def test_buckets_that_will_be_met_are_those_of_all_batches_to_come(weight):
    """Two groups are large: most windows of an epoch's length that begin inside one have none."""
    rows = [[2, 3, 4, 8, 8, 8, 8]] * 118 + [[2, 3, 40, 80, 8, 8, 8]] * 2
    buckets = [Bucket(2, 3, 4, 8, 8, 8), Bucket(2, 3, 40, 80, 8, 8)]
    plan = Plan([Source(from_rows(rows), weight)], buckets, 4, 3)
    every = [plan.batch(step)[0] for step in range(2000)]
    assert set(every) == set(buckets)
    for start in range(0, 60):
        assert plan.buckets_met(start, 2000) == set(every[start:])
        for stop in (start, start + 1, start + 7):
            assert plan.buckets_met(start, stop) == set(every[start:stop])


def test_epochs_without_members_are_passed_over():
    sizes = make_sizes(3)
    plan = Plan([Source(sizes, 0.2)], make_buckets([sizes], language=True), 2, 0)
    seen = set(np.concatenate([plan.batch(step)[1] for step in range(6)]).tolist())
    assert seen == {-1, 0, 1, 2}


@pytest.mark.parametrize("weights", [(0,), (-1,)])
def test_empty_mixture(weights):
    sizes = make_sizes(5)
    with pytest.raises(UserError, match="mixture is empty"):
        Plan([Source(sizes, w) for w in weights], make_buckets([sizes], language=True), 2, 0)


def test_eval_plan_sees_each_example_once():
    sizes = make_sizes(53)
    buckets = make_buckets([sizes], language=True, visual_cuts=(10,))
    plan = EvalPlan([Source(sizes)], buckets, 8)
    batches = [plan.batch(step) for step in range(len(plan))]
    ids = np.concatenate([ids for _, ids in batches])
    assert all(len(part) == 8 for _, part in batches)
    assert sorted(ids[ids >= 0]) == list(range(53))
    assert (ids == -1).sum() == 8 * len(plan) - 53
    fillers = [(ids < 0).sum() for _, ids in batches]
    assert sum(f > 0 for f in fillers) <= len(buckets)
    assert len(EvalPlan([Source(from_rows([]))], buckets, 8)) == 0


# Measuring


def text_examples(count, words="w"):
    half = np.full((2, 2, 1), 0.5, np.float32)
    return [
        PreferenceExample(
            f"e{i}", (Text(f"{words}{i}"),), (Candidate((Text("x"),)),) * 2, half, 0 * half
        )
        for i in range(count)
    ]


class Meter:
    def __init__(self):
        self.calls = 0

    def __call__(self, example):
        self.calls += 1
        return (2, 0, 0, len(example.prompt[0].text), 3, 4, self.calls, 0, 6, 8)


def test_measuring_is_cached_beside_the_data(tmp_path):
    meter, data = Meter(), [to_record(e) for e in text_examples(20)]
    kwargs = {"name": "train", "folder": tmp_path, "fallback": tmp_path / "elsewhere"}
    first = measure(data, meter, "key", **kwargs)
    assert meter.calls == 20 and first.prompt.tolist()[:2] == [2, 2] and first.prompt[19] == 3
    assert measure(data, meter, "key", **kwargs).rows().tolist() == first.rows().tolist()
    assert meter.calls == 20
    assert len(list(tmp_path.glob("sizes-train-*.npz"))) == 1
    measure(data, meter, "other key", **kwargs)
    assert meter.calls == 40
    measure([to_record(e) for e in text_examples(20, "v")], meter, "key", **kwargs)
    assert meter.calls == 60  # another data set at the same place
    for file in tmp_path.glob("*.npz"):
        file.write_bytes(b"broken")
    assert measure(data, meter, "key", **kwargs).prompt.tolist() == first.prompt.tolist()
    assert meter.calls == 80 and not list(tmp_path.glob("*.tmp"))


def test_measuring_falls_back_where_the_data_cannot_be_written(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    os.chmod(folder, stat.S_IRUSR | stat.S_IXUSR)
    real = sizes_module.disk.write_whole

    def write_whole(path, content):  # root may write anywhere
        if path.parent == folder:
            raise PermissionError(13, "read only")
        real(path, content)

    monkeypatch.setattr(sizes_module.disk, "write_whole", write_whole)
    meter = Meter()
    kwargs = {"name": "train", "folder": folder, "fallback": tmp_path / "cache"}
    for _ in range(2):
        measure(text_examples(5), meter, "key", **kwargs)
    assert meter.calls == 5 and not list(folder.iterdir())
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1


def test_measuring_names_the_broken_example():
    def size_of(example):
        if example.id == "e3":
            raise ValueError("not a readable image")
        return (2, 0, 0, 1, 1, 1, 1, 0, 2, 2)

    with pytest.raises(UserError, match=r"^train: example 3 \(e3\): not a readable image$"):
        measure(text_examples(5), size_of, "key", name="train")
