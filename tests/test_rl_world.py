"""Edit programs, their pictures and their gold scores, beside the built-in world's own."""

import dataclasses

import numpy as np
import pytest

from jrm_jax.data.world import scenes
from jrm_jax.data.world.draw import draw as draw_scene
from jrm_jax.data.world.vocabulary import QUALITIES
from jrm_jax.rl import drawing, editing, gold, rollout

KNOB = {name: place for place, name in enumerate(editing.OBJECT_KNOBS)}
TONE = {name: place for place, name in enumerate(editing.PICTURE_KNOBS)}


def problem_of(group):
    return editing.Problem(group.source, group.target, group.edits, group.instruction, group.kind)


@pytest.fixture(scope="module")
def attempts():
    """(problem, attempt, program), all flaws of the built-in world among them."""
    found = []
    for split in ("test", "hard"):
        for index in range(60):
            group = scenes.make_contest(split, index, "rl-tests", 8)
            problem = problem_of(group)
            for attempt in group.attempts:
                program = editing.from_scene(problem, attempt.scene)
                if program is not None:
                    if attempt.quality:
                        program.picture_NW[0, TONE[attempt.quality]] = 1
                    found.append((problem, attempt, program))
    assert {a.kind for _, a, _ in found} == set(scenes.CANDIDATE_KINDS)
    assert {a.quality for _, a, _ in found} == {None, *QUALITIES}
    return found


@pytest.fixture(scope="module")
def drawn(attempts):
    problems, _, programs = zip(*attempts, strict=True)
    return drawing.draw(problems, editing.joined(programs), range(len(problems)))


def judge(problem, program, row=0):
    visible = drawing.draw([problem] * len(program.ground_N), program, [0] * len(program.ground_N))
    return gold.judge(problem, program, row, visible.visible_NO[row])


def perfect(problem):
    return editing.from_scene(problem, problem.target)


def test_a_program_makes_the_scene_it_was_made_from(attempts):
    for problem, attempt, program in attempts:
        made = editing.to_scene(problem, program, 0)
        looks = [sorted((t.colour, t.shape, t.size, t.cell) for t in s.things)
                 for s in (made, attempt.scene)]  # fmt: skip
        assert looks[0] == looks[1] and made.background == attempt.scene.background


def test_without_knobs_pictures_are_the_built_in_worlds_to_the_bit(attempts, drawn):
    compared = 0
    for (problem, attempt, _), picture in zip(attempts, drawn.pictures_NHW3, strict=True):
        if attempt.quality is None:
            keys = {thing.key for thing in problem.source.things}
            things = tuple(  # a new object stands in the middle of its cell here
                t if t.key in keys else dataclasses.replace(t, dx=0, dy=0)
                for t in attempt.scene.things
            )
            scene = dataclasses.replace(attempt.scene, things=things)
            assert (draw_scene(scene) == picture).all()
            compared += 1
    assert compared > 500


def test_gold_is_the_built_in_worlds_on_all_its_flaws(attempts, drawn):
    """Following is not rounded to whole points here."""
    for (problem, attempt, program), visible in zip(attempts, drawn.visible_NO, strict=True):
        mine, old = gold.judge(problem, program, 0, visible), attempt.gold
        assert mine.following == pytest.approx(np.mean([*old.credits.values()]))
        assert mine.preservation == pytest.approx(old.preservation)
        assert abs(100 * mine.overall - old.overall) <= 3 + 1e-9
        assert sum(mine.lost.values()) == pytest.approx(100 - 100 * mine.overall)


def test_gold_is_continuous_and_falls_with_every_knob():
    """From perfect to the end of each knob's range: no steps, and it ends lower."""
    problem = problem_of(scenes.make_group("test", 3, "rl-tests"))
    count = 81
    path = np.linspace(0, 1, count)
    for name, place in [*KNOB.items(), *TONE.items()]:
        for sign in (1, -1):
            program = editing.take(perfect(problem), np.zeros(count, int))
            if name in KNOB:
                program.knobs_NOV[:, :2, place] = sign * path[:, None]
            else:
                program.picture_NW[:, place] = sign * path
            visible = drawing.draw([problem] * count, program, [0] * count).visible_NO
            values = [
                gold.judge(problem, program, row, visible[row]).overall for row in range(count)
            ]
            assert np.abs(np.diff(values)).max() < 0.02, name
            falls = name not in QUALITIES or sign == 1
            assert (values[-1] < 0.97) == falls, name
            assert values[0] == pytest.approx(1.0)


def test_gold_reads_what_the_picture_shows():
    """Two objects that trade everything but their places are a swap; one that is covered is gone;
    a colour in which another is drawn counts as that one."""
    groups = (scenes.make_group("test", index, "rl-tests") for index in range(400))
    problems = [problem_of(group) for group in groups]
    swap = next(p for p in problems if p.kind == "swap")
    program = perfect(swap)
    traded = editing.from_scene(swap, swap.source)
    keys = [thing.key for thing in swap.source.things]
    a, b = keys.index(swap.edits[0].key), keys.index(swap.edits[0].other)
    traded.fields_NOF[0, [a, b], :3] = traded.fields_NOF[0, [b, a], :3]
    assert judge(swap, traded).overall == pytest.approx(judge(swap, program).overall)

    remove = next(p for p in problems if p.kind == "remove" and len(p.source.things) == 3)
    covered = editing.from_scene(remove, remove.source)
    slot = [t.key for t in remove.source.things].index(remove.edits[0].key)
    cell, square, large = remove.source.things[slot].cell, 1, 2
    covered.present_NO[0, editing.OLD] = 1
    covered.fields_NOF[0, slot, 2] = 0
    covered.fields_NOF[0, editing.OLD, 1:] = square, large, cell
    found = judge(remove, covered)
    assert found.following == 10 and found.lost == {"unasked object": pytest.approx(12.0)}

    recolour = next(p for p in problems if p.kind == "recolour" and p.edits[0].value == "orange"
                    or p.kind == "recolour" and p.edits[0].value == "red")  # fmt: skip
    slot = [t.key for t in recolour.source.things].index(recolour.edits[0].key)
    other = {"orange": "yellow", "red": "orange"}[recolour.edits[0].value]
    near = perfect(recolour)
    near.fields_NOF[0, slot, 0] = editing.FIELDS["colour"].index(other)
    far = judge(recolour, near).following
    gap = np.subtract(*(gold.COLOURS[c] for c in (recolour.edits[0].value, other)))
    near.knobs_NOV[0, slot, :3] = np.clip(gap / 60, -1, 1)
    assert judge(recolour, near).following > far


def test_noise_is_the_seeds(attempts):
    problem, _, program = attempts[0]
    program.picture_NW[0, TONE["noisy"]] = 1
    pictures = [drawing.draw([problem], program, [seed]).pictures_NHW3 for seed in (1, 1, 2)]
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != pictures[2]).any()


def test_no_two_dice_share_their_noise():
    """Neither two policy seeds, nor two purposes, iterations or splits."""
    dice = [
        rollout.Dice(seed, what, number)
        for seed in (0, 1)
        for number in (0, 1, 999, 10**6)
        for what in (rollout.TRAIN, rollout.EVALUATE, rollout.SETTLE, rollout.BEST)
    ]
    seeds = {noise for die in dice for noise in (die.noise(rollout.NOISES)[0::9999])}
    assert len(seeds) == 2 * len(dice)


def test_a_scene_of_too_many_new_objects_has_no_program():
    problem = problem_of(scenes.make_group("test", 0, "rl-tests"))
    free = problem.source.free_cells()
    new = [
        dataclasses.replace(problem.source.things[0], key=500 + n, cell=free[n]) for n in range(3)
    ]
    scene = dataclasses.replace(problem.source, things=(*problem.source.things, *new))
    assert editing.from_scene(problem, scene) is None
