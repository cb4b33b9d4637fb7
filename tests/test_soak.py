"""Random damage to pictures and record files, through build, score and evaluate.

Whatever is broken ends in one line or in a row that is left out and listed; the rows that were not
touched are kept as they were. `JRM_SLOW=1` tries 200 mutations, else 20.
"""

import csv
import io
import json
import os
import random
import signal
from typing import NamedTuple

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
from export_case import make_folder, start

from jrm_jax import RewardModel, evaluate, score
from jrm_jax.data import builders, store
from jrm_jax.data.schema import from_record, in_dimensions

COUNT = 200 if os.environ.get("JRM_SLOW") else 20
SECONDS = 120  # for one mutation, programs that are compiled for odd sizes included
ROWS = 6
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
JUNK = (
    None, True, -1, 10**400, 1e308, float("nan"), float("inf"), "", "x", "0.png", "a\0b", "\ud83d",
    [], [[]], {}, {"a": 1}, {"text": 3}, {"image": None}, [None, None], ["0.png"] * 3,
    {"bytes": "AAAA", "path": None}, "data:image/png;base64,iVBOR", {"role": "user"}, "https://x/y.png",
)  # fmt: skip


def picture(number, kind="PNG"):
    """32 x 24 pixels; among the PNGs deep, transparent and palette ones."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (24, 32, 4), np.uint8)
    mode = ("RGB", "RGBA", "P", "LA")[number % 4] if kind == "PNG" else "RGB"
    image = PIL.Image.fromarray(pixels, "RGBA").convert(mode)
    if kind == "PNG" and number % 8 == 4:
        image = PIL.Image.fromarray(rng.integers(0, 65536, (24, 32), np.uint16))
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


# What is damaged: a row names its pictures by 3 * row, 3 * row + 1, 3 * row + 2


def names(row):
    return [f"{3 * row + i}.png" for i in range(3)]


def text(row):
    return f"Edit {row}: größer, bitte"


def record(row):
    source, first, second = ({"image": name} for name in names(row))
    return {"id": f"row {row}", "prompt": [text(row), source], "ranks": [1, 2],
            "candidates": [first, {"parts": [second], "critique": "Fine, «good»."}]}  # fmt: skip


def chosen(row):
    source, first, second = names(row)
    return {"id": row, "instruction": text(row), "source": source, "chosen": first,
            "rejected": second}  # fmt: skip


def pair(row):
    source, first, second = names(row)
    return {"prompt": text(row), "path_src": source, "path1": first, "path2": second,
            "model1_overall_score": 8, "model2_overall_score": 5, "tie_case": False}  # fmt: skip


def judged(row):
    source, first, second = names(row)
    return {"instruction": text(row), "input_image": source, "output_images": [first, second],
            "SC_reasoning": ["Good.", "«Bad»."], "SC_score": [[20, 20], [3, 4]]}  # fmt: skip


def cells(row):
    source, *edits = names(row)
    both = {"source": source, "instruction": text(row), "critique": 'He said "no", then left'}
    return [both | {"edit": edit, "score": score} for score, edit in enumerate(edits)]


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(
        errors="surrogatepass"
    )


def as_list(rows):
    return json.dumps(rows, ensure_ascii=False, indent=1).encode(errors="surrogatepass")


def as_csv(rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, ("source", "instruction", "edit", "score", "critique"))
    writer.writeheader()
    writer.writerows([cell for row in rows for cell in row])
    return file.getvalue().encode()


def as_parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


class Source(NamedTuple):
    layout: str
    file: str
    row: object  # number -> content
    write: object  # rows -> bytes


SOURCES = (
    Source("jsonl", "rows.jsonl", record, as_lines),
    Source("jsonl", "rows.json", record, as_list),
    Source("jsonl", "pairs.jsonl", chosen, as_lines),
    Source("editreward", "pairs.json", pair, as_list),
    Source("editreward", "pairs.parquet", pair, as_parquet),
    Source("editscore", "judged.jsonl", judged, as_lines),
    Source("csv", "table.csv", cells, as_csv),
)


# Damage


def damage_bytes(rng, data):
    """The same bytes with something cut off, turned, taken out or put in."""
    at = rng.randrange(len(data))
    kind = rng.choice(("cut", "flip", "remove", "insert", "swap"))
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        broken = bytearray(data)
        for place in {at, *(rng.randrange(at, len(data)) for _ in range(rng.randrange(3)))}:
            broken[place] ^= 1 << rng.randrange(8)
        return bytes(broken)
    if kind == "remove":
        return data[:at] + data[at + rng.randrange(1, 40) :]
    if kind == "insert":
        noise = rng.randbytes(rng.randrange(1, 40))
        junk = rng.choice((noise, b'"', b"\0", b"\xff\xfe", b"[[", b"\n"))
        return data[:at] + junk + data[at:]
    return data[:at] + data[at:][::-1][:20] + data[at + 20 :]


def damage_value(rng, value):
    """The same JSON with one value, at any depth, replaced by junk."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: damage_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], damage_value(rng, value[at]), *value[at + 1 :]]
    return rng.choice(JUNK)


class Damage(NamedTuple):
    """hit: rows that may change. whole: the other rows must be there, not only unchanged."""

    hit: set[int]
    whole: bool


def damage(rng, source, folder) -> Damage:
    path, rows = folder / source.file, [source.row(row) for row in range(ROWS)]
    data = source.write(rows)
    path.write_bytes(data)
    kind = rng.choice(("picture", "picture", "bytes", "value", "encoding"))
    if kind == "picture":
        row = rng.randrange(ROWS)
        file = folder / rng.choice(names(row))
        made = picture(rng.randrange(99), rng.choice(FORMATS))
        file.write_bytes(damage_bytes(rng, made))
        return Damage({row}, True)
    if kind == "value" and source.write in (as_lines, as_list):
        row = rng.randrange(ROWS)
        rows[row] = damage_value(rng, rows[row])
        path.write_bytes(source.write(rows))
        return Damage({row}, True)
    if kind == "encoding" and source.write is not as_parquet:
        encoding = rng.choice(("utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252"))
        path.write_bytes(data.decode().encode(encoding))
        hit = set(range(ROWS)) if encoding in ("latin-1", "cp1252") else set()
        return Damage(hit, True)
    broken = damage_bytes(rng, data)
    path.write_bytes(broken)
    if source.write is as_lines:  # what is cut off or removed is at most the lines that follow
        kept = {row for row in range(ROWS) if as_lines([rows[row]]) in broken}
        return Damage(set(range(ROWS)) - kept, True)
    if source.write is as_parquet:  # it has no sums: another value may be as good as the old one
        return Damage(set(range(ROWS)), False)
    parts = [source.write([row]) for row in rows]  # without the head of the table or the list
    parts = [part[part.index(b"\n") + 1 :].rstrip(b"]\n") for part in parts]
    return Damage({row for row in range(ROWS) if parts[row] not in broken}, False)


# Through the commands


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(a run's folder, its model)"""
    parent = tmp_path_factory.mktemp("soak")
    workdir = start(parent, make_folder(parent, "qwen3_vl"), "run")
    return workdir, RewardModel.load(workdir, batch_size=8)


@pytest.fixture
def run(model, monkeypatch, capsys):
    """run(main, *arguments) -> status; whatever is said of an error is one line."""
    workdir, loaded = model
    monkeypatch.setattr(RewardModel, "load", lambda *args, **options: loaded)  # once for all

    def stopped(*_):
        raise AssertionError(f"more than {SECONDS} s")

    def call(main, *arguments):
        capsys.readouterr()
        before = signal.signal(signal.SIGALRM, stopped)
        signal.alarm(SECONDS)
        try:
            status = main([str(word).replace("WORKDIR", str(workdir)) for word in arguments])
        except SystemExit as end:
            status = end.code
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        said = capsys.readouterr()
        words = status if isinstance(status, str) else said.err
        assert "Traceback" not in said.err + said.out
        if status not in (0, None):
            assert "\n" not in words.strip() and len(words) < 1500, words
        return status

    return call


def built(run, source, folder, out):
    """{row: example} of a build that leaves out what is bad; the rows that it counted out."""
    arguments = [source.layout, f"--data={folder / source.file}", f"--images={folder}"]
    run(builders.main, *arguments, f"--out={folder / (out + '-strict')}")
    if run(builders.main, *arguments, f"--out={folder / out}", "--skip_bad"):
        return {}, ROWS
    found = {}
    for example in map(from_record, store.open_dataset(folder / out)["train"]):
        told = [part.text for part in example.prompt if hasattr(part, "text")]
        found |= {row: example for row in range(ROWS) if told == [text(row)]}
    return found, sum(store.read_manifest(folder / out)["left_out"].values())


def same(one, other):
    one, other = (in_dimensions(example, ("overall",)) for example in (one, other))
    return (
        (one.prompt, one.candidates) == (other.prompt, other.candidates)
        and np.array_equal(one.preference, other.preference)
        and np.array_equal(one.weight, other.weight)
    )


def scores_of(run, source, folder, out):
    """{id: rewards} of the command's file, where a row was scored in full."""
    run(score.main, "--model=WORKDIR", f"--input={folder / source.file}", f"--images={folder}",
        f"--output={folder / out}")  # fmt: skip
    if not (folder / out).exists():
        return {}
    rows = [json.loads(line) for line in (folder / out).read_text().splitlines()]
    return {
        str(row["id"]): [one["reward"] for one in row["candidates"]]
        for row in rows
        if "id" in row and "error" not in row and not any("error" in c for c in row["candidates"])
    }


def predictions_of(run, source, folder, out):
    run(evaluate.main, "--checkpoint=WORKDIR", "--benchmark=jsonl", f"--images={folder}",
        f"--data={folder / source.file}", f"--out={folder / out}.json")  # fmt: skip
    path = folder / f"{out}_predictions" / "predictions.jsonl"
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {str(row["id"]): next(iter(row["scores"].values())) for row in rows}


def fill(folder):
    folder.mkdir()
    for number in range(3 * ROWS):
        (folder / f"{number}.png").write_bytes(picture(number, "PNG" if number % 3 else "JPEG"))


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """Of undamaged files, filled as they are asked for: {file: (examples, scores, predictions)}."""
    return {}


def through(run, source, folder, out):
    found = built(run, source, folder, f"{out}-set")
    scored = predicted = {}
    if source.row is record:
        scored = scores_of(run, source, folder, f"{out}-scores.jsonl")
        predicted = predictions_of(run, source, folder, f"{out}-results")
    return *found, scored, predicted


@pytest.mark.parametrize("seed", range(COUNT))
def test_damage(run, wanted, tmp_path, seed):
    rng = random.Random(seed)
    source = SOURCES[seed % len(SOURCES)]
    if source.file not in wanted:
        fill(tmp_path / "good")
        rows = [source.row(row) for row in range(ROWS)]
        (tmp_path / "good" / source.file).write_bytes(source.write(rows))
        wanted[source.file] = through(run, source, tmp_path / "good", "good")
        examples, left, scored, predicted = wanted[source.file]
        assert len(examples) == ROWS and not left
        assert len(scored) == len(predicted) == (ROWS if source.row is record else 0)
    fill(tmp_path / "bad")
    hit, whole = damage(rng, source, tmp_path / "bad")
    examples, left, scored, predicted = through(run, source, tmp_path / "bad", "bad")
    for row in set(range(ROWS)) - hit:
        if row in examples:
            assert same(examples[row], wanted[source.file][0][row]), row
        else:
            assert left and not whole, f"row {row} is gone"
        for found, good in ((scored, wanted[source.file][2]), (predicted, wanted[source.file][3])):
            name = f"row {row}"
            if name in found:
                np.testing.assert_allclose(found[name], good[name], atol=1e-4)
            else:
                assert not whole or name not in good, f"row {row} is not scored"
