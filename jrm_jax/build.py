"""A config becomes the parts of a run: mesh, backbone, state, compiled steps.

Its data are in `build_data.py`; the loop that uses these parts is in `train.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jrm_jax import heads, lora, optim, sharding
from jrm_jax.build_data import Data, backbone_folder, facts_of
from jrm_jax.data.encode import Encoder
from jrm_jax.data.template import Tokenizer
from jrm_jax.errors import UserError
from jrm_jax.model import published, stored_head, weights
from jrm_jax.model.backbone import Backbone, init_backbone
from jrm_jax.model.config import BackboneConfig, load_config
from jrm_jax.model.layers import unroll_all
from jrm_jax.model.tensors import stays_float32
from jrm_jax.reward_head import HeadStart, read_head_start
from jrm_jax.run.check_data import reads_critiques
from jrm_jax.step import (
    Forward,
    LossConfig,
    TrainState,
    make_eval_step,
    make_forward,
    make_train_step,
)

EVERYTHING = ".*"  # the default of config.trainable
OFF = "off"  # config.loss.gaussian: rewards are plain numbers
AUTO = "auto"  # config.remat: a run takes what fits, see `run.fit`
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


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
    return Backbone(
        backbone,
        dtype=DTYPES[config.backbone.compute_dtype],
        remat="none" if config.remat == AUTO else config.remat,
        attention=config.backbone.attention,
        scan_unroll=config.backbone.scan_unroll
        or unroll_all(backbone.text.layers, mesh.devices.flat[0].platform)
        or 1,
        # one device needs no constraint, but attention must know one that is not this machine's
        hidden_sharding=None if sharding.is_this_device(mesh) else sharding.batch_sharding(mesh),
        reward_token_id=reward_token_id,
        through_reward=config.loss.through_reward,
    )


def make_schedule(config: ConfigDict, total_steps: int):
    """step -> learning rate, of a run of so many steps."""
    settings = config.optimizer
    return optim.make_schedule(
        settings.schedule,
        settings.learning_rate,
        settings.warmup_steps,
        total_steps,
        settings.final_scale,
    )


def describe_more_steps(config: ConfigDict, before: int, step: int) -> str:
    """What happens to a run of `before` steps that goes on at `step` and gets more."""
    total = config.total_steps
    old, new = (make_schedule(config, steps) for steps in (before, total))
    words = (
        f"{before} steps become {total}: the learning rate ({config.optimizer.schedule}) goes from "
        f"{float(old(step)):.3g} to {float(new(step)):.3g} at step {step}, and ends at "
        f"{float(new(total)):.3g}"
    )
    if config.loss.language_end != 1.0:
        words += "; the weight of the language loss is stretched over all of them alike"
    return words


def make_optimizer(config: ConfigDict, trainable: dict, frozen: dict | None = None):
    """(optax transformation, schedule: step -> learning rate). `frozen`: what does not learn, which
    the config's patterns may name too."""
    settings = config.optimizer
    schedule = make_schedule(config, config.total_steps)
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
        others=tuple(optim.flatten(frozen or {})),
    )
    return optimizer, schedule


def frozen_dtype(config: ConfigDict) -> Callable[[str], Any]:
    """path -> dtype of a parameter that does not learn."""
    dtype = DTYPES[config.backbone.compute_dtype]
    return lambda path: jnp.float32 if stays_float32(path) else dtype


def trainable_patterns(config: ConfigDict) -> tuple[str, ...]:
    """What learns. With adapters these and the score, and what `config.trainable` names besides."""
    patterns = tuple(config.trainable)
    if lora_scale(config) is None:
        return patterns
    used = (n for n in heads.TRAINING_HEADS if config.loss.get(n.replace("head", "weight")))
    patterns = () if patterns == (EVERYTHING,) else patterns
    return (*lora.TRAINABLE, *(f"^{name}/" for name in used), *patterns)


def lora_scale(config: ConfigDict) -> float | None:
    """alpha / rank; None without adapters."""
    return config.lora.alpha / config.lora.rank if config.lora.rank else None


def abstract_params(config: ConfigDict, backbone: BackboneConfig) -> dict[str, Any]:
    """Shapes of all parameters of a run: the backbone, adapters, the reward head and its token, and
    the heads of training alone that its losses have."""
    width, words = backbone.text.hidden, bool(config.loss.words_weight)
    whole = {
        **jax.eval_shape(lambda: heads.init_training_heads(width, facts_of(config), words)),
        **weights.abstract_params(backbone),
        "reward_head": abstract_reward_head(config, width, len(config.data.dimensions)),
        "reward_embedding": jax.ShapeDtypeStruct((width,), jnp.float32),
    }
    if lora_scale(config) is None:
        return whole
    adapters = lora.adapter_shapes(whole, config.lora.rank, tuple(config.lora.targets))
    return optim.merge_params(adapters, whole)


def init_reward_head(
    config: ConfigDict, key: jax.Array, width: int, dimensions: int
) -> dict[str, Any]:
    """The reward head of a run, as it begins where no folder has one."""
    hidden, gaussian = tuple(config.head.hidden), config.loss.gaussian != OFF
    return heads.init_reward_head(key, width, dimensions, config.head.scale, hidden, gaussian)


def abstract_reward_head(config: ConfigDict, width: int, dimensions: int) -> dict[str, Any]:
    return jax.eval_shape(
        lambda: init_reward_head(config, jax.random.key(0), width, dimensions)
    )


def random_backbone(config: ConfigDict, backbone: BackboneConfig, shardings: Any = None) -> dict:
    """The weights that a run with `config.backbone.random` begins with."""
    make = jax.jit(lambda key: init_backbone(key, backbone), out_shardings=shardings)
    return make(jax.random.fold_in(jax.random.key(config.seed), 1))


def init_state(
    config: ConfigDict, backbone: BackboneConfig, mesh: jax.sharding.Mesh, encoder: Encoder
) -> tuple[TrainState, Any]:
    """(state, optimizer's schedule and transformation): weights from the folder, or random.

    Every leaf is read or made straight into its sharding. Frozen leaves of a folder have the
    compute dtype (`frozen_dtype`); those of `config.backbone.random` are float32.
    """
    folder = backbone_folder(config, weights=not config.backbone.random)
    frozen = frozen_dtype(config)
    width, dimensions = backbone.text.hidden, len(encoder.dimensions)
    key = jax.random.key(config.seed)
    whole = abstract_params(config, backbone)
    patterns = trainable_patterns(config)
    trainable_paths = set(optim.flatten(optim.split_params(whole, patterns)[0]))
    shardings = sharding.param_shardings(whole, mesh)

    def dtype_of(path: str):
        return jnp.float32 if path in trainable_paths else frozen(path)

    body = {name: shardings[name] for name in ("backbone", "language_head")}
    body["backbone"] = optim.unflatten(
        {p: s for p, s in optim.flatten(body["backbone"]).items() if not p.endswith(lora.LEAVES)}
    )
    if config.backbone.random:
        params = random_backbone(config, backbone, body)
    else:
        params = weights.load_params(folder, backbone, body, dtype_of, ignore=(stored_head.PREFIX,))
    start = head_start(config, backbone)

    def start_head(key: jax.Array, known: dict[str, Any] | None) -> dict[str, Any]:
        new = init_reward_head(config, key, width, dimensions)
        return new if known is None else jax.tree.map(
            lambda old, new: jnp.where(jnp.isnan(old), new, old), known, new
        )  # fmt: skip

    head = jax.jit(start_head, out_shardings=shardings["reward_head"])(
        jax.random.fold_in(key, 2), start.params
    )
    row = reward_row(start, encoder.tokenizer)
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
    optimizer, schedule = make_optimizer(config, trainable, frozen)
    opt_abstract = jax.eval_shape(optimizer.init, trainable)
    opt_state = jax.jit(
        optimizer.init, out_shardings=sharding.optimizer_shardings(opt_abstract, trainable, mesh)
    )(trainable)
    step = jax.device_put(jnp.int32(0), sharding.replicated(mesh))
    return TrainState(step, trainable, frozen, opt_state), (optimizer, schedule)


def head_start(config: ConfigDict, backbone: BackboneConfig) -> HeadStart:
    """What the backbone's folder has for the reward head of a run. Its words warn of a head that
    can never score."""
    start = HeadStart()
    if not config.backbone.random:
        dimensions = tuple(config.data.dimensions)
        wanted = abstract_reward_head(config, backbone.text.hidden, len(dimensions))
        folder = backbone_folder(config)
        start = read_head_start(folder, backbone, dimensions, config.head.anew, wanted)
    why = describe_fixed_head(config, lambda: start) if config.loss.preference_weight else ""
    warning = f"WARNING: what this run trains cannot score: {why}" if why else ""
    return start._replace(words="; ".join(filter(None, (start.words, warning))))


def describe_fixed_head(config: ConfigDict, start: Callable[[], HeadStart]) -> str:
    """'' where each leaf of the reward head learns or goes on from the folder, which `start`
    reads where it is needed."""
    patterns, groups = trainable_patterns(config), config.optimizer.groups
    head = optim.flatten({"reward_head": abstract_reward_head(config, 1, 1)})
    fixed = [
        path for path in head
        if not (optim.matching(patterns, [path]) and optim.multiplier(groups, path))
    ]  # fmt: skip
    anew = [path for path in fixed if path not in start().known()]
    if not anew:
        return ""
    return (
        f"config.trainable or config.optimizer.groups keep {', '.join(anew)} as it began, and the "
        "backbone's folder has none"
    )


def reward_row(start: HeadStart, tokenizer: Tokenizer) -> int:
    """Of the embedding table, where the reward token's embedding begins: the spare row that an
    export has filled (with a reward head or without), else <|im_end|>."""
    return tokenizer.reward_id if start.is_export else tokenizer.end_id


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
    whole = abstract_params(config, backbone)
    trainable, frozen = optim.split_params(whole, trainable_patterns(config))
    dtype = frozen_dtype(config)
    frozen = optim.unflatten(
        {p: jax.ShapeDtypeStruct(x.shape, dtype(p)) for p, x in optim.flatten(frozen).items()}
    )
    optimizer, schedule = make_optimizer(config, trainable, frozen)
    opt_state = jax.eval_shape(optimizer.init, trainable)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, frozen, opt_state)
    return sharding.placed(state, sharding.state_shardings(state, mesh)), (optimizer, schedule)


def loss_config(config: ConfigDict) -> LossConfig:
    return LossConfig(**{name: config.loss[name] for name in LossConfig._fields})


def make_run_forward(config: ConfigDict, backbone: Backbone, data: Data) -> Forward:
    """The forward pass of a run's steps, with its losses."""
    processor, loss = data.encoder.processor, loss_config(config)
    return make_forward(backbone, processor.mean, processor.std, loss, lora_scale(config))


def make_steps(config: ConfigDict, backbone: Backbone, data: Data, optimizer, state: TrainState):
    """(train_step, eval_step), jitted; the training state is donated."""
    forward, loss = make_run_forward(config, backbone, data), loss_config(config)
    train_step = make_train_step(forward, optimizer, loss, config.accumulation, config.total_steps)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    options = functools.partial(sharding.compiler_options, shardings.step.mesh)
    search = DTYPES[config.backbone.compute_dtype] != jnp.float32
    return (
        # The state comes out as it went in, so that the second step finds the first's program.
        jax.jit(
            train_step,
            donate_argnums=0,
            out_shardings=(shardings, None),
            compiler_options=options(search=search),
        ),
        jax.jit(make_eval_step(forward, config.accumulation), compiler_options=options()),
    )


def check_losses(config: ConfigDict, backbone: BackboneConfig) -> None:
    """Raise UserError for a loss that this backbone cannot have."""
    if config.loss.through_reward and backbone.text.delta is not None:
        raise UserError(
            "config.loss.through_reward is True, which this backbone cannot do: its layers hand on "
            "a state, and critiques would see their candidate by it; set it to False"
        )


def load_backbone_config(config: ConfigDict) -> BackboneConfig:
    """The architecture of the run's folder, which must be the published one of its variant; without
    a language head where the folder has none and no loss reads it."""
    folder = backbone_folder(config)
    found = load_config(folder)
    published.check_variant(config.get("variant", ""), found, str(folder))
    check_losses(config, found)
    has_files = any(folder.glob("*.safetensors"))  # a run of the Hub's is read without them
    if reads_critiques(config) or config.backbone.random or not has_files:
        return found
    return weights.as_stored(folder, found)
