"""The backbone of a run: found by its name wherever it lies, and known again."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import numpy as np
import pytest
from entry_point import small_backbone  # noqa: F401
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from configs import joint
from jrm_jax import backbones, build, build_data, distributed, export, score, train, workdir
from jrm_jax.backbones import READING, TRAINING, digest, find_folder, for_reading, for_training, pin
from jrm_jax.errors import UserError
from jrm_jax.packaged import ASSETS
from jrm_jax.serving.trained import load_trained

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
    workdir.write_whole(folder / backbones.RECORD, found.record.as_text())
    workdir.write_whole(folder / workdir.CONFIG, workdir.as_text(found.config))
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
    assert str(caught.value).endswith(f"({TINY.name}): give it as {READING}")


# The Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache as the Hub's library lays it out: two commits of one model, no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert constants.HF_HUB_OFFLINE  # see conftest.py
    backbones._from_hub.cache_clear()
    folder = tmp_path / "hub" / "models--org--tiny.model"
    for commit in (FIRST, SECOND):
        shutil.copytree(TINY, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(FIRST)
    (folder / "refs" / "v2").write_text(SECOND)
    yield folder
    backbones._from_hub.cache_clear()


def test_a_name_of_the_hub_is_found_in_its_cache(hub):
    first, second = (hub / "snapshots" / commit for commit in (FIRST, SECOND))
    assert find_folder("org/tiny.model") == first
    assert find_folder("org/tiny.model@v2") == find_folder(f"org/tiny.model@{SECOND}") == second
    assert pin("org/tiny.model") == f"org/tiny.model@{FIRST}"
    assert pin("org/tiny.model@v2") == f"org/tiny.model@{SECOND}"
    assert pin("tiny_qwen3_vl") == "tiny_qwen3_vl" and pin(str(TINY)) == str(TINY)


def test_a_folder_of_that_name_stays_a_folder(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy(tmp_path / "org" / "tiny.model")
    assert find_folder("org/tiny.model") == Path("org/tiny.model")
    assert pin("org/tiny.model") == "org/tiny.model"


def test_a_run_stays_at_the_commit_that_it_began_with(hub, tmp_path):
    config, run = config_of("org/tiny.model"), tmp_path / "run"
    found = begin(config, run)
    assert found.folder.name == FIRST and config.backbone.path == "org/tiny.model"
    assert workdir.read_config(run).backbone.path == f"org/tiny.model@{FIRST}"
    (hub / "refs" / "main").write_text(SECOND)  # something new was uploaded
    backbones._from_hub.cache_clear()
    assert find_folder("org/tiny.model").name == SECOND
    workdir.check_config(run, config)
    for path in ("org/tiny.model", f"org/tiny.model@{FIRST}"):
        again = for_training(config_of(path), run)
        assert again.folder == found.folder and again.record == found.record
    assert for_reading(workdir.read_config(run), run, weights=True) == found.folder
    one = load_file(hub / "snapshots" / SECOND / "model.safetensors")
    one_weight(one)
    save_file(one, hub / "snapshots" / SECOND / "model.safetensors")
    with pytest.raises(UserError, match=rf"{FIRST}\); they differ in weights"):
        for_training(config_of("org/tiny.model@main"), run)


def test_only_the_files_that_are_read_are_asked_for(hub, monkeypatch):
    asked = []
    real = huggingface_hub.snapshot_download

    def download(name, *, revision, allow_patterns):
        asked.append((revision, allow_patterns))
        return real(name, revision=revision, allow_patterns=allow_patterns)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    small = list(backbones.FILES)
    find_folder("org/tiny.model", weights=False)
    assert asked == [(None, small)]
    find_folder("org/tiny.model")
    find_folder("org/tiny.model")  # once in a process
    assert asked[1:] == [(None, small), (FIRST, ["model.safetensors"])]
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}
    text = json.dumps(index)
    (hub / "snapshots" / SECOND / "model.safetensors.index.json").write_text(text)
    find_folder("org/tiny.model@v2")
    assert asked[3:] == [("v2", small), (SECOND, SHARDS)]


def test_the_configs_and_tokenizer_suffice_where_no_weights_are_read(hub):
    (hub / "snapshots" / FIRST / "model.safetensors").unlink()
    config = config_of("org/tiny.model")
    assert build_data.backbone_folder(config).name == FIRST
    with pytest.raises(UserError, match="holds neither model.safetensors nor"):
        digest(build_data.backbone_folder(config, weights=True))


def test_a_name_that_cannot_be_had_is_refused_in_one_line(hub, monkeypatch):
    for path in ("org/other", "org/tiny.model@v3", f"org/tiny.model@{'c' * 40}"):
        with pytest.raises(UserError) as caught:
            find_folder(path)
        words = str(caught.value)
        assert words.startswith(f"the backbone {path!r} is no folder here; as a name of the Hub, ")
        assert "not in the cache, and the Hub cannot be reached (HF_HUB_OFFLINE is set)" in words
        assert f"give {TRAINING}, or get it where there is a network: hf download" in words
    (hub / "snapshots" / FIRST / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        find_folder("org/tiny.model", weights=False)

    def denied(*_, **__):
        raise type("GatedRepoError", (OSError,), {})("403\nlong")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", denied)
    with pytest.raises(UserError, match="needs your consent on its page, and hf auth login"):
        find_folder("org/closed")


def test_of_several_processes_the_leader_gets_it(monkeypatch):
    box, made = {}, []

    class Client:
        def key_value_set(self, key, value):
            assert key not in box
            box[key] = value

        def blocking_key_value_get(self, key, milliseconds):
            return box[key]

    from jax._src import distributed as inner

    monkeypatch.setattr(inner, "global_state", SimpleNamespace(client=Client()))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for which in ("first", "second"):
        before = distributed._passed
        for process in (0, 1):
            monkeypatch.setattr(distributed, "_passed", before)
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)

            def make(which=which, process=process):
                made.append(process)
                return f"org/model@{which}"

            assert distributed.from_leader("backbone", make) == f"org/model@{which}"
    assert made == [0, 0]


# Moved folders


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
    """A run of no steps whose backbone is frozen."""
    sizes = {"train": 8, "valid": 0, "test": 0, "hard": 0}
    config = config_of(
        backbone, batch_size=8, total_steps=0, trainable=("^reward_",),
        **{"data.cache": str(folder / "world"), "optimizer.warmup_steps": 0}, **fields,
        **{f"data.world.{split}": count for split, count in sizes.items()},
    )  # fmt: skip
    assert train.run(config, run) == 0
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
