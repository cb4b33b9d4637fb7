"""The buckets of a run: chosen with its length in mind, kept, and how full they are."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from configs import joint
from jrm_jax.data import sizes as sizes_module
from jrm_jax.data.buckets import Bucket, needs
from jrm_jax.data.plan import Plan, Source
from jrm_jax.data.processor import Processor
from jrm_jax.data.sizes import Sizes
from jrm_jax.errors import UserError
from jrm_jax.run import buckets

SMALL, LARGE = [2, 3, 16, 20, 10, 15, 6, 40, 18, 26], [4, 5, 16, 40, 20, 30, 10, 60, 70, 100]


def sources(*rows):
    return {"train": [Source(Sizes.from_rows(rows))]}


def slots(sizes_m6):
    k, i, n, p, c, _ = sizes_m6.T
    return p + k * c + i * n


@pytest.fixture
def config():
    config = joint.get_config()
    config.batch_size, config.total_steps = 4, 100_000
    return config


@pytest.fixture
def choose(config, tmp_path, monkeypatch):
    """`choose(sources, **fields of config)`; its folder starts empty."""
    monkeypatch.setattr(sizes_module.user_cache, "folder", lambda name: tmp_path / "cache")

    def call(found, language=True, **fields):
        own = config.copy_and_resolve_references()
        own.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
        return buckets.choose(own, found, slots, language=language, merge=2, folder=tmp_path)

    return call


def test_a_short_run_compiles_less(choose):
    found = sources(*[SMALL] * 40, *[LARGE] * 40)
    assert len(choose(found)) == 2
    assert len(choose(found, total_steps=40)) == 1
    assert len(choose(found, data__programs=1)) == 1
    # saved: about a third of the whole; a program costs COMPILE_STEPS steps
    assert len(choose(found, total_steps=8 * buckets.COMPILE_STEPS)) == 2


def test_what_is_seen_often_decides(choose):
    """Three sizes, two buckets: what is seen more often of the two smaller ones has no padding."""
    middle = [3, 4, *SMALL[2:]]
    for of_small, of_middle, least in ((100.0, 1.0, 2), (1.0, 100.0, 3)):
        parts = ((SMALL, of_small), (middle, of_middle), (LARGE, 50.0))
        found = {"train": [Source(Sizes.from_rows([row] * 40), weight) for row, weight in parts]}
        assert [bucket.candidates for bucket in choose(found, data__programs=2)] == [least, 4]
    # a split that is only read counts less than one that is trained on
    read = sources(*[LARGE] * 40) | {"test": [Source(Sizes.from_rows([SMALL] * 40))]}
    assert len(choose(read, total_steps=200)) == 1
    assert len(choose(sources(*[SMALL] * 40, *[LARGE] * 40), total_steps=200)) == 2


def test_reading_has_fewer_programs_where_padding_costs_less(config):
    few, many = (Source(Sizes.from_rows(rows)) for rows in ([SMALL] * 8, [SMALL] * 20_000))
    both = (Bucket(2, 3, 16, 24, 16, 8), Bucket(4, 5, 16, 40, 32, 16))

    def read(sources, **fields):
        own = config.copy_and_resolve_references()
        own.update_from_flattened_dict(fields)
        return buckets.for_reading(own, both, sources, slots, language=True)

    train = sources(*[LARGE] * 400)
    assert read(train) == both[1:] or read(train) == both[:1]  # nothing is read
    config.eval_interval = 10_000
    assert read(train | {"valid": [few], "test": [Source(Sizes.from_rows([LARGE]))]}) == both[1:]
    assert read(train | {"valid": [few], "test": [many]}) == both[:1]  # none needs the larger one
    large = Source(Sizes.from_rows([LARGE] * 4))
    assert read(train | {"test": [many, large]}) == both
    assert read(train | {"test": [few, large]}) == both[1:]
    # often is as much as many
    assert read(train | {"valid": [few, large]}, eval_interval=1) == both
    # classes that were asked for stay
    assert read(train | {"test": [few, large]}, **{"data.candidate_cuts": (2, 4)}) == both


def test_all_splits_and_only_what_is_kept_are_held(choose):
    sizes = Sizes.from_rows([SMALL] * 20 + [LARGE])
    found = {"train": [Source(sizes, kept=np.arange(20))]}
    (one,) = choose(found)
    assert one.candidates == 2
    found["test"] = [Source(Sizes.from_rows([LARGE]))]
    assert buckets.hold_all(choose(found), found, True)
    assert not buckets.hold_all([one], found, True)


def test_a_choice_is_kept_beside_the_data(choose, tmp_path, monkeypatch):
    found = sources(*[SMALL] * 40, *[LARGE] * 40)
    first = choose(found)
    assert len(list(tmp_path.glob("buckets-*.json"))) == 1
    calls, real = [], buckets.choose_buckets

    def counted(*arguments, **fields):
        calls.append(fields)
        return real(*arguments, **fields)

    monkeypatch.setattr(buckets, "choose_buckets", counted)
    assert choose(found) == first and not calls
    # all that it depends on
    choose(found, data__round_to=16)
    choose(found, total_steps=40)
    choose(found, language=False)
    choose(sources(*[SMALL] * 41, *[LARGE] * 40))
    assert len(calls) == 4
    for file in tmp_path.glob("buckets-*.json"):
        file.write_text("half a fi")
    assert choose(found) == first and len(calls) == 5


def test_classes_where_the_config_asks_for_them(choose):
    found = sources(*[SMALL] * 40, *[LARGE] * 40)
    for language in (True, False):  # the study's arms: the same examples in a bucket
        small, large = choose(found, language, data__candidate_cuts=(3, 4), total_steps=1)
        assert small.candidates == 2 and large.candidates == 4
        assert small.critique == (8 if language else 0)


# sizes that no group has, and that are no numbers
HUGE = buckets.as_text([Bucket(2, 3, 16, 10**30, 16, 8)])
TEXT = buckets.as_text([Bucket(2, 3, 16, 24, 16, 8)]).replace("16", '"16"')


def test_a_run_keeps_its_buckets(tmp_path):
    assert buckets.read_record(tmp_path) is None
    chosen = (Bucket(2, 3, 16, 24, 16, 8), Bucket(4, 5, 16, 40, 32, 16))
    (tmp_path / buckets.RECORD).write_text(buckets.as_text(chosen))
    assert buckets.read_record(tmp_path) == chosen
    for damaged in ("", "[", "[{}]", '[{"candidates": 2}]', "3", "null", "[]", TEXT, HUGE):
        (tmp_path / buckets.RECORD).write_text(damaged)
        with pytest.raises(UserError, match=r"buckets.json is damaged: remove it") as raised:
            buckets.read_record(tmp_path)
        assert "\n" not in str(raised.value)


GOOD = {"candidates": 2, "images": 3, "patches": 16, "prompt": 24, "candidate": 16, "critique": 8}


@pytest.mark.parametrize("size", [-1, 2**20 + 1, 10**9, 10**30, 1.0, True, None])
@pytest.mark.parametrize("name", GOOD)
def test_no_group_has_such_sizes(name, size):
    assert buckets.from_rows([GOOD]) == (Bucket(*GOOD.values()),)
    assert buckets.from_rows([GOOD, GOOD | {name: size}]) is None
    zero = buckets.from_rows([GOOD | {name: 0}])
    assert (zero is None) == (name in ("candidates", "prompt", "candidate"))


def test_what_a_model_was_trained_with_is_no_larger_than_it():
    processor = Processor(16, 2, min_pixels=4096, max_pixels=64 * 1024)
    encoder = SimpleNamespace(processor=processor)
    for positions in (4096, 0):
        backbone = SimpleNamespace(text=SimpleNamespace(positions=positions))

        def read(*rows):
            return buckets.of_training(rows, encoder, backbone)  # noqa: B023

        assert len(read(*[GOOD] * 64)) == 64 and read(*[GOOD] * 65) is None
        largest = positions or buckets.LARGEST
        most = dict.fromkeys(GOOD, largest) | {"patches": processor.most_patches}
        assert read(GOOD, most)
        for name in GOOD:
            above = most | {name: most[name] + (129 if name == "patches" else 1)}
            assert read(GOOD, above) is None, name
        assert read({}) is None


def test_no_picture_has_more_patches():
    for least, cap in ((4096, 64 * 1024), (65536, 16 * 1024 * 1024), (3136, 4096)):
        processor = Processor(16, 2, min_pixels=least, max_pixels=cap)
        found = max(
            int(np.prod(processor.grid(short, min(200 * short, long))))
            for short in (*range(1, 66), 100, 301)
            for long in map(int, np.geomspace(short, 200 * short, 200))
        )
        assert found <= processor.most_patches <= 2 * found


def test_shares_by_hand():
    found = sources(SMALL, SMALL, SMALL)["train"]
    bucket = Bucket(2, 3, 16, 24, 16, 8)
    plan = Plan(found, [bucket], 4, 0)  # one row in four is empty
    shares = buckets.real_shares(plan, found, True)
    assert shares == {"decoder": 3 * (20 + 26) / (4 * (24 + 2 * 16)), "tower": 3 * 40 / (4 * 48)}
    assert buckets.real_shares(plan, found, False)["decoder"] == 3 * (20 + 18) / (4 * 56)
    repeated = buckets.real_shares(plan, found, True, share_prompt=False)["decoder"]
    assert repeated == 3 * (2 * 20 + 26) / (4 * 2 * (24 + 16))
    none = dict.fromkeys(("images", "patches", "all_patches"), np.zeros(3, np.int32))
    bare = [Source(dataclasses.replace(found[0].sizes, **none))]
    text = Plan(bare, [dataclasses.replace(bucket, images=0)], 4, 0)
    assert buckets.real_shares(text, bare, True)["tower"] == 1


def test_the_record_is_plain_json():
    assert json.loads(buckets.as_text([Bucket(2, 3, 16, 24, 16, 8)])) == [
        {"candidates": 2, "images": 3, "patches": 16, "prompt": 24, "candidate": 16, "critique": 8}
    ]
    assert needs(Sizes.from_rows([SMALL]), True).tolist() == [[2, 3, 16, 20, 15, 6]]
