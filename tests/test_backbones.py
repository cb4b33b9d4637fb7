"""The backbone of a run: found by its name wherever it lies, and known again."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from entry_point import small_backbone  # noqa: F401
from safetensors.numpy import load_file, save_file
from shared_case import run_on_one_device

from configs import joint
from jrm_jax import build, export, score
from jrm_jax.errors import UserError
from jrm_jax.run import backbones, workdir
from jrm_jax.run.backbones import (
    READING,
    digest,
    find_folder,
    for_reading,
    for_training,
)
from jrm_jax.serving.trained import load_trained
from jrm_jax.shell import disk
from jrm_jax.shell.packaged import ASSETS

TINY = ASSETS / "tiny_qwen3_vl"
FIRST, SECOND = "a" * 40, "b" * 40
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def config_of(path, **fields):
    config = joint.get_config()
    config.backbone.path = str(path)
    config.update_from_flattened_dict(fields)
    return config.lock()


def begin(config, folder: Path) -> backbones.Found:
    """What a run leaves when it begins."""
    folder.mkdir(parents=True, exist_ok=True)
    found = for_training(config, folder)
    disk.write_whole(folder / backbones.RECORD, found.record.as_text())
    disk.write_whole(folder / workdir.CONFIG, workdir.as_text(found.config))
    return found


def copy(folder: Path, change=None) -> Path:
    """The packaged backbone in a folder of its own; `change`: of its tensors, in place."""
    shutil.copytree(TINY, folder)
    if change:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def one_weight(tensors):
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    assert name in tensors
    tensors[name] = tensors[name].copy()
    tensors[name][3, 7] += 1


def test_numbers_of_a_type_that_is_not_read_are_told_before_any_is_read(tmp_path):
    """FP8, as folders of quantised models have it: NumPy has no such type."""
    header = {
        name: {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [2 * i, 2 * i + 2]}
        for i, name in enumerate(("a.weight", "b.weight"))
    }
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(4)
    folder = copy(tmp_path / "backbone")
    (folder / "model.safetensors").write_bytes(content)
    words = "a.weight and 1 more are stored as F8_E4M3, .* in bfloat16, float16 or float32"
    for read in (digest, lambda folder: for_training(config_of(folder), tmp_path / "run")):
        with pytest.raises(UserError, match=words):
            read(folder)


@pytest.mark.parametrize("fields", [{"digest": 5}, {"digest": None}, {"path": 5}, {"from_run": []}])
def test_a_damaged_record_is_one_line(tmp_path, fields):
    run = tmp_path / "run"
    begin(config_of("tiny_qwen3_vl"), run)
    record = json.loads((run / backbones.RECORD).read_text())
    (run / backbones.RECORD).write_text(json.dumps(record | fields))
    with pytest.raises(UserError, match="backbone.json cannot be read"):
        for_reading(config_of("tiny_qwen3_vl"), run)


# Names


def test_a_packaged_backbone_is_known_by_its_name_alone(tmp_path, monkeypatch):
    assert find_folder("tiny_qwen3_vl") == TINY
    copy(tmp_path / "tiny_qwen3_vl")
    monkeypatch.chdir(tmp_path)
    assert find_folder("tiny_qwen3_vl") == TINY  # wherever one stands
    assert find_folder("./tiny_qwen3_vl").resolve() == tmp_path / "tiny_qwen3_vl"
    assert joint.get_config().backbone.path == "tiny_qwen3_vl"


def test_a_checkout_that_is_gone_had_the_packaged_one(tmp_path):
    assert find_folder("/gone/code/jrm_jax/assets/tiny_qwen3_vl") == TINY
    for path in ("/gone/weights/tiny_qwen3_vl", "/gone/jrm_jax/assets/tiny"):
        with pytest.raises(UserError, match="is no folder here"):
            find_folder(path)
    there = copy(tmp_path / "assets" / "tiny_qwen3_vl")
    assert find_folder(str(there)) == there


@pytest.mark.parametrize("path", ["", "nope", "/no/where", "../no/where", "a/b/c", "-a/b"])
def test_what_is_neither_folder_nor_name_is_refused_in_one_line(path):
    with pytest.raises(UserError) as caught:
        find_folder(path, READING)
    assert f"{path!r} is no folder here" in str(caught.value)
    known = ", ".join(sorted(path.parent.name for path in ASSETS.glob("*/model.safetensors")))
    assert TINY.name in known and f"({known}): give it as {READING}" in str(caught.value)



def test_a_run_finds_a_folder_from_anywhere_and_after_a_move(tmp_path, monkeypatch):
    project = tmp_path / "project"
    copy(project / "weights" / "tiny")
    monkeypatch.chdir(project)
    for name, path in (("relative", "weights/tiny"), ("absolute", project / "weights" / "tiny")):
        begin(config_of(path), Path("runs") / name)
    os.rename(project, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for name in ("relative", "absolute"):
        run = tmp_path / "moved" / "runs" / name
        for each in (run, Path("moved") / "runs" / name):
            found = for_reading(workdir.read_config(each), each, weights=True)
            assert found.resolve() == tmp_path / "moved" / "weights" / "tiny"
        # the same command goes on, too
        config = config_of(workdir.read_config(run).backbone.path)
        assert for_training(config, run).folder.resolve() == tmp_path / "moved/weights/tiny"
    # from before there was a record: relative to a folder that the run lies in
    run = tmp_path / "moved" / "runs" / "relative"
    (run / backbones.RECORD).unlink()
    found = for_reading(workdir.read_config(run), run)
    assert found == tmp_path / "moved" / "weights" / "tiny"


def test_a_folder_that_is_not_found_is_given(tmp_path):
    there = copy(tmp_path / "weights")
    run = tmp_path / "a" / "run"
    begin(config_of(there), run)
    os.rename(there, tmp_path / "elsewhere")
    config = workdir.read_config(run)
    with pytest.raises(UserError) as caught:
        for_reading(config, run)
    assert str(caught.value).endswith(READING) and "--config" not in str(caught.value)
    assert for_reading(config, run, str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"
    with pytest.raises(UserError, match="config.backbone.path"):
        for_training(config_of(there), run)
    # a run goes on with what has moved, and then knows where it is
    begin(config_of(tmp_path / "elsewhere"), run)
    assert for_reading(workdir.read_config(run), run) == tmp_path / "elsewhere"


def test_another_backbone_is_noticed(tmp_path):
    run, other = tmp_path / "run", copy(tmp_path / "other", one_weight)
    config = config_of("tiny_qwen3_vl")
    begin(config, run)
    stored = workdir.read_config(run)
    assert for_reading(stored, run, str(other)) == other  # all that trains is in the checkpoint
    with pytest.raises(UserError, match=r"they differ in weights: give that one as --backbone"):
        for_reading(stored, run, str(other), weights=True)
    with pytest.raises(UserError, match=r"they differ in weights: give that one as --config"):
        for_training(config_of(other), run)
    backbones.check_name(config, run)
    with pytest.raises(UserError, match="they differ in weights"):
        backbones.check_name(config_of(other), run)
    same = copy(tmp_path / "same")
    backbones.check_name(config_of(same), run)
    (same / "tokenizer.json").write_text((same / "tokenizer.json").read_text() + "\n")
    with pytest.raises(UserError, match="they differ in tokenizer"):
        for_reading(stored, run, str(same))
    random = config_of(other, **{"backbone.random": True})
    begin(random, tmp_path / "random")
    assert "weights" not in backbones.read_record(tmp_path / "random").digest


def test_a_run_from_before_there_were_records_goes_by_the_name(tmp_path):
    run = tmp_path / "run"
    begin(config_of(TINY), run)  # as its config.json had it then
    (run / backbones.RECORD).unlink()
    assert for_training(config_of("tiny_qwen3_vl"), run).folder == TINY
    with pytest.raises(UserError, match="a run with another backbone"):
        for_training(config_of(copy(tmp_path / "other")), run)


def test_the_digest_is_that_of_the_content(tmp_path, monkeypatch):
    wanted = digest(TINY)
    assert set(wanted) == {"config", "tokenizer", "weights"}
    other = copy(tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    settings["transformers_version"], settings["text_config"]["dtype"] = "9", "bfloat16"
    (other / "config.json").write_text(json.dumps(settings, indent=7))
    tensors = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = (names[::2], names[1::2])  # the same tensors in two files
    for shard, part in zip(SHARDS, parts, strict=True):
        save_file({name: tensors[name] for name in part}, other / shard)
    index = {name: shard for shard, part in zip(SHARDS, parts, strict=True) for name in part}
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert digest(other) == wanted
    settings["text_config"]["rms_norm_eps"] = 1e-5
    (other / "config.json").write_text(json.dumps(settings))
    assert digest(other) == {**wanted, "config": digest(other)["config"]} != wanted
    # where there are too many to read, a row of each
    monkeypatch.setattr(backbones, "WHOLE", 1000)
    few = digest(TINY)["weights"]
    assert few != wanted["weights"]
    assert digest(copy(tmp_path / "one", one_weight))["weights"] == few  # in no middle row

    def every_one(tensors):
        tensors.update({name: np.asarray(t * 1.5, t.dtype) for name, t in tensors.items()})

    assert digest(copy(tmp_path / "all", every_one))["weights"] != few


def test_a_bad_folder_is_left_to_who_reads_it(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert set(digest(tmp_path, weights=False)) == {"config", "tokenizer"}
    (tmp_path / "config.json").unlink()
    assert set(digest(tmp_path, weights=False)) == {"config", "tokenizer"}
    with pytest.raises(UserError, match="holds neither model.safetensors nor"):
        digest(tmp_path)


# The commands


def begin_frozen(folder: Path, backbone: Path, run: Path, **fields) -> Path:
    """A run of one step whose backbone is frozen."""
    sizes = {"train": 8, "valid": 0, "test": 0, "hard": 0}
    config = config_of(
        backbone, batch_size=8, total_steps=1, trainable=("^reward_",),
        **{"data.cache": str(folder / "world"), "optimizer.warmup_steps": 0}, **fields,
        **{f"data.world.{split}": count for split, count in sizes.items()},
    )  # fmt: skip
    assert run_on_one_device(config, run) == 0
    return run


def test_random_weights_that_are_frozen_are_made_again(tmp_path, small_backbone):
    run = begin_frozen(tmp_path, small_backbone, tmp_path / "run", **{"backbone.random": True})
    trained = load_trained(run)
    wanted = build.random_backbone(workdir.read_config(run), trained.config)
    jax.tree.map(np.testing.assert_array_equal, trained.params["backbone"], wanted["backbone"])


def test_a_model_with_frozen_weights_is_read_after_a_move(tmp_path, small_backbone, monkeypatch):
    weights, run = tmp_path / "project" / "weights", tmp_path / "project" / "runs" / "a"
    shutil.copytree(small_backbone, weights)
    begin_frozen(tmp_path, weights, run)
    before = load_trained(run)
    assert before.card["config"]["backbone"]["path"] == str(weights)
    os.rename(tmp_path / "project", tmp_path / "moved")
    run = tmp_path / "moved" / "runs" / "a"
    after = load_trained(run)
    assert after.folder.resolve() == tmp_path / "moved" / "weights"
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    os.rename(tmp_path / "moved" / "weights", tmp_path / "away")
    with pytest.raises(UserError, match="is no folder here"):
        load_trained(run)
    given = load_trained(run, backbone=tmp_path / "away")
    jax.tree.map(np.testing.assert_array_equal, before.params, given.params)
    tensors = load_file(tmp_path / "away" / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, tmp_path / "away" / "model.safetensors")
    with pytest.raises(UserError, match="they differ in weights"):
        load_trained(run, backbone=tmp_path / "away")
    out = tmp_path / "out"
    shutil.copytree(small_backbone, tmp_path / "fresh")
    export.main([f"--checkpoint={run}", f"--backbone={tmp_path / 'fresh'}", f"--out={out}"])
    with pytest.raises(UserError, match="is an export, which holds its backbone"):
        load_trained(out, backbone=tmp_path / "fresh")


@pytest.mark.parametrize("command", ["score", "export"])
def test_commands_advise_the_flag_that_they_have(command, tmp_path, capsys):
    run = tmp_path / "run"
    begin(config_of(copy(tmp_path / "weights")), run)
    (run / workdir.CHECKPOINTS).mkdir()
    shutil.rmtree(tmp_path / "weights")
    argv = {
        "score": [f"--model={run}", "--instruction=x", str(TINY / "config.json")],
        "export": [f"--checkpoint={run}", f"--out={tmp_path / 'out'}"],
    }[command]
    with pytest.raises(SystemExit) as ended:
        {"score": score, "export": export}[command].main(argv)
    assert "--backbone=FOLDER" in str(ended.value.code) and "--config" not in str(ended.value.code)
