"""configs/paper.py:tiny with both of its heads: it trains, scores, exports, and PyTorch agrees."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from export_case import FAMILIES, family_run, make_folder, make_groups, start, write
from safetensors.numpy import load_file, save_file
from shared_case import run_on_one_device, share_steps
from test_export import classifier, picture

from configs import paper
from jrm_jax import build, export, heads
from jrm_jax.errors import UserError
from jrm_jax.model import stored_head
from jrm_jax.model.config import load_config
from jrm_jax.model.published import PUBLISHED
from jrm_jax.optim import flatten
from jrm_jax.run.check_config import check_config
from jrm_jax.run.workdir import read_config
from jrm_jax.serving import rounding
from jrm_jax.serving.reward_model import RewardModel
from jrm_jax.serving.trained import load_trained

HEADS = {"linear": (), "layers": (24, 16)}


class Recipe:
    """A config's module, as `export_case.start` takes it."""

    def __init__(self, hidden, **fields):
        self.fields = {"head.hidden": hidden, "head.anew": True, "save_interval": 1, **fields}

    def get_config(self):
        config = paper.get_config("tiny")
        config.update_from_flattened_dict(self.fields)
        return config


@pytest.fixture(scope="module", autouse=True)
def shared_steps():
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        yield


@pytest.fixture(scope="module", params=HEADS)
def case(request, tmp_path_factory):
    """(workdir, float32 export, the head's hidden layers)"""
    parent, hidden = tmp_path_factory.mktemp(request.param), HEADS[request.param]
    folder = make_folder(parent, "qwen3_vl")
    workdir = start(parent, folder, "run", Recipe(hidden), steps=3)
    return workdir, write(workdir, parent / "out", "--dtype=float32"), hidden


def test_scores_and_deviations_are_those_of_pytorch(case):
    workdir, folder, _ = case
    groups = make_groups(6)
    loaded, info = classifier(folder, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = RewardModel.load(workdir).score_batch(groups)
    again = RewardModel.load(folder).score_batch(groups)
    for (text, source, candidates), mine, read in zip(groups, ours, again, strict=True):
        edit = text, picture(source), [picture(one) for one in candidates]
        scores, deviations = loaded.score_edits(*edit, with_deviation=True)
        np.testing.assert_array_equal(loaded.score_edits(*edit), scores)
        for found in (scores.numpy(), read.reward_KR):
            np.testing.assert_allclose(found, mine.reward_KR, rtol=0, atol=1e-4)
        for found in (deviations.numpy(), read.deviation_KR):
            np.testing.assert_allclose(found, mine.deviation_KR, rtol=0, atol=1e-4)
    spread = np.concatenate([one.deviation_KR for one in ours])
    assert spread.shape[1] == 2 and np.ptp(spread, axis=0).min() > 1e-3 and spread.min() > 0


def test_an_export_says_what_its_outputs_are(case):
    _, folder, hidden = case
    config = json.loads((folder / "config.json").read_text())
    assert list(config["id2label"].values()) == [
        "following", "preservation", "following log deviation", "preservation log deviation",
    ]  # fmt: skip
    names = {name for name in load_file(folder / "model.safetensors") if name.startswith("score.")}
    assert names == (
        {f"score.{layer}.{leaf}" for layer in ("hidden.0", "hidden.1", "out")
         for leaf in ("weight", "bias")} if hidden else {"score.weight"}
    )  # fmt: skip
    card = (folder / "README.md").read_text()
    assert export.DEVIATION[True] in card and export.DEVIATION[False] not in card
    assert export.LAYOUT[bool(hidden)] in card and export.LAYOUT[not hidden] not in card
    assert ", their deviations by at most 0.0%" in card


def test_what_storing_did_to_deviations_is_said():
    found = rounding.Rounding(0, 0, 0.0, 1.0, 4, deviation=0.2)
    assert "their deviations by at most 20.0%; --dtype=float32 keeps" in found.words("bfloat16")
    plain = found._replace(deviation=None).words("bfloat16")
    assert "deviation" not in plain and "float32" not in plain


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_layers_stays_float32_in_a_bfloat16_folder(family, tmp_path):
    """In PyTorch, too, whatever dtype it is loaded in: all its matrices and biases."""
    trained = load_trained(family_run(family))
    width = trained.config.text.hidden
    head = heads.init_reward_head(jax.random.key(2), width, 1, 1.0, (24, 16), deviation=True)
    head = jax.tree.map(lambda leaf: leaf + 0.01 + 1e-5 * jnp.arange(leaf.size).reshape(leaf.shape),
                        head)  # fmt: skip
    out = tmp_path / "half"
    trained = trained._replace(params=trained.params | {"reward_head": head})
    export.export(trained, out, "bfloat16", 10**9, check=False)
    read = flatten(load_trained(out).params["reward_head"])
    for path, leaf in flatten(head).items():
        np.testing.assert_array_equal(read[path], leaf)
    loaded, info = classifier(out, dtype=torch.bfloat16)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) <= {"lm_head.weight"}
    assert loaded.model.dtype == torch.bfloat16
    found = dict(loaded.score.named_parameters())
    for name, tensor in stored_head.head_tensors(head).items():
        own = found.pop(name.removeprefix(stored_head.PREFIX)).detach()
        assert own.dtype == torch.float32
        np.testing.assert_array_equal(own, tensor)
    assert not found
    hidden = np.random.default_rng(6).normal(size=(1, 5, width)).astype(np.float32)
    wanted = [apply(head, hidden)[0, :, 0]
              for apply in (heads.apply_reward_head, heads.apply_deviation_head)]  # fmt: skip
    with torch.no_grad():
        scored = loaded.score(torch.from_numpy(hidden[0])).numpy()
    np.testing.assert_allclose(scored.T, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["", "qwen3_vl_8b", "qwen3_vl_4b"])
def test_the_published_numbers(variant):
    config = paper.get_config(f"{variant},groups=200000" if variant else None)
    assert config.variant == (variant or "qwen3_vl_8b") and config.batch_size == 64
    assert config.total_steps == 31_250 and config.optimizer.warmup_steps == 1_563
    assert (config.optimizer.name, config.optimizer.b1, config.optimizer.b2) == ("adam", 0.9, 0.95)
    assert (config.optimizer.learning_rate, config.optimizer.groups) == (2e-6, ())
    assert (config.optimizer.schedule, config.optimizer.final_scale) == ("cosine", 0.0)
    assert (config.loss.preference_weight, config.loss.language_weight) == (0.3, 0.7)
    assert config.loss.gaussian == "log_of_mean" and config.head.hidden == (1024, 16)
    assert config.data.dimensions == ("instruction_following", "visual_quality")
    assert (config.backbone.compute_dtype, config.data.max_visual_tokens) == ("bfloat16", 256)
    check_config(config)


@pytest.mark.parametrize("groups", [0, -5])
@pytest.mark.parametrize("variant", ["qwen3_vl_8b", "tiny"])
def test_no_groups_are_refused_by_the_option_that_says_so(variant, groups):
    with pytest.raises(UserError, match=f"config option groups={groups} must be 1 or more"):
        paper.get_config(f"{variant},groups={groups}")


@pytest.mark.parametrize("groups", [1, 7, 64, 1000])
def test_few_groups_are_trained_and_measured_too(groups):
    config = paper.get_config(f"qwen3_vl_8b,groups={groups}")
    steps = config.total_steps
    assert (steps - 1) * 64 < 10 * groups <= steps * 64
    assert config.eval_interval <= steps and config.save_interval <= steps
    assert config.optimizer.warmup_steps >= (steps > 1)
    rates = [float(build.make_schedule(config, steps)(step)) for step in range(steps)]
    assert max(rates) == pytest.approx(2e-6, rel=1e-3) and np.isfinite(rates).all()


def test_what_came_from_another_head_is_not_said_of_the_next(case, tmp_path):
    """A plain run that began at this export: both sides load what it exports."""
    _, folder, _ = case
    before = load_trained(folder)
    kernel = np.random.default_rng(1).normal(size=(before.config.text.hidden, 2))
    plain = before._replace(params=before.params | {"reward_head": {"kernel": np.float32(kernel)}})
    out = tmp_path / "plain"
    export.export(plain, out, "float32", 10**9, check=False)
    assert stored_head.DESCRIPTION not in json.loads((out / "config.json").read_text())
    (read,) = flatten(load_trained(out).params["reward_head"]).values()
    np.testing.assert_array_equal(read, np.float32(kernel))
    loaded, info = classifier(out, dtype=torch.float32)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.is_gaussian and loaded.score.weight.shape == kernel.T.shape

    bare = tmp_path / "backbone"
    export.export_backbone(before, bare, "float32", 10**9)
    config = json.loads((bare / "config.json").read_text())
    assert not {stored_head.DESCRIPTION, "auto_map", "id2label", "problem_type"} & config.keys()
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    for path in bare.glob("*.json"):  # every class named is there
        for name in json.loads(path.read_text()).get("auto_map", {}).values():
            assert (bare / f"{name.split('.')[0]}.py").is_file(), path
    assert stored_head.load_reward_head(bare, load_config(bare)) is None


def test_a_run_goes_on_from_an_export(case, tmp_path):
    """Its means and deviations, by name; other layers are refused, unless it starts anew."""
    workdir, folder, hidden = case
    wanted = flatten(load_trained(workdir).params["reward_head"])

    def head(**fields):
        config = Recipe(hidden, **{"head.anew": False} | fields).get_config()
        config.backbone.path = str(folder)
        return build.head_start(config, load_config(folder))

    found = head()
    assert found.is_whole and flatten(found.params).keys() == wanted.keys()
    for path, leaf in flatten(found.params).items():
        np.testing.assert_array_equal(leaf, wanted[path])
    turned = head(**{"data.dimensions": ("preservation", "style")})
    assert "style starts anew; following is dropped" in turned.words and not turned.is_whole
    for path, leaf in flatten(turned.params).items():
        if not path.startswith("hidden"):
            np.testing.assert_array_equal(leaf[..., 0], wanted[path][..., 1])
            assert np.isnan(leaf[..., 1]).all()
    plain = head(**{"loss.gaussian": "off"})
    assert plain.is_whole and "its deviation is dropped" in plain.words
    with pytest.raises(UserError, match="hidden layers.*config.head.hidden.*config.head.anew"):
        head(**{"head.hidden": (8,)})


def stored(folder, hidden, deviation, **said):
    """A folder with a head of width 12 for two dimensions; `said`: what its config.json claims."""
    head = heads.init_reward_head(jax.random.key(0), 12, 2, 1.0, hidden, deviation)
    keys = iter(jax.random.split(jax.random.key(1), 20))
    head = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), head)
    folder.mkdir(exist_ok=True)
    save_file({n: np.ascontiguousarray(a) for n, a in stored_head.head_tensors(head).items()},
              folder / "model.safetensors")  # fmt: skip
    (folder / "config.json").write_text(json.dumps(stored_head.describe(head) | said))
    return head


WIDTH = SimpleNamespace(text=SimpleNamespace(hidden=12))  # of a backbone


@pytest.mark.parametrize("hidden", [(), (5,), (7, 5, 3)])
@pytest.mark.parametrize("deviation", [False, True])
def test_a_stored_head_is_read_as_it_was(tmp_path, hidden, deviation):
    wanted = flatten(stored(tmp_path, hidden, deviation))
    found = flatten(stored_head.load_reward_head(tmp_path, WIDTH))
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(found[path], leaf)


@pytest.mark.parametrize(
    ("hidden", "said", "words"),
    [
        ((5,), None, "is score.hidden.0.bias, .* by its config.json it must be score.weight"),
        ((), {"hidden": [5]}, "is score.weight; .* must be score.hidden.0.bias, "),
        ((5,), {"hidden": [6], "deviation": True},
         r"score.hidden.0.weight is F32 \[5, 12\], needs floats \[6, 12\]"),
    ],
)  # fmt: skip
def test_a_head_that_is_not_what_its_folder_says_is_refused(tmp_path, hidden, said, words):
    stored(tmp_path, hidden, True, reward_head=said)
    with pytest.raises(UserError, match=words):
        stored_head.load_reward_head(tmp_path, WIDTH)
    stored(tmp_path, (), False, reward_head={"deviation": True})
    assert "deviation" in stored_head.load_reward_head(tmp_path, WIDTH)  # two rows: one pair
    tensors = {"score.weight": np.zeros((3, 12), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="has 3 rows, needs pairs"):
        stored_head.load_reward_head(tmp_path, WIDTH)


@pytest.mark.parametrize("hidden", HEADS.values(), ids=HEADS)
def test_an_8b_head_lies_on_a_mesh_and_trains_beside_adapters(hidden):
    """All of its leaves have a place, also with a tensor axis, and learn where the rest is frozen.
    """
    config = paper.get_config()
    config.update_from_flattened_dict({
        "head.hidden": (1024, *hidden[1:]) if hidden else (), "lora.rank": 4,
        "mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 4,
    })  # fmt: skip
    backbone = PUBLISHED["qwen3_vl_8b"]
    mesh = build.make_mesh(config, backbone, jax.devices()[:8])
    state, _ = build.abstract_state(config, backbone, mesh)
    assert "reward_head" not in state.frozen
    head = flatten(state.trainable["reward_head"])
    last = (16 if hidden else 4096, 2)
    assert head["kernel"].shape == head["deviation/kernel"].shape == last
    assert ("bias" in head) == ("hidden/0/bias" in head) == ("deviation/bias" in head)
    if hidden:
        assert head["hidden/0/kernel"].sharding.shard_shape((4096, 1024)) == (2048, 1024)
    moments = [x.shape for x in jax.tree.leaves(state.opt_state) if x.shape == last]
    assert len(moments) == 4  # two of each last kernel


def test_a_run_goes_on_bit_for_bit(case, tmp_path):
    """From its checkpoint of step 2, as after a kill."""
    workdir, _, _ = case
    again = shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "3")
    (again / "results.json").unlink()
    config = read_config(again)
    assert run_on_one_device(config.lock(), again) == 0
    mine, other = (flatten(load_trained(one).params) for one in (workdir, again))
    for path, leaf in mine.items():
        np.testing.assert_array_equal(leaf, other[path])
