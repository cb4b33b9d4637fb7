"""A checkpoint becomes a Hugging Face folder that PyTorch, serving engines and this project load.

    python -m jrm_jax.export --checkpoint=WORKDIR [--step=N|best|latest] --out=FOLDER

With --backbone_only it is a backbone for another run (--config.backbone.path=FOLDER): all that was
learnt but the reward head. So a run that learnt from critiques alone can be gone on from.

The folder appears under its name only when it is complete.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jrm_jax import cli
from jrm_jax.data.processor import read_config as read_processor_config
from jrm_jax.data.template import NO_THOUGHTS, Template, save_tokenizer
from jrm_jax.errors import UserError
from jrm_jax.model import stored_head, weights
from jrm_jax.model.tensor_files import INDEX_FILE
from jrm_jax.run.backbones import FILES, TOKENIZER
from jrm_jax.serving.rounding import Rounding, measure
from jrm_jax.serving.trained import STAMP, Trained, describe_lessons, load_trained
from jrm_jax.shell import disk, terminal
from jrm_jax.shell.arguments import Parser, check_least
from jrm_jax.shell.stop import ending

ASSETS = Path(__file__).parent / "assets" / "export"
CODE, PICTURES = "modeling_jrm", "image_processing_jrm"  # what an export carries
ARCHITECTURES = {
    "qwen2_5_vl": "Qwen2_5_VLForSequenceClassification",
    "qwen3_vl": "Qwen3VLForSequenceClassification",
    "qwen3_5": "Qwen3_5ForSequenceClassification",
}
# In config.json where positions are not those of transformers: '1d', see `rope.mrope_positions`
POSITION_MODE = "position_mode"
# What config.json says of a classifier alone
CLASSIFIER = ("auto_map", "num_labels", "id2label", "label2id", "problem_type",
              stored_head.DESCRIPTION, POSITION_MODE)  # fmt: skip
# What the card says: whether rewards are Gaussians, and whether the head has hidden layers
DEVIATION = {
    False: "The rewards are plain numbers, without a deviation.",
    True: (
        "The rewards are Gaussians. The score is their mean; `model.score_edits(..., "
        "with_deviation=True)` also returns their standard deviations, in units of the score "
        "(where you divide scores by their spread in training, divide these by it, too). The "
        "outputs of `forward` are the means, then the **log** deviations, named in `id2label`: "
        "only the means are rewards. The chance that people prefer one candidate to another is "
        "the mean of sigmoid(difference), a Gaussian with the difference of the means and the sum "
        "of the squared deviations. Whether the deviations are right, `jrm_jax.evaluate` measures."
    ),
}
LAYOUT = {
    False: (
        "The layout is what vLLM documents for its sequence classifiers: `score.weight` without "
        "bias, last-token pooling."
    ),
    True: (
        "The reward head has hidden layers (`score.hidden.N`, `score.out`, with biases and ReLU), "
        "so the layout that vLLM documents for its sequence classifiers, one `score.weight` "
        "without bias, **is not met**: an engine must run the class in this folder "
        "(`modeling_jrm.py`), or it cannot score. What follows holds for a head of one linear."
    ),
}
# How whoever builds inputs without `prepare` says where pictures are, by position mode
POSITIONS = {
    "mrope": "pass `mm_token_type_ids` with pictures (the class refuses to go on without)",
    "1d": (
        "know that tokens of pictures are **numbered like text** (`config.backbone.positions` was "
        "1d in training; `position_mode` in config.json): the class in this folder "
        "(`modeling_jrm.py`) does it by itself. Classes and serving engines that number pictures "
        "as their family does give **other scores**, so they need the `position_ids` of `prepare`,"
    ),
}
# of pictures with text, and of videos
PROCESSORS = {
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    "qwen3_5": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}


def export(
    trained: Trained, out: Path, dtype: str, max_shard_bytes: int, check: bool = True
) -> Rounding | None:
    """Write the folder, and read it back (`check`): what storing did to the model.

    Raises:
        UserError: `out` exists, or cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} exists: give another --out, or remove it first")
    part = disk.half_made(out)
    try:
        part.mkdir(parents=True)
        reward_id = trained.encoder.tokenizer.reward_id
        weights.save_params(
            part,
            _with_reward_row(trained.params, reward_id),
            trained.config,
            dtype,
            max_shard_bytes,
            stored_head.head_tensors(trained.params["reward_head"]),
        )
        save_tokenizer(trained.folder, part, trained.config.text.vocab)
        files = {
            "config.json": _json(_config(trained, dtype)),
            "preprocessor_config.json": _json(_processor(trained)),
            "video_preprocessor_config.json": _json(_videos(trained)),
            "generation_config.json": _json(_generation(trained)),
            "chat_template.jinja": chat_template(trained.encoder.template),
            STAMP: _json(trained.card),
        }
        for name, text in files.items():
            (part / name).write_text(text, encoding="utf-8")
        for module in (CODE, PICTURES):
            shutil.copy(ASSETS / f"{module}.py", part)
        rounding, said = None, "not compared with the trained model"
        if check:
            rounding, said = _compared(trained, part, dtype)
        (part / "README.md").write_text(_model_card(trained, dtype, said), encoding="utf-8")
        os.rename(part, out)
        return rounding
    except OSError as error:
        raise UserError(f"{out} could not be written: {disk.explain(error, out)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _compared(trained: Trained, part: Path, dtype: str) -> tuple[Rounding | None, str]:
    """With the trained model, in words; the folder is good, too, where both have no room."""
    try:
        rounding = measure(trained, part, dtype)
        return rounding, rounding.words(dtype)
    except Exception as error:
        if not disk.is_out_of_memory(error):
            raise
        said = "not compared with the trained model, as there was no memory for both"
        terminal.say(f"WARNING: the export was {said}")
        return None, said


def export_backbone(trained: Trained, out: Path, dtype: str, max_shard_bytes: int) -> None:
    """Write a folder that a run can start from: weights, with the reward token's embedding in its
    row, and the files of the backbone that it began with. No reward head.

    Raises:
        UserError: `out` exists, or cannot be written.
    """
    part = disk.half_made(out)
    try:
        part.mkdir(parents=True)
        for name in set(FILES) - {INDEX_FILE, *TOKENIZER}:
            if (trained.folder / name).is_file():
                shutil.copy(trained.folder / name, part)
        _drop_classifier(part)
        params = _with_reward_row(trained.params, trained.encoder.tokenizer.reward_id)
        weights.save_params(part, params, trained.config, dtype, max_shard_bytes, {})
        save_tokenizer(trained.folder, part, trained.config.text.vocab)
        os.rename(part, out)
    except OSError as error:
        raise UserError(f"{out} could not be written: {disk.explain(error, out)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _with_reward_row(params: dict[str, Any], reward_id: int) -> dict[str, Any]:
    """The backbone and its language head; the spare row holds the reward token's embedding."""
    backbone = params["backbone"]
    table = backbone["embed"]["embedding"]
    row = jnp.asarray(params["reward_embedding"], table.dtype)
    embed = {"embedding": table.at[reward_id].set(row)}
    return {
        "backbone": {**backbone, "embed": embed},
        "language_head": params["language_head"],
    }


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _config(trained: Trained, dtype: str) -> dict[str, Any]:
    """The backbone's config.json as that of a sequence classifier."""
    config = json.loads((trained.folder / "config.json").read_text())
    architecture = ARCHITECTURES[trained.config.family]
    head = trained.params["reward_head"]
    outputs = stored_head.output_names(head, trained.encoder.dimensions)
    names = {str(i): name for i, name in enumerate(outputs)}
    pad, positions = trained.encoder.tokenizer.pad_id, trained.encoder.positions
    # of the folder that it began from
    for stale in ("torch_dtype", stored_head.DESCRIPTION, POSITION_MODE):
        config.pop(stale, None)
    config |= {
        "architectures": [architecture],
        "auto_map": {"AutoModelForSequenceClassification": f"{CODE}.{architecture}"},
        "dtype": dtype,
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: int(i) for i, name in names.items()},
        "problem_type": "regression",
        "pad_token_id": pad,
        # transformers reads it here, whatever the text part says
        "tie_word_embeddings": trained.config.text.tie_embeddings,
        **stored_head.describe(head),
        **({POSITION_MODE: positions} if positions != "mrope" else {}),
    }
    # the classifier finds a row's last token by the padding token of the text part
    for part in ("text_config", "vision_config"):
        if part in config:
            config[part].pop("torch_dtype", None)
            config[part]["dtype"] = dtype
    if "text_config" in config:
        config["text_config"]["pad_token_id"] = pad
        config["text_config"]["tie_word_embeddings"] = trained.config.text.tie_embeddings
    return config


def _drop_classifier(folder: Path) -> None:
    """Of a backbone that began at an export: its config.json without the head that is gone, and the
    image processor's class that its files name."""
    before = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in before.items() if name not in CLASSIFIER}
    names = before.get("architectures") or ()
    if set(names) & set(ARCHITECTURES.values()):
        kinds = [n.replace("SequenceClassification", "ConditionalGeneration") for n in names]
        config["architectures"] = kinds
    if config != before:  # else it stays as it is, to the byte
        (folder / "config.json").write_text(_json(config), encoding="utf-8")
    if f'"{PICTURES}.' in read_processor_config(folder)[0].read_text(encoding="utf-8"):
        shutil.copy(ASSETS / f"{PICTURES}.py", folder)


def _processor(trained: Trained) -> dict[str, Any]:
    _, fields = read_processor_config(trained.folder)
    kept = {k: v for k, v in fields.items() if k not in ("min_pixels", "max_pixels")}
    processor = trained.encoder.processor
    size = {"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels}
    # A type of our own is refused without trust_remote_code: transformers' own class resizes with
    # torchvision where that is installed, to other pixels than those of the training.
    return kept | {
        "size": size,
        "image_processor_type": "JrmImageProcessor",
        "auto_map": {"AutoImageProcessor": f"{PICTURES}.JrmImageProcessor"},
        "processor_class": PROCESSORS[trained.config.family][0],
    }


def _videos(trained: Trained) -> dict[str, Any]:
    """There are none, but `AutoProcessor` wants to know; else it looks for one of our own."""
    processor = trained.encoder.processor
    sizes = {"patch_size": processor.patch, "merge_size": processor.merge, "temporal_patch_size": 2}
    return {"video_processor_type": PROCESSORS[trained.config.family][1]} | sizes


def _generation(trained: Trained) -> dict[str, Any]:
    """Critiques end with <|im_end|> and never hold the reward token."""
    tokenizer = trained.encoder.tokenizer
    return {
        "do_sample": False,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
        "suppress_tokens": [tokenizer.reward_id],
    }


def chat_template(template: Template) -> str:
    """A Jinja chat template that ends at the reward token.

    Messages: one 'user' turn whose last picture is the candidate; or a 'user' turn with the prompt
    and a 'candidate' turn (any parts). Neighbouring texts are joined by a line break.
    """
    words = {"RUBRIC": template.rubric, "RESULT": template.result,
             "THOUGHTS": _thoughts(template)}  # fmt: skip
    source = (ASSETS / "chat_template.jinja").read_text(encoding="utf-8")
    for name, text in words.items():
        source = source.replace(f"__{name}__", json.dumps(text, ensure_ascii=False))
    return source


def _thoughts(template: Template) -> str:
    return "".join(NO_THOUGHTS) if template.thinking else ""


def _model_card(trained: Trained, dtype: str, rounding: str) -> str:
    card, stamp = trained.card, trained.card["stamp"]
    results = card.get("results") or {}
    settings = card.get("config") or {}
    data = settings.get("data", {})
    losses = settings.get("loss", {})
    numbers = {n: value for n, value in results.items() if isinstance(value, int | float)}
    rows = [f"| {name} | {value:.6g} |" for name, value in sorted(numbers.items())]
    mean, deviation = card.get("reward_mean"), card.get("reward_std")
    spread = "unknown" if mean is None else f"mean {mean:.4f}, standard deviation {deviation:.4f}"
    critiques = "what it generates behind the reward token is the critique."
    if card.get("taught") and not card["taught"].get("language"):
        critiques = "but it has learnt no critiques: what it generates is the backbone's own."
    if trained.config.text.headless:
        critiques = "but its language head is missing, as it was in the backbone: it cannot speak."
    if trained.through_reward:
        critiques = (
            "but critiques were trained to see their candidate by the reward token alone, which "
            "`generate` does not know; `jrm_jax.score` writes them."
        )
    head = trained.params["reward_head"]
    return (ASSETS / "model_card.md").read_text(encoding="utf-8").format(
        architecture=ARCHITECTURES[trained.config.family],
        dtype=dtype,
        rounding=rounding,
        critiques=critiques,
        step=card.get("step"),
        lessons=describe_lessons(card),
        backbone=settings.get("backbone", {}).get("path", "unknown"),
        data=data.get("path") or data.get("mixture") or "the built-in world of jrm_jax",
        losses=", ".join(f"{k} {v}" for k, v in sorted(losses.items())),
        dimensions=", ".join(stamp["dimensions"]),
        rubric=stamp["rubric"],
        result=json.dumps(stamp["result"]),
        thoughts=json.dumps(_thoughts(trained.encoder.template)),
        reward_token_id=stamp["reward_token_id"],
        max_pixels=f"{stamp['max_pixels']:,}",
        spread=spread,
        deviation=DEVIATION["deviation" in head],
        layout=LAYOUT["hidden" in head],
        positions=POSITIONS[trained.encoder.positions],
        results="\n".join(["| number | value |", "|---|---|", *rows]) if rows else "None.",
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m jrm_jax.export", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--checkpoint", required=True, help="folder of a run")
    parser.add_argument("--step", default="best", help="a number, 'best' or 'latest'")
    parser.add_argument("--backbone", default="", help="where the run's backbone lies by now")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=tuple(weights.STORED_AS), default="bfloat16")
    parser.add_argument("--max_shard_gb", type=float, default=5.0, help="10^9 bytes per file")
    parser.add_argument(
        "--no_check", action="store_true", help="do not read the folder back and compare scores"
    )
    parser.add_argument(
        "--backbone_only", action="store_true", help="a backbone to start another run from"
    )
    args = parser.parse_args(argv)
    if args.step not in ("best", "latest"):
        if not args.step.isdecimal():
            parser.error(f"--step={args.step}: give a number, 'best' or 'latest'")
        args.step = int(args.step)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if argv is None:
        cli.prepare()
    with ending():
        check_least(args, {"max_shard_gb": 1e-6})
        if args.out.exists():
            raise UserError(f"{args.out} exists: give another --out, or remove it first")
        disk.check_folder(args.out.parent)  # loading takes minutes
        alone, shard = args.backbone_only, int(args.max_shard_gb * 1e9)
        trained = load_trained(args.checkpoint, args.step, args.backbone, scores=not alone)
        if alone:
            rounding = export_backbone(trained, args.out, args.dtype, shard)
        else:
            rounding = export(trained, args.out, args.dtype, shard, not args.no_check)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: step {trained.card.get('step')}, {size / 1e6:,.1f} MB, {args.dtype}")
    if rounding:
        print(rounding.words(args.dtype))


if __name__ == "__main__":
    main()
