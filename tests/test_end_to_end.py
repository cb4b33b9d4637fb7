"""The entry point, run as a user runs it: train, stop, go on, and report."""

import json
import shutil

import numpy as np
import pytest
from entry_point import (  # noqa: F401  fixtures among them
    STEPS,
    finished,
    metrics,
    parameters,
    runner,
    small_backbone,
    steps,
    stopped,
)

from jrm_jax.checkpoint import open_checkpoints
from jrm_jax.data import store
from jrm_jax.data.schema import from_record

# A run and its results


def test_a_run_reports_held_out_numbers(finished):
    workdir, printed = finished
    results = json.loads((workdir / "results.json").read_text())
    for split in ("valid", "test", "hard"):
        assert results[f"{split}/groups"] == 8
        assert 8 <= results[f"{split}/pairs"] <= 8 * 6
        correct = results[f"{split}/pair_accuracy"] * results[f"{split}/pairs"]
        assert correct == pytest.approx(round(correct))
        assert results[f"{split}/ties"] == int(results[f"{split}/ties"])
        assert np.isfinite(results[f"{split}/language"])
    # the pairs and ties are those of the data
    data = store.open_dataset(next((workdir.parent / "world").glob("world-*")))
    for split in ("test", "hard"):
        labels = [from_record(record) for record in data[split]]
        upper = [np.triu(e.weight[..., 0], 1) > 0 for e in labels]
        pairs = sum(int((u & (e.preference[..., 0] != 0.5)).sum())
                    for e, u in zip(labels, upper, strict=True))  # fmt: skip
        assert results[f"{split}/pairs"] == pairs
        assert results[f"{split}/ties"] == sum(int(u.sum()) for u in upper) - pairs
    assert "pair accuracy" in printed and "ties (outside)" in printed
    assert "test" in printed and "hard" in printed and str(workdir / "results.json") in printed
    assert (workdir / "config.json").exists() and list((workdir / "tensorboard").iterdir())
    rows = metrics(workdir)
    assert [r["step"] for r in rows if r["split"] == "train"] == list(range(1, STEPS + 1))
    assert [r["step"] for r in rows if r["split"] == "valid"] == [6, STEPS]
    assert [r["step"] for r in rows if r["split"] in ("test", "hard")] == 2 * [results["step"]]
    assert all(np.isfinite(r["loss"]) for r in rows if r["split"] == "train")


def test_the_best_step_is_the_one_reported(finished):
    workdir, _ = finished
    results = json.loads((workdir / "results.json").read_text())
    valid = {r["step"]: r for r in metrics(workdir) if r["split"] == "valid"}
    best = max(valid, key=lambda step: (valid[step]["pair_accuracy"], -step))
    assert results["step"] == best and results["total_steps"] == STEPS
    with open_checkpoints(workdir / "checkpoints") as checkpoints:
        assert checkpoints.ranked()[0] == best


def test_a_finished_run_reprints(runner, finished):
    workdir, printed = finished
    before = (workdir / "results.json").read_bytes(), (workdir / "metrics.jsonl").read_bytes()
    done = runner.run(workdir)
    assert done.returncode == 0 and not done.stderr
    assert "is finished; its results:" in done.stdout
    table = printed[printed.index("joint: held-out") : printed.index("results:")].rstrip()
    assert table.strip() in done.stdout
    after = (workdir / "results.json").read_bytes(), (workdir / "metrics.jsonl").read_bytes()
    assert before == after


def test_a_changed_config_is_refused_with_the_difference(runner, finished):
    line = runner.refused(finished[0], loss__margin=0.5, seed=3)
    assert "loss.margin: 0.0 -> 0.5" in line and "seed: 0 -> 3" in line
    assert "batch_size" not in line and "--workdir" in line


def test_a_finished_run_can_be_made_longer(runner, finished):
    workdir, total = shutil.copytree(finished[0], runner.folder / "longer"), STEPS + 1
    kept = json.loads((workdir / "buckets.json").read_text())
    kept[-1]["prompt"] += 8  # as another version might have chosen: the run goes on with it
    (workdir / "buckets.json").write_text(json.dumps(kept))
    done = runner.run(workdir, total_steps=total)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert f"{STEPS} steps become {total}: the learning rate (cosine) goes from" in done.stdout
    assert f"resuming {workdir} from step {STEPS}" in done.stdout
    rows = [r["step"] for r in metrics(workdir) if r["split"] == "train"]
    assert rows == list(range(1, total + 1))
    assert f"; tokens: prompt {kept[-1]['prompt']}, " in done.stdout
    assert json.loads((workdir / "buckets.json").read_text()) == kept
    before = json.loads((finished[0] / "results.json").read_text())
    assert json.loads((workdir / f"results-{STEPS}.json").read_text()) == before
    assert json.loads((workdir / "results.json").read_text())["total_steps"] == total
    assert json.loads((workdir / "config.json").read_text())["total_steps"] == total
    line = runner.refused(workdir)  # fewer again
    assert f"total_steps: {total} -> {STEPS}" in line


# Stop, fail, go on


def test_sigterm_saves_and_exits_143(stopped):
    workdir, status, printed, errors = stopped
    assert status == 143, errors
    assert not errors and "stopped by SIGTERM after step" in printed
    assert not (workdir / "results.json").exists()
    (step,) = steps(workdir)
    assert 2 <= step < 6 and f"after step {step}, which is saved" in printed


def test_a_full_disk_is_one_line_and_spares_what_is_saved(runner, stopped):
    """A limit on the size of a file stands in for the full disk."""
    workdir = shutil.copytree(stopped[0], runner.folder / "full")
    (step,) = steps(workdir)
    before = parameters(workdir, step)
    line = runner.refused(workdir, limit=20_000, flags="")
    assert line.startswith("error: checkpoint 6 could not be written")
    assert "free some space" in line and "then run the same command again" in line
    assert line.endswith(f"complete checkpoints: {step}")
    assert steps(workdir) == [step]
    after = parameters(workdir, step)
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_going_on_equals_never_having_stopped(runner, finished, stopped):
    """Bit for bit: parameters, moments, metrics and results."""
    workdir = shutil.copytree(stopped[0], runner.folder / "resumed")
    (step,) = steps(workdir)
    # left by a process that died later than the save
    (workdir / "metrics.jsonl").open("a").write('{"step": 5, "split": "train"}\n{"ste')
    done = runner.run(workdir, flags="")
    assert done.returncode == 0, done.stderr
    assert f"resuming {workdir} from step {step}" in done.stdout
    wanted, found = parameters(finished[0], STEPS), parameters(workdir, STEPS)
    assert len(wanted) > 50 and list(found) == list(wanted)
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    assert any("mu" in name and found[name].any() for name in found)

    def numbers(rows):
        return [{k: v for k, v in row.items() if "second" not in k} for row in rows]

    assert numbers(metrics(workdir)) == numbers(metrics(finished[0]))
    results = [json.loads((w / "results.json").read_text()) for w in (workdir, finished[0])]
    assert numbers(results)[0] == numbers(results)[1]
