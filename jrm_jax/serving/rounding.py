"""What storing a trained model in fewer bits does to it: changes rounded away, scores moved.

Fine-tuning changes weights by little. bfloat16 has 8 bits of precision, so that a change below
about 1/500 of a weight is lost when the weight is stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrm_jax.data.schema import Image, Text
from jrm_jax.data.world.scenes import make_example
from jrm_jax.model import stored_head, weights
from jrm_jax.model.tensor_files import has_weights
from jrm_jax.model.tensors import flatten
from jrm_jax.serving.groups import Group
from jrm_jax.serving.reward_model import RewardModel
from jrm_jax.serving.trained import Trained, load_trained

GROUPS = 4  # of the built-in world, whose pictures are scored with both
MUCH = 0.05  # of the scores' spread


class Rounding(NamedTuple):
    """trained: entries of the backbone that training changed. kept: of these, how many still differ
    from the backbone's when both are stored. difference: the largest between a score of the stored
    model and of the trained one, over `pictures` pictures. spread: standard deviation of the
    scores. deviation: the largest ratio between their deviations, less 1; None where rewards are
    plain numbers."""

    trained: int
    kept: int
    difference: float
    spread: float
    pictures: int
    deviation: float | None = None

    def words(self, dtype: str) -> str:
        share = self.difference / self.spread if self.spread else 0.0
        moved = (
            f"scores of {self.pictures} pictures move by at most {self.difference:.2g} "
            f"({share:.1%} of their spread)"
        )
        if self.trained:
            kept = f"{dtype} keeps {self.kept / self.trained:.1%} of the"
            moved = f"{kept} {self.trained:,} weights that training changed; {moved}"
        if self.deviation is not None:
            moved += f", their deviations by at most {self.deviation:.1%}"
        worst = max(share, self.deviation or 0.0)
        more = "; --dtype=float32 keeps all" if worst > MUCH and dtype != "float32" else ""
        return moved + more


def measure(trained: Trained, folder: Path, dtype: str) -> Rounding:
    """Of a model and the folder that it was exported into.

    Raises:
        UserError: the folder cannot be read back.
    """
    # where nothing is frozen a model is read without the weights that it began from
    there = has_weights(trained.folder)
    changed, kept = _entries(trained, dtype) if there else (0, 0)
    groups = [_group(index) for index in range(GROUPS)]
    # one after the other: what the first needs to score is free again
    both = [RewardModel(read()).score_batch(groups)
            for read in (lambda: trained, lambda: load_trained(folder))]  # fmt: skip
    ours, theirs = (np.concatenate([one.reward_KR for one in scores]) for scores in both)
    difference, deviation = float(np.abs(ours - theirs).max()), None
    if both[0][0].deviation_KR is not None:
        logs = [np.log(np.concatenate([one.deviation_KR for one in scores])) for scores in both]
        deviation = float(np.expm1(np.abs(logs[0] - logs[1]).max()))
    return Rounding(changed, kept, difference, float(ours.std()), len(ours), deviation)


def _entries(trained: Trained, dtype: str) -> tuple[int, int]:
    """(entries that training changed, those that still differ when stored); leaf by leaf."""
    if trained.card.get("config", {}).get("backbone", {}).get("random"):
        return 0, 0  # the folder holds no weights that it began from
    stored = weights.STORED_AS[dtype][1]
    changed = kept = 0
    known = {name: trained.params[name] for name in ("backbone", "language_head")}
    for path, leaf in flatten(known).items():
        read = weights.load_params(
            trained.folder, trained.config, ignore=(stored_head.PREFIX,), only={path}
        )
        (before,) = flatten(read).values()
        now = jnp.asarray(leaf, jnp.float32)
        changed += _count(now != before)
        kept += _count(now.astype(stored) != before.astype(stored))
    return changed, kept


def _count(true: jax.Array) -> int:
    """Of a leaf that may have more entries than an int32 can count."""
    return int(np.asarray(jnp.sum(true, axis=-1, dtype=jnp.int32)).sum(dtype=np.int64))


def _group(index: int) -> Group:
    example = make_example("test", index, 0)
    texts = [part.text for part in example.prompt if isinstance(part, Text)]
    sources = [part.data for part in example.prompt if isinstance(part, Image)]
    return Group("\n".join(texts), sources, [c.parts[0].data for c in example.candidates])
