"""Building a data set from a few rows, for the tests of the layouts."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from benchmark_files import png

from jrm_jax.data import builders, store
from jrm_jax.data.schema import from_record


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
