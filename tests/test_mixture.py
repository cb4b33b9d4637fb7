"""Preferences alone, critiques alone and both in one run: each loss sees exactly its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import joint
from jrm_jax import build, build_data, sharding
from jrm_jax.benchmarks import make_tiny_backbone
from jrm_jax.benchmarks.kill_test import SMALL
from jrm_jax.data import store
from jrm_jax.data.pipeline import assemble_batch
from jrm_jax.data.schema import from_record
from jrm_jax.data.sizes import Sizes, measure
from jrm_jax.data.world import scenes
from jrm_jax.errors import UserError
from jrm_jax.losses import combine, term_weights
from jrm_jax.optim import flatten
from jrm_jax.step import LossConfig, make_forward

COUNT = 6
KINDS = ("both", "preferences", "critiques")


def mute(group):
    """Without critiques."""
    candidates = tuple(dataclasses.replace(c, critique=None) for c in group.candidates)
    return dataclasses.replace(group, candidates=candidates)


def unranked(group, count=None):
    """Without labels; of the first candidates only."""
    weight = np.zeros_like(group.weight[:count, :count])
    return dataclasses.replace(
        group, weight=weight, preference=np.full_like(weight, 0.5),
        candidates=group.candidates[:count],
    )  # fmt: skip


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    """A folder for each of `KINDS`; among the critiques an edit that stands alone."""
    folder = tmp_path_factory.mktemp("mixture")
    groups = [scenes.make_example("train", index, 5) for index in range(3 * COUNT)]
    groups = [dataclasses.replace(g, id=f"{KINDS[i % 3]} {i}") for i, g in enumerate(groups)]
    parts = {
        "both": groups[0::3],
        "preferences": [mute(group) for group in groups[1::3]],
        "critiques": [unranked(g, 1 if i == 0 else None) for i, g in enumerate(groups[2::3])],
    }
    # a dimension that only one of the sets has
    parts["preferences"] = [
        dataclasses.replace(
            group,
            dimensions=("quality", "overall"),
            preference=np.concatenate([group.preference.swapaxes(0, 1), group.preference], -1),
            weight=np.concatenate([group.weight, group.weight], -1),
        )
        for group in parts["preferences"]
    ]
    for kind, examples in parts.items():
        store.write_dataset(folder / kind, {"train": examples}, examples[0].dimensions)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(scope="module")
def config(tmp_path_factory, data_sets):
    config = joint.get_config()
    folder = tmp_path_factory.mktemp("model") / "small"
    make_tiny_backbone.main([f"--out={folder}", "--no-weights", *SMALL])
    config.backbone.path, config.backbone.random = str(folder), True
    config.backbone.scan_unroll = 1
    config.data.mixture = tuple((str(path), 1.0) for path in data_sets.values())
    config.data.dimensions = ("overall", "quality")
    config.data.programs = 1
    config.batch_size = 6
    return config


def test_a_batch_of_a_mixture_holds_what_each_record_has(config, data_sets):
    backbone = build.load_backbone_config(config)
    data = build_data.build_data(config, backbone, print)
    mesh = build.make_mesh(config, backbone, jax.devices()[:1])
    seen = dict.fromkeys(KINDS, 0)
    epoch = data.train_plan.steps_per_epoch
    with build_data.batches(config, data, "train", mesh, 0, epoch) as batches:
        for batch in batches:
            for row, name in enumerate(data.example_names(batch["example_index"])):
                kind = name.split("(")[1].split()[0]
                seen[kind] += 1
                weight_R = batch["preference_weight"][row].sum((0, 1))
                assert bool(weight_R[0]) == (kind != "critiques"), name
                assert bool(weight_R[1]) == (kind == "preferences"), name  # 'quality'
                said_K = batch["critique_weights"][row].sum(-1) > 0
                wanted = batch["candidate_mask"][row] if kind != "preferences" else np.zeros(4)
                np.testing.assert_array_equal(said_K, wanted > 0, name)
    assert seen == dict.fromkeys(KINDS, COUNT)


def test_weights_of_a_mixture_say_how_often_each_set_is_seen(config, data_sets):
    config = config.copy_and_resolve_references()
    config.data.mixture = (
        (str(data_sets["both"]), 2.0), (str(data_sets["preferences"]), 0.5),
        (str(data_sets["critiques"]), 0.0),
    )  # fmt: skip
    data = build_data.build_data(config, build.load_backbone_config(config), print)
    plan = data.train_plan
    steps = next(step for step in range(99) if plan.epoch(step) == 2)  # two epochs
    ids = [int(i) for step in range(steps) for i in plan(step)[1]]
    kinds = [name.split("(")[1].split()[0] for name in data.example_names(ids)]
    found = {kind: kinds.count(kind) for kind in KINDS}
    assert found == {"both": 4 * COUNT, "preferences": COUNT, "critiques": 0}
    config.data.dimensions = ("overall", "beauty")
    with pytest.raises(UserError, match="'beauty' is not in the data, which has overall"):
        build_data.build_data(config, build.load_backbone_config(config), print)


def test_what_exceeds_a_cap_is_left_out_and_told(config):
    """Each cap of the config means its own part of an example."""
    backbone = build.load_backbone_config(config)
    data = build_data.build_data(config, backbone, print)
    parts = [measure(s, data.encoder.sizes, "", name="train").rows() for s in data.train_sets]
    sizes = Sizes.from_rows(np.concatenate(parts))
    found = {
        "max_candidates": sizes.candidates, "max_pictures": sizes.images,
        "max_picture_tokens": sizes.patches // backbone.vision.merge**2,
        "max_prompt": sizes.prompt, "max_candidate": sizes.answer, "max_critique": sizes.critique,
    }  # fmt: skip
    for name, values in found.items():
        largest = values.max()
        capped = config.copy_and_resolve_references()
        capped.data[name] = int(largest)
        said = []
        build_data.build_data(capped, backbone, said.append)
        assert not [words for words in said if "too large" in words]
        capped.data[name] = int(largest) - 1
        with pytest.raises(UserError, match="are too large.*skip_large=True"):
            build_data.build_data(capped, backbone, said.append)
    capped.data.skip_large, said = True, []
    data = build_data.build_data(capped, backbone, said.append)
    told = [words for words in said if "too large" in words]
    assert told and all("critique up to" in w and w.endswith("left out") for w in told)
    kept = sum(int((data.train_plan.batch(step)[1] >= 0).sum())
               for step in range(data.train_plan.steps_per_epoch))  # fmt: skip
    assert kept == (sizes.critique < largest).sum()


def test_gradients_of_a_mixture_are_the_sum_of_those_computed_apart(config):
    """A batch of all three kinds against a run on its preferences and one on its critiques."""
    backbone_config = build.load_backbone_config(config)
    data = build_data.build_data(config, backbone_config, print)
    mesh = build.make_mesh(config, backbone_config, jax.devices()[:1])
    encoder = data.encoder
    backbone = build.make_backbone(config, backbone_config, mesh, encoder.tokenizer.reward_id)
    params = build.init_state(config, backbone_config, mesh, encoder)[0].trainable
    params = params | {"language_head": {}}
    forward = make_forward(
        backbone, encoder.processor.mean, encoder.processor.std,
        LossConfig(1.0, 1.0, centering_weight=1.0),
    )  # fmt: skip
    (bucket,) = data.buckets
    groups = [from_record(part[index]) for part in data.train_sets for index in (0, 1)]

    def lay(change):
        """The same six places, each with what `change` leaves of its group."""
        changed = [change(group) for group in groups]
        encoded = [encoder.encode_example(group) if group else None for group in changed]
        return jax.tree.map(jnp.asarray, assemble_batch(encoded, bucket, encoder))

    def loss(params, batch, coefficients):
        return combine(forward(params, batch).terms, coefficients, term_weights(batch))

    options = sharding.compiler_options(mesh)
    gradient = jax.jit(jax.grad(loss), compiler_options=options)

    def ranked(group):
        return mute(group) if group.weight.any() else None

    def told(group):
        return unranked(group) if any(c.critique for c in group.candidates) else None

    ranking = {"preference": 3.0, "centering": 0.1}
    silent = {"preference": 0.0, "centering": 0.0}
    whole = gradient(params, lay(lambda group: group), ranking | {"language": 1.0})
    alone = gradient(params, lay(ranked), ranking | {"language": 0.0})
    words = gradient(params, lay(told), silent | {"language": 1.0})
    # the language loss moves the reward's embedding, never its head
    assert not np.any(words["reward_head"]["kernel"]) and np.any(words["reward_embedding"])
    for (path, found), one, two in zip(
        flatten(whole).items(), flatten(alone).values(), flatten(words).values(), strict=True
    ):
        scale = max(np.abs(found).max(), 1e-3)
        np.testing.assert_allclose(found / scale, (one + two) / scale, atol=1e-5, err_msg=path)
    # as if there were nothing else: the same with everything asked for
    for apart, change in ((alone, ranked), (words, told)):
        again = gradient(params, lay(change), ranking | {"language": 1.0})
        for (path, found), one in zip(
            flatten(again).items(), flatten(apart).values(), strict=True
        ):
            np.testing.assert_array_equal(found, one, path)
