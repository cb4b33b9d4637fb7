"""What fits: recomputation by what the device holds, and refusals that say what would fit."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot_case import SMALL, one_device
from aot_case import small_case as make_case
from entry_point import small_backbone  # noqa: F401  a fixture
from flax import linen as nn
from jax.extend.core import jaxprs_in_params

from configs import joint
from jrm_jax import build, train
from jrm_jax.errors import UserError
from jrm_jax.model import cudnn
from jrm_jax.model.layers import CUDNN, REMAT, Linear, stack
from jrm_jax.planning import compiling
from jrm_jax.run import fit
from jrm_jax.run.programs import Programs
from jrm_jax.sharding import make_mesh

GIB = 2**30
# without what is between the layers: it takes a third less time to trace
PLAIN = dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, deepstack=()))


def small_case():
    return make_case(PLAIN)


class Layer(nn.Module):
    """A narrow and a wide product, as a layer has them."""

    @nn.compact
    def __call__(self, x, _, __):
        x = x + Linear(8, jnp.float32, narrow=True, name="attention")(jnp.sin(x))
        wide = Linear(32, jnp.float32, name="up")(jnp.cos(x))
        return x + Linear(8, jnp.float32, name="down")(jnp.tanh(wide)), None


def gradient_of(remat):
    layers = stack(Layer, 3, remat, 1)()
    x = jnp.linspace(0, 1, 16).reshape(2, 8)
    params = jax.jit(layers.init)(jax.random.key(0), x, None, None)
    return jax.jit(jax.grad(lambda p: layers.apply(p, x, None, None)[0].sum())), params


def test_what_is_computed_again_changes_no_gradient_and_fewer_products_the_more_is_kept():
    gradients, products = {}, {}
    for remat in REMAT:
        gradient, params = gradient_of(remat)
        gradients[remat] = gradient(params)
        products[remat] = gradient.lower(params).as_text().count("dot_general")
    for remat in REMAT:
        jax.tree.map(np.testing.assert_allclose, gradients[remat], gradients["none"])
    assert products["none"] == products["dots"] < products["narrow"] < products["full"]


def kernels(jaxpr) -> int:
    """Calls of attention kernels whose results are read (XLA drops the others), loops counted as
    often as they run."""
    read = {id(x) for equation in jaxpr.eqns for x in equation.invars} | set(map(id, jaxpr.outvars))
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in (CUDNN, "pallas_call"):
            total += any(id(x) in read for x in equation.outvars)
            continue
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(map(kernels, jaxprs_in_params(equation.params)))
    return total


@pytest.mark.parametrize(("backend", "calls"), [("tpu", 3), ("gpu", 1)])
def test_attention_kernels_run_once_unless_everything_is_computed_again(
    monkeypatch, backend, calls
):
    """Traced. Splash has kernels for gradients, too: of queries, and of keys and values."""
    config, backbone, _ = small_case()
    config.backbone.scan_unroll, config.backbone.compute_dtype = 1, "bfloat16"
    bucket = compiling.make_bucket(backbone, 32, 64, 64, 2, 3, 128)

    def count(remat):
        config.remat = remat
        _, state, step = compiling.train_parts(config, backbone, one_device())
        batch = compiling.abstract_batch(config, backbone, bucket, one_device())
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: backend)
            patch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91000)
            return kernels(step.trace(state, batch).jaxpr.jaxpr)

    once = count("none")
    assert once > 0 and count("dots") == count("narrow") == once
    assert count("full") == once + once // calls


@pytest.fixture(scope="module")
def rough():
    """remat, groups, microbatches -> bytes (by the shapes, of state and batch and gradients)."""

    def count(remat, groups=4, accumulation=1, bucket=None):
        config, backbone, small = small_case()
        config.remat, config.batch_size, config.accumulation = remat, groups, accumulation
        config.backbone.scan_unroll = 1
        forward, state, _ = compiling.train_parts(config, backbone, one_device())
        batch = compiling.abstract_batch(config, backbone, bucket or small, one_device())
        held = fit.bytes_per_device((state, batch, state.trainable))
        return fit.rough_bytes(forward, state, batch, accumulation), held

    return count


def test_what_shapes_need_falls_with_what_is_computed_again(rough):
    needs = [rough(remat)[0] for remat in REMAT]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == len(needs)


def test_what_shapes_need_follows_the_batch_and_its_parts(rough):
    (one, held_one), (two, held_two) = rough("none", 4), rough("none", 8)
    # activations double; what is made of the parameters for the pass stays
    assert 1.8 * (one - held_one) < two - held_two <= 2 * (one - held_one)
    parts, held = rough("none", 8, 2)
    assert held == held_two and parts < two
    trainable = held_one  # the sum of the gradients comes on top
    assert parts - held < two - held_two + trainable


@pytest.mark.parametrize("remat", ["none", "narrow"])
def test_what_is_kept_counts_as_it_lies(remat):
    """On eight devices each had whole kernels in bfloat16 by the count: nothing seemed to fit."""

    def kept(groups, *sizes):
        config, backbone, bucket = small_case()
        config.remat, config.batch_size, config.backbone.scan_unroll = remat, groups, 1
        config.backbone.compute_dtype = "bfloat16"
        mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
        forward, state, _ = compiling.train_parts(config, backbone, mesh)
        batch = compiling.abstract_batch(config, backbone, bucket, mesh)
        rest = fit.bytes_per_device((state, batch, state.trainable))
        kernels = sum(2 * x.size for x in jax.tree.leaves(state.trainable) if x.ndim > 1)
        return fit.rough_bytes(forward, state, batch, 1) - rest, kernels

    one, kernels = kept(1, 1, 1, 1)
    split, _ = kept(8, 1, 8, 1)
    assert one - kernels < split < one - kernels / 2  # the same activations
    assert kept(1, 1, 1, 2)[0] < 0.7 * one  # heads and words are split, too


# ---- the search of a run


class Compiler:
    """A `Programs` that compiles nothing: a step needs so many GiB of a device."""

    def __init__(self, needs, has, buckets, given_up=False, reads=(), parts=1):
        self.needs, self.has, self.given_up = needs, has, given_up
        self.buckets = {"train": buckets, "evaluate": reads}
        self.tried, self.met, self.read = [], [], []
        self.steps = {"evaluate": ("evaluate", parts)}

    def outermost(self, kind):
        return [(kind, bucket) for bucket in self.buckets[kind]]

    def use(self, kind, step):
        self.steps[kind] = step

    def prepare(self, inputs, limit):
        ((kind, bucket),) = inputs
        remat, parts = self.steps[kind]
        if kind == "evaluate":
            self.read.append((parts, limit, *(set(map(type, jax.tree.leaves(inputs))))))
        else:
            self.tried.append((remat, parts))
            self.met.append(bucket)
        need = self.needs[remat] / parts
        if need > self.has:
            raise fit.OutOfMemory(int(need * GIB), int(self.has * GIB))
        return not self.given_up


@pytest.fixture
def search(monkeypatch):
    """search(needs, has, **fields) -> (kept step, tried, said)."""

    def run(
        needs, has, limit=None, given_up=False, buckets=(), met=None, reads=0, read=None, **fields
    ):
        config, backbone, bucket = small_case()
        config.update({"batch_size": 4, "remat": "auto"} | fields)
        _, state, _ = compiling.train_parts(config, backbone, one_device())
        data = SimpleNamespace(encoder=compiling.stand_in_encoder(config, backbone))
        said, kept = [], []
        fitting = fit.Fitting(config, backbone, data, None, state, said.append)
        assert fitting.limit is None  # a CPU tells nothing
        fitting.limit = limit
        monkeypatch.setattr(
            fitting, "_steps", lambda remat, parts: ((remat, parts), ("evaluate", parts))
        )
        needs = dict(zip(REMAT, needs, strict=True)) | {"evaluate": reads}
        wanted = [[bucket], given_up, [bucket] if reads else []]
        wanted[0] = buckets or wanted[0]
        compiler = Compiler(needs, has, *wanted, config.accumulation)
        try:
            going_on = fitting.search(compiler, "train", "evaluate", kept.append)
        finally:
            if read is not None:
                read += [(fit.bytes_per_device(state.opt_state), *found) for found in compiler.read]
        assert going_on is not given_up and kept[-1] == compiler.steps["train"]
        if met is not None:
            met += compiler.met
        return compiler.steps["train"], [remat for remat, _ in compiler.tried], said

    return run


def test_auto_takes_the_least_that_fits_and_says_so(search):
    step, tried, said = search((40, 30, 20, 10), has=25)
    assert step == ("narrow", 1) and tried == ["none", "dots", "narrow"]
    assert "remat none does not fit: 40.00 GiB of 25.00 GiB, 15.00 GiB too much" in said
    assert said[-1] == "remat narrow, the least that fits"
    assert search((40, 30, 20, 10), has=50)[1] == ["none"]
    assert search((40, 30, 20, 10), has=15, remat="full") == (("full", 1), ["full"], [])


@pytest.mark.parametrize("remat", ["auto", "dots"])
def test_where_there_is_plenty_nothing_is_compiled_to_be_sure(search, rough, remat):
    """A small model's first step does not wait for the program of its largest batch."""
    first = "none" if remat == "auto" else remat
    need = rough("none")[0]  # whatever is asked for
    for limit, tried in ((4.1 * need, []), (3.9 * need, [first])):
        found = search((1, 1, 1, 1), has=2, limit=int(limit), remat=remat)
        assert found[:2] == ((first, 1), tried)


def test_what_cannot_fit_is_not_compiled(search, rough):
    limit = int((rough("none")[0] + rough("dots")[0]) / 2 / fit.DOUBT)
    step, tried, said = search((1, 1, 1, 1), has=2, limit=limit)
    assert step == ("dots", 1) and tried == ["dots"]
    assert said[0].startswith("remat none does not fit: ") and said[0].endswith(", about")
    # the last is compiled whatever the estimate says
    assert search((1, 1, 1, 1), has=2, limit=1)[1] == ["full"]
    with pytest.raises(UserError, match="GiB too much; --config.remat=auto fits"):
        search((1, 1, 1, 1), has=2, limit=1, remat="dots")


@pytest.mark.parametrize(
    "has, fields, words",
    [
        (25, {"remat": "none"}, "40.00 GiB of 25.00 GiB, 15.00 GiB too much; --config.remat=auto"),
        (6, {}, "10.00 GiB of 6.00 GiB, 4.00 GiB too much; --config.accumulation=2 fits"),
        (3, {"remat": "dots"}, "--config.remat=auto --config.accumulation=4 fits"),
        (2, {}, "; try --config.lora.rank=16"),
        (
            3,
            {"accumulation": 2},
            "5.00 GiB of 3.00 GiB, 2.00 GiB too much; --config.acc",
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_with_what_would(search, has, fields, words):
    with pytest.raises(UserError) as refused:
        search((40, 30, 20, 10), has, **fields)
    assert str(refused.value).startswith("config.batch_size 4 does not fit on 1 x cpu: ")
    assert words in str(refused.value)


def test_the_program_that_must_fit_is_the_one_of_most_memory(search, rough):
    """Not the dearest one: a tower of many layers takes more time, a long text more memory."""
    _, _, bucket = small_case()
    texts = dataclasses.replace(bucket, candidate=8 * bucket.candidate)
    dearest = dataclasses.replace(bucket, patches=2 * bucket.patches)
    limit = 2 * rough("none", bucket=texts)[0]
    for has, most in ((limit, texts), (None, dearest)):  # nothing is known without a limit
        met = []
        search((1, 1, 1, 1), 2, has, buckets=[dearest, texts], met=met)
        assert met == [most]


def test_only_buckets_that_no_other_holds_are_asked():
    _, _, bucket = small_case()
    wide = dataclasses.replace(bucket, patches=bucket.patches + 4)
    long = dataclasses.replace(bucket, critique=bucket.critique + 8)
    wanted = {"train": {bucket, wide, long}, "eval": {bucket}}
    steps = dict.fromkeys(wanted)
    quiet = {"stop": None, "watchdog": None, "say": print, "show": print}
    programs = Programs(steps, wanted, [bucket, wide, long], **quiet)
    assert programs.outermost("train") == [("train", long), ("train", wide)]
    assert programs.outermost("eval") == [("eval", bucket)]
    assert programs.outermost("absent") == []  # nothing is held out, or no step is left


def test_a_search_can_be_given_up(search):
    assert search((1, 1, 1, 1), 2, given_up=True)[1] == ["none"]
    assert search((1, 1, 1, 1), 2, given_up=True, reads=1)[1] == []


def test_the_evaluation_must_fit_too_beside_the_moments(search, rough):
    """It came after hundreds of steps, before the first save, and took the whole batch at once."""
    read, limit = [], rough("none")[0]
    step, tried, _ = search((40, 30, 20, 10), 25, limit, reads=20, read=read)
    assert step == ("narrow", 1) and tried == ["none", "dots", "narrow"]
    ((moments, parts, left, *kinds),) = read  # once
    assert (parts, left) == (1, limit - moments) and moments > 0
    assert kinds == [jax.ShapeDtypeStruct]
    assert search((1, 1, 1, 1), 2, 4 * limit + 4, reads=9)[1] == []  # plenty: nothing is compiled
    with pytest.raises(UserError) as refused:
        search((4, 3, 2, 1), 25, reads=60, read=(read := []))
    assert "60.00 GiB of 25.00 GiB" in str(refused.value)
    assert str(refused.value).endswith("--config.accumulation=4 fits, the same step in parts")
    assert [parts for _, parts, *_ in read] == [1, 2, 4]


def test_microbatches_divide_the_rows_of_a_device():
    assert fit.more_parts(8, 1) == [2, 4, 8] and fit.more_parts(12, 2) == [4, 12]
    assert fit.more_parts(1, 1) == [] and fit.more_parts(6, 4) == [6]


def test_a_program_that_plans_with_too_much_is_refused():
    lowered = jax.jit(lambda x: x * 2).lower(jnp.zeros(1000))
    program = fit.compile_within(lowered, 8000)
    assert fit.planned_bytes(program) == 8000
    with pytest.raises(fit.OutOfMemory) as refused:
        fit.compile_within(lowered, 7999)
    assert (refused.value.needed, refused.value.available) == (8000, 7999)


# ---- a run


@pytest.fixture(scope="module")
def start(small_backbone, tmp_path_factory):  # noqa: F811
    """start(has, workdir): a run of two steps on 8 devices of so many bytes, or of `has(bytes)` of
    those of its state."""
    world = tmp_path_factory.mktemp("world")

    def run(has, workdir):
        config = joint.get_config()
        config.backbone.path, config.data.cache = str(small_backbone), str(world)
        config.data.world.train = 16
        config.data.world.valid = config.data.world.test = config.data.world.hard = 0
        config.data.candidate_cuts = (4,)
        config.batch_size, config.total_steps, config.remat = 8, 2, "auto"
        config.optimizer.name = "adam"
        config.backbone.scan_unroll = 1
        if callable(has):
            backbone = build.load_backbone_config(config)
            mesh = build.make_mesh(config, backbone)
            has = has(fit.bytes_per_device(build.abstract_state(config, backbone, mesh)[0]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fit, "memory_limit", lambda device: has)
            return train.run(config, workdir)

    return run


def test_a_run_trains_with_the_program_that_was_found_to_fit(
    start, tmp_path, capsys, caplog, monkeypatch
):
    monkeypatch.setattr(fit, "PLENTY", 0)
    jax.config.update("jax_log_compiles", True)
    try:
        assert start(2**40, tmp_path / "run") == 0
    finally:
        jax.config.update("jax_log_compiles", False)
    said = capsys.readouterr().out
    assert "remat none, the least that fits\n" in said
    assert said.index("remat none") < said.index("is finished" if "is finished" in said else "2/2")
    done = "Finished XLA compilation of jit(train_step)"
    assert sum(record.getMessage().startswith(done) for record in caplog.records) == 1


def test_a_run_that_cannot_fit_ends_before_its_first_step(start, tmp_path):
    with pytest.raises(UserError, match="does not fit on 8 x cpu: .* too much; try --config.lora"):
        start(lambda state: state + 1000, tmp_path / "run")
    assert not [*(tmp_path / "run").rglob("metrics.jsonl")][0].read_text()


def test_a_state_that_cannot_fit_is_refused_before_anything_is_read(start, tmp_path, monkeypatch):
    monkeypatch.setattr(train.build_data, "build_data", None)
    monkeypatch.setattr(train.build, "init_state", None)
    words = "parameters and optimizer state do not fit on 8 x cpu: .* GiB too much; try --config"
    with pytest.raises(UserError, match=words):
        start(lambda state: state - 1, tmp_path / "run")
