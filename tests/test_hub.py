"""Backbones by a name of the Hub: its cache, its commits, one process that fetches."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file
from test_backbones import FIRST, SECOND, SHARDS, TINY, begin, config_of, copy, one_weight

from jrm_jax import build_data, distributed
from jrm_jax.errors import UserError
from jrm_jax.run import backbones, workdir
from jrm_jax.run.backbones import TRAINING, digest, find_folder, for_reading, for_training, pin


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


