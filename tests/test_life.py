"""The world like life: what becomes of labels and critiques of `train`, and of nothing else."""

import itertools

import numpy as np
import pytest

from configs.joint import get_config
from jrm_jax.data import store
from jrm_jax.data.schema import from_record, to_record
from jrm_jax.data.stated import stated_scores
from jrm_jax.data.world import facts, scenes
from jrm_jax.data.world.life import LIKE_PACKAGED, Life, make_lifelike, of_config, spoil
from jrm_jax.data.world.prepare import prepare_world
from jrm_jax.errors import UserError
from jrm_jax.run.check_config import check_config

SEED, COUNT = 3, 160
SCORES = ("following", "preservation")


@pytest.fixture(scope="module")
def plain():
    """Examples of `train`; small pictures."""
    return [scenes.make_example("train", i, SEED, pixels=48, kind="facts") for i in range(COUNT)]


def lifelike(plain, **fields):
    life = Life(**fields)
    return [make_lifelike(e, life, i, SEED, COUNT) for i, e in enumerate(plain)]


def votes(examples):
    """{(group, i, j, dimension): share} of what is labelled, i < j."""
    return {
        (g, i, j, r): float(e.preference[i, j, r])
        for g, e in enumerate(examples)
        for i, j in itertools.combinations(range(len(e.candidates)), 2)
        for r in range(3) if e.weight[i, j, r]
    }  # fmt: skip


def critiques(examples):
    return [[c.critique for c in e.candidates] for e in examples]


def test_the_packaged_world_stays_what_it_was(plain):
    for before, after in zip(plain, lifelike(plain), strict=True):
        assert to_record(before) == to_record(after)
    assert of_config(get_config().data.world) == LIKE_PACKAGED and LIKE_PACKAGED.words == ""


def test_shares_of_groups_are_exact_and_nested(plain):
    chosen = {}
    for share in (0.05, 0.25, 0.5, 1.0):
        made = lifelike(plain, labelled=share)
        chosen[share] = {g for g, e in enumerate(made) if e.weight.any()}
        assert len(chosen[share]) == round(share * COUNT)
        kept = votes(made)
        assert all(kept[key] == value for key, value in votes(plain).items() if key in kept)
    assert chosen[0.05] < chosen[0.25] < chosen[0.5]
    critiqued = lifelike(plain, critiqued=0.25)
    told = {g for g, e in enumerate(critiqued) if e.candidates[0].critique}
    assert len(told) == COUNT / 4 and told != chosen[0.25]
    silent = next(e for e in critiqued if e.candidates[0].critique is None)
    assert {c.facts for c in silent.candidates} == {()}
    assert from_record(to_record(silent)).candidates[0].facts == ()


def test_pairs_of_a_group(plain):
    one, two = (lifelike(plain, pairs=n) for n in (1, 2))
    for example, fewer, more in zip(plain, one, two, strict=True):
        count = len(example.candidates)
        assert fewer.weight[..., 0].sum() == 2  # a pair and its mirror
        assert more.weight[..., 0].sum() == 2 * min(2, count * (count - 1) // 2)
        assert ((fewer.weight > 0) <= (more.weight > 0)).all()
        assert (fewer.weight == fewer.weight.swapaxes(0, 1)).all()
    assert len({next(iter(votes([e])))[1:3] for e in one if len(e.candidates) == 4}) > 4


def test_flipped_votes(plain):
    clean, some, more = (votes(lifelike(plain, flip=f)) for f in (0.0, 0.2, 0.35))
    decided = [key for key, share in clean.items() if share != 0.5]
    turned = {key for key in decided if some[key] != clean[key]}
    assert abs(len(turned) / len(decided) - 0.2) < 0.03
    assert turned < {key for key in decided if more[key] != clean[key]}  # more of the same
    assert all(some[key] == 0.5 for key in clean if clean[key] == 0.5)
    for example in lifelike(plain, flip=0.5):
        mirrored = example.preference + example.preference.swapaxes(0, 1)
        assert (mirrored == 1).all()


def test_votes_as_bradley_and_terry_say(plain):
    noisy, clean = votes(lifelike(plain, vote_scale=20.0)), votes(plain)
    near, far = [], []
    for (g, i, j, r), share in noisy.items():
        golds = [a.gold.overall for a in scenes.make_group("train", g, SEED).attempts]
        ahead = golds[i] - golds[j]
        if r == 0 and ahead:
            (near if abs(ahead) <= 20 else far).append((share == clean[g, i, j, r], abs(ahead)))
    for found in (near, far):
        right, ahead = np.array(found, float).T
        assert abs(right.mean() - (1 / (1 + np.exp(-ahead / 20))).mean()) < 0.06
    assert votes(lifelike(plain, vote_scale=1e-3)).items() >= {
        key: share for key, share in clean.items() if share != 0.5
    }.items()


def test_each_choice_has_numbers_of_its_own(plain):
    """What one field chose stays as it was when another is changed."""
    base = dict(labelled=0.5, pairs=1, flip=0.3, critiqued=0.5, wrong_facts=0.3)
    reference = lifelike(plain, **base)
    others = lifelike(plain, **{**base, "wrong_facts": 0.0, "critiqued": 1.0})
    assert votes(others) == votes(reference)
    other = lifelike(plain, **{**base, "labelled": 1.0, "flip": 0.1, "pairs": 2})
    assert critiques(other) == critiques(reference)
    assert votes(other).keys() > votes(reference).keys()
    scored = lifelike(plain, **{**base, "score_correlation": 0.6})
    said = [(w.rpartition("\n")[0], v.rpartition("\n")[0])
            for a, b in zip(critiques(scored), critiques(reference), strict=True)
            for w, v in zip(a, b, strict=True) if w]  # fmt: skip
    assert said and all(ours == theirs for ours, theirs in said)
    assert votes(scored) == votes(reference)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_the_share_of_stated_facts_that_is_wrong(plain, share):
    made = lifelike(plain, wrong_facts=share)
    words = wrong = 0
    for before, after in zip(critiques(plain), critiques(made), strict=True):
        for ours, theirs in zip(before, after, strict=True):
            verdicts = [t.partition(":")[0].split(",")[0].removesuffix(" and more")
                        for t in (ours, theirs)]  # fmt: skip
            words, wrong = words + 1, wrong + (verdicts[0] != verdicts[1])
            assert ours.rpartition("\n")[2] == theirs.rpartition("\n")[2]
    assert abs(wrong / words - share) < 0.06
    stated = [
        (set(c.facts), set(d.facts)) for e, f in zip(plain, made, strict=True)
        for c, d in zip(e.candidates, f.candidates, strict=True)
    ]  # fmt: skip
    scores = {i for i, name in enumerate(facts.FACTS)
              if name.startswith(("following", "preservation"))}  # fmt: skip
    gone = sum(len(before - after - scores) for before, after in stated)
    assert abs(gone / sum(len(before - scores) for before, _ in stated) - share) < 0.05
    assert all(len(before) == len(after) for before, after in stated)
    assert spoil(plain[0].candidates[0].critique, Life(wrong_facts=0.0), "x") == (
        plain[0].candidates[0].critique
    )


@pytest.mark.parametrize("wanted", [0.5, 0.7, 0.8])
def test_scores_err_as_a_judges(wanted):
    gold, said = [], []
    for index in range(700):
        group = scenes.make_group("train", index, SEED)
        for k, words in enumerate(scenes.group_critiques(group)):
            scores = stated_scores(
                spoil(words, Life(score_correlation=wanted), f"{index}/{k}"), SCORES
            )
            said.append(6 * scores["following"] + 4 * scores["preservation"])
            gold.append(group.attempts[k].gold.overall)
    assert abs(np.corrcoef(gold, said)[0, 1] - wanted) < 0.035


def test_facts_state_the_scores_that_words_do(plain):
    for example in lifelike(plain, score_correlation=0.6)[:40]:
        for candidate in example.candidates:
            named = dict(facts.FACTS[i].split("=") for i in candidate.facts)
            scores = stated_scores(candidate.critique, SCORES)
            for name in ("following", "preservation"):
                assert float(named[name]) == scores[name]


def test_a_folder_for_each_world_with_the_pictures_of_one(tmp_path):
    counts = {"train": 6, "valid": 2}
    lives = [LIKE_PACKAGED, Life(labelled=0.5), Life(labelled=0.5, flip=0.25), Life(wrong_facts=1)]
    folders = [prepare_world(tmp_path, counts, 1, "edits", life) for life in lives]
    assert len(set(folders)) == len(folders)
    assert folders[0].name == "world-edits-v5-seed1-train6-valid2"  # where it always was
    assert prepare_world(tmp_path, counts, 1, "edits", lives[1]) == folders[1]
    sets = [store.open_dataset(folder) for folder in folders]
    for other in sets[1:]:
        for split, count in counts.items():
            for index in range(count):
                ours, theirs = sets[0][split][index], other[split][index]
                assert [bytes(i) for i in ours["images"]] == [bytes(i) for i in theirs["images"]]
                if split == "valid":
                    assert ours["record"] == theirs["record"]
    assert sum(from_record(sets[1]["train"][i]).weight.any() for i in range(6)) == 3
    assert store.read_manifest(folders[2])["life"]["flip"] == 0.25


@pytest.mark.parametrize("name", Life._fields)
def test_every_field_is_of_the_config_and_in_the_folders_name(name):
    plain = get_config().data.world[name]
    assert plain == getattr(LIKE_PACKAGED, name)
    other = Life(**{name: type(plain)(0.5) if isinstance(plain, float) else 2})
    assert name in other.words
    config = get_config()
    config.data.world[name] = -1
    with pytest.raises(UserError, match=f"config.data.world.{name} is -1"):
        check_config(config)


def test_worlds_of_pretraining_have_no_life():
    config = get_config()
    config.data.world.kind, config.data.world.flip = "lookups", 0.5
    with pytest.raises(UserError, match="has no labels and no critiques that could be flip0.5"):
        check_config(config)
