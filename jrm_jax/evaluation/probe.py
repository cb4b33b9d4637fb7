"""Sanity of a model: what its reward reacts to, and how sure it is. Only calibration reads labels.

Letters: K candidates, D width of the reward token's state.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image

from jrm_jax.data.images import open_image
from jrm_jax.data.schema import Text
from jrm_jax.evaluation.cases import Case, Judged, Part, Picture, missing_pictures
from jrm_jax.evaluation.report import main_dimension
from jrm_jax.evaluation.scoring import CHUNK, Change, column, encode_case, pixel_distance
from jrm_jax.evaluation.statistics import bootstrap, effective_rank, spearman
from jrm_jax.evaluation.unsure import calibrated, deviations, scored_pairs, told
from jrm_jax.shell.terminal import Bar

CASES = 128  # the first so many of the benchmark
CRITIQUES = 24  # cases whose critiques are written out
MAX_TOKENS = 96


def _resized(width: float, height: float) -> Change:
    def change(picture: PIL.Image.Image) -> PIL.Image.Image:
        size = max(1, round(picture.width * width)), max(1, round(picture.height * height))
        return picture.resize(size, PIL.Image.Resampling.BICUBIC)

    return change


# name: what is done to every picture of a case
CHANGES: dict[str, Change] = {
    "half the resolution": _resized(0.5, 0.5),
    "three quarters of the resolution": _resized(0.75, 0.75),
    "one and a half times the resolution": _resized(1.5, 1.5),
    "stretched by a quarter": _resized(1.25, 1.0),
}

# how often the model sees every case: as it is (scores, then states), changed, with other words,
# with a black candidate, in reverse order
PASSES = 2 + len(CHANGES) + 3


class _Watched:
    """A model whose work moves a bar."""

    def __init__(self, model: Any, bar: Bar):
        self._model, self._bar = model, bar
        self.score_encoded = functools.partial(model.score_encoded, advance=bar.advance)
        self.reward_states = functools.partial(model.reward_states, advance=bar.advance)

    def critique_tokens(self, *arguments: Any, **options: Any) -> Any:
        said = self._model.critique_tokens(*arguments, **options)
        self._bar.advance()
        return said

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def probe(model: Any, judged: Sequence[Judged], count: int = CASES) -> dict[str, Any]:
    """Rows {'name', 'value', 'meaning'}, the numbers behind them, and the calibration."""
    chosen = _choose(judged, count)
    numbers: dict[str, Any] = {"cases": len(chosen)}
    rows: list[dict[str, str]] = []

    def tell(name: str, words: str, meaning: str) -> None:
        rows.append({"name": name, "value": words, "meaning": meaning})

    if chosen:
        cases = [one.case for one in chosen]
        with Bar("probing", PASSES * len(cases) + min(CRITIQUES, len(cases))) as bar:
            seen = _Watched(model, bar)
            base = _rewards(seen, cases)
            spread = float(np.std(np.concatenate(base)))
            _tell_rank(seen, cases, numbers, tell)
            _tell_pixels(chosen, base, numbers, tell)
            _tell_changes(seen, cases, base, spread, numbers, tell)
            _tell_instruction(seen, cases, base, spread, numbers, tell)
            _tell_black(seen, cases, base, numbers, tell)
            _tell_swap(seen, cases, base, numbers, tell)
            if model.speaks:
                _tell_critiques(seen, chosen, base, numbers, tell)
    asked = main_dimension(judged)
    pairs = scored_pairs(asked)
    found = calibrated(pairs, deviations(pairs))
    if found["count"]:
        within = found["intervals"]
        tell(
            "calibration error",
            f"{told(found['error'], within['error'])} ({found['count']:,} pairs)",
            "mean gap between the predicted and the observed chance that people prefer the model's"
            " choice; 0 is perfect",
        )
        tell(
            "Brier score",
            told(found["brier"], within["brier"]),
            "mean squared error of that chance; always one half gives 0.25",
        )
    numbers["calibration"] = found if found["count"] else None
    about = (
        f"The first {len(chosen)} cases whose pictures can be read; calibration: all decided pairs"
        f" ({', '.join(dict.fromkeys(one.case.dimension for one in asked))})."
    )
    return {"about": about, "rows": rows, **numbers}


def _choose(judged: Sequence[Judged], count: int) -> list[Judged]:
    found: dict[Any, Judged] = {}
    for one in judged:
        if len(found) == count:
            break
        key = one.case.section, one.case.id, one.case.group
        if key not in found and one.case.pictures and not missing_pictures(one.case):
            found[key] = one
    return list(found.values())


def _encoded(model: Any, cases: Sequence[Case], change: Change | None = None):
    for start in range(0, len(cases), CHUNK):
        yield [encode_case(model, case, change) for case in cases[start : start + CHUNK]]


def _rewards(model: Any, cases: Sequence[Case], change: Change | None = None) -> list[np.ndarray]:
    parts = _encoded(model, cases, change)
    found = [scores for part in parts for scores in model.score_encoded(part, one_bucket=True)]
    return [
        scores.reward_KR[:, column(model.dimensions, case.dimension)]
        for scores, case in zip(found, cases, strict=True)
    ]


def _tell_rank(model, cases, numbers, tell: Callable) -> None:
    parts = [state for part in _encoded(model, cases) for state in model.reward_states(part)]
    states_ND = np.concatenate(parts)
    within_ND = np.concatenate([state_KD - state_KD.mean(0) for state_KD in parts])
    rank, within = effective_rank(states_ND), effective_rank(within_ND)
    numbers["effective_rank"], numbers["effective_rank_within_groups"] = rank, within
    limit = min(states_ND.shape)
    tell("effective rank of the reward token's states", f"{rank:.1f} of {limit}",
         f"exponential of the entropy of the singular values, over {len(states_ND)} candidates;"
         " near 1: the model says the same of everything")  # fmt: skip
    tell("the same within groups", f"{within:.1f} of {limit}",
         "each group's mean taken out: what tells candidates of one prompt apart")  # fmt: skip


def _tell_pixels(chosen: Sequence[Judged], base, numbers, tell: Callable) -> None:
    agree, groups, scores, distances = [], [], [], []
    for (case, _), reward_K in zip(chosen, base, strict=True):
        distance_K = np.asarray(pixel_distance(case))
        scores += (reward_K - reward_K.mean()).tolist()
        distances += (distance_K - distance_K.mean()).tolist()
        for i in range(len(reward_K)):
            for j in range(i):
                gap = distance_K[i] - distance_K[j]
                if gap and reward_K[i] != reward_K[j]:
                    agree.append(float((reward_K[i] > reward_K[j]) == (gap < 0)))
                    groups.append(case.group)
    if not agree:
        return
    share = bootstrap(np.asarray(agree), groups)
    rho = spearman(np.asarray(scores), np.asarray(distances))
    numbers["pixel_agreement"], numbers["pixel_spearman"] = share.value, rho
    tell("agrees with 'fewest changed pixels'",
         f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f}; {len(agree)} pairs)",
         "near 1 or 0: it measures how much has changed, not whether that is right")  # fmt: skip
    tell("Spearman of reward and changed pixels", f"{rho:+.3f}", "within prompts")


def _tell_changes(model, cases, base, spread: float, numbers, tell: Callable) -> None:
    numbers["drift"] = {}
    for name, change in CHANGES.items():
        other = _rewards(model, cases, change)
        drift = float(np.mean(np.abs(np.concatenate(other) - np.concatenate(base))))
        flipped, pairs = _flips(base, other)
        share = drift / spread if spread else math.nan
        numbers["drift"][name] = {"drift": share, "flips": flipped, "pairs": pairs}
        tell(f"score drift, {name}",
             f"{share:.2f} of the scores' spread; {flipped:.0%} of {pairs:,} pairs turn",
             "all pictures of a case are changed alike, so the order should stay; 1: as far as"
             " scores of different edits lie apart")  # fmt: skip


def _tell_instruction(model, cases, base, spread: float, numbers, tell: Callable) -> None:
    """Every case with the words of the next case that says something else."""
    texts = ["\n".join(p.text for p in case.prompt if isinstance(p, Text)) for case in cases]
    chosen, changed = [], []
    for place, case in enumerate(cases):
        others = (texts[(place + step) % len(cases)] for step in range(1, len(cases)))
        other = next((words for words in others if words and words != texts[place]), "")
        if texts[place] and other:
            chosen.append(place)
            changed.append(case._replace(prompt=_with_words(case.prompt, other)))
    if not changed:
        return
    own, found = [base[place] for place in chosen], _rewards(model, changed)
    gap_N = np.concatenate(found) - np.concatenate(own)
    drift = float(np.abs(gap_N).mean()) / spread if spread else math.nan
    lower, (flipped, pairs) = float((gap_N < 0).mean()), _flips(own, found)
    numbers["another_instruction"] = {
        "drift": drift, "lower": lower, "flips": flipped, "pairs": pairs, "cases": len(chosen),
    }  # fmt: skip
    tell("another instruction",
         f"{drift:.2f} of the scores' spread; {lower:.0%} of {len(gap_N):,} scores fall;"
         f" {flipped:.0%} of {pairs:,} pairs turn",
         "each case with the words of another one: scores should fall and the order should change;"
         " near 0: the model does not read the instruction")  # fmt: skip


def _with_words(prompt: Sequence[Part], words: str) -> tuple[Part, ...]:
    """The words instead of the prompt's first text, and no other text."""
    first = next(place for place, part in enumerate(prompt) if isinstance(part, Text))
    return tuple(
        Text(words) if place == first else part
        for place, part in enumerate(prompt)
        if place == first or isinstance(part, Picture)
    )


def _tell_black(model, cases, base, numbers, tell: Callable) -> None:
    """The last candidate's pictures in black, against all candidates as they are."""
    chosen, changed = [], []
    for place, case in enumerate(cases):
        if any(isinstance(part, Picture) for part in case.candidates[-1]):
            black = tuple(_black(p) if isinstance(p, Picture) else p for p in case.candidates[-1])
            chosen.append(place)
            changed.append(case._replace(candidates=(*case.candidates[:-1], black)))
    if not changed:
        return
    scores = [reward_K[-1] for reward_K in _rewards(model, changed)]
    below = [float(own < real) for own, place in zip(scores, chosen, strict=True)
             for real in base[place]]  # fmt: skip
    last = [own < base[place].min() for own, place in zip(scores, chosen, strict=True)]
    share, lowest = float(np.mean(below)), float(np.mean(last))
    numbers["black_candidate"] = {"below": share, "lowest": lowest, "cases": len(chosen)}
    tell("black candidate",
         f"scores lower than {share:.0%} of {len(below):,} real ones; the lowest of its group in"
         f" {lowest:.0%} of {len(chosen):,}",
         "a black picture in a candidate's place should be the worst of all; near one half: the"
         " model does not look at the candidate")  # fmt: skip


def _black(picture: Picture) -> Picture:
    """A black one of the same size."""
    file = io.BytesIO()
    PIL.Image.new("RGB", open_image(picture.read()).size).save(file, "PNG")
    return Picture(f"{picture.name} in black", file.getvalue())


def _flips(base: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> tuple[float, int]:
    turned = pairs = 0
    for one_K, two_K in zip(base, other, strict=True):
        for i in range(len(one_K)):
            for j in range(i):
                pairs += 1
                turned += np.sign(one_K[i] - one_K[j]) != np.sign(two_K[i] - two_K[j])
    return (turned / pairs if pairs else math.nan), pairs


def _tell_swap(model, cases, base, numbers, tell: Callable) -> None:
    other = _rewards(model, [case._replace(candidates=case.candidates[::-1]) for case in cases])
    other = [reward_K[::-1] for reward_K in other]
    largest = float(np.max(np.abs(np.concatenate(other) - np.concatenate(base))))
    flipped, pairs = _flips(base, other)
    numbers["swap"] = {"largest": largest, "flips": flipped, "pairs": pairs}
    tell("candidates in reverse order", f"{largest:.1e}; {flipped:.0%} of {pairs:,} pairs turn",
         "largest change of a score; more than rounding is a fault of the program")  # fmt: skip


def _tell_critiques(model, chosen: Sequence[Judged], base, numbers, tell: Callable) -> None:
    lengths, rewards, groups = [], [], []
    for one, reward_K in list(zip(chosen, base, strict=True))[:CRITIQUES]:
        case = one.case
        simple = all(len(parts) == 1 and isinstance(parts[0], Picture) for parts in case.candidates)
        if not simple:
            continue
        texts = [part.text for part in case.prompt if not isinstance(part, Picture)]
        sources = [part.read() for part in case.prompt if isinstance(part, Picture)]
        said = model.critique_tokens(
            "\n".join(texts), sources, [parts[0].read() for parts in case.candidates],
            max_tokens=MAX_TOKENS,
        )  # fmt: skip
        lengths += [float(len(ids)) for ids in said]
        rewards += reward_K.tolist()
        groups += [case.group] * len(said)
    if not lengths:
        return
    values = np.stack([lengths, rewards], axis=1)
    found = bootstrap(values, groups, lambda v: spearman(v[:, 0], v[:, 1]), draws=500)
    numbers["critique_length"] = {
        "mean": float(np.mean(lengths)),
        "spearman": found.value if math.isfinite(found.value) else None,
        "cut": int(sum(length >= MAX_TOKENS for length in lengths)),
    }
    words = (
        f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
        if math.isfinite(found.value)
        else "all of one length"
    )
    tell("Spearman of critique length and reward", words,
         f"{len(lengths)} critiques of {np.mean(lengths):.1f} tokens on average; far from 0:"
         " one of them follows the other")  # fmt: skip
