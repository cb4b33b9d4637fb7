"""All backbones against `transformers`: values, gradients, the packed prompt-sharing layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_case import (
    CANDIDATE,
    GRIDS,
    IMAGE,
    PATCHES,
    PROMPT,
    QUICK,
    REWARD,
    VOCAB,
    backbone_of,
    case,  # noqa: F401  a fixture
    logits_of,
    make_case,
    pack,
    relative,
    run_hidden,
    run_states,
    run_torch,
    sequence_slots,
)

from jrm_jax.model.backbone import init_backbone
from jrm_jax.model.published import PARAMETERS, PUBLISHED
from jrm_jax.model.rope import image_tables
from jrm_jax.model.weights import abstract_params, load_params

torch = pytest.importorskip("torch")

HIDDEN_BARS = {"qwen2_5_vl": 1e-4, "qwen3_vl": 1e-4, "qwen3_5": 2e-5}
GRADIENT_BARS = {"qwen2_5_vl": 1e-3, "qwen3_vl": 1e-3, "qwen3_5": 1e-4}
SAME_BARS = {"qwen2_5_vl": 1e-6, "qwen3_vl": 1e-6, "qwen3_5": 1e-5}  # a state hands roundings on


def test_every_layer_and_logit_matches_torch(case):
    theirs = run_torch(case)
    ours = run_states(case, pack(case))

    sizes = [h * w for h, w in GRIDS]
    assert theirs.numbers == [0, 1, 0, 2]
    per_image = np.cumsum([0] + [sizes[n] for n in theirs.numbers])
    errors = {}

    def compare_images(name: str, mine, yours, unit: int) -> None:
        for place, number in enumerate(theirs.numbers):
            first, last = per_image[place] // unit, per_image[place + 1] // unit
            size = sizes[number] // unit
            errors[f"{name} image {place}"] = relative(mine[number, :size], yours[first:last])

    for layer, state in enumerate(theirs.states["vision"]):
        compare_images(f"vision {layer}", ours["vision_blocks"][layer], state, 1)
    tokens = ours["visual_tokens"].reshape(3, PATCHES // 4, -1)
    compare_images("merger", tokens, theirs.states["visual"][0], 4)
    for tap, state in enumerate(theirs.states["deepstack"]):
        feature = ours["deepstack"][tap].reshape(3, PATCHES // 4, -1)
        compare_images(f"deepstack {tap}", feature, state, 4)

    layers = [ours["embedded"], *ours["decoder_layers"]]
    assert len(layers) == len(theirs.states["decoder"]) == case.config.text.layers + 1
    logits = np.asarray(logits_of(case, case.params, ours["hidden"]))
    for row in range(2):
        slots = sequence_slots(case, row)
        for layer, (mine, state) in enumerate(zip(layers, theirs.states["decoder"], strict=True)):
            errors[f"decoder {layer} {row}"] = relative(mine[0, slots], state[row, : len(slots)])
        hidden = theirs.states["hidden"][row, : len(slots)]
        errors[f"hidden {row}"] = relative(ours["hidden"][0, slots], hidden)
        errors[f"logits {row}"] = relative(logits[0, slots], theirs.logits[row, : len(slots)])
    worst = max(errors, key=errors.get)
    print(f"{case.family}: worst value {worst}: {errors[worst]:.1e}")
    assert errors[worst] < 1e-4, {k: v for k, v in errors.items() if v >= 1e-4}
    final = [errors[f"hidden {row}"] for row in range(2)]
    assert max(final) < HIDDEN_BARS[case.family], final


def test_every_gradient_matches_torch(case, tmp_path):
    theirs = run_torch(case)
    with torch.no_grad():  # the gradients saved as weights: one mapping for both
        values = [parameter.detach().clone() for parameter in case.model.parameters()]
        for parameter in case.model.parameters():
            parameter.copy_(parameter.grad)
        case.model.save_pretrained(tmp_path)
        for parameter, value in zip(case.model.parameters(), values, strict=True):
            parameter.copy_(value)
    expected = load_params(tmp_path, case.config)

    batch = pack(case)
    weights_SX = np.zeros((PROMPT + 2 * CANDIDATE, VOCAB), np.float32)
    for row in (1, 0):
        slots = sequence_slots(case, row)
        weights_SX[slots] = case.loss_weights[row, : len(slots)]
    # each family with other compute options, which must not change anything either
    options = {
        "qwen2_5_vl": {"remat": "dots", "scan_unroll": True},
        "qwen3_vl": {"remat": "full", "scan_unroll": 2},
        "qwen3_5": {"remat": "full"},
    }
    backbone = backbone_of(case, **options[case.family])

    def loss_of(params, reward, patches, inputs):
        hidden = backbone.apply({"params": params["backbone"]}, inputs, reward, patches)
        return jnp.sum(logits_of(case, params, hidden)[0] * weights_SX)

    step = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1, 2)), compiler_options=QUICK)
    patches = batch.pop("patches")
    loss, (grads, reward_grad, patch_grad) = step(case.params, case.reward, patches, batch)
    assert abs(float(loss) - theirs.loss) < 1e-4 * abs(theirs.loss)

    table = np.asarray(grads["backbone"]["embed"]["embedding"]).copy()
    table[REWARD] += reward_grad
    grads["backbone"]["embed"]["embedding"] = table
    assert np.linalg.norm(reward_grad) > 0
    ours = dict(jax.tree_util.tree_leaves_with_path(grads))
    wanted = dict(jax.tree_util.tree_leaves_with_path(expected))
    assert ours.keys() == wanted.keys()
    errors = {}
    for path, want in wanted.items():
        want = np.asarray(want)
        assert np.linalg.norm(want) > 0, path
        distance = np.linalg.norm(np.asarray(ours[path]) - want) / np.linalg.norm(want)
        errors[jax.tree_util.keystr(path)] = distance
    for number, want in enumerate(theirs.pixel_grads):
        order = image_tables(GRIDS[number], case.config.vision).order
        mine = np.asarray(patch_grad)[0, number]
        assert not mine[len(want) :].any(), "padding patches must get no gradient"
        difference = np.linalg.norm(mine[: len(want)] - want[order])
        errors[f"pixels {number}"] = difference / np.linalg.norm(want)
    # a shift of all keys changes no attention weight: without a key norm its gradient is only noise
    errors = {k: v for k, v in errors.items() if "'k']['bias'" not in k}
    worst = max(errors, key=errors.get)
    print(f"{case.family}: worst gradient {worst}: {errors[worst]:.1e}")
    bar = GRADIENT_BARS[case.family]
    assert errors[worst] < bar, {k: v for k, v in errors.items() if v >= bar}


def test_prompt_sharing_equals_repeating_the_prompt(case):
    shared = run_hidden(case, pack(case))
    repeated = run_hidden(case, pack(case, share=False))
    for row in range(2):
        slots = sequence_slots(case, row)
        first = row * (PROMPT + CANDIDATE)
        assert relative(shared[slots], repeated[first : first + len(slots)]) < 1e-5


def test_more_padding_changes_nothing(case):
    short = run_hidden(case, pack(case))
    long = run_hidden(case, pack(case, PROMPT + 7, CANDIDATE + 9, PATCHES + 12))
    assert np.isfinite(long).all()
    for row in range(2):
        first = PROMPT + 7 + row * (CANDIDATE + 9)
        slots = np.r_[0 : case.prompt_length, first : first + case.lengths[row]]
        assert relative(long[slots], short[sequence_slots(case, row)]) < 1e-5


def test_a_candidate_ignores_the_other_and_its_own_future(case):
    batch = pack(case)
    before = run_hidden(case, batch)
    reward_slot = sum(len(tokens) for _, tokens in case.runs[1][0][:4])
    assert batch["candidate_tokens"][0, 0, reward_slot] == REWARD

    other = {key: value.copy() for key, value in batch.items()}
    other["candidate_tokens"][0, 1, -20:] = 7
    other["candidate_segments"][0, 1] = 1
    other["patches"][0, 2] *= -1
    after = run_hidden(case, other)
    first = slice(0, PROMPT + CANDIDATE)
    np.testing.assert_array_equal(after[first], before[first])
    assert relative(after[PROMPT + CANDIDATE :], before[PROMPT + CANDIDATE :]) > 1e-2

    later = {key: value.copy() for key, value in batch.items()}
    later["candidate_tokens"][0, 0, reward_slot + 1 :] = 11
    later["candidate_segments"][0, 0] = 1
    after = run_hidden(case, later)
    slot = PROMPT + reward_slot
    np.testing.assert_array_equal(after[: slot + 1], before[: slot + 1])
    assert relative(after[slot + 1], before[slot + 1]) > 1e-2


def test_deepstack_reaches_the_output(tmp_path_factory):
    case = make_case("qwen3_vl", str(tmp_path_factory.getbasetemp() / "qwen3_vl"))
    batch = pack(case)
    before = run_hidden(case, batch)
    reward_slot = PROMPT + sum(len(tokens) for _, tokens in case.runs[1][0][:4])
    for tap in range(2):
        params = jax.tree.map(lambda x: x, case.params)
        merger = params["backbone"]["vision"][f"deepstack_{tap}"]
        merger["fc2"] = jax.tree.map(jnp.zeros_like, merger["fc2"])
        assert relative(run_hidden(case, batch, params)[reward_slot], before[reward_slot]) > 1e-2


def test_random_parameters_have_the_loaded_tree(case):
    fresh = jax.eval_shape(lambda key: init_backbone(key, case.config), jax.random.key(0))
    shapes = jax.tree.map(jnp.shape, case.params)
    assert jax.tree.map(lambda x: x.shape, fresh) == shapes


@pytest.mark.parametrize("variant", PUBLISHED)
def test_released_sizes_have_their_parameter_counts(variant):
    config = PUBLISHED[variant]
    params = jax.eval_shape(lambda key: init_backbone(key, config), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[variant]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract_params(config))


def test_without_images(case):
    batch = pack(case)
    for key in ("prompt", "candidate"):
        batch[f"{key}_visual"][:] = -1
        batch[f"{key}_tokens"][batch[f"{key}_tokens"] == IMAGE] = 5
    expected = run_hidden(case, batch)
    for key, value in batch.items():
        if key.startswith(("patch", "window", "position_")):
            batch[key] = value[:, :0]
    assert relative(run_hidden(case, batch), expected) < SAME_BARS[case.family]
