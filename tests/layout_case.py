"""Building a data set from a few rows, for the tests of the layouts."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from benchmark_files import png

from jrm_jax.data import builders, store
from jrm_jax.data.schema import from_record

SIDES = ("left", "right")


@pytest.fixture
def build(tmp_path, capsys):
    """build(layout, file, *arguments) -> (examples, counts of problems by kind)."""

    def run(layout, path, *arguments):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        capsys.readouterr()
        status = builders.main(
            [layout, f"--data={path}", f"--out={out}", "--skip_bad", *arguments]
        )
        said = capsys.readouterr()
        assert status == 0, said.err
        kinds = {}
        for line in (out / "problems.txt").read_text().splitlines():
            kept, kind, _ = line.split("\t")
            kinds[kept, kind] = kinds.get((kept, kind), 0) + 1
        return [from_record(r) for r in store.open_dataset(out)["train"]], kinds

    return run


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    return path


@pytest.fixture
def pictures(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    return tmp_path


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hub_row(source=0, left=1, right=2, vote="leftvote", scores=((6, 4, 2), (5, 2, 3)), **changes):
    """All fields of EditReward-Data on the Hub; scores: overall, following, quality of a side."""
    row = {
        "key": f"key{source}", "unique_key": f"key{source}_{left}_{right}", "pair_index": 3,
        "instruction": "Make the sandwich a hot dog.", "source_img": {"bytes": png(source * 100)},
        "left_output_image": {"bytes": png(source * 100 + left)},
        "right_output_image": {"bytes": png(source * 100 + right)},
        "left_model": f"m{left}", "right_model": f"m{right}", "vote_type": vote,
        "metadata_index": 7, "left_img_rel": f"{source}/m{left}.png",
        "right_img_rel": f"{source}/m{right}.png",
    }  # fmt: skip
    for side, values in zip(SIDES, scores, strict=True):
        names = ("overall", "instruction_following", "quality_aesthetic")
        row |= {f"{side}_{n}_score": v for n, v in zip(names, values, strict=True)}
    return row | changes
