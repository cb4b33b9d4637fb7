"""The built-in world: determinism, splits, gold scores, honesty of the preferences, words."""

import dataclasses
import hashlib
import io
import itertools
import json
import random
import re

import numpy as np
import pytest
from PIL import Image
from world_case import a_scene

from jrm_jax.data.world import describe, scenes
from jrm_jax.data.world import text as world_text
from jrm_jax.data.world.draw import coverage, degrade, draw, encode_png
from jrm_jax.data.world.edits import Edit, apply, apply_all, changes, compare
from jrm_jax.data.world.vocabulary import (
    COLOURS,
    HELD_OUT_KINDS,
    HELD_OUT_PAIRS,
    QUALITIES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    scene_split,
)

SEED = 11
PLAIN_SPLITS = ("train", "valid", "test")
# Of the pixels and words of a few examples: changes only when the world itself is changed.
GOLDEN = "5ac80a133b1ce73f"


def groups(split, count, seed=SEED):
    return [scenes.make_group(split, index, seed) for index in range(count)]


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def everything(example):
    """Digest of an example's texts, pixels and labels (not of the PNG bytes: zlibs differ)."""
    digest = hashlib.sha256(example.id.encode())
    parts = [*example.prompt, *(part for c in example.candidates for part in c.parts)]
    for part in parts:
        image = hasattr(part, "data")
        digest.update(pixels(part.data).tobytes() if image else part.text.encode())
    for candidate in example.candidates:
        digest.update(f"{candidate.critique}{candidate.score_line}".encode())
    digest.update(example.preference.tobytes() + example.weight.tobytes())
    return digest.hexdigest()


def test_same_seed_same_data():
    made = [scenes.make_example(split, 5, SEED) for split in scenes.SPLITS]
    made += [describe.make_description(5, SEED, kind) for kind in describe.KINDS]
    made += [scenes.make_example("train", 6, SEED)]
    digests = [everything(example) for example in made]
    assert digests[0] == everything(scenes.make_example("train", 5, SEED))
    assert digests[0] != everything(scenes.make_example("train", 5, SEED + 1))
    assert len(set(digests)) == len(digests)
    total = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
    assert total == GOLDEN, "the built-in world draws or says something else than before"


def test_example_is_well_formed():
    counts = set()
    for index in range(120):
        example = scenes.make_example("train", index, SEED)
        count = len(example.candidates)
        counts.add(count)
        assert example.dimensions == ("overall", "following", "preservation")
        head, kinds = example.id.split(":")
        assert re.fullmatch(rf"train-{index:06d}-[a-z]+", head)
        assert len(kinds.split(",")) == count
        assert set(kinds.split(",")) <= set(scenes.CANDIDATE_KINDS)
        pictures = [c.parts[0].data for c in example.candidates]
        assert len({pixels(data).tobytes() for data in pictures}) == count
        p, w = example.preference, example.weight
        assert p.shape == w.shape == (count, count, 3)
        assert p.dtype == w.dtype == np.float32
        np.testing.assert_array_equal(p + p.swapaxes(0, 1), 1)
        assert set(np.unique(p)) <= {0, 0.5, 1}
        np.testing.assert_array_equal(w[..., 0], 1 - np.eye(count))
        # The preferences are those of the scores each critique states.
        scores = []
        for candidate in example.candidates:
            assert candidate.score_line
            *_, f, _, s = candidate.critique.split("\n")[1].split()
            scores.append([world_text.NUMBERS.index(f), world_text.NUMBERS.index(s)])
        scores = np.array(scores)
        overall = scores @ [6, 4]
        expected = np.stack([overall, *scores.T], -1)
        order = (np.sign(expected[:, None] - expected[None]) + 1) / 2
        np.testing.assert_array_equal(p, order)
        if "perfect" in kinds:
            best = kinds.split(",").index("perfect")
            assert all(p[best, k, 0] == 1 for k in range(count) if k != best)
    assert counts == {2, 3, 4}


def test_splits_share_no_source_scene():
    seen = {split: set() for split in PLAIN_SPLITS}
    asked = {split: set() for split in scenes.SPLITS}
    for split in scenes.SPLITS:
        for group in groups(split, 1500 if split == "train" else 400):
            text = (group.source.background,) + tuple(
                (t.colour, t.shape, t.size, t.cell) for t in group.source.things
            )
            asked[split].add((text, group.instruction))
            if split != "hard":
                # The rule that keeps them apart, since chance alone would rarely be caught.
                assert scene_split(group.source) == split
                seen[split].add(text)
    for a, b in itertools.combinations(PLAIN_SPLITS, 2):
        assert not seen[a] & seen[b]
    for a, b in itertools.combinations(scenes.SPLITS, 2):
        assert not asked[a] & asked[b]
    # The small offsets do not matter to it: the same scene a pixel off is the same scene.
    for group in groups("valid", 50):
        things = tuple(dataclasses.replace(t, key=9, dx=0, dy=0) for t in group.source.things)
        assert scene_split(Scene(group.source.background, things)) == "valid"


def test_hard_combinations_are_never_seen_before():
    pairs, words = set(), []
    shown = []
    for split, count in (("train", 2000), ("valid", 500), ("test", 500)):
        for group in groups(split, count):
            shown += [group.source, group.target, *(a.scene for a in group.attempts)]
            words += [group.instruction, *scenes.group_critiques(group)]
            for edit in group.edits:
                thing = edit.value if edit.kind == "add" else group.source.get(edit.key)
                colour = edit.value if edit.kind == "recolour" else thing and thing.colour
                assert (edit.kind, colour) not in HELD_OUT_KINDS
    for kind, index in itertools.product(describe.KINDS, range(100)):
        words += [c.critique for c in describe.make_description(index, SEED, kind).candidates]
    for scene in shown:
        pairs |= {thing.pair for thing in scene.things}
    assert not pairs & HELD_OUT_PAIRS
    assert {colour for colour, _ in pairs} == set(COLOURS)
    assert {shape for _, shape in pairs} == set(SHAPES)
    text = " ".join(words)
    assert not any(f"{colour} {shape}" in text for colour, shape in HELD_OUT_PAIRS)
    assert "red circle" in text  # the search above can find what is there


def test_hard_is_about_held_out_pairs():
    kinds = set()
    for group in groups("hard", 300):
        touched = {key for edit in group.edits for key in (edit.key, edit.other)} - {None}
        things = [t for scene in (group.source, group.target) for t in scene.things]
        assert any(t.key in touched and t.pair in HELD_OUT_PAIRS for t in things)
        kinds.add(group.kind)
    assert kinds == {*scenes.KINDS, "compound"} - {"background"}


GOLD_CASES = {
    # candidate edits (by kind and value), lost quality -> following, preservation
    "perfect": ([Edit("recolour", 0, "green")], None, 10, 10),
    "untouched": ([], None, 0, 10),
    "other colour": ([Edit("recolour", 0, "cyan")], None, 4, 10),
    "other object": ([Edit("recolour", 1, "green")], None, 0, 7),
    "background too": (
        [Edit("recolour", 0, "green"), Edit("background", None, "tan")], None, 10, 6,
    ),
    "object too": ([Edit("recolour", 0, "green"), Edit("remove", 1)], None, 10, 7),
    "its size too": ([Edit("recolour", 0, "green"), Edit("resize", 0, "small")], None, 10, 7),
    "two objects too": (
        [Edit("recolour", 0, "green"), Edit("remove", 1), Edit("move", 2, 8)], None, 10, 4,
    ),
    "degraded": ([Edit("recolour", 0, "green")], "noisy", 10, 2),
}  # fmt: skip


@pytest.mark.parametrize("case", GOLD_CASES)
def test_gold_of_a_recolour(case):
    edits, quality, following, preservation = GOLD_CASES[case]
    source = a_scene()
    target = apply(source, Edit("recolour", 0, "green"))
    gold = compare(source, target, apply_all(source, edits), quality)
    assert (gold.following, gold.preservation) == (following, preservation)
    assert gold.overall == 6 * following + 4 * preservation


def test_gold_gives_credit_for_half_of_the_way():
    source = a_scene()

    def following(wanted, done):
        target = apply_all(source, wanted)
        return compare(source, target, apply_all(source, done), None).following

    move = [Edit("move", 0, 8)]
    assert following(move, [Edit("move", 0, 5)]) == 5
    assert following([Edit("move", 2, 3)], [Edit("move", 2, 8)]) == 3
    resize = [Edit("resize", 1, "small")]
    assert following(resize, [Edit("resize", 1, "medium")]) == 6
    assert following([Edit("resize", 0, "small")], [Edit("resize", 0, "large")]) == 2
    both = [Edit("recolour", 0, "cyan"), Edit("remove", 1)]
    assert following(both, both[:1]) == following(both, both[1:]) == 5
    swap = [Edit("swap", 0, other=1)]
    assert following(swap, swap) == 10
    new = Thing(9, "cyan", "cross", "small", 8, 0, 0)
    near = Thing(9, "cyan", "cross", "small", 7, 0, 0)
    assert following([Edit("add", 9, new)], [Edit("add", 9, near)]) == 6
    assert following([Edit("add", 9, new)], []) == 0


def test_gold_across_the_kinds_of_candidate():
    by_kind = {}
    for group in groups("valid", 400):
        for attempt in group.attempts:
            by_kind.setdefault(attempt.kind, []).append(attempt)
    assert set(by_kind) == set(scenes.CANDIDATE_KINDS)
    for kind, attempts in by_kind.items():
        for a in attempts:
            full = a.gold.following == 10
            assert full == (kind in ("perfect", "over-edited", "degraded"))
            if kind == "perfect":
                assert a.gold.preservation == 10
            if kind == "untouched":
                assert (a.gold.following, a.gold.preservation) == (0, 10)
            if kind in ("over-edited", "degraded") or a.quality:
                assert a.gold.preservation <= 7


def test_trivial_rankings_fail():
    """Neither distance to the source nor neatness ranks; ties in the gold are left out."""
    hits = {name: [] for name in ("L1", "L2", "changes", "neat")}
    for index in range(450):
        rng = random.Random(f"{SEED}/rank/{index}")
        group = scenes.make_group("test", index, SEED)
        source = draw(group.source).astype(np.int64)
        rows = []
        for a in group.attempts:
            picture = draw(a.scene)
            if a.quality:
                picture = degrade(picture, a.quality, rng)
            gap = picture.astype(np.int64) - source
            changed = len({key for key, _ in changes(group.source, a.scene)})
            facts = (np.abs(gap).sum(), (gap * gap).sum(), changed, a.quality is not None)
            rows.append((a.gold.overall, dict(zip(hits, facts, strict=True))))
        for (gold_a, a), (gold_b, b) in itertools.combinations(rows, 2):
            if gold_a != gold_b:
                for name in hits:
                    right = (a[name] < b[name]) == (gold_a > gold_b)
                    hits[name].append(0.5 if a[name] == b[name] else float(right))
    assert len(hits["L1"]) >= 1500
    for name, limit in (("L1", 0.6), ("L2", 0.6), ("changes", 0.65), ("neat", 0.65)):
        accuracy = np.mean(hits[name])
        assert max(accuracy, 1 - accuracy) < limit, f"{name}: {accuracy:.3f}"


def test_critique_says_what_the_scenes_say():
    source = a_scene()
    edits = (Edit("recolour", 0, "green"),)
    target = apply_all(source, edits)

    def critique(done, quality=None):
        scene = apply_all(source, done)
        gold = compare(source, target, scene, quality)
        return world_text.critique(source, scene, edits, gold, quality)

    assert critique(edits) == (
        "Correct: the red circle is now green as asked. Nothing else changed.\n"
        "following ten preservation ten"
    )
    assert critique([]) == (
        "Nothing changed: the red circle is still red, not green.\n"
        "following zero preservation ten"
    )
    assert critique([Edit("recolour", 1, "green")], "noisy") == (
        "Wrong object, noisy: the red circle is still red, not green. "
        "The blue star is now green by mistake.\n"
        "following zero preservation zero"
    )
    assert critique([*edits, Edit("background", None, "navy")]).startswith(
        "Too much: the red circle is now green as asked. The background is now navy by mistake."
    )


def test_critiques_name_subject_flaw_and_scores():
    for group in groups("test", 200):
        for attempt, text in zip(group.attempts, scenes.group_critiques(group), strict=True):
            body, line = text.split("\n")
            assert line == world_text.score_line(attempt.gold)
            edit = group.edits[0]
            if edit.kind in ("recolour", "remove", "replace", "move", "resize", "swap"):
                assert world_text.name(group.source.get(edit.key)) in body
            noted = "by mistake" in body
            if len(group.edits) > 1:
                noted = " and more" in body or body.startswith("Too much")
            assert noted == bool(attempt.gold.extras)
            assert not attempt.quality or attempt.quality in body.partition(":")[0].lower()


def test_words_are_few_and_texts_short():
    words, instructions, critiques = set(), [], []
    for split in scenes.SPLITS:
        for group in groups(split, 400):
            texts = scenes.group_critiques(group)
            shown = [describe.describe(a.scene, a.quality) for a in group.attempts]
            for text in (group.instruction, *texts, *shown):
                words.update(re.findall(r"[A-Za-z]+|[^A-Za-z\s]", text))
            critiques += [len(re.findall(r"[A-Za-z]+|[^A-Za-z\s]", t)) for t in texts]
            if group.kind != "compound":
                instructions.append(len(group.instruction.split()))
    assert len({word.lower() for word in words}) < 230
    assert not any(word.isdigit() for word in words)
    assert max(instructions) <= 14
    assert np.percentile(critiques, 95) <= 40 and max(critiques) < 48
    assert len({g.instruction for g in groups("train", 300)}) > 250


def test_pictures_are_smooth_distinct_and_inside_their_cell():
    for cell in (16, 32, 64):
        for shape, size in itertools.product(SHAPES, SIZES):
            mask = coverage(shape, size, cell)
            assert mask.max() > 60 and mask.min() == 0
            assert len(mask) // 2 + 3 * cell // 32 <= cell // 2 + 2
            assert not mask[0].any() and not mask[:, 0].any()
        areas = [coverage("circle", size, cell).sum() for size in SIZES]
        assert areas[0] * 1.8 < areas[1] and areas[1] * 1.6 < areas[2]
    assert ((coverage("circle", "large", 32) % 64) != 0).sum() > 20  # anti-aliased
    masks = {coverage(shape, "small", 32).tobytes() for shape in SHAPES}
    assert len(masks) == len(SHAPES)
    source = a_scene()
    for size in (96, 192):
        assert draw(source, size).shape == (size, size, 3)
    # Moving one object leaves every pixel outside the two cells alone.
    moved = draw(apply(source, Edit("move", 0, 8)))
    same = (moved == draw(source)).all(-1)
    assert same[:32, 32:].all() and same[32:64].all() and same[64:, :64].all()
    assert not same[:32, :32].all() and not same[64:, 64:].all()


def test_degraded_pictures_are_visibly_worse():
    picture = draw(a_scene())
    np.testing.assert_array_equal(pixels(encode_png(picture)), picture)
    for quality in QUALITIES:
        worse = degrade(picture, quality, random.Random(1))
        assert worse.shape == picture.shape and worse.dtype == np.uint8
        assert np.abs(worse.astype(int) - picture).mean() > 1
        np.testing.assert_array_equal(worse, degrade(picture, quality, random.Random(1)))


def test_tokenizer_makes_every_word_one_token(tmp_path):
    from transformers import AutoTokenizer

    from jrm_jax.benchmarks import make_tiny_backbone

    make_tiny_backbone.main([f"--out={tmp_path}", "--no-weights", "--corpus=800"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = json.loads((tmp_path / "config.json").read_text())["text_config"]["vocab_size"]
    assert len(tokenizer) + make_tiny_backbone.SPARE_ROWS <= rows
    assert "<|reward|>" not in tokenizer.get_vocab()
    for group in groups("hard", 150):
        shown = [describe.describe(a.scene, a.quality) for a in group.attempts]
        for text in (group.instruction, *scenes.group_critiques(group), *shown):
            pieces = re.findall(r"[A-Za-z]+|[^A-Za-z\s]\n?", text)
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert len(ids) == len(pieces)
            assert tokenizer.decode(ids) == text
    odd = "é 你好 12\t<x>"
    assert tokenizer.decode(tokenizer.encode(odd, add_special_tokens=False)) == odd
    for token in make_tiny_backbone.SPECIAL_TOKENS:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
