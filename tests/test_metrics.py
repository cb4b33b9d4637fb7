"""Metrics: sums with weights, and the files of a run after a restart."""

import json
import math

import numpy as np
import pytest

from jrm_jax.metrics import JSONL, Accumulator, Writer, duration
from jrm_jax.run.check_config import METRICS


def rows(folder):
    return [json.loads(line) for line in (folder / JSONL).read_text().splitlines()]


def test_accumulator_divides_sums_by_weights():
    totals = Accumulator()
    totals.add({"preference": (np.float32(3.0), np.float32(2.0)), "language": (1.0, 0.0)})
    totals.add({"preference": (1.0, 6.0), "ties": (4.0, 1.0)})
    assert totals.mean("preference") == 0.5  # not the mean of 1.5 and 1/6
    assert totals.sum("preference") == 4 and totals.weight("preference") == 8
    assert math.isnan(totals.mean("language")) and math.isnan(totals.mean("absent"))
    assert totals.sum("absent") == totals.weight("absent") == 0
    totals.add({"deviation": (3.0, 2.0), "teacher": (1.0, 2.0)})
    summary = totals.summary()
    assert (summary["deviation"], summary["teacher"], summary["preference"]) == (1.5, 0.5, 0.5)


def test_accumulator_counts_in_float64():
    totals = Accumulator()
    for _ in range(1000):
        totals.add({"loss": (np.float32(1.0), np.float32(2**15))})
    totals.add({"loss": (2.0**40, 0.0)})
    totals.add({"loss": (1.0, 1.0)})
    assert totals.sum("loss") == 2**40 + 1001 and totals.weight("loss") == 1000 * 2**15 + 1


def test_summary_counts_pairs_and_ties_and_spreads_rewards():
    totals = Accumulator()
    for correct, pairs, ties, rewards in ((3, 4, 2, (1.0, 3.0)), (0, 2, 1, (5.0, 7.0))):
        totals.add(
            {
                "pair_accuracy": (correct, pairs),
                "ties": (ties, 1.0),
                "reward": (sum(rewards), 2),
                "reward_square": (sum(r * r for r in rewards), 2),
                "loss": (9.0, 1.0),
            }
        )
    summary = totals.summary()
    assert summary == {
        "pair_accuracy": 0.5, "pairs": 6, "ties": 3, "reward_mean": 4,
        "reward_std": pytest.approx(np.std([1, 3, 5, 7])), "loss": 9,
    }  # fmt: skip
    assert Accumulator().summary() == {}


def test_whatever_a_step_measures_reaches_the_summary():
    """Losses that checkpoints can be ranked by, the deviation, and what will come."""
    names = {name.lstrip("-") for name in METRICS} | {"deviation", "another_loss"}
    totals = Accumulator()
    totals.add({name: (3.0, 2.0) for name in names})
    assert {name: totals.summary()[name] for name in names} == dict.fromkeys(names, 1.5)


def test_not_a_number_is_null_in_json(tmp_path):
    writer = Writer(tmp_path, 10, 0)
    writer.write(1, "train", {"loss": math.nan, "grad_norm": math.inf, "pairs": np.float32(2)})
    writer.close()
    text = (tmp_path / JSONL).read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert rows(tmp_path) == [
        {"step": 1, "split": "train", "loss": None, "grad_norm": None, "pairs": 2.0}
    ]


def test_the_mean_of_nothing_is_a_dash_and_no_warning(tmp_path, capsys, caplog):
    writer = Writer(tmp_path, total_steps=4, start=0)
    writer.write(1, "valid", {"preference": 0.5, "teacher": math.nan})
    writer.progress(1, {"preference": 0.5, "teacher": math.nan})
    writer.close()
    assert "step 1/4  preference 0.5  teacher -  left" in capsys.readouterr().out
    assert not caplog.records  # tensorboardX's


def test_lines_after_the_restored_step_and_broken_lines_are_cut(tmp_path):
    writer = Writer(tmp_path, 10, 0)
    for step in (2, 4, 6):
        writer.write(step, "train", {"loss": step})
    writer.close()
    with (tmp_path / JSONL).open("ab") as file:
        file.write(b'\xff\xfe\nnull\n17\n{"step": null}\n{"split": "train"}\n')  # a bad disk
        file.write(b'{"step": 4, "split": "va')  # a crash in the middle of a line
    writer = Writer(tmp_path, 10, 4)
    writer.write(5, "train", {"loss": 50})
    writer.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(2, 2), (4, 4), (5, 50)]
    assert (tmp_path / JSONL).read_text().endswith("}\n")
    assert not list(tmp_path.glob("*.tmp"))
    writer = Writer(tmp_path, 10, 0)  # anew: nothing of before is left
    writer.close()
    assert rows(tmp_path) == []


def test_each_line_is_there_at_once(tmp_path):
    writer = Writer(tmp_path, 10, 0)
    writer.write(1, "train", {"loss": 1})
    assert len(rows(tmp_path)) == 1
    writer.close()


def test_an_inactive_writer_writes_nothing(tmp_path, capsys):
    writer = Writer(tmp_path, 10, 0, active=False)
    writer.write(1, "train", {"loss": 1})
    writer.progress(1, {"loss": 1})
    writer.say("words")
    writer.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_progress_is_a_plain_line_away_from_a_terminal(tmp_path, capsys):
    writer = Writer(tmp_path, 100, 40)
    writer._began -= 10  # ten steps in ten seconds, fifty to go
    writer.progress(50, {"loss": 0.123456})
    writer.close()
    assert capsys.readouterr().out == "step 50/100  loss 0.1235  left 0:50\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0:00"), (-3, "0:00"), (59.6, "1:00"), (123, "2:03"), (3599.4, "59:59"),
     (3600, "1:00:00"), (3723, "1:02:03"), (90061, "25:01:01")],
)  # fmt: skip
def test_duration(seconds, words):
    assert duration(seconds) == words
