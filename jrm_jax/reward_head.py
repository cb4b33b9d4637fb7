"""Where the reward head of a run comes from: the backbone's folder, if an export of a run with the
same reward dimensions lies there, or it starts anew.

Letters: R reward dimensions of the run, D hidden width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jrm_jax.data.template import names_reward
from jrm_jax.errors import UserError
from jrm_jax.model import weights
from jrm_jax.model.config import BackboneConfig


class HeadStart(NamedTuple):
    """is_export: whether the folder has the reward token's row, as exports have.
    kernel_DR: of the run's dimensions, NaN in columns of those that start anew; None: all do.
    words: what is to be said of it; '' for nothing."""

    is_export: bool = False
    kernel_DR: np.ndarray | None = None
    words: str = ""

    @property
    def is_whole(self) -> bool:
        """Every dimension goes on from the folder."""
        return self.kernel_DR is not None and not np.isnan(self.kernel_DR).any()


def read_head_start(
    folder: Path, backbone: BackboneConfig, dimensions: Sequence[str], anew: bool
) -> HeadStart:
    """Dimensions are found by their names, which an export writes into its config.json; where it
    has none, by their order.

    Raises:
        UserError: the head is for other dimensions alone; or as `weights.load_params`.
    """
    found = weights.load_reward_head(folder, backbone)
    if found is None:
        return HeadStart(names_reward(folder))
    if anew:
        return HeadStart(True, None, "the reward head starts anew: config.head.anew is True")
    kernel_DR = np.asarray(found["kernel"])
    names, here = _names(folder), f"the reward head of {folder}"
    if names is None or len(names) != kernel_DR.shape[1]:
        if kernel_DR.shape[1] == len(dimensions):
            return HeadStart(True, kernel_DR, f"{here} goes on for {', '.join(dimensions)}")
        number = kernel_DR.shape[1]
        return HeadStart(True, None, f"{here} has {number} outputs without names: it starts anew")
    known = [name for name in dimensions if name in names]
    if not known:
        raise UserError(
            f"{here} scores {', '.join(names)}, this run {', '.join(dimensions)}: name them alike "
            "in config.data.dimensions, or start anew with --config.head.anew=True"
        )
    absent = np.full(len(kernel_DR), np.nan, np.float32)
    columns = [kernel_DR[:, names.index(n)] if n in names else absent for n in dimensions]
    words = f"{here} goes on for {', '.join(known)}"
    for rest, verb in (
        ([n for n in dimensions if n not in names], "starts anew"),
        ([n for n in names if n not in dimensions], "is dropped"),
    ):
        words += f"; {', '.join(rest)} {verb}" if rest else ""
    return HeadStart(True, np.stack(columns, axis=1), words)


def _names(folder: Path) -> list[str] | None:
    """Of the outputs; None where config.json has none of its own."""
    labels = json.loads((folder / "config.json").read_text()).get("id2label") or {}
    names = [labels.get(str(index)) for index in range(len(labels))]
    own = all(isinstance(name, str) and not name.startswith("LABEL_") for name in names)
    return names if names and own else None
