"""Weights against transformers: names, layouts, transposes, errors, and what each device reads."""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrm_jax.errors import UserError
from jrm_jax.model import weights
from jrm_jax.model.backbone import init_backbone
from jrm_jax.model.config import load_config
from jrm_jax.model.stored_head import load_reward_head
from jrm_jax.model.tensors import flatten, tensor_table
from jrm_jax.model.weights import abstract_params, load_params, save_params
from jrm_jax.sharding import make_mesh, param_shardings

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from hf_models import VOCAB, build, check_params, keep, legacy, native, relayout  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
CASES = [(f, t) for f in FAMILIES for t in (True, False)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(family, tied) -> (torch model, folder as transformers saves it)."""
    made = {}
    for family, tied in CASES:
        folder = tmp_path_factory.mktemp("models") / f"{family}-{tied}"
        model = build(family, tied)
        model.save_pretrained(folder)
        made[family, tied] = model, folder
    return made


@pytest.mark.parametrize("family, tied", CASES)
def test_every_tensor_arrives(models, family, tied):
    model, folder = models[family, tied]
    config = load_config(folder)
    params = load_params(folder, config)
    check_params(params, model, family, tied)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == sum(p.numel() for p in model.parameters())
    abstract = abstract_params(config)
    born = jax.eval_shape(lambda key: init_backbone(key, config), jax.random.key(0))
    assert abstract == born  # the model's own tree: paths, shapes and dtypes
    assert jax.tree.structure(abstract) == jax.tree.structure(params)
    assert all(
        a.shape == b.shape and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(params), strict=True)
    )


@pytest.mark.parametrize("layout", [native, legacy])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_and_shards(models, tmp_path, family, layout):
    model, folder = models[family, False]
    other = relayout(folder, tmp_path / "copy", layout, shards=3)
    prefix = "visual." if layout is legacy else "model.visual."
    saved = json.loads((other / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(name.startswith(prefix) for name in saved)
    check_params(load_params(other, load_config(other)), model, family, False)


def test_flat_config_and_present_tied_head(models, tmp_path):
    model, folder = models["qwen2_5_vl", True]
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config = text | config
    other = relayout(folder, tmp_path / "flat", keep, config=config)
    tensors = load_file(other / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, other / "model.safetensors")
    check_params(load_params(other, load_config(other)), model, "qwen2_5_vl", True)
    head[-1, -1] += 1  # then the file and config.json contradict each other
    save_file(tensors | {"lm_head.weight": head}, other / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_params(other, load_config(other))


def test_bfloat16_on_disk_and_in_memory(models, tmp_path):
    model, folder = models["qwen3_vl", False]
    other = relayout(folder, tmp_path / "bf16", lambda n, t: (n, t.bfloat16()))
    config = load_config(other)
    params = load_params(other, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    rounded = copy.deepcopy(model).bfloat16().float()
    check_params(params, rounded, "qwen3_vl", False)
    vision_only = load_params(
        other, config, dtype=lambda path: jnp.bfloat16 if "/vision/" in path else jnp.float32
    )
    for path, leaf in flatten(vision_only).items():
        assert leaf.dtype == (jnp.bfloat16 if "/vision/" in path else jnp.float32), path
    check_params(vision_only, rounded, "qwen3_vl", False)


def test_all_misfits_in_one_message(models, tmp_path):
    _, folder = models["qwen3_vl", False]

    def damage(name, tensor):
        if name.endswith("layers.1.mlp.up_proj.weight") or name == "model.visual.merger.norm.bias":
            return None
        if name.endswith("blocks.2.attn.qkv.bias"):
            return name, tensor[:-1]
        if name.endswith("blocks.0.norm1.bias"):
            return name, tensor.to(torch.int8)
        if name.endswith("layers.2.self_attn.q_norm.weight"):
            return name.replace("q_norm", "qq_norm"), tensor
        return name, tensor

    other = relayout(folder, tmp_path / "bad", damage)
    with pytest.raises(UserError) as error:
        load_params(other, load_config(other))
    message = str(error.value)
    assert "\n" not in message
    missing, unread, shape, kind = message.split("; ")
    assert "missing (3)" in missing
    assert "model.language_model.layers.1.mlp.up_proj.weight" in missing
    assert "model.visual.merger.norm.bias" in missing and "layers.2.self_attn.q_norm" in missing
    assert "not read (1): model.language_model.layers.2.self_attn.qq_norm.weight" in unread
    assert "blocks.2.attn.qkv.bias is [47], needs [48]" in shape
    assert "blocks.0.norm1.bias is I8" in kind


def test_score_weight_is_read_or_left_aside(models, tmp_path):
    model, folder = models["qwen3_vl", True]
    config = load_config(folder)
    assert load_reward_head(folder, config) is None
    other = relayout(folder, tmp_path / "scored", keep)
    tensors = load_file(other / "model.safetensors")
    score = torch.randn(2, 32)
    save_file(tensors | {"score.weight": score}, other / "model.safetensors")
    with pytest.raises(UserError, match="not read .1.: score.weight"):
        load_params(other, config)
    check_params(load_params(other, config, ignore=("score.weight",)), model, "qwen3_vl", True)
    head = load_reward_head(other, config)
    np.testing.assert_array_equal(head["kernel"], score.numpy().T)
    save_file(tensors | {"score.weight": score[:, 1:].clone()}, other / "model.safetensors")
    with pytest.raises(UserError, match=r"score.weight is F32 \[2, 31\]"):
        load_reward_head(other, config)


def test_repeated_tensors(models, tmp_path):
    _, folder = models["qwen3_vl", False]
    other = relayout(folder, tmp_path / "twice", keep)
    tensors = load_file(other / "model.safetensors")
    name = "model.language_model.norm.weight"
    save_file(tensors | {"model.norm.weight": tensors[name] + 1}, other / "model.safetensors")
    with pytest.raises(UserError, match="twice .1.: .*model.norm.weight"):
        load_params(other, load_config(other))


def test_damaged_or_absent_files(models, tmp_path):
    _, folder = models["qwen3_vl", True]
    config = load_config(folder)
    with pytest.raises(UserError, match="holds neither model.safetensors"):
        load_params(tmp_path, config)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="only PyTorch pickles"):
        load_params(tmp_path, config)
    whole = (folder / "model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"
    for broken in (whole[:-100], whole[:20], b"", pointer):
        (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(UserError, match="model.safetensors cannot be read .*fetch it again"):
            load_params(tmp_path, config)
    (tmp_path / "model.safetensors").unlink()
    other = relayout(folder, tmp_path / "shards", keep, shards=3)
    (other / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="incomplete.*names model-00002-of-00003"):
        load_params(other, config)
    (other / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="not a valid safetensors index"):
        load_params(other, config)
    with pytest.raises(UserError, match="config.json"):
        load_config(tmp_path)


class Reads:
    """Counts the numbers copied out of the files, per tensor and in total."""

    def __init__(self, monkeypatch):
        self.largest, self.total = {}, 0
        original = weights.TensorFiles.read

        def read(files, name, slices):
            part = original(files, name, slices)
            self.largest[name] = max(part.size, self.largest.get(name, 0))
            self.total += part.size
            return part

        monkeypatch.setattr(weights.TensorFiles, "read", read)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_device_reads_only_its_part(models, family, monkeypatch):
    model, folder = models[family, False]
    config = load_config(folder)
    shardings = param_shardings(abstract_params(config), make_mesh(2, 2, 2))
    reads = Reads(monkeypatch)
    progress = []
    params = load_params(
        folder, config, shardings, progress=lambda done, total: progress.append((done, total))
    )
    check_params(params, model, family, False)
    placed = flatten(shardings)
    for path, leaf in flatten(params).items():
        assert leaf.sharding == placed[path]
    count = sum(p.numel() for p in model.parameters())
    assert reads.total == count  # every number once: devices with the same part share it
    assert progress[-1] == (count, count) and len(progress) == len(placed)
    for path, leaf in tensor_table(config).items():
        shape = placed[path].shard_shape(leaf.shape)
        for name in leaf.names:
            assert reads.largest[name] == np.prod(shape[leaf.stacked :]), name
    assert reads.largest["lm_head.weight"] == VOCAB * 32 // 4


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_slices_of_every_axis(models, family):
    """Also layer stacks, the patch kernel, the convolution: no rule splits them that way."""
    _, folder = models[family, False]
    config = load_config(folder)
    whole = load_params(folder, config)
    mesh = make_mesh(2, 2, 2)
    for path, expected in flatten(whole).items():
        for dim in range(expected.ndim):
            if expected.shape[dim] % 2 == 0:
                spec = jax.sharding.PartitionSpec(*[None] * dim, "fsdp")
                sharding = jax.sharding.NamedSharding(mesh, spec)
                files = weights.TensorFiles(folder)
                leaf = tensor_table(config)[path]
                got = weights._place(files, leaf, np.dtype("float32"), sharding)
                np.testing.assert_array_equal(got, expected, err_msg=f"{path} {dim}")


def reload(folder, model):
    """transformers must find every tensor and nothing else."""
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return again


@pytest.mark.parametrize("family, tied", CASES)
def test_round_trip_through_transformers(models, tmp_path, family, tied):
    model, folder = models[family, tied]
    config = load_config(folder)
    shardings = param_shardings(abstract_params(config), make_mesh(1, 4, 2))
    params = load_params(folder, config, shardings)
    out = tmp_path / "out"
    limit = 40_000 if tied else 10**9
    save_params(out, params, config, max_shard_bytes=limit)
    shutil.copy(folder / "config.json", out)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (not tied)
    if tied:
        assert all((out / name).stat().st_size < limit + 10_000 for name in files)
    names = {name for file in files for name in load_file(out / file)}
    assert ("lm_head.weight" in names) == (not tied)
    assert all(name.startswith(("model.language_model.", "model.visual.", "lm_")) for name in names)
    again = reload(out, model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    check_params(load_params(out, config), model, family, tied)
    with pytest.raises(UserError, match="holds weights already"):
        save_params(out, params, config)


def test_save_bfloat16_and_further_tensors(models, tmp_path):
    model, folder = models["qwen3_vl", False]
    config = load_config(folder)
    params = jax.tree.map(np.asarray, load_params(folder, config))  # host arrays will do
    score = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    save_params(tmp_path, params, config, dtype="bfloat16", extra={"score.weight": score})
    stored = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(stored.pop("score.weight").numpy(), score)
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name], tensor.bfloat16()), name
    with pytest.raises(UserError, match="float16.*float32 or bfloat16"):
        save_params(tmp_path / "other", params, config, dtype="float16")


def test_save_names_every_leaf_that_does_not_fit(models, tmp_path):
    _, folder = models["qwen3_vl", True]
    config = load_config(folder)
    params = load_params(folder, config)
    params["backbone"]["decoder"]["norm"] = {"scale": jnp.zeros((3,))}
    params["language_head"] = {"kernel": jnp.zeros((32, VOCAB))}
    del params["backbone"]["embed"]
    with pytest.raises(UserError) as error:
        save_params(tmp_path, params, config)
    assert "backbone/decoder/norm/scale is [3], needs [32]" in str(error.value)
    assert "language_head/kernel is unknown" in str(error.value)
    assert "backbone/embed/embedding is missing" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_is_not_rounded_and_what_is_ignored(models, tmp_path):
    model, folder = models["qwen3_5", False]
    config = load_config(folder)
    params = load_params(folder, config)
    save_params(tmp_path / "half", params, config, dtype="bfloat16")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    wide = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert wide == {
        f"model.language_model.layers.{layer}.linear_attn.{part}"
        for layer in (0, 1, 3, 4) for part in ("A_log", "norm.weight")
    }  # fmt: skip
    for name in wide:
        assert torch.equal(stored[name], model.state_dict()[name])
    other = relayout(folder, tmp_path / "mtp", keep)
    tensors = load_file(other / "model.safetensors")
    extra = {"mtp.fc.weight": torch.ones(2, 3), "mtp.layers.0.mlp.up_proj.weight": torch.ones(2)}
    save_file(tensors | extra, other / "model.safetensors")
    check_params(load_params(other, config), model, "qwen3_5", False)
    save_file(tensors | {"mtpx.weight": torch.ones(2)}, other / "model.safetensors")
    with pytest.raises(UserError, match="not read .1.: mtpx.weight"):
        load_params(other, config)
