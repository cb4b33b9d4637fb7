"""Pictures that stand in a benchmark's files lie on the disk until they are scored."""

import errno
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from benchmark_files import editscore_rows, png, write_parquet

from jrm_jax.data.schema import Candidate, Image, PreferenceExample, Text
from jrm_jax.data.store import write_dataset
from jrm_jax.errors import UserError
from jrm_jax.evaluation import held
from jrm_jax.evaluation.cases import Issues
from jrm_jax.evaluation.layouts import LAYOUTS


def pictures_of(name, path):
    cases = LAYOUTS[name].read(str(path), Issues()).cases
    return [picture for case in cases for picture in case.pictures]


def in_memory(pictures):
    """Bytes of pictures that the cases keep."""
    return sum(len(one.data) for one in pictures if isinstance(one.data, bytes))


def test_pictures_of_parquet_files_are_kept_on_the_disk_and_once(tmp_path, monkeypatch):
    monkeypatch.setattr(held, "IN_MEMORY", 100)
    rows = [{"pair_id": str(i), "label": "add", "instruction": "Edit",
             "original_image": {"bytes": png(0), "path": "0.png"},
             "edited_images": [{"bytes": png(2 * i + k), "path": None} for k in (1, 2)]}
            for i in range(5)]  # fmt: skip
    write_parquet(tmp_path / "rows.parquet", rows)
    found = pictures_of("mer_bench", tmp_path / "rows.parquet")
    wanted = [p["bytes"] for r in rows for p in (r["original_image"], *r["edited_images"])]
    assert in_memory(found) == 0 and len(found) == 15
    spool = found[0].data.store
    assert spool._file._rolled and spool._end == sum(map(len, set(wanted)))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda one: one.data.read(), found * 20)) == wanted * 20
    assert [one.read() for one in found] == wanted
    assert found[0].key == found[3].key != found[1].key and "(0.png)" in found[0].name


def test_pictures_of_a_prepared_set_stay_there(tmp_path):
    ones = np.array([[[0.0], [1.0]], [[0.0], [0.0]]], np.float32)
    examples = [
        PreferenceExample(
            f"e{i}", (Text("Edit"), Image(png(0))),
            tuple(Candidate((Image(png(2 * i + k)),)) for k in (1, 2)),
            ones, np.abs(ones - ones.transpose(1, 0, 2)), ("overall",),
        )
        for i in range(3)
    ]  # fmt: skip
    write_dataset(tmp_path / "set", {"valid": examples}, ("overall",), "own")
    found = pictures_of("jsonl", tmp_path / "set")
    wanted = [part.data for example in examples
              for part in (example.prompt[1], *(c.parts[0] for c in example.candidates))]
    assert in_memory(found) == 0 and [one.read() for one in found] == wanted
    assert found[0].key == found[3].key


@pytest.mark.parametrize("size", [10, 10**5])
def test_a_disk_that_does_not_take_them_is_one_line(monkeypatch, size):
    monkeypatch.setattr(held, "IN_MEMORY", 100)
    spool = held.Spool()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool._file, "write", full)
    with pytest.raises(UserError, match="free some space.*TMPDIR"):
        spool.put(bytes(size))


def test_rows_of_every_kind_hold_their_pictures_so(tmp_path):
    write_parquet(tmp_path / "rows.parquet", editscore_rows())
    found = pictures_of("editscore_bench", tmp_path / "rows.parquet")
    assert found and in_memory(found) == 0
    assert all(one.like is None or one.like.data.digest for one in found)
