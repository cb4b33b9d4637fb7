"""Compiling for a TPU that is not there: the counts, the tables, the words.

What needs libtpu (requirements-tpu.txt) is skipped where it is not installed.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot_case import one_device, small_case, traced

from configs import joint
from configs.common import TINY
from jrm_jax import build, optim, sharding
from jrm_jax.errors import UserError
from jrm_jax.model import cudnn, weights
from jrm_jax.model.published import PARAMETERS, PUBLISHED, check_variant
from jrm_jax.planning import compiling, fitting
from jrm_jax.planning.chips import CHIPS, Topology, parse_topology
from jrm_jax.run import fit
from jrm_jax.run.check_config import check_config

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


# ---- published architectures and chips


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_architectures_have_the_published_number_of_parameters(variant):
    tree = weights.abstract_params(PUBLISHED[variant])
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == PARAMETERS[variant]


def test_a_folder_that_is_not_its_variant_is_refused():
    config = joint.get_config("qwen3_vl_8b")
    config.backbone.path = TINY
    with pytest.raises(UserError, match=r"config.json is no qwen3_vl_8b: .*text.layers is \d+, "
                                        r"published 36"):  # fmt: skip
        build.load_backbone_config(config)
    config.variant = ""
    build.load_backbone_config(config)
    check_variant("qwen3_vl_8b", PUBLISHED["qwen3_vl_8b"], "folder")


def test_topologies_are_read():
    found = parse_topology("v5e:16x16", 2)
    assert (found.chip, found.shape, found.chips) == (CHIPS["v5e"], (16, 16), 512)
    assert parse_topology("v5p:4x4x4").chips == 64


@pytest.mark.parametrize(
    ("text", "slices", "words"),
    [
        ("v5p", 1, "no CHIP:SHAPE"),
        ("v5p:4x4x", 1, "no CHIP:SHAPE"),
        ("v9:4x4", 1, "'v9' is none of v5e, v5p, v6e"),
        ("v5p:4x4", 1, "3 dimensions"),
        ("v5e:4x4x4", 1, "2 dimensions"),
        ("v5e:0x4", 1, "2 dimensions"),
        ("v5e:4x4", 0, "--num_slices=0"),
    ],
)
def test_bad_topologies_are_refused(text, slices, words):
    with pytest.raises(UserError, match=re.escape(words)):
        parse_topology(text, slices)


def test_chips_are_what_their_makers_table_says():
    assert CHIPS["v5e"].flops == 197e12 and CHIPS["v5e"].memory == 16 * 2**30
    assert CHIPS["v5p"].flops == 459e12 and CHIPS["v5p"].memory == 95 * 2**30
    assert CHIPS["v6e"].flops == 918e12 and CHIPS["v6e"].memory == 32 * 2**30
    # a pod's network is that of its chips
    assert CHIPS["v5e"].network_bandwidth * 8 * 256 == pytest.approx(6.4e12)
    assert CHIPS["v6e"].network_bandwidth * 8 * 256 == pytest.approx(25.6e12)


# ---- what the steps hold


def test_bytes_per_device_are_those_of_the_shards():
    config, backbone, _ = small_case()
    config.mesh.data, config.mesh.fsdp = 2, 4
    config.batch_size = 8
    mesh = build.make_mesh(config, backbone)
    state, _ = build.abstract_state(config, backbone, mesh)
    made = jax.tree.map(
        lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding), state
    )
    first = jax.devices()[0]
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(made)
        for shard in leaf.addressable_shards
        if shard.device == first
    )
    assert fit.bytes_per_device(state) == held


def test_abstract_state_is_what_training_starts_from():
    config, backbone, _ = small_case()
    config.trainable, config.backbone.random = ("decoder", "reward_"), True
    mesh = one_device()
    tokenizer = SimpleNamespace(end_id=3, reward_id=5)
    encoder = SimpleNamespace(dimensions=("overall",), tokenizer=tokenizer, facts=0)
    real = jax.eval_shape(lambda: build.init_state(config, backbone, mesh, encoder)[0])
    ours, _ = build.abstract_state(config, backbone, mesh)
    described = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) for state in (real, ours)
    ]
    assert described[0] == described[1]
    wanted = sharding.state_shardings(real, mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, ours) == wanted


def test_partial_training_saves_moments():
    """Qwen3-VL-8B, the decoder's last part only: moments of what trains, bfloat16 for the rest."""
    config = joint.get_config("qwen3_vl_8b")
    backbone = PUBLISHED["qwen3_vl_8b"]
    held = {}
    for name, patterns in {"all": (".*",), "head": ("reward_", "decoder/norm")}.items():
        config.trainable = patterns
        state, _ = build.abstract_state(config, backbone, one_device())
        held[name] = (
            fit.bytes_per_device((state.trainable, state.frozen)),
            fit.bytes_per_device(state.opt_state),
        )
    total = PARAMETERS["qwen3_vl_8b"]
    assert held["all"][0] == pytest.approx(4 * total, rel=1e-4)
    assert held["all"][1] == pytest.approx(8 * total, rel=1e-4)
    assert held["head"][0] == pytest.approx(2 * total, rel=1e-4)
    assert held["head"][1] < MIB


# ---- the mesh's own sizes


class Chip:
    platform = "tpu"

    def __init__(self, slice_index=None, coords=None):
        self.slice_index, self.coords = slice_index, coords


@pytest.mark.parametrize(
    ("variant", "devices", "tensor", "data"),
    [
        ("qwen3_vl_8b", 64, 1, 1),
        ("qwen3_vl_8b", 256, 1, 2),  # 1152 = 128 * 9
        ("qwen3_vl_8b", 256, 2, 1),
        ("qwen2_5_vl_7b", 256, 1, 1),  # 1280 = 256 * 5; 3420 is split by `tensor` only
    ],
)
def test_fsdp_splits_every_large_parameter(variant, devices, tensor, data):
    params = weights.abstract_params(PUBLISHED[variant])
    sizes = sharding.fill_sizes((-1, -1, tensor), params, [Chip()] * devices)
    assert sizes == (data, -1, tensor)


def test_data_crosses_slices_where_the_sizes_are_left_open():
    params = weights.abstract_params(PUBLISHED["qwen3_vl_8b"])
    two = [Chip(index) for index in (0, 1) for _ in range(256)]
    assert sharding.fill_sizes((-1, -1, 1), params, two) == (4, -1, 1)
    assert sharding.fill_sizes((2, -1, 1), params, two) == (2, -1, 1)  # asked for: taken


@pytest.mark.parametrize(
    ("shape", "tensor", "data"),
    [((4, 4, 4), 1, 4), ((4, 4, 8), 1, 4), ((4, 4, 4), 2, 4), ((2, 2, 4), 1, 1), ((8, 8, 1), 1, 1)],
)
def test_fsdp_spans_two_dimensions_of_a_torus(shape, tensor, data):
    params = weights.abstract_params(PUBLISHED["qwen3_vl_8b"])
    chips = [Chip(None, place) for place in np.ndindex(shape)]
    assert sharding.fill_sizes((-1, -1, tensor), params, chips) == (data, -1, tensor)
    two = [Chip(index, place) for index in (0, 1) for place in np.ndindex(shape)]
    assert sharding.fill_sizes((-1, -1, tensor), params, two) == (2 * data, -1, tensor)


# ---- attention


def test_the_lowered_step_calls_splash_in_tower_and_decoder(monkeypatch):
    """Lowered for a TPU, without compiling, so without libtpu: heads of 64 and of 128."""
    config = joint.get_config("qwen3_vl_2b")
    config.batch_size, config.mesh.data, config.mesh.fsdp = 1, 1, 1
    backbone = PUBLISHED["qwen3_vl_2b"]
    vision = dataclasses.replace(backbone.vision, deepstack=(5,))  # fewer stacks to trace
    backbone = dataclasses.replace(backbone, vision=vision)
    bucket = compiling.make_bucket(backbone, 64, 100, 64, 2, 3, 128)
    monkeypatch.setattr(sharding, "compiler_options", lambda *_, **__: None)
    texts = {}
    for backend, platform in (("tpu", "tpu"), ("gpu", "cuda")):
        step, _, state, batch = traced(config, backbone, bucket)
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda name=backend: name)
            patch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91000)
            lowered = step.trace(state, batch).lower(lowering_platforms=(platform,))
        texts[platform] = lowered.as_text()
    kernels = compiling.attention_kernels(texts["tpu"])
    for pass_ in ("fwd", "dq", "dkv"):
        shapes = {k.split("[")[1] for k in kernels if f"_{pass_}_" in k}
        assert "3, 16, 256, 64]" in shapes  # tower: 3 pictures
        # prompt; both candidates as one row, which reads the prompt's keys where they are
        assert {"16, 256, 128]", "16, 512, 128]"} <= shapes
    for pass_ in ("(", "Backward("):  # tower (two stacks), prompt, candidates twice (and taps)
        assert texts["cuda"].count(f"@__cudnn$fmhaSoftmax{pass_}") >= 5
    for text in texts.values():
        assert "2x512x8x128x" not in text  # keys of the prompt and of a candidate, joined
        for queries, keys in ((256, 256), (512, 256), (256, 512), (512, 768)):
            assert f"16x{queries}x{keys}x" not in text and f"1x{queries}x{keys}x" not in text


# ---- out of memory

MESSAGE = (
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. "
    "Exceeded hbm capacity by 5.75G."
)


def test_out_of_memory_says_by_how_much_and_what_to_change(monkeypatch):
    error = fit.OutOfMemory(*fit.parse_out_of_memory(MESSAGE))
    assert (error.needed, error.available) == (21.5 * 2**30, 15.75 * 2**30)
    assert fit.parse_out_of_memory("RESOURCE_EXHAUSTED: no words") == (None, None)
    early = "total memory required for HLO temporaries (19.57G) exceeds available HBM (15.75G)."
    wanted = (int(19.57 * 2**30), int(15.75 * 2**30))
    assert fit.parse_out_of_memory(early) == wanted
    config = joint.get_config("qwen3_vl_8b")
    config.batch_size, config.remat = 32, "dots"
    case = fitting.Case(
        config, PUBLISHED["qwen3_vl_8b"], Topology("v5e:2x4", CHIPS["v5e"], (2, 4)),
        tuple(jax.devices()), 512, 256, 640, 2, 3,
    )  # fmt: skip
    words = fitting.advice(case, "train", error)
    assert "the train step of qwen3_vl_8b does not fit on v5e:2x4" in words
    assert "21.50 GiB of 15.75 GiB, 5.75 GiB too much" in words
    for hint in ("--config.remat=full", "--config.batch_size=16", "--config.accumulation=2"):
        assert hint in words


@pytest.mark.parametrize("changes", [
    {"batch_size": 24}, {"batch_size": 24, "accumulation": 3}, {"batch_size": 40},
    {"batch_size": 8}, {"batch_size": 16, "accumulation": 2}, {"batch_size": 48, "remat": "full"},
    {"batch_size": 8, "mesh.data": 8, "mesh.fsdp": 1}, {"batch_size": 4, "mesh.tensor": 2},
    {"batch_size": 32, "lora.rank": 16},
])  # fmt: skip
@pytest.mark.parametrize("variant", ["qwen3_vl_8b", "qwen2_5_vl_3b"])  # 8 and 2 key-value heads
def test_advice_is_never_what_a_run_refuses(variant, changes):
    def config_with(fields):
        config = joint.get_config(variant)
        config.update_from_flattened_dict(changes | fields)
        return config

    backbone, devices = PUBLISHED[variant], tuple(jax.devices())
    case = fitting.Case(
        config_with({}), backbone, Topology("v5e:2x4", CHIPS["v5e"], (2, 4)), devices,
        512, 256, 640, 2, 3,
    )  # fmt: skip
    for which in ("train", "score"):
        words = fitting.advice(case, which, fit.OutOfMemory(None, None)).split(". Try ")[1]
        for hint in words.split(", or "):
            pairs = re.findall(r"--config\.([\w.]+)=(\w+)", hint)
            fields = {name: int(value) if value.isdigit() else value for name, value in pairs}
            check_config(config_with(fields))
            build.make_mesh(config_with(fields), backbone, devices)
        if changes == {"batch_size": 24}:
            assert "batch_size=8" in words and ("accumulation=3" in words) == (which == "train")
        assert ("lora" in words) == (which == "train" and "lora.rank" not in changes)


def test_the_shapes_of_a_plan_are_those_of_its_losses():
    """Every head and every array that a loss reads is there."""
    config, backbone, bucket = small_case()
    config.loss.update({"facts_weight": 1.0, "words_weight": 1.0, "teacher_weight": 1.0})
    config.data.dimensions = ("following", "preservation")
    forward, state, _ = compiling.train_parts(config, backbone, one_device())
    batch = compiling.abstract_batch(config, backbone, bucket, one_device())
    outputs = jax.eval_shape(forward, optim.merge_params(state.trainable, state.frozen), batch)
    assert outputs.reward_BKR.shape == (1, 2, 2)
    assert {"facts", "words", "teacher"} <= set(outputs.terms)


def test_prompts_that_are_not_shared_are_in_every_candidate():
    """As the run's are; in scoring they are shared."""
    config, backbone, bucket = small_case()
    shared = compiling.abstract_batch(config, backbone, bucket, one_device())
    config.data.share_prompt = False
    own = compiling.abstract_batch(config, backbone, bucket, one_device())
    assert own["prompt_tokens"].shape[-1] == 0
    assert own["candidate_tokens"].shape[-1] == bucket.prompt + bucket.candidate
    again = compiling.abstract_batch(config, backbone, bucket, one_device(), share=True)
    assert again == shared


def test_find_takes_the_largest_batch_then_the_least_remat(monkeypatch):
    """A step that needs 1 GiB a group, and twice that with 'dots', of 5."""
    config = joint.get_config("qwen3_vl_8b")
    case = fitting.Case(
        config, PUBLISHED["qwen3_vl_8b"], Topology("v5e:2x4", CHIPS["v5e"], (2, 4)),
        tuple(jax.devices()), 512, 256, 640, 2, 3,
    )  # fmt: skip
    limit, compiled = [5], []

    def compile_train(config, backbone, bucket, mesh):
        compiled.append((config.batch_size, config.remat))
        times = {"full": 1, "narrow": 1.1, "dots": 1.2, "none": 3}[config.remat]
        need = config.batch_size / 8 * times
        if need > limit[0]:
            raise fit.OutOfMemory(int(need * 2**30), int(limit[0] * 2**30))
        return SimpleNamespace(peak=need * 2**30, seconds=1.0)

    monkeypatch.setattr(compiling, "compile_train", compile_train)
    monkeypatch.setattr(fitting.Case, "may_fit", lambda _: True)  # of a v5e it would not be
    said = []
    found = fitting.find(case, said.append)
    assert (found.config.batch_size, found.config.remat) == (32, "dots")
    assert any("batch_size 64, remat full: does not fit: 8.00 GiB of 5.00" in w for w in said)
    # `auto` at a given size, by the same search; what was compiled is not compiled again
    compiled.clear()
    found = fitting.settle(case.with_(16, "auto"), said.append)
    assert found.config.remat == "dots" and found.compile("train").peak == 2.4 * 2**30
    assert compiled == [(16, "none"), (16, "dots")]
    limit[0] = 0.5
    with pytest.raises(UserError, match=r"1.00 GiB of 0.50 GiB, 0.50 GiB too much.*--config.mesh"):
        fitting.find(case, said.append)


# ---- the command


def run(*arguments: str, timeout: int = 240) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "jrm_jax.aot", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.parametrize("flag", ["--candidates=1", "--visual_tokens=-4"])
def test_sizes_that_are_none_are_refused_before_anything_is_compiled(flag):
    done = run("--config=configs/joint.py:qwen3_vl_2b", "--topology=v5e:2x4", flag)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 1 and f"flag {flag}: " in line
    assert "not an integer in the range" in line


def test_the_command_without_libtpu_says_what_to_install():
    if importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is installed")
    done = run("--config=configs/joint.py:qwen3_vl_2b", "--topology=v5e:2x4")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].endswith("pip install -r requirements-tpu.txt")


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs requirements-tpu.txt")
def test_the_command_compiles_for_a_topology(tmp_path):
    out = tmp_path / "out.json"
    done = run(
        "--config=configs/joint.py:qwen3_vl_2b", "--topology=v5e:2x4", "--config.batch_size=8",
        "--visual_tokens=64", "--critique_tokens=64", "--steps=score", f"--out={out}", timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pairs/s/chip at most" in done.stdout
    step = json.loads(out.read_text())["steps"]["score"]
    assert step["params"] == pytest.approx(2 * PARAMETERS["qwen3_vl_2b"] / 8, rel=0.01)
    assert any("[3, 16, 256, 64]" in kernel for kernel in step["attention"])
    assert step["collectives"]["links"]["all-gather"]["bytes"] > step["params"]
