"""Reading held-out splits: the evaluation step, in microbatches; the end of a run."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from test_checkpoint import copy, lose_parameters, saved, trees  # noqa: F401

from configs import joint
from jrm_jax import train
from jrm_jax.checkpoint import open_checkpoints
from jrm_jax.losses import Term
from jrm_jax.step import Outputs, TrainState, make_eval_step


def test_evaluation_in_microbatches_gives_what_the_whole_batch_gives():
    """Values, and a program that has logits of one microbatch at a time."""
    rng = np.random.default_rng(0)
    batch = {
        "example_index": jnp.array([0, 1, 2, 3, -1, -1]),
        "candidate_mask": jnp.ones((6, 2)).at[4:].set(0),
        "preference": jnp.asarray(rng.choice([0, 0.5, 1], (6, 2, 2, 1)), jnp.float32),
        "preference_weight": jnp.ones((6, 2, 2, 1)).at[4:].set(0),
        "x": jnp.asarray(rng.integers(-4, 5, (6, 2)), jnp.float32),
    }

    def forward(params, batch):
        logits = batch["x"][..., None] * params["w"]
        reward = jnp.sum(logits, -1, keepdims=True)
        weight = jnp.sum(batch["candidate_mask"])
        terms = {"language": Term(jnp.sum(logits), weight)}
        return Outputs(reward, terms, jnp.zeros_like(reward))

    params = {"w": jnp.arange(7.0)}  # whole numbers: sums are exact in any order
    whole = make_eval_step(forward)(params, {}, batch)
    for parts in (2, 3, 6):
        step = make_eval_step(forward, parts)
        jax.tree.map(np.testing.assert_array_equal, step(params, {}, batch), whole)
        text = jax.jit(step).lower(params, {}, batch).as_text()
        assert f"tensor<{6 // parts}x2x7xf32>" in text and "tensor<6x2x7xf32>" not in text
    assert whole[0]["ties"].weight == 1 and "deviation" in whole[0]
    plain = jax.make_jaxpr(make_eval_step(forward, 1))(params, {}, batch)
    assert "scan" not in str(plain)


def test_a_damaged_best_checkpoint_does_not_block_a_run_that_is_trained(copy, capsys):  # noqa: F811
    """And what is read for the end takes the place of the state, moments and all."""
    config, said, read = joint.get_config(), [], []
    config.total_steps = 4
    state = TrainState(jnp.int32(4), trees(4)[0], {}, trees(4)[1])

    def read_all(workdir, step, trainable, frozen):
        assert all(
            leaf.is_deleted() for leaf in jax.tree.leaves((state.trainable, state.opt_state))
        )
        read.append((step, trainable))
        return {"test": {"pairs": 2.0, "pair_accuracy": 0.5}}

    with open_checkpoints(copy, said.append) as checkpoints:
        for step, metric in ((3, 0.8), (4, 0.2)):
            meta = {"reward_mean": 0.0, "reward_std": 1.0}
            checkpoints.save(step, *trees(step), meta, metric)
        checkpoints.wait()
        lose_parameters(copy / "1")
        run = SimpleNamespace(
            config=config, checkpoints=checkpoints, state=state, workdir=copy.parent, leader=True,
            seconds=1.0, held_out=SimpleNamespace(read_all=read_all),
            watchdog=SimpleNamespace(beat=lambda: None),
            trace=SimpleNamespace(close=lambda _: None),
            writer=SimpleNamespace(write=lambda *_: None, close=lambda: None),
        )  # fmt: skip
        assert train._Run._finish(run) == 0
    ((step, trainable),) = read
    assert step == 3 == json.loads((copy.parent / "results.json").read_text())["step"]
    jax.tree.map(np.testing.assert_array_equal, trainable, trees(3)[0])
    assert "checkpoint 1 cannot be read" in said[0] and (copy / "1.damaged").is_dir()
