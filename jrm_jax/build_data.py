"""A config becomes the data of a run: encoder, data sets, buckets, plans, batches on the mesh.

Reads the config and the disk. Mesh, backbone, state and steps are made in `build.py`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jrm_jax import sharding
from jrm_jax.data import contents, plan, store
from jrm_jax.data.buckets import Bucket, select
from jrm_jax.data.encode import Encoder, make_encoder
from jrm_jax.data.pipeline import BatchIterator, make_iterator, repeat_prompt
from jrm_jax.data.sizes import as_example, measure
from jrm_jax.data.template import Template, protocol_stamp
from jrm_jax.data.world.facts import COUNT as FACTS
from jrm_jax.data.world.life import of_config
from jrm_jax.data.world.prepare import prepare_world
from jrm_jax.errors import UserError
from jrm_jax.model.config import BackboneConfig
from jrm_jax.run import buckets as bucket_choice
from jrm_jax.run import check_data
from jrm_jax.run.backbones import find_folder, path_of
from jrm_jax.run.check_data import reads_critiques
from jrm_jax.run.flops import group_cost
from jrm_jax.run.ranking import METRICS


@dataclasses.dataclass(frozen=True)
class Data:
    """Everything about the examples of a run."""

    encoder: Encoder
    train_plan: plan.Plan | plan.LabelledPlan
    train_sets: tuple[Sequence[Any], ...]
    eval_plans: dict[str, plan.EvalPlan]
    eval_sets: dict[str, Sequence[Any]]
    buckets: tuple[Bucket, ...]
    stamp: dict[str, Any]
    real: dict[str, float]  # shares of the slots that hold something, see `run.buckets`
    measured: Collection[str] = tuple(METRICS)  # of `ranking.METRICS`: what `valid` can be asked

    def example_names(self, ids: Sequence[int]) -> list[str]:
        """String ids of global training ids, for messages; none for filler rows (-1)."""
        names = []
        for example_id in filter(lambda i: i >= 0, ids):
            which, index = self.train_plan.locate(int(example_id))
            names.append(f"{example_id} ({as_example(self.train_sets[which][index]).id})")
        return names


def backbone_folder(config: ConfigDict, weights: bool = False) -> Path:
    """The folder of `config.backbone.path`; of a model of the Hub with its weights or without.

    Raises:
        UserError: it is not set, or there is no such folder or name.
    """
    return find_folder(path_of(config), weights=weights)


def facts_of(config: ConfigDict) -> int:
    """How many facts the examples of a run are asked for; 0 where no loss reads them."""
    return FACTS if config.loss.facts_weight else 0


def make_run_encoder(config: ConfigDict, backbone: BackboneConfig) -> Encoder:
    """The encoder of a run's examples, but for `teacher_scale`, which is found in the data."""
    return make_encoder(
        backbone_folder(config),
        backbone,
        template=Template(rubric=config.data.rubric),
        max_visual_tokens=config.data.max_visual_tokens or None,
        dimensions=tuple(config.data.dimensions),
        language=reads_critiques(config),
        score_line=config.loss.score_line,
        positions=config.backbone.positions,
        facts=facts_of(config),
        teacher=config.loss.teacher_mix if config.loss.teacher_weight else None,
    )


def build_data(
    config: ConfigDict,
    backbone: BackboneConfig,
    say: Callable[[str], None],
    buckets: tuple[Bucket, ...] | None = None,
) -> Data:
    """Prepare or open the data, measure it, and plan every step.

    Args:
        buckets: of the run if it has begun; they are chosen anew where they do not hold its
            training data. Other splits get buckets of their own where these do not hold them.

    Raises:
        UserError: data that cannot be read, that this config learns nothing from, or too large.
    """
    language = reads_critiques(config)
    encoder = make_run_encoder(config, backbone)
    folders = data_folders(config)
    store.check_dimensions(config.data.dimensions, [path for path, _ in folders])
    caps = make_caps(config, backbone)
    sources: dict[str, list[plan.Source]] = {}
    sets: dict[str, list[Sequence[Any]]] = {}
    held: list[dict[str, contents.Contents]] = []  # by data set, then by split
    lessons, spans = [], {}
    stated: dict[str, Counter] = {"train": Counter(), "valid": Counter()}
    dimensions, mix = tuple(config.data.dimensions), dict(config.loss.teacher_mix)
    for folder, weight in folders:
        held.append({})
        for split, records in store.open_dataset(folder).items():
            name = f"{folder.name}/{split}"
            found = held[-1][split] = contents.read_contents(folder, split, records)
            if len(records) and (config.loss.through_reward or encoder.facts):
                first = as_example(records[0])  # before anything is compiled
                check_data.check_example(config, first, name)
                if encoder.facts:
                    encoder.candidate_facts(first.candidates)
            key = f"{encoder.key}/{found.digest}"
            sizes = measure(records, encoder.sizes, key, name=name, folder=folder)
            kept, words = select(sizes, caps, language, config.data.skip_large, name)
            if words:
                say(words)
            sources.setdefault(split, []).append(plan.Source(sizes, weight, kept))
            sets.setdefault(split, []).append(records)
            if split == "train" and config.data.labelled:
                lessons.append(contents.find_lessons(folder, split, records, dimensions))
            # a pass over all records, which a set without critiques need not have
            if config.loss.teacher_weight and found.critiques and split in ("train", "valid"):
                said = contents.find_stated(folder, split, records, dimensions, mix)
                if split == "valid":
                    stated[split].update(said.groups)
                elif weight:
                    stated[split].update(said.groups)
                    spans[f"{folder}/{split}"] = said.spans  # two sets may have one name
    measured = _check_splits(config, folders, held, stated, say)
    scale, words = check_data.teacher_scale(config, spans)
    for line in words:
        say(line)
    encoder = dataclasses.replace(encoder, teacher_scale=scale)

    cost = group_cost(backbone, config.data.share_prompt)

    def choose(sources: dict[str, list[plan.Source]]) -> tuple[Bucket, ...]:
        return bucket_choice.choose(
            config,
            sources,
            cost,
            language=language,
            merge=backbone.vision.merge,
            folder=folders[0][0],
        )

    training = {"train": sources["train"]}
    if buckets is None or not bucket_choice.hold_all(buckets, training, language):
        buckets = choose(sources)
    # a split that was added to the data of a run must not change what it trains on
    read = {split: each for split, each in sources.items() if split != "train"}
    others = buckets
    if not bucket_choice.hold_all(buckets, read, language):
        others = (*buckets, *choose(read))
    reading = bucket_choice.for_reading(config, others, sources, cost, language=language)
    size = config.batch_size
    held_out = [split for split in ("valid", "test", "hard") if split in sources]
    train_plan = _train_plan(config, sources["train"], lessons, buckets, language)
    return Data(
        encoder=encoder,
        train_plan=train_plan,
        train_sets=tuple(sets["train"]),
        eval_plans={s: plan.EvalPlan(sources[s], reading, size, language) for s in held_out},
        eval_sets={split: tuple(sets[split]) for split in held_out},
        buckets=others,
        stamp=protocol_stamp(
            encoder.template,
            encoder.tokenizer,
            encoder.processor,
            encoder.positions,
            encoder.dimensions,
        )
        | {"data": contents.stamp([folder.name for folder, _ in folders], held)},
        real=bucket_choice.real_shares(
            train_plan, sources["train"], language, config.data.share_prompt
        ),
        measured=measured,
    )


def _train_plan(
    config: ConfigDict,
    sources: Sequence[plan.Source],
    lessons: Sequence[tuple[np.ndarray, np.ndarray]],
    buckets: tuple[Bucket, ...],
    language: bool,
) -> plan.Plan | plan.LabelledPlan:
    if not config.data.labelled:
        return plan.Plan(sources, buckets, config.batch_size, config.seed, language)
    labelled, critiqued = zip(*lessons, strict=True)
    size, count = config.batch_size, config.data.labelled
    for what, which, rows in (("label", labelled, count), ("critique", critiqued, size - count)):
        taught = [
            index if source.kept is None else np.intersect1d(source.kept, index)
            for source, index in zip(sources, which, strict=True) if source.weight
        ]  # fmt: skip
        if rows and not any(map(len, taught)):
            raise UserError(
                f"config.data.labelled is {count} of {size}, and no training group has a {what} "
                f"for the {rows} rows that are to have one: set it to 0, or to config.batch_size"
            )
    (bucket,) = buckets  # config.data.programs is 1
    return plan.LabelledPlan(
        sources, labelled, critiqued, bucket, size, count, config.seed, language
    )


def _check_splits(
    config: ConfigDict,
    folders: Sequence[tuple[Path, float]],
    held: Sequence[dict[str, contents.Contents]],
    stated: Mapping[str, Mapping[str, int]],
    say: Callable[[str], None],
) -> Collection[str]:
    """Is there something to learn, and something to measure it by? What is missing is said.
    Returns what checkpoints can be ranked by, of `ranking.METRICS`."""
    paths = [path for path, _ in folders]
    names = ", ".join(map(str, paths))
    train = [
        found["train"]
        for found, (_, weight) in zip(held, folders, strict=True)
        if weight and "train" in found
    ]
    if not train:
        raise UserError(f"{names}: there is no split 'train'")
    for words in check_data.check_lessons(config, train, names, stated["train"]):
        say(words)
    for words in check_data.describe_unused(config, paths):
        say(words)
    valid = [found["valid"] for found in held if "valid" in found]
    if not valid:
        say(check_data.describe_no_valid(config, paths))
        return tuple(METRICS)
    absent = {
        "pair_accuracy": not any(c.labels.get(d) for c in valid for d in config.data.dimensions),
        "-teacher": not any(stated["valid"].values()),
        "-language": not any(found.critiques for found in valid),
    }
    measured = [metric for metric in METRICS if not absent.get(metric)]
    if config.loss.preference_weight and absent["pair_accuracy"]:
        say(check_data.describe_no_judgement(config, measured))
    return measured


def make_caps(config: ConfigDict, backbone: BackboneConfig) -> Bucket:
    """What a group may need at most; 0: no cap."""
    data = config.data
    return Bucket(
        candidates=data.max_candidates,
        images=data.max_pictures,
        patches=data.max_picture_tokens * backbone.vision.merge**2,
        prompt=data.max_prompt,
        candidate=data.max_candidate,
        critique=data.max_critique,
    )


def data_folders(config: ConfigDict) -> list[tuple[Path, float]]:
    """(folder, times per epoch) of a run's data sets; the built-in world is drawn if need be."""
    if config.data.mixture:
        return [(Path(path), float(weight)) for path, weight in config.data.mixture]
    if config.data.path:
        return [(Path(config.data.path), 1.0)]
    world = config.data.world
    counts = {s: world[s] for s in ("train", "valid", "test", "hard") if world[s]}
    life = of_config(world)
    return [(prepare_world(config.data.cache, counts, world.seed, world.kind, life), 1.0)]


def batches(
    config: ConfigDict,
    data: Data,
    which: str,
    mesh: jax.sharding.Mesh,
    start: int = 0,
    stop: int | None = None,
) -> BatchIterator:
    """This host's batches of a split, prepared ahead; 'train' follows the seeded plan."""
    chosen = data.train_plan if which == "train" else data.eval_plans[which]
    rows = sharding.local_rows(config.batch_size, mesh)
    process, count = jax.process_index(), jax.process_count()
    own = np.arange(process * len(rows), (process + 1) * len(rows))
    if len(rows) * count != config.batch_size or (rows != own).any():
        raise UserError(
            "this mesh does not give each host one contiguous share of the batch: make "
            "config.mesh.tensor no larger than the devices of a host"
        )
    return make_iterator(
        chosen,
        data.train_sets if which == "train" else data.eval_sets[which],
        data.encoder,
        start=start,
        stop=stop,
        process_index=process,
        process_count=count,
        workers=config.data.workers if which == "train" else 0,
        prefetch=config.data.prefetch,
    )


def place(config: ConfigDict, batch: dict, mesh: jax.sharding.Mesh) -> dict:
    """Host arrays -> arrays on the mesh."""
    if not config.data.share_prompt:
        batch = repeat_prompt(batch)
    return sharding.place_batch(batch, mesh)
