"""The built-in world as life has it: few labels, noisy ones, critiques that err or are missing.

Labels and critiques of `train` are changed; pictures and instructions, and the splits that measure,
stay as they are. Every choice has random numbers of its own, found by the world's seed, what is
chosen and the group: changing one field leaves what the others chose, and of two shares the groups
of the smaller one are among those of the larger.

Letters: K candidates, R reward dimensions.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jrm_jax.data.schema import PreferenceExample
from jrm_jax.data.world import facts, scenes
from jrm_jax.data.world.text import NUMBERS
from jrm_jax.data.world.vocabulary import BACKGROUNDS, COLOURS, PLACES, QUALITIES, SHAPES, SIZES


class Life(NamedTuple):
    """labelled, critiqued: shares of the groups that have labels, critiques. pairs: labelled pairs
    of a group, 0: all. vote_scale: a vote is that of Bradley and Terry (1952), for a candidate with
    chance sigmoid(points ahead / vote_scale), points of gold from 0 to 100; 0: the better one wins.
    flip: chance that a vote then turns over; a tie stays one. wrong_facts: share of what a critique
    states that is wrong. score_correlation: of the scores in its last line with the gold score."""

    labelled: float = 1.0
    pairs: int = 0
    flip: float = 0.0
    vote_scale: float = 0.0
    critiqued: float = 1.0
    wrong_facts: float = 0.0
    score_correlation: float = 1.0

    @property
    def words(self) -> str:
        """'labelled0.25-pairs1', what is not as in the packaged world; '' for nothing."""
        pairs = zip(self._fields, self, LIKE_PACKAGED, strict=True)
        return "-".join(f"{name}{value!r}" for name, value, plain in pairs if value != plain)


LIKE_PACKAGED = Life()


def of_config(world: Mapping[str, Any]) -> Life:
    """Of the fields of `config.data.world`."""
    return Life(**{name: world[name] for name in Life._fields})


# Deviation of normal errors of both scores, before they are rounded and kept in 0..10, and the
# correlation with gold (6 x following + 4 x preservation) that is left: measured on 12,000 groups.
ERRORS = (
    (0.0, 1.0), (0.5, 0.992), (1.0, 0.975), (1.5, 0.946), (2.0, 0.907), (3.0, 0.810), (4.0, 0.702),
    (5.0, 0.603), (6.0, 0.521), (8.0, 0.400), (10.0, 0.321),
)  # fmt: skip
LEAST_CORRELATION = 0.4
# What can be wrong, kind by kind; places with two words before those with one.
_PLACES = sorted(PLACES, key=len, reverse=True)
_KINDS = (tuple(COLOURS), SHAPES, SIZES, tuple(_PLACES), tuple(BACKGROUNDS), QUALITIES)
_WORDS = {word: words for words in _KINDS for word in words}
_STATED = re.compile(rf"\b(?:{'|'.join(map(re.escape, _WORDS))})\b")
_VERDICT = re.compile("|".join(sorted(facts.VERDICTS, key=len, reverse=True)))
_SCORE = re.compile(r"following (\w+) preservation (\w+)\s*$")


def make_lifelike(
    example: PreferenceExample, life: Life, index: int, seed: int, count: int
) -> PreferenceExample:
    """The example of `train` at `index` of `count`, which `scenes.make_example` made with `seed`.

    A critique's facts, where it has some, err as often as its words do, but not in the same places.
    """
    preference, weight = _votes(example, life, index, seed, count)
    candidates = example.candidates
    if not _is_chosen("critiqued", life.critiqued, index, seed, count):
        candidates = tuple(
            dataclasses.replace(c, critique=None, facts=None if c.facts is None else ())
            for c in candidates
        )
    elif life.wrong_facts or life.score_correlation < 1:
        candidates = tuple(
            dataclasses.replace(
                c,
                critique=spoil(c.critique, life, f"{seed}/train/{index}/{k}"),
                facts=c.facts and _spoil_facts(c.facts, life, f"{seed}/train/{index}/{k}"),
            )
            for k, c in enumerate(candidates)
        )
    return dataclasses.replace(example, preference=preference, weight=weight, candidates=candidates)


@functools.lru_cache(maxsize=8)
def _ranks(name: str, seed: int, count: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"{seed}/{name}").shuffle(order)
    return tuple(order)


def _is_chosen(name: str, share: float, index: int, seed: int, count: int) -> bool:
    """Of all groups exactly round(share * count) are."""
    return share >= 1 or _ranks(name, seed, count)[index] < round(share * count)


# Labels


def _votes(
    example: PreferenceExample, life: Life, index: int, seed: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(preference, weight), each [K, K, R]."""
    preference, weight = example.preference.copy(), example.weight.copy()
    if not _is_chosen("labelled", life.labelled, index, seed, count):
        return np.full_like(preference, 0.5), np.zeros_like(weight)
    place = f"{seed}/train/{index}"
    pairs = list(itertools.combinations(range(len(example.candidates)), 2))
    if life.pairs:
        random.Random(f"{place}/pairs").shuffle(pairs)
        for i, j in pairs[life.pairs :]:
            preference[[i, j], [j, i]], weight[[i, j], [j, i]] = 0.5, 0
        pairs = pairs[: life.pairs]
    if not life.flip and not life.vote_scale:
        return preference, weight
    gold_KR = _gold(index, seed) if life.vote_scale else None
    for (i, j), r in itertools.product(pairs, range(preference.shape[2])):
        share = float(preference[i, j, r])
        if gold_KR is not None:
            ahead = (gold_KR[i, r] - gold_KR[j, r]) / life.vote_scale
            drawn = random.Random(f"{place}/vote/{i}/{j}/{r}").random()
            share = float(drawn < (1 + math.tanh(ahead / 2)) / 2)  # sigmoid, of any number
        if random.Random(f"{place}/flip/{i}/{j}/{r}").random() < life.flip:
            share = 1 - share
        preference[i, j, r], preference[j, i, r] = share, 1 - share
    return preference, weight


def _gold(index: int, seed: int) -> np.ndarray:
    """[K, R] in points of 0 to 100, in the order of `scenes.DIMENSIONS`."""
    golds = [attempt.gold for attempt in scenes.make_group("train", index, seed).attempts]
    return np.array([(g.overall, 10 * g.following, 10 * g.preservation) for g in golds])


# Critiques


def spoil(critique: str, life: Life, place: str) -> str:
    """A critique of the world with errors; `place` says which random numbers."""
    text, _, line = critique.rpartition("\n")
    rng = random.Random(f"{place}/facts")

    def other(found: re.Match, kind: tuple[str, ...]) -> str:
        word, wrong, which = found[0], rng.random(), rng.random()
        rest = [w for w in kind if w != word]
        return rest[int(which * len(rest))] if wrong < life.wrong_facts else word

    says = _VERDICT.match(text)
    verdict = other(says, facts.VERDICTS)
    text = verdict + _STATED.sub(lambda found: other(found, _WORDS[found[0]]), text[says.end() :])
    return f"{text}\n{_spoil_scores(line, life.score_correlation, random.Random(f'{place}/score'))}"


def _spoil_scores(line: str, correlation: float, rng: random.Random) -> str:
    deviation = error_of(correlation)
    words = [_erring(NUMBERS.index(word), deviation, rng) for word in _SCORE.match(line).groups()]
    return f"following {words[0]} preservation {words[1]}"


def _erring(score: int, deviation: float, rng: random.Random) -> str:
    return NUMBERS[min(10, max(0, round(score + deviation * rng.gauss(0, 1))))]


def error_of(correlation: float) -> float:
    """Deviation of the errors that leave this correlation of what is stated with gold."""
    deviations, left = zip(*ERRORS, strict=True)
    return float(np.interp(-correlation, [-c for c in left], deviations))


def _spoil_facts(stated: tuple[int, ...], life: Life, place: str) -> tuple[int, ...]:
    """The same share of them replaced by another value of their slot; scores as in the critique."""
    rng, score = random.Random(f"{place}/facts"), random.Random(f"{place}/score")
    deviation, found = error_of(life.score_correlation), []
    for index in stated:
        slot, _, value = facts.FACTS[index].partition("=")
        rest = [f"{slot}={v}" for v in facts.SLOTS[slot] if str(v) != value]
        wrong, which = rng.random(), rng.random()
        if slot in ("following", "preservation"):
            word = _erring(int(value), deviation, score)
            found.append(facts.FACTS.index(f"{slot}={NUMBERS.index(word)}"))
        elif rest and wrong < life.wrong_facts:
            found.append(facts.FACTS.index(rest[int(which * len(rest))]))
        else:
            found.append(index)
    return tuple(sorted(found))
