"""The steps of a config, compiled for a TPU topology on a machine that has none.

The steps are those of `build` and `step`; only their arguments are shapes instead of arrays.
Letters: see `data/pipeline.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time
from types import SimpleNamespace
from typing import Any

import jax
from ml_collections import ConfigDict

from jrm_jax import build, build_data, lora, sharding
from jrm_jax.data.buckets import Bucket
from jrm_jax.data.pipeline import empty_batch, repeat_prompt
from jrm_jax.errors import UserError
from jrm_jax.model.config import BackboneConfig
from jrm_jax.model.published import PIXELS, PUBLISHED, UNUSED_TOKEN
from jrm_jax.planning.chips import Topology
from jrm_jax.run.fit import bytes_per_device, compile_within
from jrm_jax.step import Forward, TrainState, make_score_step

# libtpu would ask a cloud machine's metadata server what it runs on; two compiles may run at once
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One step for one topology. Bytes are those of a device."""

    params: int
    optimizer: int
    batch: int
    outputs: int  # that no argument's memory is used for
    activations: int
    peak: int
    seconds: float
    processor_seconds: float  # of the compile: what it takes where nothing else runs, or less
    program: str  # optimised HLO
    attention: tuple[str, ...]  # names of the attention kernels of the lowered module

    @property
    def allotted(self) -> int:
        """All that is allotted, as if no two buffers ever shared their place: `peak` at most."""
        return self.params + self.optimizer + self.batch + self.outputs + self.activations


def describe_devices(topology: Topology) -> list[Any]:
    """The devices of a topology. Raises UserError without libtpu, or for a shape it has not."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chips == topology.slices:  # one chip; the default is a host of four
        options["chips_per_host_bounds"] = (1,) * len(topology.shape)
    try:
        found = topologies.get_topology_desc(topology.name, platform="tpu", **options).devices
    except Exception as error:
        text = " ".join(str(error).split())
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                "compiling for a TPU needs libtpu: pip install -r requirements-tpu.txt"
            ) from error
        raise UserError(f"--topology={topology.name}: {text[:200]}") from error
    return list(found)


def architecture(config: ConfigDict) -> BackboneConfig:
    """That of the folder where the config names one, else the published one of its variant."""
    variant = config.get("variant", "")
    if config.backbone.path:
        return build.load_backbone_config(config)
    if variant not in PUBLISHED:
        raise UserError(
            f"config variant {variant!r} has no published architecture: name one of "
            f"{', '.join(PUBLISHED)}, or give --config.backbone.path=FOLDER"
        )
    build.check_losses(config, PUBLISHED[variant])
    return PUBLISHED[variant]


def make_bucket(
    backbone: BackboneConfig, visual: int, text: int, critique: int, candidates: int, images: int,
    round_to: int,
) -> Bucket:
    """Static sizes of a step: a source picture in the prompt, one picture per candidate.

    `text`: tokens of rubric and instruction. A candidate's own words before its critique are few:
    24 slots hold them. With critique 0 the candidates end at the reward token, as in scoring.
    """

    def rounded(count: int) -> int:
        return -(-count // round_to) * round_to

    own = visual if images else 0
    return Bucket(
        candidates=candidates,
        images=images,
        patches=rounded(visual * backbone.vision.merge**2),
        prompt=rounded(text + own),
        candidate=rounded(own + 24 + critique),
        critique=critique,
    )


def abstract_batch(
    config: ConfigDict, backbone: BackboneConfig, bucket: Bucket, mesh: Any, share: bool = False
) -> dict:
    """A batch of `config.batch_size` groups as shapes on the mesh; `share`: prompts are shared
    whatever `config.data.share_prompt` says, as in scoring."""
    one = empty_batch(1, bucket, stand_in_encoder(config, backbone))
    if not (share or config.data.share_prompt):
        one = repeat_prompt(one)
    groups, rows = (config.batch_size,), sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(groups + array.shape[1:], array.dtype, sharding=rows)
        for name, array in one.items()
    }


def stand_in_encoder(config: ConfigDict, backbone: BackboneConfig) -> Any:
    """What shapes and pixels need of an Encoder, which would need a tokenizer's files."""
    mean, std = PIXELS[backbone.family]
    return SimpleNamespace(
        processor=SimpleNamespace(
            mean=mean, std=std, features=backbone.vision.features, merge=backbone.vision.merge
        ),
        tokenizer=SimpleNamespace(
            pad_id=0, reward_id=min(UNUSED_TOKEN[backbone.family], backbone.text.vocab - 1)
        ),
        vision=backbone.vision,
        dimensions=tuple(config.data.dimensions),
        facts=build_data.facts_of(config),
        teacher=() if config.loss.teacher_weight else None,
    )


def train_parts(
    config: ConfigDict, backbone: BackboneConfig, mesh: Any
) -> tuple[Forward, TrainState, Any]:
    """(forward pass, abstract state, jitted train step) of a run with this config."""
    encoder = stand_in_encoder(config, backbone)
    module = build.make_backbone(config, backbone, mesh, encoder.tokenizer.reward_id)
    state, (optimizer, _) = build.abstract_state(config, backbone, mesh)
    data: Any = SimpleNamespace(encoder=encoder)
    step, _ = build.make_steps(config, module, data, optimizer, state)
    return build.make_run_forward(config, module, data), state, step


def compile_train(
    config: ConfigDict, backbone: BackboneConfig, bucket: Bucket, mesh: Any
) -> Compiled:
    """The train step. Raises OutOfMemory."""
    _, state, step = train_parts(config, backbone, mesh)
    batch = abstract_batch(config, backbone, bucket, mesh)
    params = bytes_per_device((state.trainable, state.frozen))
    return _compile(
        step, (state, batch), params, bytes_per_device(state.opt_state), bytes_per_device(batch)
    )


def compile_score(
    config: ConfigDict, backbone: BackboneConfig, bucket: Bucket, mesh: Any
) -> Compiled:
    """The score step, its parameters in the compute dtype. Raises OutOfMemory."""
    encoder = stand_in_encoder(config, backbone)
    module = build.make_backbone(config, backbone, mesh, encoder.tokenizer.reward_id)
    whole = build.abstract_params(config, backbone)
    # adapters are merged into what scores
    whole = jax.eval_shape(lambda params: lora.merge_adapters(params, 1.0), whole)
    dtype = build.DTYPES[config.backbone.compute_dtype]
    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), whole)
    params = sharding.placed(whole, sharding.param_shardings(whole, mesh))
    processor = encoder.processor
    step = jax.jit(
        make_score_step(module, processor.mean, processor.std),
        compiler_options=sharding.compiler_options(mesh),
    )
    batch = abstract_batch(config, backbone, bucket, mesh, share=True)
    return _compile(step, (params, batch), bytes_per_device(params), 0, bytes_per_device(batch))


def _compile(step: Any, arguments: tuple, params: int, optimizer: int, batch: int) -> Compiled:
    start, busy = time.monotonic(), time.process_time()
    lowered = step.lower(*arguments)
    kernels = attention_kernels(lowered.as_text())
    program = compile_within(lowered, None)  # this compiler gives up where it does not fit
    seconds, busy = time.monotonic() - start, time.process_time() - busy
    memory = program.memory_analysis()
    return Compiled(
        params=params,
        optimizer=optimizer,
        batch=batch,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        activations=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        seconds=seconds,
        processor_seconds=busy,
        program=program.as_text(),
        attention=kernels,
    )


def attention_kernels(module: str) -> tuple[str, ...]:
    """Mosaic kernels called by a lowered module, each once: 'name [rows, heads, slots, width]'.

    A device with one row has no axis for it.
    """
    calls = re.findall(r'@tpu_custom_call\(.*kernel_name = "([^"]+)".* : \((.*)\) -> ', module)
    found = []
    for name, operands in calls:
        # the first operands after the integer tables of the mask are the queries
        shapes = re.findall(r"tensor<((?:\d+x){3,4})b?f\d+>", operands)
        shape = shapes[0].rstrip("x").replace("x", ", ") if shapes else ""
        found.append(f"{name} [{shape}]")
    return tuple(dict.fromkeys(found))
