"""Mesh, sharding rules, optimizer state and batch placement, on eight simulated devices."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from aot_case import SMALL_HYBRID
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jrm_jax.errors import UserError
from jrm_jax.heads import init_facts_head, init_reward_head, init_words_head
from jrm_jax.model.config import BackboneConfig, TextConfig, VisionConfig
from jrm_jax.model.tensors import abstract_params, flatten
from jrm_jax.sharding import (
    RULES,
    batch_sharding,
    check_batch_size,
    check_mesh,
    compiler_options,
    fit_spec,
    local_rows,
    make_mesh,
    optimizer_shardings,
    param_shardings,
    place_batch,
    state_shardings,
)

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")


class State(NamedTuple):
    step: object
    trainable: object
    frozen: object
    opt_state: object


def config_of(family: str) -> BackboneConfig:
    if family == "qwen3_5":
        return dataclasses.replace(
            SMALL_HYBRID, text=dataclasses.replace(SMALL_HYBRID.text, hidden=64)
        )
    qwen3 = family == "qwen3_vl"
    vision = VisionConfig(
        family=family,
        depth=4,
        hidden=32,
        mlp=44,
        heads=4,
        patch=4,
        merge=2,
        temporal_patch=2,
        channels=3,
        out_hidden=64,
        deepstack=(1,) if qwen3 else (),
        full_attention=() if qwen3 else (1, 3),
        window=0 if qwen3 else 16,
        num_positions=16 if qwen3 else 0,
    )
    text = TextConfig(
        layers=3,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        mlp=96,
        vocab=130,
        rope_theta=1e6,
        mrope_section=(4, 2, 2),
        mrope_interleaved=qwen3,
        eps=1e-6,
        qkv_bias=not qwen3,
        qk_norm=qwen3,
        tie_embeddings=False,
    )
    return BackboneConfig(family, vision, text, 120, 121, 122)


def abstract(family: str) -> dict:
    return abstract_params(config_of(family)) | {
        "reward_head": jax.eval_shape(
            lambda: init_reward_head(jax.random.key(0), 64, 3, hidden=(32, 16), deviation=True)
        ),
        "reward_embedding": jax.ShapeDtypeStruct((64,), jnp.float32),
        "facts_head": jax.eval_shape(lambda: init_facts_head(64, 7)),
        "words_head": jax.eval_shape(lambda: init_words_head(64)),
    }


@pytest.mark.parametrize(
    "sizes, shape",
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, -1), (1, 4, 2)), ((8, 1, 1),) * 2],
)
def test_make_mesh(sizes, shape):
    mesh = make_mesh(*sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    "sizes, words",
    [
        ((-1, -1, 1), "at most one"),
        ((0, 8, 1), "positive"),
        ((2, -2, 2), "positive"),
        ((3, -1, 1), "data=3.*divide.* 8"),
        ((2, 2, 1), "fsdp=2.*multiply to.* 8"),
        ((16, 1, 1), "multiply to.* 8"),
    ],
)
def test_make_mesh_refuses(sizes, words):
    with pytest.raises(UserError, match=words):
        make_mesh(*sizes)


@dataclass(frozen=True)
class _Chip:
    """What mesh_utils asks of a TPU device."""

    id: int
    slice_index: int
    coords: tuple
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0


def test_data_axis_crosses_tpu_slices():
    chips = [
        _Chip(4 * s + 2 * y + x, s, (x, y, 0)) for s in range(2) for y in range(2) for x in range(2)
    ]
    mesh = make_mesh(2, -1, 1, devices=chips)
    assert mesh.devices.shape == (2, 4, 1)
    for half in mesh.devices:
        assert len({chip.slice_index for chip in half.flat}) == 1
    with pytest.raises(UserError, match="multiple of the 2 TPU slices"):
        make_mesh(1, -1, 1, devices=chips)


def test_check_mesh_names_the_heads_that_do_not_split():
    config = config_of("qwen3_vl")
    check_mesh(config, make_mesh(1, -1, 2))
    with pytest.raises(UserError, match="tensor is 4.* 2 key-value heads: use 2 "):
        check_mesh(config, make_mesh(1, -1, 4))


def test_fit_spec_drops_only_what_does_not_divide():
    mesh = make_mesh(1, 4, 2)
    assert fit_spec(("tensor", "fsdp"), (6, 8), mesh) == P("tensor", "fsdp")
    assert fit_spec(("tensor", "fsdp"), (6, 6), mesh) == P("tensor", None)
    assert fit_spec((None, "fsdp", "tensor"), (4, 8, 3), mesh) == P(None, "fsdp", None)


def test_every_leaf_has_one_rule_and_every_rule_a_leaf():
    used = set()
    for family in FAMILIES:
        for path, leaf in flatten(abstract(family)).items():
            matching = [rule for rule in RULES if re.fullmatch(rule[0], path)]
            assert len(matching) == 1, (path, matching)
            assert len(matching[0][1]) == len(leaf.shape), path
            used.add(matching[0])
    assert used == set(RULES)


def test_large_leaves_are_split_by_fsdp_and_tensor():
    specs = flatten(jax.tree.map(lambda s: s.spec, _shard(make_mesh(1, 4, 2), "qwen3_vl")))
    assert specs["backbone/decoder/layers/attn/q/kernel"] == P(None, "fsdp", "tensor")
    assert specs["backbone/decoder/layers/mlp/down/kernel"] == P(None, "tensor", "fsdp")
    assert specs["backbone/embed/embedding"] == P("tensor", "fsdp")
    assert specs["language_head/kernel"] == P("fsdp", "tensor")
    assert specs["backbone/vision/blocks_0/attn/qkv/kernel"] == P(None, "fsdp", None)
    for family in FAMILIES:
        mesh = make_mesh(1, 4, 2)
        shardings = flatten(_shard(mesh, family))
        for path, leaf in flatten(abstract(family)).items():
            whole = np.prod(leaf.shape)
            if whole > 1500:
                here = np.prod(shardings[path].shard_shape(leaf.shape))
                assert here * 4 <= whole, path
    # 130 rows of vocabulary do not divide by 4: that dimension stays whole, the other is split
    specs = _shard(make_mesh(1, 2, 4), "qwen3_vl")
    assert specs["backbone"]["embed"]["embedding"].spec == P(None, "fsdp")


    shardings = flatten(_shard(make_mesh(1, 4, 2), "qwen3_5"))
    specs = {path: sharding.spec for path, sharding in shardings.items()}
    delta = "backbone/decoder/blocks/delta/mixer/"
    assert specs[delta + "qkv/kernel"] == P(None, "fsdp", None)
    assert specs[delta + "out/kernel"] == P(None, "tensor", "fsdp")
    assert specs["backbone/decoder/blocks/full/attn/q/kernel"] == P(None, "fsdp", "tensor")


def _shard(mesh, family):
    return param_shardings(abstract(family), mesh)


def test_unmatched_leaves_are_all_named():
    tree = abstract("qwen3_vl")
    tree["backbone"]["vision"]["surprise"] = {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    tree["backbone"]["decoder"]["norm"] = {"scale": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    with pytest.raises(UserError) as error:
        param_shardings(tree, make_mesh())
    assert "backbone/vision/surprise/kernel [2, 3]" in str(error.value)
    assert "backbone/decoder/norm/scale [2, 3]" in str(error.value)
    assert "embedding" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["adamw", "groups", "adafactor"])
def test_state_shardings_follow_the_parameters(kind):
    tree = abstract("qwen3_vl")
    frozen = {"backbone": {"vision": tree["backbone"].pop("vision")}}
    labels = jax.tree_util.tree_map_with_path(
        lambda keys, _: "head" if "head" in keys[0].key else "body", tree
    )
    optimizer = {
        "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        "groups": optax.multi_transform(
            {"head": optax.adamw(1e-3), "body": optax.adamw(optax.constant_schedule(1e-4))}, labels
        ),
        "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=16),
    }[kind]
    opt_state = jax.eval_shape(optimizer.init, tree)
    state = State(jax.ShapeDtypeStruct((), jnp.int32), tree, frozen, opt_state)
    mesh = make_mesh(2, 2, 2)
    shardings = state_shardings(state, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    assert shardings.step.spec == P()
    vision = shardings.frozen["backbone"]["vision"]
    assert vision["blocks_0"]["mlp"]["fc1"]["kernel"].spec == P(None, "fsdp", "tensor")
    moments = [
        (jax.tree_util.keystr(keys), sharding.spec, leaf.shape)
        for (keys, sharding), leaf in zip(
            jax.tree_util.tree_leaves_with_path(shardings.opt_state),
            jax.tree.leaves(opt_state),
            strict=True,
        )
    ]
    gate = [m for m in moments if m[0].endswith("['layers']['mlp']['gate']['kernel']")]
    if kind == "adafactor":  # factored: sums over rows and columns, small, everywhere
        assert gate and all(spec == P() for _, spec, _ in gate)
    else:
        assert [spec for _, spec, _ in gate] == [P(None, "fsdp", "tensor")] * 2
    assert all(spec == P() for _, spec, shape in moments if shape == ())


def test_optimizer_state_that_belongs_to_nothing_is_named():
    tree = abstract("qwen3_vl")
    with pytest.raises(UserError, match="no parameter goes with.*history.*5, 6"):
        optimizer_shardings({"history": jnp.zeros((5, 6))}, tree, make_mesh())


def test_born_sharded_and_updated_where_they_lie():
    mesh = make_mesh(1, 4, 2)
    tree, optimizer = abstract("qwen2_5_vl"), optax.adamw(1e-3)

    def init():
        params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), tree)
        return State(jnp.int32(0), params, {}, optimizer.init(params))

    state = jax.jit(init, out_shardings=state_shardings(jax.eval_shape(init), mesh))()
    kernel = state.trainable["backbone"]["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 64 // 4, 96 // 2)
    moment = state.opt_state[0].mu["backbone"]["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert moment.sharding == kernel.sharding


def test_place_batch_spreads_rows_over_data_and_fsdp():
    mesh = make_mesh(2, 2, 2)
    batch = {
        "tokens": np.arange(24, dtype=np.int32).reshape(8, 3),
        "patches": np.arange(16, dtype=np.uint8).reshape(8, 2, 1),
        "index": np.arange(8, dtype=np.int32),
        "critique_targets": np.zeros((8, 2, 0), np.int32),
    }
    placed = place_batch(batch, mesh)
    for name, array in placed.items():
        assert array.sharding.is_equivalent_to(batch_sharding(mesh), array.ndim)
        assert array.dtype == batch[name].dtype
        np.testing.assert_array_equal(array, batch[name])
        assert array.addressable_shards[0].data.shape[0] == 2
    np.testing.assert_array_equal(local_rows(8, mesh), np.arange(8))


def test_batch_sizes_that_do_not_fit():
    mesh = make_mesh(2, 2, 2)
    check_batch_size(8, mesh, accumulation=2)
    with pytest.raises(UserError, match="batch_size is 6.*data 2 x fsdp 2.* multiple of 4"):
        check_batch_size(6, mesh)
    with pytest.raises(UserError, match="2 microbatches.* multiple of 8"):
        check_batch_size(12, mesh, accumulation=2)
    with pytest.raises(UserError, match="6 rows"):
        place_batch({"tokens": np.zeros((6, 2), np.int32)}, mesh)
    with pytest.raises(ValueError, match="differ in their rows"):
        place_batch({"a": np.zeros((4, 2)), "b": np.zeros((8, 2))}, mesh)


HOST = """
import sys
import jax
import numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jax.sharding import AxisType, Mesh
from jrm_jax.sharding import AXES, local_rows, make_mesh, place_batch
ready = make_mesh(-1, 2, 1)
# places 0 and 2 on one host: what a machine's wiring may do to the order of devices
crossed = Mesh(ready.devices.reshape(2, 2, 2).transpose(1, 0, 2).reshape(4, 1, 2), AXES,
               axis_types=(AxisType.Auto,) * 3)
shared = Mesh(ready.devices.reshape(2, 4).T.reshape(2, 2, 2), AXES,
              axis_types=(AxisType.Auto,) * 3)
for name, mesh in (("ready", ready), ("crossed", crossed), ("shared", shared)):
    rows = local_rows(8, mesh)
    whole = np.arange(16).reshape(8, 2)
    placed = place_batch({"x": whole[rows]}, mesh)["x"]
    assert placed.shape == whole.shape
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
    print(name, *rows)
"""


def test_two_hosts_supply_their_own_rows(tmp_path):
    root = Path(__file__).resolve().parents[1]
    env = os.environ | {
        "PYTHONPATH": str(root),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(i)],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]
    try:
        outputs = [host.communicate(timeout=180)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(outputs)
    assert "ready 0 1 2 3\n" in outputs[0] and "ready 4 5 6 7\n" in outputs[1]
    assert "crossed 0 1 4 5\n" in outputs[0] and "crossed 2 3 6 7\n" in outputs[1]
    assert all("shared 0 1 2 3 4 5 6 7\n" in output for output in outputs)


def test_only_a_long_run_lets_a_gpus_compiler_search_for_kernels():
    card = SimpleNamespace(devices=np.array([[[SimpleNamespace(platform="gpu")]]]))
    assert compiler_options(card) == {"xla_gpu_enable_triton_gemm": False}
    assert compiler_options(card, search=True) is None
    here = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    assert compiler_options(here) == compiler_options(here, search=True) is not None


def test_sums_of_broadcasts_are_the_same_every_time():
    """Without the options, jaxlib 0.10.2 gives some forty different sums here."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    x = jax.random.normal(jax.random.key(0), (5, 128, 256))

    def total(x):
        return jnp.sum(jnp.square(jnp.broadcast_to(x, (2, *x.shape))))

    total = jax.jit(total, compiler_options=compiler_options(mesh))
    assert len({float(total(x)) for _ in range(500)}) == 1
    assert float(total(x)) == pytest.approx(2 * np.sum(np.square(x, dtype=np.float64)), rel=1e-5)
