"""The command for a machine with an accelerator, with small sizes: it measures what it says, and
what fails costs one row."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jrm_jax import build, sharding  # noqa: E402
from jrm_jax.benchmarks.accelerator import __main__ as command  # noqa: E402
from jrm_jax.benchmarks.accelerator import case, theirs, trace  # noqa: E402
from jrm_jax.benchmarks.accelerator.page import make_page  # noqa: E402
from jrm_jax.benchmarks.accelerator.parts import PARTS  # noqa: E402
from jrm_jax.model.config import load_config  # noqa: E402
from jrm_jax.model.published import PUBLISHED  # noqa: E402
from jrm_jax.optim import flatten  # noqa: E402
from jrm_jax.planning import compiling  # noqa: E402
from jrm_jax.run.flops import train_flops  # noqa: E402

MODEL = "qwen3_vl_2b"


@pytest.mark.parametrize("name", [n for n in PUBLISHED if n.startswith("qwen3_vl")])
def test_both_sides_have_the_published_architecture(name, tmp_path):
    theirs.hf_config(PUBLISHED[name]).save_pretrained(tmp_path)
    assert load_config(tmp_path) == PUBLISHED[name]


def test_the_batch_fills_the_slots_of_a_real_step():
    config, backbone = case.make_config(MODEL, case.REAL), PUBLISHED[MODEL]
    batch = case.make_batch(config, backbone, case.REAL)
    assert batch["prompt_tokens"].shape == (4, 512)
    assert batch["candidate_tokens"].shape == (4, 2, 1408)
    assert batch["critique_targets"].shape == (4, 2, 896)
    assert batch["patches"].shape[:3] == (4, 3, 2048)
    for name in ("prompt_segments", "candidate_segments", "critique_weights"):
        assert (batch[name] == 1).all(), name
    assert batch["patch_segments"].mean() > 0.98
    # the reward token, then the critique that it predicts
    assert (np.diff(batch["critique_index"]) == 1).all()
    after = batch["candidate_tokens"][..., 513:]
    np.testing.assert_array_equal(after, batch["critique_targets"][..., :-1])

    mesh = build.make_mesh(config, backbone, jax.devices()[:1])
    state, _ = build.abstract_state(config, backbone, mesh)
    flops = train_flops(
        backbone, case.REAL.bucket(True), state.trainable, state.frozen, "full"
    )
    assert 4 * flops.model / 1e12 == pytest.approx(198.9, abs=0.05)


@pytest.mark.parametrize("name", [MODEL, "qwen3_5_2b"])
def test_the_small_case_is_of_the_same_kind(name):
    backbone, whole = case.architecture(name, True), PUBLISHED[name]
    assert bool(backbone.vision.deepstack) == bool(whole.vision.deepstack)
    config = case.make_config(name, case.TINY)
    mesh = build.make_mesh(config, backbone, jax.devices()[:1])
    state, _ = build.abstract_state(config, backbone, mesh)
    whole_state, _ = build.abstract_state(config, whole, mesh)

    def names(state):
        """The last two parts of every parameter's path."""
        return {tuple(path.split("/")[-2:]) for path in flatten(state.trainable)}

    assert names(state) == names(whole_state)
    batch = case.make_batch(config, backbone, case.TINY)
    assert batch["candidate_tokens"].max() < backbone.text.vocab


@pytest.mark.parametrize(("dtype", "search"), [("float32", False), ("bfloat16", True)])
def test_only_train_steps_in_bfloat16_let_a_compiler_search(dtype, search, monkeypatch):
    asked = []
    monkeypatch.setattr(
        sharding, "compiler_options", lambda mesh, search=False: asked.append(search)
    )
    config, backbone = case.make_config(MODEL, case.TINY), case.architecture(MODEL, True)
    config.backbone.compute_dtype = dtype
    compiling.train_parts(config, backbone, build.make_mesh(config, backbone, jax.devices()[:1]))
    assert asked == [search, False]  # the train step, the evaluation


def test_edits_are_the_same_number_in_larger_groups():
    many = case.REAL.scored_with(8)
    assert many.scored * many.candidates == case.REAL.scored * case.REAL.candidates == 32
    config = case.make_config(MODEL, case.TINY)
    small = case.TINY.scored_with(4)
    batch = case.make_batch(config, case.architecture(MODEL, True), small, critique=False)
    assert batch["candidate_mask"].shape == (1, 4) and batch["candidate_mask"].all()
    assert batch["patches"].shape[1] == 5  # the source once


def test_both_sides_begin_with_the_same_loss_and_gradient(tmp_path):
    full, half = theirs.losses(tmp_path, MODEL)
    for row, tolerance in ((full, 1e-4), (half, 3e-2)):
        for name in ("loss", "grad_norm"):
            assert row["jrm_jax"][name] == pytest.approx(row["torch"][name], rel=tolerance), row
    assert full["jrm_jax"]["loss"] > 1 and full["jrm_jax"]["loss"] != half["jrm_jax"]["loss"]


def test_a_trace_becomes_a_table(tmp_path):
    step = jax.jit(lambda x: jnp.sin(x @ x).sum())
    x = jnp.ones((200, 200))
    step(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(2):
            step(x).block_until_ready()
    rows = trace.kernels(tmp_path, 2)
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert len(rows) <= trace.MOST + 1
    assert all(row["ms"] >= 0 and row["calls"] > 0 for row in rows)


def test_what_fails_or_takes_too_long_costs_its_own_row(tmp_path, monkeypatch, capsys):
    out, page = tmp_path / "record.json", tmp_path / "page.md"
    arguments = ["--tiny", f"--out={out}", f"--page={page}", "--commit=abc"]
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    command.main([*arguments, "--parts=rate"])
    failed = json.loads(out.read_text())["parts"]["rate"]
    assert failed["status"] == "failed with status 1" and "nonsense" in "\n".join(failed["log"])
    assert "a matrix product: failed with status 1" in page.read_text()

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    short = PARTS["rate_torch"]._replace(seconds=0.1)
    monkeypatch.setitem(PARTS, "rate_torch", short)
    command.main([*arguments, "--parts=rate,rate_torch"])
    parts = json.loads(out.read_text())["parts"]
    assert parts["rate"]["status"] == "done" and parts["rate"]["rows"][0]["tflop_per_second"] > 0
    assert parts["rate_torch"]["status"] == "stopped after 0 s"

    # no time for the others: they are named, and what was measured stays
    command.main([*arguments, "--minutes=0"])
    after = json.loads(out.read_text())["parts"]
    assert after["rate"] == parts["rate"]
    assert {after[name]["status"] for name in PARTS if name not in parts} == {"not reached"}
    assert "commit abc" in page.read_text() and "- scoring, 8B: not reached" in page.read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command.main(["--parts=rat"])
    assert "no part 'rat'" in capsys.readouterr().err


def test_the_page_compares_the_sides():
    step = {"model": MODEL, "trains": "everything", "attention": "auto", "remat": "dots"}
    numbers = {"seconds": 0.5, "tflop_per_second": 400.0, "pairs_per_second": 8.0}
    kernels = [{"name": "gemm|a", "calls": 3.0, "ms": 2.0, "share": 1.0}]
    numbers |= {"peak_gib": 60.0, "compile_seconds": 41.0}
    scored = {"model": MODEL, "candidates": 2}
    both = {"loss": 2.0, "grad_norm": 1.0}
    rows = {
        "rate": [{"side": 8192, "tflop_per_second": 800.0}],
        "step_2b": [
            step | {"remat": "none", "failed": "does not fit"},
            step | numbers,
            step | {"kernels": kernels},
        ],
        "step_2b_torch": [step | {"seconds": 2.0, "pairs_per_second": 2.0}],
        "start": [{"start": "first", "seconds_to_step": 33.0}],
        "score_2b": [scored | {"seconds": 0.1, "edits_per_second": 300.0}],
        "score_2b_torch": [scored | {"seconds": 0.2, "edits_per_second": 150.0}],
        "losses": [{"dtype": "float32", "jrm_jax": both, "torch": both}],
        "parity": [{"platform": "gpu", "passed": 20, "skipped": 0, "failed_tests": {"a": "b"}}],
    }
    parts = {
        name: {"words": PARTS[name].words, "status": "done", "seconds": 1.0, "rows": found}
        for name, found in rows.items()
    }
    machine = {"cards": ["H"], "cores": 16, "python": "3", "versions": {"jax": "1"}, "commit": "c"}
    page = make_page(
        {"parts": parts, "machine": machine, "command": "x", "date": "d", "tiny": False}
    )
    assert "| everything | auto | dots | 0.5 | 400 | 0.5 | 8 | 4 | 60 | 41 |" in page
    assert "| 300 | 2 |" in page and "20 passed, 1 failed" in page and "gemm/a" in page
    # said in its row; what has no numbers at all is listed below
    assert "| none | does not fit |" in page and "Not measured" not in page
    parts["step_2b"]["rows"] = rows["step_2b"][:1]
    page = make_page(
        {"parts": parts, "machine": machine, "command": "x", "date": "d", "tiny": False}
    )
    assert "## Not measured\n\n- joint step, 2B: does not fit" in page
