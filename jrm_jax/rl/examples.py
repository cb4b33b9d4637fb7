"""Edits that a reward likes and that are worth little: kept as programs, drawn again on a sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jrm_jax.data.world.draw import PIXELS
from jrm_jax.data.world.draw import draw as draw_scene
from jrm_jax.rl.drawing import draw
from jrm_jax.rl.editing import Program, make_problem, take
from jrm_jax.rl.rollout import Rollout
from jrm_jax.serving.lettering import Lettering

KEPT = 4  # of each split
ZOOM, MARGIN, LETTER, LINE = 2, 10, 11, 15
WIDE = PIXELS * ZOOM


def liked(found: Rollout, split: str) -> list[dict[str, Any]]:
    """The edit of each problem that the reward likes best; problems are the first of `split`."""
    rows = []
    for index, best in enumerate(found.reward_GK.argmax(1)):
        row = int(index * found.gold_GK.shape[1] + best)
        program = {
            name: np.round(array[0].astype(float), 4).tolist()
            for name, array in take(found.program, [row])._asdict().items()
        }
        lost = found.golds[row].lost
        rows.append(
            {
                "split": split, "index": index, "noise": found.seeds[row],
                "reward": round(float(found.reward_GK.flat[row]), 4),
                "proxy": round(float(found.proxy_GK.flat[row]), 4),
                "gold": round(float(found.gold_GK.flat[row]), 4),
                "lost": {n: round(lost[n], 2) for n in sorted(lost, key=lost.get, reverse=True)},
                "program": program,
            }
        )  # fmt: skip
    return rows


def worst(rows: Sequence[dict[str, Any]], kept: int = KEPT) -> list[dict[str, Any]]:
    """Those of the least gold."""
    return sorted(rows, key=lambda row: row["gold"])[:kept]


def _program(kept: Mapping[str, Any]) -> Program:
    kinds = dict(present_NO=np.int32, fields_NOF=np.int32, ground_N=np.int32)
    return Program(
        *(np.asarray([kept[name]], kinds.get(name, np.float32)) for name in Program._fields)
    )


def draw_sheet(
    arms: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], world_seed: str, out: Path
) -> None:
    """A row of pairs, source and edit, for each arm: (its name, rows that `worst` kept)."""
    import PIL.Image
    import PIL.ImageDraw

    letters, tile = Lettering(LETTER), 2 * WIDE + 2 * MARGIN
    count = max(len(rows) for _, rows in arms)
    words = {
        (a, r): [
            *letters.wrap(make_problem(row["split"], row["index"], world_seed).instruction,
                          2 * WIDE),
            f"score {row['proxy']:+.2f}, gold {row['gold']:.2f}",
            *letters.wrap(
                ", ".join(f"{n} -{p:.0f}" for n, p in [*row["lost"].items()][:3]), 2 * WIDE
            ),
        ]
        for a, (_, rows) in enumerate(arms)
        for r, row in enumerate(rows)
    }  # fmt: skip
    tall = LINE + WIDE + LINE * max(map(len, words.values())) + 2 * MARGIN
    sheet = PIL.Image.new("RGB", (MARGIN + count * tile, MARGIN + len(arms) * tall), "white")
    pen = PIL.ImageDraw.Draw(sheet)
    for a, (name, rows) in enumerate(arms):
        top = MARGIN + a * tall
        letters.draw(pen, MARGIN, top, name, (20, 20, 20))
        for r, row in enumerate(rows):
            left = MARGIN + r * tile
            problem = make_problem(row["split"], row["index"], world_seed)
            edit = draw([problem], _program(row["program"]), [row["noise"]]).pictures_NHW3[0]
            for place, picture in enumerate((draw_scene(problem.source), edit)):
                image = PIL.Image.fromarray(picture).resize((WIDE, WIDE), PIL.Image.NEAREST)
                sheet.paste(image, (left + place * (WIDE + 2), top + LINE))
            for number, line in enumerate(words[a, r]):
                at = top + LINE + WIDE + 2 + number * LINE
                letters.draw(pen, left, at, line, (60, 60, 60))
    sheet.save(out)
