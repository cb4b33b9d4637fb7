"""A config becomes the parts of a run: data, mesh, backbone, state, compiled steps.

Reads the config and the disk; the loop that uses these parts is in `train.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jrm_jax import heads, lora, optim, sharding
from jrm_jax.data import builders, plan, store
from jrm_jax.data.encode import Encoder, make_encoder
from jrm_jax.data.facts import COUNT as FACTS
from jrm_jax.data.pipeline import BatchIterator, make_iterator, repeat_prompt
from jrm_jax.data.sizes import Sizes, as_example, measure
from jrm_jax.data.template import Template, protocol_stamp
from jrm_jax.errors import UserError
from jrm_jax.model import published, weights
from jrm_jax.model.backbone import Backbone, init_backbone
from jrm_jax.model.config import BackboneConfig, load_config
from jrm_jax.step import LossConfig, TrainState, make_eval_step, make_forward, make_train_step

EVERYTHING = ".*"  # the default of config.trainable
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Data:
    """Everything about the examples of a run."""

    encoder: Encoder
    train_plan: plan.Plan
    train_sets: tuple[Sequence[Any], ...]
    eval_plans: dict[str, plan.EvalPlan]
    eval_sets: dict[str, Sequence[Any]]
    buckets: tuple[plan.Bucket, ...]
    stamp: dict[str, Any]

    def example_names(self, ids: Sequence[int]) -> list[str]:
        """String ids of global training ids, for messages."""
        names = []
        for example_id in ids:
            which, index = self.train_plan.locate(int(example_id))
            names.append(f"{example_id} ({as_example(self.train_sets[which][index]).id})")
        return names


def backbone_folder(config: ConfigDict) -> Path:
    """Raises UserError unless `config.backbone.path` is a folder."""
    path = config.backbone.path
    if not path or not Path(path).is_dir():
        wanted = f" of {config.variant}" if config.get("variant") else ""
        found = f"{path!r} is no folder" if path else "is not set"
        raise UserError(
            f"config.backbone.path {found}: give the Hugging Face folder{wanted}, "
            "--config.backbone.path=FOLDER"
        )
    return Path(path)


def reads_critiques(config: ConfigDict) -> bool:
    """Whether a run's losses need critiques; without, they are left out of the batches."""
    return bool(config.loss.language_weight or config.loss.get("words_weight"))


def make_run_encoder(config: ConfigDict, backbone: BackboneConfig) -> Encoder:
    """The encoder of a run's examples."""
    return make_encoder(
        backbone_folder(config),
        backbone,
        template=Template(rubric=config.data.rubric),
        max_visual_tokens=config.data.max_visual_tokens or None,
        dimensions=tuple(config.data.dimensions),
        language=reads_critiques(config),
        score_line=config.loss.score_line,
        positions=config.backbone.positions,
        facts=FACTS if config.loss.get("facts_weight") else 0,
    )


def build_data(config: ConfigDict, backbone: BackboneConfig, say: Callable[[str], None]) -> Data:
    """Prepare or open the data, measure it, and plan every step."""
    language = reads_critiques(config)
    encoder = make_run_encoder(config, backbone)
    folders = _data_folders(config)
    store.check_dimensions(config.data.dimensions, [path for path, _ in folders])
    caps = plan.Bucket(0, 0, 0, 0, 0, config.data.max_critique)
    sources: dict[str, list[plan.Source]] = {}
    sets: dict[str, list[Sequence[Any]]] = {}
    for folder, weight in folders:
        for split, records in store.open_dataset(folder).items():
            name = f"{folder.name}/{split}"
            sizes = measure(records, encoder.sizes, encoder.key, name=name, folder=folder)
            kept, words = plan.select(sizes, caps, language, config.data.skip_large, name)
            if words:
                say(words)
            sources.setdefault(split, []).append(plan.Source(sizes, weight, kept))
            sets.setdefault(split, []).append(records)
    if "train" not in sources:
        raise UserError(f"{', '.join(str(f) for f, _ in folders)}: there is no split 'train'")
    buckets = plan.make_buckets(
        [Sizes.from_rows(s.sizes.rows()[s.kept]) for each in sources.values() for s in each],
        language=language,
        merge=backbone.vision.merge,
        candidate_cuts=tuple(config.data.candidate_cuts),
        visual_cuts=tuple(config.data.visual_cuts),
        round_to=config.data.round_to,
        round_patches=0 if config.data.round_to < 128 else 128,
    )
    size = config.batch_size
    held_out = [split for split in ("valid", "test", "hard") if split in sources]
    return Data(
        encoder=encoder,
        train_plan=plan.Plan(sources["train"], buckets, size, config.seed, language),
        train_sets=tuple(sets["train"]),
        eval_plans={s: plan.EvalPlan(sources[s], buckets, size, language) for s in held_out},
        eval_sets={split: tuple(sets[split]) for split in held_out},
        buckets=buckets,
        stamp=protocol_stamp(
            encoder.template,
            encoder.tokenizer,
            encoder.processor,
            encoder.positions,
            encoder.dimensions,
        ),
    )


def _data_folders(config: ConfigDict) -> list[tuple[Path, float]]:
    if config.data.mixture:
        return [(Path(path), float(weight)) for path, weight in config.data.mixture]
    if config.data.path:
        return [(Path(config.data.path), 1.0)]
    world = config.data.world
    counts = {s: world[s] for s in ("train", "valid", "test", "hard") if world[s]}
    return [(builders.prepare_world(config.data.cache, counts, world.seed, world.kind), 1.0)]


def batches(
    config: ConfigDict, data: Data, which: str, mesh: jax.sharding.Mesh, start: int = 0,
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


def make_mesh(
    config: ConfigDict,
    backbone: BackboneConfig,
    devices: Sequence[Any] | None = None,
    check_batch: bool = True,
) -> jax.sharding.Mesh:
    """The mesh of a run; `devices` are this machine's unless given."""
    given = {} if devices is None else {"devices": devices}
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    sizes = sharding.fill_sizes(sizes, weights.abstract_params(backbone), **given)
    mesh = sharding.make_mesh(*sizes, **given)
    sharding.check_mesh(backbone, mesh)
    if check_batch:
        sharding.check_batch_size(config.batch_size, mesh, config.accumulation)
    return mesh


def make_backbone(
    config: ConfigDict, backbone: BackboneConfig, mesh: jax.sharding.Mesh, reward_token_id: int
) -> Backbone:
    if config.backbone.compute_dtype not in DTYPES:
        raise UserError(
            f"config.backbone.compute_dtype: {config.backbone.compute_dtype!r} is none of "
            f"{', '.join(DTYPES)}"
        )
    return Backbone(
        backbone,
        dtype=DTYPES[config.backbone.compute_dtype],
        remat=config.remat,
        attention=config.backbone.attention,
        scan_unroll=config.backbone.scan_unroll or True,
        # one device needs no constraint, but attention must know one that is not this machine's
        hidden_sharding=None if sharding.is_this_device(mesh) else sharding.batch_sharding(mesh),
        reward_token_id=reward_token_id,
        through_reward=config.loss.through_reward,
    )


def make_optimizer(config: ConfigDict, trainable: dict):
    """(optax transformation, schedule: step -> learning rate)."""
    settings = config.optimizer
    schedule = optim.make_schedule(
        settings.schedule,
        settings.learning_rate,
        settings.warmup_steps,
        config.total_steps,
        settings.final_scale,
    )
    optimizer = optim.make_optimizer(
        trainable,
        schedule,
        name=settings.name,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        decay_patterns=tuple(settings.decay_patterns),
        clip_norm=settings.clip_norm,
        groups=tuple(settings.groups),
    )
    return optimizer, schedule


def trainable_patterns(config: ConfigDict) -> tuple[str, ...]:
    """What learns. With adapters these and the score, and what `config.trainable` names besides."""
    patterns = tuple(config.trainable)
    if lora_scale(config) is None:
        return patterns
    used = (n for n in heads.TRAINING_HEADS if config.loss.get(n.replace("head", "weight")))
    patterns = () if patterns == (EVERYTHING,) else patterns
    return (*lora.TRAINABLE, *(f"^{name}/" for name in used), *patterns)


def lora_scale(config: ConfigDict) -> float | None:
    """alpha / rank; None without adapters. Runs from before there were any have no such field.

    Raises:
        UserError: a negative rank.
    """
    settings = config.get("lora")
    if not settings or not settings.rank:
        return None
    if settings.rank < 0:
        raise UserError(f"config.lora.rank is {settings.rank}: a positive number, or 0 for none")
    return settings.alpha / settings.rank


def abstract_params(
    config: ConfigDict, backbone: BackboneConfig, dimensions: int, facts: int = 0
) -> dict[str, Any]:
    """Shapes of all parameters of a run: the backbone, adapters, the reward head and its token, and
    the heads of training alone that its losses have."""
    width, words = backbone.text.hidden, bool(config.loss.get("words_weight"))
    whole = {
        **jax.eval_shape(lambda: heads.init_training_heads(width, facts, words)),
        **weights.abstract_params(backbone),
        "reward_head": {"kernel": jax.ShapeDtypeStruct((width, dimensions), jnp.float32)},
        "reward_embedding": jax.ShapeDtypeStruct((width,), jnp.float32),
    }
    if lora_scale(config) is None:
        return whole
    adapters = lora.adapter_shapes(whole, config.lora.rank, tuple(config.lora.targets))
    return optim.merge_params(adapters, whole)


def init_state(
    config: ConfigDict, backbone: BackboneConfig, mesh: jax.sharding.Mesh, encoder: Encoder
) -> tuple[TrainState, Any]:
    """(state, optimizer's schedule and transformation): weights from the folder, or random.

    Every leaf is read or made straight into its sharding; frozen leaves are bfloat16 where the
    compute dtype is.
    """
    folder = backbone_folder(config)
    frozen_dtype = DTYPES[config.backbone.compute_dtype]
    width, dimensions = backbone.text.hidden, len(encoder.dimensions)
    key = jax.random.key(config.seed)
    whole = abstract_params(config, backbone, dimensions, encoder.facts)
    patterns = trainable_patterns(config)
    trainable_paths = set(optim.flatten(optim.split_params(whole, patterns)[0]))
    shardings = sharding.param_shardings(whole, mesh)

    def dtype_of(path: str):
        return jnp.float32 if path in trainable_paths else frozen_dtype

    body = {name: shardings[name] for name in ("backbone", "language_head")}
    body["backbone"] = optim.unflatten(
        {p: s for p, s in optim.flatten(body["backbone"]).items() if not p.endswith(lora.LEAVES)}
    )
    if config.backbone.random:
        params = jax.jit(lambda k: init_backbone(k, backbone), out_shardings=body)(
            jax.random.fold_in(key, 1)
        )
        kernel = None
    else:
        params = weights.load_params(folder, backbone, body, dtype_of, ignore=("score.weight",))
        kernel = weights.load_reward_head(folder, backbone)
    if kernel is None or kernel["kernel"].shape[1] != dimensions:
        head = jax.jit(
            lambda k: heads.init_reward_head(k, width, dimensions, config.head.scale),
            out_shardings=shardings["reward_head"],
        )(jax.random.fold_in(key, 2))
    else:
        host = jax.tree.map(np.asarray, kernel)  # every process has the whole of it
        head = jax.device_put(host, shardings["reward_head"])
    # A spare row that an export has filled is the trained embedding; else begin at <|im_end|>.
    row = encoder.tokenizer.end_id if kernel is None else encoder.tokenizer.reward_id
    embedding = jax.jit(
        lambda table: table[row].astype(jnp.float32), out_shardings=shardings["reward_embedding"]
    )(params["backbone"]["embed"]["embedding"])
    params = {**params, "reward_head": head, "reward_embedding": embedding}
    training = {name: s for name, s in shardings.items() if name in heads.TRAINING_HEADS}
    if training:
        make = functools.partial(
            heads.init_training_heads, width, encoder.facts, "words_head" in training
        )
        params |= jax.jit(make, out_shardings=training)()
    params = _with_adapters(config, params, shardings, jax.random.fold_in(key, 3))
    trainable, frozen = optim.split_params(params, patterns)
    optimizer, schedule = make_optimizer(config, trainable)
    opt_abstract = jax.eval_shape(optimizer.init, trainable)
    opt_state = jax.jit(
        optimizer.init, out_shardings=sharding.optimizer_shardings(opt_abstract, trainable, mesh)
    )(trainable)
    step = jax.device_put(jnp.int32(0), sharding.replicated(mesh))
    return TrainState(step, trainable, frozen, opt_state), (optimizer, schedule)


def _with_adapters(config: ConfigDict, params: dict, shardings: dict, key: jax.Array) -> dict:
    if lora_scale(config) is None:
        return params
    shapes = lora.adapter_shapes(params, config.lora.rank, tuple(config.lora.targets))
    placed = optim.flatten(shardings)
    places = optim.unflatten({path: placed[path] for path in optim.flatten(shapes)})
    adapters = jax.jit(lambda k: lora.init_adapters(k, shapes), out_shardings=places)(key)
    return optim.merge_params(adapters, params)


def abstract_state(
    config: ConfigDict, backbone: BackboneConfig, mesh: jax.sharding.Mesh
) -> tuple[TrainState, Any]:
    """What `init_state` returns, as shapes with shardings: nothing is read or allocated."""
    whole = abstract_params(config, backbone, len(config.data.dimensions))
    trainable, frozen = optim.split_params(whole, trainable_patterns(config))
    frozen_dtype = DTYPES[config.backbone.compute_dtype]
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, frozen_dtype), frozen)
    optimizer, schedule = make_optimizer(config, trainable)
    opt_state = jax.eval_shape(optimizer.init, trainable)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, frozen, opt_state)
    return sharding.placed(state, sharding.state_shardings(state, mesh)), (optimizer, schedule)


def make_steps(config: ConfigDict, backbone: Backbone, data: Data, optimizer, state: TrainState):
    """(train_step, eval_step), jitted; the training state is donated."""
    loss = LossConfig(**{name: config.loss[name] for name in LossConfig._fields})
    processor = data.encoder.processor
    forward = make_forward(backbone, processor.mean, processor.std, loss, lora_scale(config))
    train_step = make_train_step(forward, optimizer, loss, config.accumulation, config.total_steps)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    options = sharding.compiler_options(shardings.step.mesh)
    return (
        # The state comes out as it went in, so that the second step finds the first's program.
        jax.jit(
            train_step,
            donate_argnums=0,
            out_shardings=(shardings, None),
            compiler_options=options,
        ),
        jax.jit(make_eval_step(forward), compiler_options=options),
    )


def load_backbone_config(config: ConfigDict) -> BackboneConfig:
    """The architecture of the run's folder, which must be the published one of its variant."""
    folder = backbone_folder(config)
    found = load_config(folder)
    published.check_variant(config.get("variant", ""), found, str(folder))
    return found
