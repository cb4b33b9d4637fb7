"""Scoring on several devices, on devices that are too small, and in bfloat16."""

import contextlib
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_case import family_run, make_groups

from jrm_jax import RewardModel
from jrm_jax.data.pipeline import assemble_batch
from jrm_jax.errors import UserError
from jrm_jax.optim import flatten
from jrm_jax.serving import placing
from jrm_jax.serving.device_call import SCORES, DeviceCall
from jrm_jax.serving.trained import load_trained


@pytest.fixture(scope="module")
def workdir():
    return family_run("qwen3_vl")


@pytest.fixture(scope="module")
def trained(workdir):
    return load_trained(workdir)


@pytest.fixture(scope="module")
def one(trained):
    return RewardModel(trained, batch_size=2, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def groups(one):
    encoded = [one.encode(group) for group in make_groups(20) if not isinstance(group[1], str)]
    bucket = one.bucket_of(max(encoded, key=lambda group: len(group.candidates)))
    return bucket, [group for group in encoded if one.bucket_of(group) == bucket][:10]


def test_eight_devices_score_as_one_does_to_the_bit(workdir, one, groups):
    bucket, encoded = groups
    eight = RewardModel.load(workdir, batch_size=2)
    assert (one.batch_size, eight.batch_size) == (2, 16)
    assert all(len(leaf.sharding.device_set) == 8 and leaf.is_fully_replicated
               for leaf in jax.tree.leaves(eight._runner.device.params))  # fmt: skip
    found = eight.score_rows(bucket, encoded)
    cost = eight._runner.cost(np.array([dataclasses.astuple(bucket)]))[0]
    assert (eight.work.slots, eight.work.rows) == (16 * cost, len(encoded))
    for start in range(0, len(encoded), 2):
        alone = one.score_rows(bucket, encoded[start : start + 2])
        for wanted, scores in zip(alone, found[start:], strict=False):
            np.testing.assert_array_equal(scores.reward_KR, wanted.reward_KR)
    group = make_groups(3)[2]
    assert eight.critique(*group, max_tokens=4) == one.critique(*group, max_tokens=4)
    many = eight.score_batch([group] * 3)  # few: one call with a row for each device
    assert len(many) == 3 and np.ptp([scores.reward_KR for scores in many], axis=0).max() < 1e-5


def test_a_model_too_large_for_a_device_is_split(workdir, one, groups):
    bucket, encoded = groups
    whole = placing._bytes(one._runner.device.params)
    limit = int(0.4 * whole / placing.SHARE)
    split = RewardModel.load(workdir, batch_size=1, device_bytes=limit)
    params = split._runner.device.params
    assert placing._bytes(params) < 0.4 * whole
    kernel = params["backbone"]["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert not kernel.is_fully_replicated and placing.mesh_of(params).shape["fsdp"] == 8
    wanted = one.score_rows(bucket, encoded[:2])
    for scores, alone in zip(split.score_rows(bucket, encoded[:8]), wanted, strict=False):
        np.testing.assert_allclose(scores.reward_KR, alone.reward_KR, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="use more devices, or compute_dtype=bfloat16"):
        RewardModel.load(workdir, device_bytes=whole // 20)
    assert (at_once(split, bucket, encoded[0]), at_once(one, bucket, encoded[0])) == (1, 4)


def at_once(model, bucket, group):
    """How many of four callers' programs run at the same time."""
    device, running, most = model._runner.device, [], []
    gate = threading.Barrier(4)

    def program(params, batch):
        running.append(batch)
        most.append(len(running))
        with contextlib.suppress(threading.BrokenBarrierError):
            gate.wait(1)  # all four come here, or none of the others does
        most.append(len(running))
        running.pop()
        return jnp.zeros((len(batch["candidate_mask"]), bucket.candidates, 1))

    before = device._jitted[(SCORES,)]
    device._jitted[(SCORES,)] = program
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: model.score_rows(bucket, [group]), range(4)))
    finally:
        device._jitted[(SCORES,)] = before
    return max(most)


def test_bfloat16_keeps_matrices_in_it_and_changes_no_score(workdir, trained, groups):
    bucket, encoded = groups
    device = jax.devices()[:1]
    half = RewardModel.load(workdir, compute_dtype="bfloat16", devices=device, batch_size=2)
    kept = flatten(half._runner.device.params)
    small = {path for path, leaf in kept.items() if leaf.dtype == jnp.float32}
    assert sum(kept[path].size for path in small) < 0.4 * sum(x.size for x in kept.values())
    assert all("kernel" not in path for path in small - {"reward_head/kernel"}
               if "patch_embed" not in path)  # fmt: skip
    wide = placing.place(trained.params, placing.lay_out(trained.params, "float32", device))
    processor, tokenizer = half.encoder.processor, half.encoder.tokenizer
    call = DeviceCall(
        trained.config, wide, pixels=(processor.mean, processor.std),
        reward_id=tokenizer.reward_id, compute_dtype="bfloat16",
    )  # fmt: skip
    batch = assemble_batch(encoded[:2], bucket, half.encoder)
    wanted = np.asarray(call((SCORES,), batch))
    for row, scores in enumerate(half.score_rows(bucket, encoded[:2])):
        np.testing.assert_array_equal(
            scores.reward_KR, wanted[row, : len(encoded[row].candidates)]
        )
    with pytest.raises(UserError, match="compute_dtype 'float16'"):
        RewardModel.load(workdir, compute_dtype="float16")


def test_a_batch_holds_at_least_one_group(workdir):
    for size in (0, -3):
        with pytest.raises(UserError, match=f"batch_size is {size}, must be at least 1"):
            RewardModel.load(workdir, batch_size=size, devices=jax.devices()[:1])
