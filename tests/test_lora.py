"""Adapters: only they train and are saved, they resume, and an export holds them merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entry_point import parameters, small_backbone  # noqa: F401  a fixture
from shared_case import on_one_device, share_steps

from configs import joint
from jrm_jax import build, build_data, export, lora, sharding, train
from jrm_jax.errors import UserError
from jrm_jax.model.layers import Linear
from jrm_jax.optim import flatten
from jrm_jax.serving.trained import load_trained
from jrm_jax.step import make_score_step

STEPS, RANK = 3, 4


def is_allowed(path: str) -> bool:
    return path.rpartition("/")[2] in (*lora.LEAVES, "reward_embedding") or path == (
        "reward_head/kernel"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module", autouse=True)
def one_device_compiled_quickly():
    """What is compared was compiled alike; optimising would take most of the time."""
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options = sharding.compiler_options
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        patch.setattr(sharding, "compiler_options", lambda *a, **more: options(*a, **more) | quick)
        share_steps(patch)
        yield


def make_config(folder, backbone):
    config = joint.get_config()
    config.backbone.path, config.backbone.scan_unroll = str(backbone), 1
    config.data.cache = str(folder / "world")
    config.data.world.train = 16
    config.data.world.valid = config.data.world.test = config.data.world.hard = 0
    config.batch_size, config.total_steps, config.save_interval = 4, STEPS, 1
    config.optimizer.name, config.optimizer.warmup_steps = "adam", 0
    config.optimizer.learning_rate = 0.03
    config.loss.language_weight = 0.0
    config.lora.rank = RANK
    return config


@pytest.fixture(scope="module")
def trained(folder, small_backbone):
    """(config, workdir) of a finished run on one device; the state as it was at its end."""
    config = make_config(folder, small_backbone)
    states = []
    finish = train._Run._finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train._Run, "_finish", lambda run: (states.append(run.state), finish(run))[1]
        )
        assert train.run(config, folder / "whole") == 0
    return config, folder / "whole", states[0]


def test_a_linear_adds_the_scaled_product():
    rng = np.random.default_rng(0)
    kernel, low, high = (rng.normal(size=s).astype(np.float32) for s in ((6, 5), (6, 2), (2, 5)))
    tree = {"backbone": {"q": {"kernel": kernel, "lora_a": low, "lora_b": high}}}
    module, x = Linear(5, jnp.float32, bias=False), rng.normal(size=(3, 6)).astype(np.float32)
    scaled, merged = (
        module.apply({"params": change(tree, 0.5)["backbone"]["q"]}, x)
        for change in (lora.scale_adapters, lora.merge_adapters)
    )
    np.testing.assert_allclose(scaled, x @ (kernel + 0.5 * low @ high), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merged, scaled, rtol=1e-5, atol=1e-5)


def test_a_target_that_matches_nothing_is_named():
    tree = {"backbone": {"q": {"kernel": np.zeros((4, 4))}}, "reward_head": {"kernel": None}}
    with pytest.raises(UserError, match=r"config.lora.targets: no parameter matches 'reward_head'"):
        lora.adapter_shapes(tree, 2, ("reward_head",))


def test_heads_of_training_alone_train_beside_adapters():
    config = joint.get_config()
    config.lora.rank = 2
    assert "^words_head/" not in build.trainable_patterns(config)
    config.loss.words_weight = 1.0
    assert "^words_head/" in build.trainable_patterns(config)


def test_adapters_lie_like_their_kernels():
    layer = "backbone/decoder/layers/attn/"
    assert sharding.rule(layer + "q/lora_a") == (None, "fsdp", None)
    assert sharding.rule(layer + "q/lora_b") == (None, None, "tensor")
    assert sharding.rule(layer + "o/lora_a") == (None, "tensor", None)
    assert sharding.rule(layer + "o/lora_b") == (None, None, "fsdp")


def test_gradients_moments_and_checkpoints_hold_only_what_trains(trained):
    _, workdir, state = trained
    paths = list(flatten(state.trainable))
    assert all(map(is_allowed, paths)) and not any(map(is_allowed, flatten(state.frozen)))
    targets = {p.rpartition("/")[0] for p in paths if p.endswith("lora_a")}
    assert targets == {
        p.removesuffix("/kernel")
        for p in flatten(state.frozen)
        if p.startswith("backbone/decoder/") and p.endswith("/kernel")
    }
    saved = parameters(workdir, STEPS)  # and optimizer state
    arrays = {name: leaf for name, leaf in saved.items() if leaf.size > sharding.CONSTANTS}
    assert len(arrays) == 3 * len([p for p in flatten(state.trainable).values() if p.size > 16])
    for name in arrays:
        assert any(f"'{leaf}'" in name for leaf in (*lora.LEAVES, "reward_embedding")) or (
            "'reward_head'" in name
        ), name
    # the gradient's tree is the trainable one: Adam's moments mirror it, leaf by leaf
    moments = next(
        part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    )  # fmt: skip
    assert flatten(moments.mu).keys() == flatten(state.trainable).keys() == flatten(
        moments.nu
    ).keys()
    ups = [leaf for path, leaf in flatten(state.trainable).items() if path.endswith("lora_b")]
    assert ups and all(np.asarray(leaf).any() for leaf in ups)  # they have learnt


def test_an_interrupted_run_goes_on_bit_for_bit(folder, trained):
    config, workdir, _ = trained

    class Stopped(train.StopRequest):
        def now(self):
            self.asked = 15 if super().now() or self._calls == 2 else 0  # after the first step
            return self.asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "StopRequest", Stopped)
        assert train.run(config, folder / "again") == 128 + 15
    assert train.run(config, folder / "again") == 0
    wanted, found = parameters(workdir, STEPS), parameters(folder / "again", STEPS)
    assert list(wanted) == list(found)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_an_export_is_merged_and_scores_as_the_unmerged_model(folder, trained):
    config, workdir, state = trained
    options = ["--step=latest", "--dtype=float32"]  # the default, bfloat16, rounds the merged ones
    export.main([f"--checkpoint={workdir}", f"--out={folder / 'out'}", *options])
    exported = load_trained(folder / "out")
    assert not any(path.endswith(lora.LEAVES) for path in flatten(exported.params))
    architecture = build.load_backbone_config(config)
    mesh = build.make_mesh(config, architecture)
    data = build_data.build_data(config, architecture, print)
    module = build.make_backbone(config, architecture, mesh, data.encoder.tokenizer.reward_id)
    processor = data.encoder.processor
    optimizer, _ = build.make_optimizer(config, state.trainable)
    _, unmerged = build.make_steps(config, module, data, optimizer, state)
    merged = jax.jit(
        make_score_step(module, processor.mean, processor.std),
        compiler_options=sharding.compiler_options(mesh),
    )
    with build_data.batches(config, data, "train", mesh, 0, 2) as batches:
        for batch in batches:
            placed = build_data.place(config, batch, mesh)
            wanted = unmerged(state.trainable, state.frozen, placed)[1]
            found = merged(exported.params, placed)
            assert np.ptp(np.asarray(wanted)) > 1e-3
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    start = build.init_state(config, architecture, mesh, data.encoder)[0]
    before = unmerged(start.trainable, start.frozen, placed)[1]
    assert np.abs(np.asarray(before) - np.asarray(wanted)).max() > 1e-3  # adapters count
