"""A trained model from disk: a run's folder with its checkpoints, or an exported folder.

Both give the same `Trained`: parameters, encoder and the protocol they were trained with.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jrm_jax import build, build_data, heads, lora, optim
from jrm_jax.checkpoint import read_checkpoint
from jrm_jax.data.buckets import Bucket
from jrm_jax.data.encode import Encoder, make_encoder
from jrm_jax.data.template import Template, protocol_stamp
from jrm_jax.errors import UserError
from jrm_jax.model import stored_head, weights
from jrm_jax.model.config import BackboneConfig, load_config
from jrm_jax.reward_head import HeadStart
from jrm_jax.run import backbones, buckets
from jrm_jax.run.workdir import CHECKPOINTS, CONFIG, read_config, read_results
from jrm_jax.shell import disk, terminal

STAMP = "jrm.json"  # in an exported folder: the protocol stamp, reward statistics, origin


class Trained(NamedTuple):
    """A model that can score.

    params: 'backbone', 'language_head', 'reward_head', 'reward_embedding'.
    folder: a Hugging Face folder with its tokenizer, image processor and config.json.
    card: what is known of the training: 'stamp', 'reward_mean', 'reward_std' (of the training
        rewards, None if unknown), 'step', 'taught' (steps in which each loss had something to
        teach), 'config', 'results', 'buckets' (of the training, as `run.buckets.as_rows` writes
        them; older folders have none).
    """

    config: BackboneConfig
    params: dict[str, Any]
    encoder: Encoder
    folder: Path
    card: dict[str, Any]

    @property
    def through_reward(self) -> bool:
        """Whether its critiques see their candidate by the reward token alone."""
        return bool(self.card.get("config", {}).get("loss", {}).get("through_reward"))

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Of the training; none where they are not known."""
        return buckets.from_rows(self.card.get("buckets", ())) or ()


# shapes of parameters -> the same with a dtype and a sharding each, as they are to be read
LayOut = Callable[[dict[str, Any]], dict[str, Any]]


def load_trained(
    path: str | Path,
    step: int | str = "best",
    backbone: str | Path = "",
    scores: bool = True,
    laid_out: LayOut | None = None,
) -> Trained:
    """Read a run's folder (`step`: a number, 'best' or 'latest') or an exported folder.

    Args:
        backbone: where the run's backbone lies by now, or its name; needed if it is not found.
        scores: False: a run that has trained no reward is read, too.
        laid_out: how parameters are to lie; default: whole on the first device, float32.

    Raises:
        UserError: neither of the two, no such checkpoint, files at odds with each other, or a
            reward head that was never trained.
    """
    path = Path(path)
    if (path / CHECKPOINTS).is_dir() and (path / CONFIG).is_file():
        return _load_run(path, step, str(backbone), scores, laid_out or _here)
    if (path / STAMP).is_file():
        if backbone:
            raise UserError(f"{path} is an export, which holds its backbone: no other can be given")
        return _load_export(path, laid_out or _here)
    raise UserError(_what_it_is(path))


class Identity(NamedTuple):
    """Which weights a folder's scores come from. step: of the training. digest: of what trained, of
    its backbone and of the protocol; wherever the folder lies."""

    step: int
    digest: str


def identify(path: str | Path, step: int | str = "best") -> Identity:
    """What `load_trained` would read by now. Of exports beyond 64 million weights a part of each
    tensor is compared.

    Raises:
        UserError: neither a run with a checkpoint nor an export.
    """
    path = Path(path)
    if (path / CHECKPOINTS).is_dir() and (path / CONFIG).is_file():
        found, trainable, meta = read_checkpoint(path / CHECKPOINTS, None, step)
        leaves, record = optim.flatten(trainable), backbones.read_record(path)
        adapters = build.lora_scale(read_config(path))
        known = [_scoring(meta["stamp"]), record and record.digest, adapters]
        parts = (
            part
            for name in sorted(leaves)
            for part in (f"{name} {leaves[name].shape} {leaves[name].dtype}".encode(),
                         jax.device_get(leaves[name]).tobytes())
        )  # fmt: skip
    elif (path / STAMP).is_file():
        card = _read_card(path)
        found, known, parts = card["step"], [_scoring(card["stamp"]), backbones.digest(path)], ()
    else:
        raise UserError(_what_it_is(path))
    text = json.dumps(known, sort_keys=True).encode()
    return Identity(found, backbones.hashed(itertools.chain((text,), parts)))


def _read_card(folder: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: the card of an export cannot be read, or does not tell its training.
    """
    advice = "export the model again, or copy its folder again"
    card = disk.read_json(folder / STAMP, advice)
    if not isinstance(card, dict) or not {"stamp", "step"} <= set(card):
        raise UserError(f"{folder / STAMP} is damaged (no 'stamp' or no 'step'): {advice}")
    return card


def _what_it_is(path: Path) -> str:
    what = "is no folder" if not path.is_dir() else f"has neither checkpoints nor {STAMP}"
    return f"{path} {what}: give the folder of a run, or one that jrm_jax.export wrote"


def _here(shapes: dict[str, Any]) -> dict[str, Any]:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=here), shapes
    )


def _load_run(
    workdir: Path, step: int | str, backbone: str, scores: bool, laid_out: LayOut
) -> Trained:
    named = read_config(workdir)
    folder = backbones.for_reading(named, workdir, backbone)
    config = backbones.located(named, folder)
    architecture = build.load_backbone_config(config)
    encoder = build_data.make_run_encoder(config, architecture)
    whole = laid_out(build.abstract_params(config, architecture))
    trainable, frozen = optim.split_params(whole, build.trainable_patterns(config))
    if optim.flatten(frozen) and not config.backbone.random:
        backbones.for_reading(named, workdir, backbone, weights=True)
    found, trainable, meta = read_checkpoint(workdir / CHECKPOINTS, trainable, step)
    start = functools.cache(lambda: build.head_start(config, architecture))
    taught = _taught(config, found, meta)
    if scores and (why := _why_no_score(config, start, found, taught)):
        raise UserError(f"{workdir}: its scores would come from random weights: {why}")
    paths, laid = frozenset(optim.flatten(frozen)), optim.flatten(whole)
    frozen = _load_frozen(config, folder, architecture, paths, encoder, start, laid)
    params = optim.merge_params(trainable, frozen)
    if (scale := build.lora_scale(config)) is not None:
        params = lora.merge_adapters(params, scale, lambda path: laid[path].dtype)
    params = {n: p for n, p in params.items() if n not in heads.TRAINING_HEADS}
    encoder = dataclasses.replace(encoder, facts=0, teacher=None)
    results = read_results(workdir)
    if results is None or results["step"] != found:
        results = meta["valid"]
    card = {
        "stamp": meta["stamp"],
        "reward_mean": meta["reward_mean"],
        "reward_std": meta["reward_std"],
        "step": found,
        "taught": taught,
        "config": named.to_dict(),
        "results": results,
        "buckets": _ladder_rows(
            _record(workdir), workdir / buckets.RECORD, encoder, architecture
        ),
    }
    _check_stamp(workdir, card["stamp"], encoder)
    return Trained(architecture, params, encoder, folder, card)


def _record(workdir: Path) -> Any:
    """Of the buckets of a run, as a card holds it; None where it is damaged."""
    try:
        return buckets.as_rows(buckets.read_record(workdir) or ())
    except UserError:
        return None


def _ladder_rows(
    rows: Any, path: Path, encoder: Encoder, architecture: BackboneConfig
) -> list[dict[str, int]]:
    """What a card says of the buckets of its training. A model scores without them: a record that
    its training cannot have left is left out, with a warning."""
    found = buckets.of_training(rows, encoder, architecture)
    if found is None:
        terminal.say(
            f"WARNING: {path}: the record of the training's buckets is damaged. The model scores in"
            " the buckets of a model without a record: the last digits of its scores may differ"
        )
    return buckets.as_rows(found or ())


def _load_frozen(
    config: ConfigDict,
    folder: Path,
    architecture: BackboneConfig,
    paths: frozenset[str],
    encoder: Encoder,
    start: Callable[[], HeadStart],
    laid: dict[str, jax.ShapeDtypeStruct],
) -> dict[str, Any]:
    """What checkpoints do not hold, as `build.init_state` read it when the run began."""
    if not paths:
        return {}
    table, random = "backbone/embed/embedding", config.backbone.random
    frozen, half = build.frozen_dtype(config), jnp.bfloat16  # what the run has rounded
    read = build.random_backbone(config, architecture) if random else weights.load_params(
        folder, architecture, optim.unflatten({path: leaf.sharding for path, leaf in laid.items()}),
        lambda path: half if frozen(path) == half else laid[path].dtype,
        ignore=(stored_head.PREFIX,), only=paths | {table},
    )  # fmt: skip
    leaves = optim.flatten(read)
    if any(path.startswith("reward_head/") for path in paths):
        leaves |= {path: jnp.asarray(leaf) for path, leaf in start().known().items()}
    if "reward_embedding" in paths:
        row = build.reward_row(start(), encoder.tokenizer)
        leaves["reward_embedding"] = leaves[table][row].astype(jnp.float32)
    return optim.unflatten({path: leaves[path] for path in paths if path in leaves})


def _taught(config: ConfigDict, step: int, meta: dict[str, Any]) -> dict[str, int]:
    """Steps in which each loss had something to teach. Checkpoints from before that was counted
    tell it of the preference loss by the mean of its rewards."""
    ranked = bool(config.loss.preference_weight) and meta["reward_mean"] is not None
    return meta.get("taught", {"preference": step * ranked})


def _why_no_score(
    config: ConfigDict, start: Callable[[], HeadStart], step: int, taught: dict[str, int]
) -> str:
    """'' where every leaf of the reward head was trained: by this run, or as it came with the
    backbone."""
    if step == 0:
        return "" if start().is_whole else "it has made no step yet"
    if not config.loss.preference_weight:
        return "config.loss.preference_weight is 0, it learns from critiques alone"
    if not (taught.get("preference") or taught.get("teacher")):
        return "no group it has seen had a label"
    return build.describe_fixed_head(config, start)


def _load_export(folder: Path, laid_out: LayOut) -> Trained:
    card = _read_card(folder)
    architecture = weights.as_stored(folder, load_config(folder))
    stamp = card["stamp"]
    encoder = make_encoder(
        folder,
        architecture,
        template=Template(stamp["rubric"], stamp["result"]),
        dimensions=stamp["dimensions"],
        positions=stamp["positions"],
    )
    _check_stamp(folder, stamp, encoder)
    if "buckets" in card:  # older exports have none
        rows = card["buckets"]
        card["buckets"] = _ladder_rows(rows, folder / STAMP, encoder, architecture)
    laid = laid_out(weights.abstract_params(architecture))
    params = weights.load_params(
        folder,
        architecture,
        jax.tree.map(lambda leaf: leaf.sharding, laid),
        {path: leaf.dtype for path, leaf in optim.flatten(laid).items()}.__getitem__,
        ignore=(stored_head.PREFIX,),
    )
    head = stored_head.load_reward_head(folder, architecture)
    if head is None:
        raise UserError(f"{folder} has no score.weight: it can train, but not score")
    table = params["backbone"]["embed"]["embedding"]
    embedding = table[encoder.tokenizer.reward_id].astype(jnp.float32)
    params = {**params, "reward_head": head, "reward_embedding": embedding}
    return Trained(architecture, params, encoder, folder, card)


def _scoring(stamp: dict[str, Any]) -> dict[str, Any]:
    """That of a stamp on which a score depends."""
    return {name: value for name, value in stamp.items() if name != "data"}


def _check_stamp(path: Path, stamp: dict[str, Any], encoder: Encoder) -> None:
    found = protocol_stamp(
        encoder.template,
        encoder.tokenizer,
        encoder.processor,
        encoder.positions,
        encoder.dimensions,
    )
    differing = [name for name in _scoring(stamp) if stamp[name] != found.get(name)]
    if differing:
        words = ", ".join(f"{n} was {stamp[n]!r}, is {found.get(n)!r}" for n in differing)
        raise UserError(f"{path}: the files do not fit what the model was trained with: {words}")


def describe_lessons(card: dict[str, Any]) -> str:
    """'the preference loss in 60 steps, the language loss in 60 steps'"""
    if "taught" not in card:
        return "losses unknown"
    said = [f"the {name} loss in {steps} steps" for name, steps in card["taught"].items() if steps]
    return ", ".join(said) or "no loss: it has made no step"


def scale(card: dict[str, Any]) -> tuple[float, float]:
    """(mean, deviation) of the training rewards; (nan, nan) where they are not known."""
    mean, deviation = card.get("reward_mean"), card.get("reward_std")
    return (math.nan, math.nan) if mean is None or not deviation else (mean, deviation)
