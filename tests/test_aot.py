"""Compiling for a TPU that is not there: the counts, the tables, the words.

What needs libtpu (requirements-tpu.txt) is skipped where it is not installed.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from entry_point import make_small_backbone
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import joint
from jrm_jax import build, compiling, fitting, flops, sharding
from jrm_jax.chips import CHIPS, Topology, parse_topology
from jrm_jax.collectives import Traffic, read_collectives
from jrm_jax.data.plan import Bucket
from jrm_jax.errors import UserError
from jrm_jax.model import weights
from jrm_jax.model.published import PARAMETERS, PUBLISHED, check_variant

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


# ---- published architectures and chips


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_architectures_have_the_published_number_of_parameters(variant):
    tree = weights.abstract_params(PUBLISHED[variant])
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == PARAMETERS[variant]


def test_a_folder_that_is_not_its_variant_is_refused(folder):
    config = joint.get_config("qwen3_vl_8b")
    config.backbone.path = str(folder)
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


# ---- FLOPs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_small_backbone(tmp_path_factory.mktemp("aot") / "small")


def tiny_case(folder: Path):
    """(config, architecture, bucket) of a small backbone, unrolled, in float32."""
    config = joint.get_config()
    config.backbone.path = str(folder)
    config.batch_size, config.mesh.data, config.mesh.fsdp = 1, 1, 1
    backbone = build.load_backbone_config(config)
    return config, backbone, compiling.make_bucket(backbone, 16, 24, 24, 2, 3, 8)


def one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def products(jaxpr) -> int:
    """FLOPs of every dot_general of a program, loops counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contract)
            total += 2 * inner * equation.outvars[0].aval.size
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inside in jaxprs_in_params(equation.params):
            total += times * products(inside)
    return total


def traced(config, backbone, bucket, remat="none"):
    """The train step's program, with shapes for arrays."""
    config.remat = remat
    mesh = one_device()
    encoder = compiling.stand_in_encoder(config, backbone)
    module = build.make_backbone(config, backbone, mesh, encoder.tokenizer.reward_id)
    state, (optimizer, _) = build.abstract_state(config, backbone, mesh)
    data = SimpleNamespace(encoder=encoder)
    step, evaluate = build.make_steps(config, module, data, optimizer, state)
    batch = compiling.abstract_batch(config, backbone, bucket, mesh)
    return step, evaluate, state, batch


def test_forward_flops_are_those_of_the_program(folder):
    config, backbone, bucket = tiny_case(folder)
    _, evaluate, state, batch = traced(config, backbone, bucket)
    found = products(evaluate.trace(state.trainable, state.frozen, batch).jaxpr)
    ours = sum(sum(part) for part in flops.forward_flops(backbone, bucket, causal=False).values())
    small = 2 * bucket.candidates * backbone.text.hidden  # the reward head
    table = 2 * bucket.images * bucket.patches * 4 * backbone.vision.hidden  # resampled positions
    prompt = bucket.candidates * bucket.candidate * bucket.prompt  # pairs, of all P + C keys
    assert prompt > 0
    assert found == ours + small + table


def test_forward_flops_by_hand():
    """Qwen3-VL-8B, three pictures of 512 visual tokens: the sum written out."""
    backbone = PUBLISHED["qwen3_vl_8b"]
    bucket = compiling.make_bucket(backbone, 512, 256, 640, 2, 3, 128)
    assert bucket == Bucket(2, 3, 2048, 768, 1280, 640)
    parts = flops.forward_flops(backbone, bucket)
    slots = 768 + 2 * 1280
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 12288
    assert parts["layers"].linear == 2 * slots * 36 * layer
    seen = 768 * 769 // 2 + 2 * (1280 * 768 + 1280 * 1281 // 2)
    assert parts["layers"].attention == 4 * seen * 4096 * 36
    assert parts["blocks"].linear == 2 * 3 * 2048 * 27 * (4 * 1152**2 + 2 * 1152 * 4304)
    assert parts["language_head"].linear == 2 * 2 * 640 * 4096 * 151936


def test_train_flops_follow_what_is_trained_and_recomputed(folder):
    config, backbone, bucket = tiny_case(folder)

    def count(trainable=(".*",), remat="none", chunk=0):
        config.trainable = trainable
        state, _ = build.abstract_state(config, backbone, one_device())
        return flops.train_flops(backbone, bucket, state.trainable, state.frozen, remat, chunk)

    parts = flops.forward_flops(backbone, bucket)
    forward = sum(sum(part) for part in parts.values())
    whole = count()
    # all of it three times, but the pixels need no gradient
    assert whole.model == 3 * forward - parts["patches"].linear and whole.again == 0
    stacks = sum(sum(parts[name]) for name in ("blocks", "layers"))
    assert count(remat="full").again == stacks
    assert count(remat="full").model == whole.model
    assert 0 < count(remat="dots").again < stacks
    assert count(chunk=8).again == parts["language_head"].linear
    head = count(("reward_head",), remat="full")
    assert head == (forward, 0)  # nothing before the head is trained: one forward pass
    decoder = count(("decoder", "reward_"), remat="full")
    assert decoder.again == sum(parts["layers"])
    tower = sum(sum(parts[name]) for name in ("patches", "blocks", "mergers"))
    head_inputs = 2 * parts["language_head"].linear
    assert decoder.model == tower + 3 * sum(parts["layers"]) + head_inputs


@pytest.mark.parametrize("remat", ["none", "full"])
def test_train_flops_are_those_of_the_program(folder, remat):
    config, backbone, bucket = tiny_case(folder)
    config.optimizer.name = "adam"
    step, _, state, batch = traced(config, backbone, bucket, remat)
    found = products(step.trace(state, batch).jaxpr)
    ours = flops.train_flops(backbone, bucket, state.trainable, state.frozen, remat, 0)
    parts = flops.forward_flops(backbone, bucket)
    rectangles = flops.forward_flops(backbone, bucket, causal=False)
    extra = sum(rectangles[n].attention - parts[n].attention for n in parts)
    extra *= 4 if remat == "full" else 3
    assert found == pytest.approx(ours.model + ours.again + extra, rel=0.01)


def test_forward_flops_are_those_that_xla_counts(folder):
    config, backbone, bucket = tiny_case(folder)
    _, evaluate, state, batch = traced(config, backbone, bucket)
    counted = evaluate.lower(state.trainable, state.frozen, batch).compile().cost_analysis()
    ours = sum(sum(part) for part in flops.forward_flops(backbone, bucket, causal=False).values())
    # XLA also counts what is no product: norms, softmax, rotations
    assert ours < counted["flops"] < 1.35 * ours


# ---- collectives


def test_collectives_of_a_compiled_program():
    """Eight devices, a loop of three: a gather per turn, a sum and a permutation outside."""
    mesh = sharding.make_mesh(2, 4, 1)

    def program(x, kernels):
        def turn(x, kernel):
            whole = jax.lax.all_gather(kernel, "fsdp", tiled=True)
            return jnp.tanh(x @ whole), None

        x, _ = jax.lax.scan(turn, x, kernels)
        x = jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])
        return jax.lax.psum(x, "fsdp"), jax.lax.psum_scatter(x, "fsdp", tiled=True)

    mapped = jax.shard_map(
        program,
        mesh=mesh,
        in_specs=(P(("data", "fsdp")), P(None, "fsdp")),
        out_specs=(P("data"), P(("data", "fsdp"))),
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P()))
    kernels = jax.ShapeDtypeStruct((3, 32, 32), jnp.float32, sharding=NamedSharding(mesh, P()))
    text = jax.jit(mapped).lower(x, kernels).compile().as_text()
    found = read_collectives(text, 8)
    kernel, rows = 32 * 32 * 4, 8 * 32 * 4  # bytes
    assert found.network == {}
    assert found.links["all-gather"] == Traffic(3, 3 * kernel * 3 // 4)
    assert found.links["all-reduce"] == Traffic(1, 2 * rows * 3 // 4)
    assert found.links["reduce-scatter"] == Traffic(1, rows * 3 // 4)
    assert found.links["collective-permute"] == Traffic(1, rows)
    # the first four devices one slice, the others another: only the exchange crosses
    apart = read_collectives(text, 8, slices=2)
    assert set(apart.network) == {"collective-permute"}
    assert set(apart.links) == {"all-gather", "all-reduce", "reduce-scatter"}


TPU_TEXT = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %r = f32[] add(%a, %b)
}

%start (p: bf16[64,8]) -> bf16[512,8] {
  ROOT %g.1 = bf16[512,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}, dimensions={0}
}

%done (p.2: bf16[64,8]) -> bf16[512,8] {
  ROOT %g.2 = bf16[512,8]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=5, replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}, dimensions={0}
}

%cond (c: (s32[], bf16[64,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %at = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

%body (b.1: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %f.1 = bf16[512,8]{1,0} fusion(%x), kind=kCustom, calls=%start
  %f.2 = bf16[512,8]{1,0} fusion(%x), kind=kCustom, calls=%done
  ROOT %t = (s32[], bf16[64,8]) tuple(%i, %x)
}

ENTRY %main (p0: bf16[64,8]) -> f32[4] {
  %w = (s32[]{:T(128)}, bf16[64,8]) while(%t0), condition=%cond, body=%body
  %s = (f32[4]{0:T(128)}, f32[2]{0:T(128)}) all-reduce(%y, %z), channel_id=9, replica_groups=[8,2]<=[2,8]T(1,0), to_apply=%add
  ROOT %o = f32[4] get-tuple-element(%s), index=0
}
"""  # noqa: E501


def test_collectives_of_a_tpu_program():
    """A gather spread over two fusions counts once, as often as the loop's condition says."""
    found = read_collectives(TPU_TEXT, 16, slices=2)
    # axis_0 strides over both slices, and so do pairs (i, i + 8)
    assert found.network["all-gather"] == Traffic(7, 7 * 512 * 8 * 2 * 7 // 8)
    assert found.network["all-reduce"] == Traffic(1, 2 * 24 // 2)
    assert found.links == {}


# ---- what the steps hold


def test_bytes_per_device_are_those_of_the_shards(folder):
    config, backbone, _ = tiny_case(folder)
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
    assert compiling.bytes_per_device(state) == held


def test_abstract_state_is_what_training_starts_from(folder):
    config, backbone, _ = tiny_case(folder)
    config.trainable = ("decoder", "reward_")
    mesh = one_device()
    tokenizer = SimpleNamespace(end_id=3, reward_id=5)
    encoder = SimpleNamespace(dimensions=("overall",), tokenizer=tokenizer)
    real, _ = build.init_state(config, backbone, mesh, encoder)
    ours, _ = build.abstract_state(config, backbone, mesh)
    described = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding.spec), state)
        for state in (real, ours)
    ]
    assert described[0] == described[1]


def test_partial_training_saves_moments():
    """Qwen3-VL-8B, the decoder's last part only: moments of what trains, bfloat16 for the rest."""
    config = joint.get_config("qwen3_vl_8b")
    backbone = PUBLISHED["qwen3_vl_8b"]
    held = {}
    for name, patterns in {"all": (".*",), "head": ("reward_", "decoder/norm")}.items():
        config.trainable = patterns
        state, _ = build.abstract_state(config, backbone, one_device())
        held[name] = (
            compiling.bytes_per_device((state.trainable, state.frozen)),
            compiling.bytes_per_device(state.opt_state),
        )
    total = PARAMETERS["qwen3_vl_8b"]
    assert held["all"][0] == pytest.approx(4 * total, rel=1e-4)
    assert held["all"][1] == pytest.approx(8 * total, rel=1e-4)
    assert held["head"][0] == pytest.approx(2 * total, rel=1e-4)
    assert held["head"][1] < MIB


# ---- the mesh's own sizes


class Chip:
    platform = "tpu"

    def __init__(self, slice_index=None):
        self.slice_index = slice_index


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


# ---- attention


def test_the_lowered_step_calls_splash_in_tower_and_decoder(monkeypatch):
    """Lowered for a TPU, without compiling, so without libtpu: heads of 64 and of 128."""
    config = joint.get_config("qwen3_vl_2b")
    config.batch_size, config.mesh.data, config.mesh.fsdp = 1, 1, 1
    backbone = PUBLISHED["qwen3_vl_2b"]
    bucket = compiling.make_bucket(backbone, 64, 100, 64, 2, 3, 128)
    monkeypatch.setattr(sharding, "compiler_options", lambda mesh: None)
    step, _, state, batch = traced(config, backbone, bucket, "full")
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "tpu")
        lowered = step.trace(state, batch).lower(lowering_platforms=("tpu",))
    kernels = compiling.attention_kernels(lowered.as_text())
    for pass_ in ("fwd", "dq", "dkv"):
        shapes = {k.split("[")[1] for k in kernels if f"_{pass_}_" in k}
        assert "3, 16, 256, 64]" in shapes  # tower: 3 pictures
        assert {"1, 16, 256, 128]", "2, 16, 256, 128]"} <= shapes  # prompt, candidates


# ---- out of memory

MESSAGE = (
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. "
    "Exceeded hbm capacity by 5.75G."
)


def test_out_of_memory_says_by_how_much_and_what_to_change(monkeypatch):
    error = compiling.OutOfMemory(MESSAGE)
    assert (error.needed, error.available) == (21.5 * 2**30, 15.75 * 2**30)
    assert compiling.parse_out_of_memory("RESOURCE_EXHAUSTED: no words") == (None, None)
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


def test_find_takes_the_largest_batch_then_the_least_remat(monkeypatch):
    """A step that needs 1 GiB a group, and twice that with 'dots', of 5."""
    config = joint.get_config("qwen3_vl_8b")
    case = fitting.Case(
        config, PUBLISHED["qwen3_vl_8b"], Topology("v5e:2x4", CHIPS["v5e"], (2, 4)),
        tuple(jax.devices()), 512, 256, 640, 2, 3,
    )  # fmt: skip
    limit = [5]

    def compile_train(config, backbone, bucket, mesh):
        need = config.batch_size / 8 * {"full": 1, "dots": 1.2, "none": 3}[config.remat]
        if need > limit[0]:
            used = MESSAGE.replace("21.50G", f"{need:.2f}G")
            raise compiling.OutOfMemory(used.replace("15.75G", f"{limit[0]:.2f}G"))
        return SimpleNamespace(peak=need * 2**30, seconds=1.0)

    monkeypatch.setattr(compiling, "compile_train", compile_train)
    said = []
    found = fitting.find(case, said.append)
    assert (found.config.batch_size, found.config.remat) == (32, "dots")
    assert any("batch_size 64, remat full: does not fit: 8.00 GiB of 5.00" in w for w in said)
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
