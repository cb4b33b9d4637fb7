"""Places are local: an address where a folder is meant is refused by every command, in one line."""

import re
from pathlib import Path

import pytest

from jrm_jax import evaluate, export, score
from jrm_jax.benchmarks import build_scale, kill_test, make_tiny_backbone
from jrm_jax.data import builders
from jrm_jax.errors import UserError
from jrm_jax.shell.arguments import check_places

PACKAGE = Path(builders.__file__).parents[1]
GOOD = (
    ["--workdir=runs/a:b", "--config=configs/joint.py:qwen3_vl_8b", "a.png", "C:/pictures/a.png"],
    ["--instruction=write http://a.b/c on it", "--name", "hf://me", "--config.data.rubric=See s3://"],
    ["--instruction", "https://a.b", "b.png", "--json", "c.png", "--config.reward.url=http://a:1"],
)
BAD = {
    ("--workdir=gs://bucket/run",): "--workdir=gs://bucket/run: files and folders must be local",
    ("--workdir", "s3://bucket/run"): "--workdir s3://bucket/run: files and folders must be local",
    ("--workdir=gs:/bucket/run",): "mount the bucket (gcsfuse; launch/README.md",
    ("--config.backbone.path=hf://Qwen/Qwen3-VL-2B-Instruct",): "goes by its name, ORG/NAME",
    ("--config.backbone.path=https://huggingface.co/Qwen/Q",): "goes by its name, ORG/NAME",
    ("--config.data.mixture=(('a', 1.0), ('GS://b/c', 1.0))",): "mount the bucket",
    ("--out=file:///tmp/a",): "give the path alone",
    ("--json", "a.png", "http://a.b/c.png"): "download it and give the local path",
    ("--instruction", "a b", "https://a.b/c.png"): "download it and give the local path",
    ("--data=abfss://a@b/c",): "download it and give the local path",
}


@pytest.mark.parametrize("argv", GOOD, ids=range(len(GOOD)))
def test_words_and_paths_pass(argv):
    check_places(argv)


@pytest.mark.parametrize("argv", BAD, ids=" ".join)
def test_addresses_are_refused(argv):
    with pytest.raises(UserError) as caught:
        check_places(argv)
    assert BAD[argv] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("word", ["--workdir=~/run", "--config.data.path=~", "--out=~me/x"])
def test_a_home_that_the_shell_leaves_as_it_is_is_refused(word):
    with pytest.raises(UserError, match="the shell does not know ~ there: "):
        check_places([word])
    check_places(["--instruction=~/a", "--name", "~", "--workdir=a~/b", "--out=~x.json"])


COMMANDS = [
    (score.parse_args, ["--model=gs://b/run", "--instruction=x", "a.png"]),
    (score.parse_args, ["--model=run", "--instruction=x", "--source=s3://b/a.png", "a.png"]),
    (score.parse_args, ["--model=run", "--instruction=x", "--sheet", "gs://b/sheet.png"]),
    (export.parse_args, ["--checkpoint=gs://b/run", "--out=x"]),
    (export.parse_args, ["--checkpoint=run", "--out=hf://me/model"]),
    (evaluate.parse_args, ["--checkpoint=gs://b/run", "--benchmark=world", "--out=a.json"]),
    (evaluate.parse_args, ["--compare", "a.json", "http://a.b/b.json"]),
    (builders.parse_args, ["jsonl", "--data=hf://datasets/a/b", "--out=x"]),
    (builders.parse_args, ["world", "--out=gs://b/world"]),
    (build_scale.main, ["--out=gs://b/x"]),
    (kill_test.main, ["--out=gs://b/x"]),
    (make_tiny_backbone.main, ["--out=gs://b/x"]),
]


@pytest.mark.parametrize(("parse", "argv"), COMMANDS, ids=range(len(COMMANDS)))
def test_every_command_refuses_them_in_one_line(parse, argv, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(argv)
    said = capsys.readouterr()
    assert ended.value.code == 1 and not said.out
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert "must be local" in said.err


def test_no_command_has_a_parser_of_another_kind():
    """The commands with a config are tried in test_configs.py."""
    texts = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    made = re.compile(r"argparse\.ArgumentParser[()]")  # one is built, or a class is derived
    assert [p.name for p, text in texts.items() if made.search(text)] == ["arguments.py"]
    flags = {path for path, text in texts.items() if "DEFINE_config_file(" in text}
    parsed = {path for path, text in texts.items() if "config_cli.parse(" in text}
    assert flags - {PACKAGE / "shell" / "config_cli.py"} == parsed and len(parsed) >= 3
    assert not [p for p, text in texts.items() if "FLAGS(sys.argv)" in text]


@pytest.mark.parametrize("main, argv, words", [
    (score.main, ["--model=m", "--instruction=x", "a.png", "--max_tokens=0"], "--max_tokens=0"),
    (score.main, ["--model=m", "--instruction=x", "a.png", "--programs=-1"], "--programs=-1"),
    (export.main, ["--checkpoint=m", "--out=x", "--max_shard_gb=nan"], "--max_shard_gb=nan"),
    (export.main, ["--checkpoint=m", "--out=x", "--max_shard_gb=inf"], "--max_shard_gb=inf"),
    (evaluate.main, ["--benchmark=world", "--checkpoint=m", "--out=x.json", "--batch_size=0"],
     "--batch_size=0"),
    (builders.main, ["csv", "--data=x", "--out=y", "--shard_examples=0"], "--shard_examples=0"),
    (builders.main, ["world", "--out=y", "--test=-1"], "--test=-1"),
], ids=lambda value: getattr(value, "__module__", str(value)))  # fmt: skip
def test_numbers_that_are_too_small_are_refused_before_anything_is_read(main, argv, words, capsys):
    try:
        said = str(main(argv))
    except SystemExit as stopped:
        said = str(stopped.code)
    said += capsys.readouterr().err
    assert f"error: {words}: at least " in said
