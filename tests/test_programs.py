"""Few programs: the ladder of single calls, what it holds, and what happens where it ends."""

import dataclasses

import numpy as np
import pytest
from export_case import FAMILIES, family_run

from jrm_jax.data.buckets import Bucket, as_table
from jrm_jax.data.encode import PartSizes
from jrm_jax.data.processor import Processor
from jrm_jax.data.schema import Candidate, Image, Text
from jrm_jax.errors import UserError
from jrm_jax.serving import ladder, rows
from jrm_jax.serving.groups import read_picture
from jrm_jax.serving.programs import LIMIT, Program, Programs, Work
from jrm_jax.serving.trained import load_trained

PROCESSOR = Processor(patch=16, merge=2, min_pixels=4096, max_pixels=64 * 1024)
LADDER = tuple(Bucket(k, k + 1, 256, 256, 96, 0) for k in (2, 4, 8))


def slots(sizes_m6):
    k, i, n, p, c, _ = np.asarray(sizes_m6, np.int64).T
    return p + k * c + i * n


def programs(limit=8):
    return Programs(LADDER, slots, PROCESSOR, limit)


def a_need(rng):
    k = int(rng.integers(1, 9))
    images, visual = k + int(rng.integers(0, 5)), int(rng.integers(4, 65))
    return Bucket(k, images, 4 * visual, 60 + int(rng.integers(0, 900)), 20 + 2 * visual, 0)


@pytest.fixture(scope="module", params=FAMILIES)
def encoder(request):
    return load_trained(family_run(request.param)).encoder


def total(*buckets):
    return int(slots(as_table(buckets)).sum())


def a_group(encoder, rng, sources, candidates):
    def picture():
        sides = rng.integers(40, 200, 2)
        return Image(read_picture(rng.integers(0, 256, (*sides, 3), np.uint8)))

    prompt = [Text("Make it red."), *(picture() for _ in range(sources))]
    return encoder.encode_group(prompt, [Candidate((picture(),)) for _ in range(candidates)])


def test_the_ladder_is_short_and_holds_what_is_expected(encoder):
    rungs = ladder.make_ladder(encoder, slots)
    assert len(set(rungs)) == len(rungs) <= LIMIT - 1
    assert list(rungs) == sorted(rungs, key=total)
    for count in (1, 2, 3, 8):
        need = rows.need_of(a_group(encoder, np.random.default_rng(0), 1, count))
        rung = ladder.rung_of(need, rungs, slots, encoder.processor)
        assert rung in rungs and ladder.holds(rung, need)
        assert rung == min((r for r in rungs if ladder.holds(r, need)), key=total)


def test_short_instructions_do_not_pay_for_long_ones(encoder):
    rungs, found = ladder.make_ladder(encoder, slots), []
    for seed in range(8):
        need = rows.need_of(a_group(encoder, np.random.default_rng(seed), 1, 2))
        found.append((need, ladder.rung_of(need, rungs, slots, encoder.processor)))
    needed, taken = (total(*each) for each in zip(*found, strict=True))
    assert taken < 1.5 * needed
    # less than with rungs for 128 tokens of text alone
    long = [dataclasses.replace(need, prompt=need.prompt + 120) for need, _ in found]
    assert taken < total(*long)


def test_what_a_model_was_trained_on_has_its_rungs(encoder):
    plain = ladder.make_ladder(encoder, slots)
    need = rows.need_of(a_group(encoder, np.random.default_rng(0), 2, 4))
    lived = dataclasses.replace(need, prompt=-(-need.prompt // 8) * 8, candidate=400, critique=300)
    rungs = ladder.make_ladder(encoder, slots, [lived])
    found = ladder.cheapest(need, rungs, slots)
    assert total(found) <= 1.1 * total(need) < total(ladder.cheapest(need, plain, slots)) / 1.1
    assert len(rungs) <= LIMIT - 1
    for odd in ([Bucket(2, 0, 0, 40, 20, 0)], [Bucket(1, 1, 4, 0, 4, 0)], [lived] * 20):
        assert len(ladder.make_ladder(encoder, slots, odd)) <= LIMIT - 1
    on_tpu = ladder.make_ladder(encoder, slots, [lived], 128)
    assert not any(size % 128 for b in on_tpu for size in (b.patches, b.prompt, b.candidate))


@pytest.mark.parametrize("warmed", [0, 3, LIMIT])
@pytest.mark.parametrize("limit", [LIMIT, 12])
def test_the_same_group_meets_the_same_program_whatever_came_before(encoder, limit, warmed):
    rungs, rng = ladder.make_ladder(encoder, slots), np.random.default_rng(0)
    groups = [a_group(encoder, rng, *rng.integers(1, (3, 9))) for _ in range(30)]
    needs = [rows.need_of(group) for group in groups]
    usual = [need for need in needs if holds(need, rungs)]
    # each rung's own size, and prompts that no rung holds, ever longer ones
    usual += [rung for rung in rungs if ladder.cheapest(rung, rungs, slots) == rung]
    odd = [need for need in needs if need not in usual]
    odd += [dataclasses.replace(usual[0], prompt=words) for words in (1500, 2000, 3000, 6000, 9000)]
    for order in (usual + odd, odd + usual, odd[::-1] + usual[::-1], [*odd[:2], *usual, *odd[2:]]):
        shelf = Programs(rungs, slots, encoder.processor, limit)
        for rung in rungs[: min(warmed, shelf.spare)]:
            shelf.take(Program(rung, 8))
        met = {}
        for need in order:
            try:
                met[need] = shelf.choose(need, [8])
                assert ladder.holds(met[need].bucket, need)
            except UserError:
                assert need in odd
        for need in usual:
            assert met[need] == (ladder.cheapest(need, rungs, slots), 8)
        assert len(shelf.taken) <= limit


@pytest.mark.parametrize("limit", [2, 3, 4, 8])
def test_what_no_rung_holds_leaves_the_rungs_their_places(limit):
    shelf = programs(limit)
    for words in (500, 900, 700, 300, 100):
        shelf.choose(Bucket(2, 3, 256, 256 + words, 80, 0), [8])
    asked = LADDER[::-1][: limit - 1]
    assert [shelf.choose(rung, [8]).bucket for rung in asked] == list(asked)
    assert len(shelf.taken) <= limit


def holds(need, rungs):
    return ladder.cheapest(need, rungs, slots) is not None


def test_what_no_rung_holds_is_rounded_up_coarsely():
    found = {
        ladder.rung_of(Bucket(2, 3, 256, words, 80, 0), LADDER, slots, PROCESSOR)
        for words in range(257, 4096)
    }
    assert len(found) <= 8 and all(bucket.prompt > 256 for bucket in found)


def test_never_more_programs_than_allowed_and_each_holds_what_it_is_for():
    rng = np.random.default_rng(0)
    for limit in (1, 2, 8):
        shelf, refused = programs(limit), 0
        for _ in range(400):
            need, rows = a_need(rng), [[1, 8], [8, 1]][rng.integers(2)]
            try:
                bucket, count = shelf.choose(need, rows)
            except UserError as error:
                refused += 1
                assert "larger number of `programs`" in str(error)
                continue
            assert ladder.holds(bucket, need) and count in rows
            assert (bucket, count) in shelf.taken
        assert len(shelf.taken) <= limit
        assert refused < 20 if limit == 8 else True


def test_a_program_does_not_change_while_there_is_room():
    shelf, rng = programs(1000), np.random.default_rng(1)
    needs = [a_need(rng) for _ in range(50)]
    first = [shelf.choose(need, [8]) for need in needs]
    assert [shelf.choose(need, [8]) for need in needs[::-1]] == first[::-1]


def test_the_last_program_is_wide():
    shelf = programs(1)
    (bucket, _) = shelf.choose(Bucket(1, 2, 64, 100, 30, 0), [1])
    assert bucket.candidates == 8 and bucket.prompt >= 200 and bucket.images >= 9
    with pytest.raises(UserError, match="number 2, and 1 are allowed"):
        shelf.choose(dataclasses.replace(bucket, prompt=bucket.prompt + 1), [1])
    with pytest.raises(UserError, match="at least 1"):
        programs(0)


@pytest.mark.parametrize("limit, warmed", [(6, 5), (8, 7), (12, 9)])
def test_what_is_compiled_ahead_leaves_room_for_all_that_comes(limit, warmed):
    rungs = [
        Bucket(k, k + 1, patches, 128 + patches // 4, 16 + patches // 4, 0)
        for patches in (64, 256, 1024) for k in (2, 4, 8)
    ]  # fmt: skip
    shelf = Programs(rungs, slots, PROCESSOR, limit)
    for rung in rungs[: shelf.spare]:
        shelf.take(Program(rung, 8))
    assert len(shelf.taken) == warmed
    for words in (500, 700, 1500):  # odd groups of small pictures and long texts come first
        shelf.choose(Bucket(1, 2, 64, words, 32, 0), [8])
    for sources in range(1, 9):
        need = Bucket(8, 8 + sources, 1024, 128 + sources * 256, 272, 0)
        assert ladder.holds(shelf.choose(need, [8]).bucket, need)
    assert len(shelf.taken) <= limit


def test_a_group_is_cut_into_rows_of_about_equal_size(encoder):
    group = a_group(encoder, np.random.default_rng(0), 2, 19)
    parts = rows.split(group, 8)
    assert [len(part.candidates) for part in parts] == [6, 6, 7]
    first = 0
    for part in parts:
        assert len(part.images) == 2 + len(part.candidates)
        for row, whole in zip(part.candidates, group.candidates[first:], strict=False):
            ((slot, image, slots_t),) = row.visual
            ((slot_before, image_before, slots_before),) = whole.visual
            assert (row.tokens, slot) == (whole.tokens, slot_before)
            np.testing.assert_array_equal(slots_t, slots_before)
            np.testing.assert_array_equal(part.images[image][0], group.images[image_before][0])
        assert part.preference.shape[:2] == (len(part.candidates),) * 2
        first += len(part.candidates)
    assert rows.split(parts[0], 8) == [parts[0]]


def test_the_padded_share_counts_empty_rows_too():
    work = Work()
    assert work.padded == 0
    work.add(Program(LADDER[0], 4), [LADDER[0]] * 3, slots)
    assert (work.rows, work.padded) == (3, 0.25)


def sizes_of(prompt, own):
    """Texts alone: lengths of a prompt and of its candidates."""
    return rows.needs_from([PartSizes((), length) for length in (prompt, *own)])


def test_a_set_gets_the_programs_that_it_is_worth():
    rng = np.random.default_rng(0)
    alike = [sizes_of(int(rng.integers(40, 60)), [30] * 4) for _ in range(200)]
    shelf = programs()
    assert not shelf.settle(alike, 8) and 1 <= len(shelf.taken) <= 3
    before = shelf.taken
    assert not shelf.settle(alike[::-1][:64], 8) and shelf.taken == before  # they are there
    few = programs()
    few.settle(alike[:16], 8)
    assert len(few.taken) == 1  # more would take longer to compile than they save


def test_small_sets_one_after_another_share_their_programs():
    rng, shelf = np.random.default_rng(0), programs()
    for _ in range(100):
        needs = [sizes_of(int(n), [30, 30, 30]) for n in rng.lognormal(4, 0.4, 16)]
        shelf.settle(needs, 8)
        for need in needs:
            shelf.fit(need.together, (8, 1))
    assert len(shelf.taken) <= 5


@pytest.mark.parametrize("limit", [1, 2, 3, 8])
def test_a_set_goes_where_it_went_before(limit):
    rng, shelf = np.random.default_rng(0), programs(limit)
    for _ in range(3):
        needs = [sizes_of(int(n), [30, 20]) for n in rng.integers(30, 90, 12)]
        ways = [shelf.settle(needs, 8)]
        rows_of = (lambda need: need.apart) if ways[0] else (lambda need: [need.together])
        first = [shelf.fit(row, (8, 1)) for need in needs for row in rows_of(need)]
        ways.append(shelf.settle(needs, 8))
        assert ways[0] == ways[1]
        assert first == [shelf.fit(row, (8, 1)) for need in needs for row in rows_of(need)]


def test_prompts_and_candidates_of_all_lengths_are_laid_apart():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(4, 1, (400, 3)).astype(int) + 1
    needs = [sizes_of(first, own) for first, *own in lengths.tolist()]
    shelf, work = programs(), Work()
    assert shelf.settle(needs, 8) and len(shelf.taken) <= 7
    for need in needs:
        for row in need.apart:
            work.add(Program(shelf.fit(row, (8, 1)).bucket, 1), [row], slots)
    assert work.padded < 0.3
