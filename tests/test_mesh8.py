"""Eight simulated devices train as one does, and hold only their share of the state."""

import jax
import numpy as np
import pytest
from entry_point import make_small_backbone, make_small_hybrid

from configs import joint
from jrm_jax import build, build_data, sharding
from jrm_jax.optim import flatten

STEPS = 5
MESHES = {"one": (1, 1, 1), "fsdp": (1, 8, 1), "mixed": (2, 2, 2)}
# What makes it, its optimizer and learning rate. A random hybrid's gradients have a norm of 80:
# what sums in another order differ by grows with each step, the more, the larger the rate. With
# Adam its programs take half the time to compile.
BACKBONES = {
    "qwen3_vl": (make_small_backbone, "muon", 1.5e-3),
    "qwen3_5": (make_small_hybrid, "adam", 3e-5),
}
# kernels that `tensor` does not split, by a part of their path
WHOLE_BY_TENSOR = ("qkv", "patch_embed", "mixer/a/", "mixer/b/")


def shards(tree) -> dict[str, tuple]:
    """{path: (spec, shape of a shard on each device)}"""
    return {
        jax.tree_util.keystr(path): (
            leaf.sharding.spec, tuple(s.data.shape for s in leaf.addressable_shards)
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }  # fmt: skip


def bytes_per_device(tree) -> np.ndarray:
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return np.array([held[device] for device in jax.devices()])


def make_config(folder, backbone, optimizer, rate, sizes):
    config = joint.get_config()
    config.backbone.path, config.backbone.scan_unroll = str(backbone), 1
    config.data.cache = str(folder / "world")
    config.data.candidate_cuts = (4,)  # one bucket, one compilation
    config.data.world.train = 40
    config.data.world.valid = config.data.world.test = config.data.world.hard = 0
    config.batch_size, config.total_steps = 8, STEPS
    config.optimizer.warmup_steps, config.optimizer.learning_rate = 1, rate
    config.optimizer.name = optimizer
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
    return config


def train(config):
    """(measured, placements before and after, final state, bytes held) of five steps on a mesh."""
    sizes = tuple(config.mesh.values())
    devices = jax.devices()[: int(np.prod(sizes))]
    make = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *asked: make(*asked, devices=devices))
        architecture = build.load_backbone_config(config)
        mesh = build.make_mesh(config, architecture)
    data = build_data.build_data(config, architecture, print)
    module = build.make_backbone(config, architecture, mesh, data.encoder.tokenizer.reward_id)
    state, (optimizer, _) = build.init_state(config, architecture, mesh, data.encoder)
    step, _ = build.make_steps(config, module, data, optimizer, state)
    before, held = shards(state), bytes_per_device((state.trainable, state.opt_state))
    measured = []
    with build_data.batches(config, data, "train", mesh, 0, STEPS) as batches:
        for batch in batches:
            placed = build_data.place(config, batch, mesh)
            rows = {s.data.shape[0] for s in placed["patches"].addressable_shards}
            assert rows == {8 // (sizes[0] * sizes[1])}
            state, metrics = step(state, placed)
            measured.append({k: np.asarray(v) for k, v in jax.device_get(metrics).items()})
    assert step._cache_size() == 1
    return measured, before, shards(state), state, held


@pytest.fixture(scope="module", params=BACKBONES)
def runs(request, tmp_path_factory):
    assert len(jax.devices()) == 8
    folder = tmp_path_factory.mktemp(request.param)
    make, *settings = BACKBONES[request.param]
    backbone = make(folder / "backbone")
    return {
        name: train(make_config(folder, backbone, *settings, sizes))
        for name, sizes in MESHES.items()
    }


@pytest.mark.parametrize("name", ["fsdp", "mixed"])
def test_losses_equal_those_of_one_device(runs, name):
    wanted, found = runs["one"][0], runs[name][0]
    assert len(wanted) == len(found) == STEPS
    losses = [[float(m["loss"]) for m in run] for run in (wanted, found)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-5)
    assert len({round(loss, 3) for loss in losses[0]}) == STEPS  # training moved


@pytest.mark.parametrize("name", ["fsdp", "mixed"])
def test_metrics_equal_those_of_one_device(runs, name):
    wanted, found = runs["one"][0], runs[name][0]
    for theirs, ours in zip(wanted, found, strict=True):
        assert set(theirs) == set(ours)
        for key in theirs:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=2e-4, atol=1e-4, err_msg=key)
        np.testing.assert_array_equal(ours["pair_accuracy"], theirs["pair_accuracy"])


@pytest.mark.parametrize("name", ["fsdp", "mixed"])
def test_final_parameters_equal_those_of_one_device(runs, name):
    wanted, found = flatten(runs["one"][3].trainable), flatten(runs[name][3].trainable)
    assert list(wanted) == list(found)
    for path in wanted:
        # Adam turns a gradient near zero into a whole step of either sign, for a few entries
        difference = np.abs(np.asarray(found[path]) - np.asarray(wanted[path]))
        assert np.mean(difference) < 2e-5, path


def kernels_of(trainable: dict) -> list[str]:
    return [path for path in trainable if path.endswith("kernel") and "head" not in path]


def moments(state) -> list[dict]:
    """Adam's first and second ones, then Muon's averages where there are any; by path."""
    states = jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
    states = {type(part).__name__: part for part in states if hasattr(part, "mu")}
    adam = states.pop("ScaleByAdamState")
    return [
        {path: leaf for path, leaf in flatten(tree).items() if hasattr(leaf, "sharding")}
        for tree in (adam.mu, adam.nu, *(part.mu for part in states.values()))
    ]


@pytest.mark.parametrize("name", ["fsdp", "mixed"])
def test_parameters_and_moments_stay_sharded(runs, name):
    _, before, after, state, held = runs[name]
    assert before == after
    mesh = {"fsdp": 8, "mixed": 4}[name]
    trainable = flatten(state.trainable)
    kernels = kernels_of(trainable)
    assert len(kernels) > 10
    first, second, *averages = moments(state)
    assert set(first) == set(second)
    if averages:
        assert set(averages[0]) >= set(kernels) and not set(first) & set(averages[0])
    assert set(first).union(*averages) == set(trainable)
    for tree in (trainable, *(averages or (first, second))):
        for path in kernels:
            leaf = tree[path]
            assert leaf.shape == trainable[path].shape
            assert leaf.sharding == trainable[path].sharding
            assert len({s.device for s in leaf.addressable_shards}) == 8
            parts = {leaf.size // s.data.size for s in leaf.addressable_shards}
            whole = name == "mixed" and any(part in path for part in WHOLE_BY_TENSOR)
            split = 2 if whole else mesh
            assert parts == {split}, (path, leaf.sharding)
    # no device holds more than its share and the small vectors
    (everything,) = {int(h) for h in runs["one"][4][:1]}
    assert held.max() == held.min() < everything / mesh * 1.6
    assert held.max() == bytes_per_device((state.trainable, state.opt_state)).max()


@pytest.mark.parametrize("name", ["fsdp", "mixed"])
def test_a_hybrids_averages_of_muon_lie_as_its_kernels(tmp_path, name):
    """By their shapes: above it is trained with Adam."""
    backbone = make_small_hybrid(tmp_path / "backbone")
    config = make_config(tmp_path, backbone, "muon", 1e-4, MESHES[name])
    architecture = build.load_backbone_config(config)
    mesh = build.make_mesh(config, architecture)
    state, _ = build.abstract_state(config, architecture, mesh)
    trainable, (_, _, averages) = flatten(state.trainable), moments(state)
    kernels = kernels_of(trainable)
    assert len(kernels) > 10
    for path in kernels:
        assert averages[path].sharding == trainable[path].sharding, path
        assert not averages[path].sharding.is_fully_replicated, path
