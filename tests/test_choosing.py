"""Buckets by cost: few programs, little padding."""

import itertools

import numpy as np
import pytest

from jrm_jax.data.buckets import Bucket, by_cost
from jrm_jax.data.choosing import choose_buckets
from jrm_jax.data.sizes import Sizes
from jrm_jax.errors import UserError
from jrm_jax.model.published import PUBLISHED
from jrm_jax.run.flops import forward_flops, group_cost

COST = group_cost(PUBLISHED["qwen3_vl_2b"])
BATCH = 64


def slots(sizes_m6):
    """A cost that can be checked by hand: decoder slots and patches."""
    k, i, n, p, c, _ = sizes_m6.T
    return p + k * c + i * n


def table(sizes: Sizes) -> np.ndarray:
    return np.stack([sizes.candidates, sizes.images, sizes.patches, sizes.prompt, sizes.answer,
                     sizes.critique], axis=1)  # fmt: skip


def synthetic(count: int, seed: int = 0) -> Sizes:
    """Groups of 2 to 7 edits, each with a picture of 128 to 256 tokens and a critique of 50 to 900;
    instructions around 25 tokens and one of 4,000."""
    rng = np.random.default_rng(seed)
    number = rng.integers(2, 8, count)
    there = np.arange(7) < number[:, None]
    source, own = rng.integers(128, 257, count), rng.integers(128, 257, (count, 7)) * there
    said = rng.integers(50, 901, (count, 7)) * there
    instruction = np.rint(rng.lognormal(np.log(25), 0.5, count)).astype(int)
    instruction[0] = 4000
    own_words, rubric = 13, 80
    rows = [
        number, number + 1, 4 * np.maximum(source, own.max(1)), rubric + instruction + source,
        own_words + own.max(1), own_words + (own + said).max(1) - 1, said.max(1),
        *[0 * number] * 3,  # all together: not asked for here
    ]  # fmt: skip
    return Sizes.from_rows(np.stack(rows, axis=1))


def paid(needs_n6: np.ndarray, buckets, cost=COST) -> np.ndarray:
    """[n]: what each example costs, in the cheapest bucket that holds it."""
    each = cost(np.array([[*vars(bucket).values()] for bucket in buckets]))
    fits = np.stack([bucket.fits(needs_n6) for bucket in buckets])
    return np.where(fits, each[:, None], np.iinfo(np.int64).max).min(axis=0)


def padded(needs_n6: np.ndarray, buckets, cost=COST) -> float:
    """The share of all FLOPs that no example asked for."""
    return 1 - cost(needs_n6).sum(dtype=float) / paid(needs_n6, buckets, cost).sum(dtype=float)


@pytest.fixture(scope="module")
def large():
    return synthetic(100_000)


@pytest.mark.parametrize(("programs", "bar"), [(6, 0.20), (3, 0.35)])
def test_little_of_a_large_mixed_set_is_padding(large, programs, bar):
    needs = table(large)
    buckets = choose_buckets(needs, programs, COST, rows=BATCH)
    assert len(buckets) <= programs and padded(needs, buckets) < bar
    # the others cost no more than they would without the outlier
    others = choose_buckets(needs[1:], programs - 1, COST, rows=BATCH)
    assert paid(needs, buckets)[1:].sum() <= 1.002 * paid(needs[1:], others).sum()


def test_the_same_whatever_the_order_and_however_often():
    needs = table(synthetic(200))
    found = choose_buckets(needs, 3, COST)
    assert found == choose_buckets(needs[::-1], 3, COST)
    assert found == choose_buckets(needs.repeat(2, 0), 3, COST)
    assert found == by_cost(reversed(found), COST)


def best_by_trying(needs, programs):
    """The least cost of all sets of boxes whose sides are sizes that occur."""
    sides = [sorted(set(column)) for column in needs.T]
    boxes = np.array([*itertools.product(*sides)])
    cost, fits = slots(boxes), (needs[None] <= boxes[:, None]).all(2)
    best = np.inf
    for chosen in itertools.combinations(range(len(boxes)), programs):
        total = np.where(fits[list(chosen)], cost[list(chosen), None], np.inf).min(0).sum()
        best = min(best, total)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_no_choice_of_two_is_two_percent_cheaper(seed):
    rng = np.random.default_rng(seed)
    k, p, c = rng.integers([2, 1, 1], [5, 5, 7], (30, 3)).T
    needs = np.stack([k, 0 * k + 1, 0 * k + 8, 8 * p, 8 * c, 0 * k], axis=1)
    found = paid(needs, choose_buckets(needs, 2, slots), slots).sum()
    assert found <= 1.02 * best_by_trying(needs, 2)


def test_boxes_hold_everything_and_are_rounded():
    needs = table(synthetic(500))
    for programs in (1, 2, 5):
        buckets = choose_buckets(needs, programs, COST, round_to=128, round_patches=128)
        assert np.stack([bucket.fits(needs) for bucket in buckets]).any(0).all()
        for b in buckets:
            assert not (b.prompt % 128 or b.candidate % 128 or b.critique % 128 or b.patches % 128)
    (one,) = choose_buckets(needs, 1, COST, round_to=1)
    assert one == Bucket(*map(int, needs.max(0)))


def test_a_bucket_is_made_where_it_saves_enough():
    small, big = [2, 3, 16, 24, 16, 8], [4, 5, 16, 24, 16, 8]
    needs = np.array([small] * 50 + [big] * 50)
    costs = slots(np.array([small, big]))
    saved = 1 - (costs.mean() / costs[1])
    assert len(choose_buckets(needs, 6, slots)) == 2  # no more than there are sizes
    assert len(choose_buckets(needs, 6, slots, worth=0.9 * saved)) == 2
    assert len(choose_buckets(needs, 6, slots, worth=3 * saved)) == 1
    assert len(choose_buckets(needs, 1, slots)) == 1
    # one example alone would cost a whole batch
    lonely = np.array([big] * 50 + [[4, 5, 16, 24, 24, 8]])
    assert len(choose_buckets(lonely, 6, slots, rows=1)) == 2
    assert len(choose_buckets(lonely, 6, slots, rows=64)) == 1
    # what counts often decides
    needs = np.array([[2, 3, 16, 24, c, 8] for c in (16, 24, 80)])
    for weights, between in (([1, 100, 1], 24), ([100, 1, 1], 16)):
        buckets = choose_buckets(needs, 2, slots, weights_n=np.array(weights))
        assert [bucket.candidate for bucket in buckets] == [between, 80]


def test_sizes_beyond_all_reason_do_not_overflow():
    needs = np.array([[2, 3, 16, 24, 16, 8]] * 9 + [[64, 65] + [2**17] * 4])
    buckets = choose_buckets(needs, 3, group_cost(PUBLISHED["qwen3_vl_8b"]), rows=1)
    assert [bucket.candidates for bucket in buckets] == [2, 64]


def test_without_examples():
    with pytest.raises(UserError, match="no examples"):
        choose_buckets(np.zeros((0, 6)), 6, COST)


def test_costs_follow_the_model():
    bucket = Bucket(3, 4, 512, 256, 384, 128)
    for name in ("qwen3_vl_8b", "qwen2_5_vl_7b"):
        backbone = PUBLISHED[name]
        total = sum(map(sum, forward_flops(backbone, bucket).values()))
        rows = np.array([[*vars(bucket).values()]] * 2)
        assert group_cost(backbone)(rows).tolist() == [total, total]
        apart = group_cost(backbone, share_prompt=False)(rows)[0]
        assert apart == group_cost(backbone)(rows + [[0, 0, 0, -256, 256, 0]])[0] > total
