"""The cells of whichever part of the study a config describes."""

from __future__ import annotations

from ml_collections import ConfigDict

from jrm_jax.study import cells, regimes
from jrm_jax.study.cells import Cell


def is_second(config: ConfigDict) -> bool:
    """Whether it is the second part."""
    return "points" in config


def plan(config: ConfigDict) -> list[Cell]:
    """The cells in their order.

    Raises:
        UserError: an arm that does not exist.
    """
    return regimes.plan(config) if is_second(config) else cells.plan(config)


def load(config: ConfigDict, folder: str = cells.FOLDER) -> dict[Cell, dict]:
    """The results there are."""
    return cells.load_cells(config, plan(config), folder)
