"""Where the reward head of a run comes from: the backbone's folder, if an export of a run with the
same reward dimensions and hidden layers lies there, or it starts anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jrm_jax.data.template import names_reward
from jrm_jax.errors import UserError
from jrm_jax.model.config import BackboneConfig
from jrm_jax.model.stored_head import load_reward_head
from jrm_jax.optim import flatten, unflatten

NEW = "the reward head starts anew: config.head.anew is True"
ANEW = "start anew with --config.head.anew=True"


class HeadStart(NamedTuple):
    """is_export: whether the folder has the reward token's row, as exports have.
    params: the head of the run, float32, NaN in the columns of what starts anew; None: all does.
    words: what is to be said of it; '' for nothing."""

    is_export: bool = False
    params: dict[str, Any] | None = None
    words: str = ""

    @property
    def is_whole(self) -> bool:
        """Every dimension goes on from the folder."""
        return self.params is not None and len(self.known()) == len(flatten(self.params))

    def known(self) -> dict[str, np.ndarray]:
        """Leaves by their paths in a run's parameters that go on from the folder in every
        column."""
        leaves = flatten({"reward_head": self.params or {}})
        return {path: leaf for path, leaf in leaves.items() if not np.isnan(leaf).any()}


def read_head_start(
    folder: Path,
    backbone: BackboneConfig,
    dimensions: Sequence[str],
    anew: bool,
    wanted: Mapping[str, Any],
) -> HeadStart:
    """Dimensions are found by their names, which an export writes into its config.json; where it
    has none, by their order. Deviations that only one of the two has start anew, or are dropped.

    Args:
        wanted: shapes of the run's head.

    Raises:
        UserError: unless `anew`: the head is for other dimensions alone, or has other hidden
            layers; or as `stored_head.load_reward_head`.
    """
    try:
        head = load_reward_head(folder, backbone)
    except UserError as error:
        if anew:
            return HeadStart(names_reward(folder), None, NEW)
        raise UserError(f"{error}; or {ANEW}") from error
    if head is None:
        return HeadStart(names_reward(folder))
    if anew:
        return HeadStart(True, None, NEW)
    here, number = f"the reward head of {folder}", head["kernel"].shape[1]
    has, needs = (_widths(one) for one in (head, wanted))
    if has != needs:
        raise UserError(
            f"{here} is {_listed(has)}, that of this run {_listed(needs)}: set "
            f'--config.head.hidden="{has}", or {ANEW}'
        )
    names = _names(folder)
    if names is not None and "deviation" in head and len(names) == 2 * number:
        names = names[:number]  # those of the log-deviations follow
    if names is None or len(names) != number:
        if number != len(dimensions):
            words = f"{here} has {number} outputs without names: it starts anew"
            return HeadStart(True, None, words)
        names = list(dimensions)
    known = [name for name in dimensions if name in names]
    if not known:
        raise UserError(
            f"{here} scores {', '.join(names)}, this run {', '.join(dimensions)}: name them alike "
            f"in config.data.dimensions, or {ANEW}"
        )
    columns = [names.index(name) if name in names else None for name in dimensions]
    words = f"{here} goes on for {', '.join(known)}"
    for rest, verb in (
        ([n for n in dimensions if n not in names], "starts anew"),
        ([n for n in names if n not in dimensions], "is dropped"),
        (["its deviation"] if "deviation" in wanted and "deviation" not in head else [],
         "starts anew"),
        (["its deviation"] if "deviation" in head and "deviation" not in wanted else [],
         "is dropped"),
    ):  # fmt: skip
        words += f"; {', '.join(rest)} {verb}" if rest else ""
    return HeadStart(True, _in_columns(flatten(head), columns, flatten(wanted)), words)


def _in_columns(
    found: Mapping[str, Any], columns: Sequence[int | None], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """The leaves of `found` by path as those of `wanted`, a column for each dimension."""
    leaves = {}
    for path, shape in wanted.items():
        if path.startswith("hidden/"):
            leaves[path] = np.asarray(found[path])
            continue
        leaf = np.full(shape.shape, np.nan, np.float32)
        for place, column in enumerate(columns):
            if path in found and column is not None:
                leaf[..., place] = found[path][..., column]
        leaves[path] = leaf
    return unflatten(leaves)


def _widths(head: Mapping[str, Any]) -> tuple[int, ...]:
    layers = head.get("hidden", {})
    return tuple(layers[str(n)]["bias"].shape[0] for n in range(len(layers)))


def _listed(widths: Sequence[int]) -> str:
    if not widths:
        return "one linear layer"
    return f"one with hidden layers of {' and '.join(map(str, widths))}"


def _names(folder: Path) -> list[str] | None:
    """Of the outputs; None where config.json has none of its own."""
    labels = json.loads((folder / "config.json").read_text()).get("id2label")
    labels = labels if isinstance(labels, dict) else {}
    names = [labels.get(str(index)) for index in range(len(labels))]
    own = all(isinstance(name, str) and not name.startswith("LABEL_") for name in names)
    return names if names and own else None
