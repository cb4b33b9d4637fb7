"""The side to beat: `transformers`' own model in PyTorch on the same device, as trainers use it.

Float32 weights under bfloat16 autocast, fused AdamW, clipping; scaled dot-product attention, and
flash attention where its package is installed; with and without gradient checkpointing. Every
candidate is its own sequence with the prompt repeated. The sequences of `case` are equally long, so
nothing is padded and PyTorch may take its kernels for causal attention without a mask.
"""

from __future__ import annotations

import gc
import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from jrm_jax.benchmarks import torch_reference
from jrm_jax.benchmarks.accelerator import case, timing
from jrm_jax.model.config import BackboneConfig
from jrm_jax.planning.compiling import stand_in_encoder

Row = dict[str, Any]
GIB = 2**30


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def product(sizes: case.Sizes) -> Iterator[Row]:
    """As `ours.product`."""
    side, times = sizes.product, 20
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device()) for _ in range(2))
    b *= side**-0.5

    def run() -> None:
        x = a
        for _ in range(times):
            x = x @ b

    yield timing.rate(_finished(run), side, times)


def hf_config(backbone: BackboneConfig) -> Any:
    """The config of `transformers` for a Qwen3-VL architecture."""
    text, vision = backbone.text, backbone.vision
    rope = {
        "rope_type": "default", "rope_theta": text.rope_theta,
        "mrope_section": list(text.mrope_section), "mrope_interleaved": text.mrope_interleaved,
    }  # fmt: skip
    return transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": text.vocab, "hidden_size": text.hidden, "intermediate_size": text.mlp,
            "num_hidden_layers": text.layers, "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads, "head_dim": text.head_dim,
            "rms_norm_eps": text.eps, "rope_parameters": rope, "pad_token_id": None,
            "bos_token_id": None, "eos_token_id": None,
            "use_cache": False,
        },
        vision_config={
            "depth": vision.depth, "hidden_size": vision.hidden, "intermediate_size": vision.mlp,
            "num_heads": vision.heads, "in_channels": vision.channels, "patch_size": vision.patch,
            "spatial_merge_size": vision.merge, "temporal_patch_size": vision.temporal_patch,
            "out_hidden_size": vision.out_hidden,
            "num_position_embeddings": vision.num_positions,
            "deepstack_visual_indexes": list(vision.deepstack),
        },
        image_token_id=backbone.image_token_id,
        video_token_id=backbone.image_token_id + 1,
        vision_start_token_id=backbone.vision_start_id,
        vision_end_token_id=backbone.vision_end_id,
        tie_word_embeddings=text.tie_embeddings,
    )  # fmt: skip


def make_model(backbone: BackboneConfig, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """Random weights, made on the device."""
    with device():
        return transformers.AutoModelForImageTextToText.from_config(
            hf_config(backbone), dtype=dtype, attn_implementation=attention
        )


def attentions() -> list[str]:
    return ["sdpa"] + ["flash_attention_2"] * bool(importlib.util.find_spec("flash_attn"))


def to_device(inputs: dict) -> dict:
    def move(x: Any) -> Any:
        return [move(y) for y in x] if isinstance(x, list) else x.to(device())

    return {name: move(x) for name, x in inputs.items()}


def train(sizes: case.Sizes, tiny: bool, model: str) -> Iterator[Row]:
    """A row for each kind of attention with and without checkpointing."""
    backbone = case.architecture(model, tiny)
    config = case.make_config(model, sizes)
    encoder = stand_in_encoder(config, backbone)
    batch = case.make_batch(config, backbone, sizes)
    scale = encoder.processor.mean, encoder.processor.std
    inputs = to_device(torch_reference.unpack_sequences(batch, *scale))
    reward_id, pairs = encoder.tokenizer.reward_id, sizes.groups * math.comb(sizes.candidates, 2)
    for attention in attentions():
        for checkpointing in (False, True):
            row: Row = {"model": model, "trains": "everything", "attention": attention,
                        "remat": "checkpointing" if checkpointing else "none"}  # fmt: skip
            try:
                network = make_model(backbone, torch.float32, attention).train()
                if checkpointing:
                    network.gradient_checkpointing_enable(
                        gradient_checkpointing_kwargs={"use_reentrant": False}
                    )
                steps = _make_steps(network, config, inputs, batch, reward_id)
                row |= timing.spread(_finished(steps), sizes.rounds, timing.STEPS) | _memory()
                yield row | {"pairs_per_second": pairs / row["seconds"]}
            except torch.cuda.OutOfMemoryError as error:
                yield row | {"failed": f"does not fit: {' '.join(str(error).split())[:200]}"}
            network = steps = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


def _make_steps(
    network: Any, config: Any, inputs: dict, batch: dict, reward_id: int
) -> Callable[[], None]:
    """`timing.STEPS` of them."""
    hidden = network.config.text_config.hidden_size
    kernel = torch.nn.Parameter(hidden**-0.5 * torch.randn(hidden, 1, device=device()))
    weights = [*network.parameters(), kernel]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        weights, settings.learning_rate, (settings.b1, settings.b2), weight_decay=0.0,
        fused=torch.cuda.is_available(),
    )  # fmt: skip

    def step() -> None:
        with torch.autocast(device().type, torch.bfloat16):
            loss, _ = torch_reference.joint_loss(
                network, kernel, inputs, batch, config.loss.preference_weight,
                config.loss.language_weight, reward_id,
            )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.optimizer.clip_norm)
        optimizer.step()

    def steps() -> None:
        for _ in range(timing.STEPS):
            step()

    return steps


def score(sizes: case.Sizes, tiny: bool, model: str, candidates: int = 2) -> Iterator[Row]:
    """Without gradients, weights in bfloat16: edits (a candidate with its source) a second."""
    sizes = sizes.scored_with(candidates)
    backbone = case.architecture(model, tiny)
    config = case.make_config(model, sizes)
    encoder = stand_in_encoder(config, backbone)
    batch = case.make_batch(config, backbone, sizes, critique=False)
    scale = encoder.processor.mean, encoder.processor.std
    inputs = to_device(torch_reference.unpack_sequences(batch, *scale))
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    for attention in attentions():
        network = make_model(backbone, torch.bfloat16, attention).eval()
        kernel = torch.randn(backbone.text.hidden, 1, device=device(), dtype=torch.bfloat16)

        def run(network=network, kernel=kernel) -> None:
            with torch.no_grad():
                torch_reference.joint_loss(
                    network, kernel, inputs, batch, 1.0, 0.0, encoder.tokenizer.reward_id
                )

        times = timing.spread(_finished(run), sizes.rounds)
        row = {"model": model, "candidates": candidates, "attention": attention}
        row |= times | _memory()
        edits = sizes.scored * sizes.candidates
        yield row | {"edits_per_second": edits / row["seconds"]}


def losses(folder: Path, model: str) -> Iterator[Row]:
    """Both sides' first step from equal weights of a small backbone, in float32 and bfloat16."""
    from jrm_jax.benchmarks.accelerator import ours

    torch.manual_seed(0)
    network = make_model(case.architecture(model, tiny=True), torch.float32)
    network.save_pretrained(folder)
    known, run_ours = ours.losses(case.TINY, model, folder)
    encoder = stand_in_encoder(known.config, known.backbone)
    scale = encoder.processor.mean, encoder.processor.std
    inputs = to_device(torch_reference.unpack_sequences(known.batch, *scale))
    kernel = torch.nn.Parameter(torch.from_numpy(np.array(known.kernel)).to(device()))
    weights = [*network.parameters(), kernel]
    for dtype in ("float32", "bfloat16"):
        with torch.autocast(device().type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss, _ = torch_reference.joint_loss(
                network, kernel, inputs, known.batch, known.config.loss.preference_weight,
                known.config.loss.language_weight, encoder.tokenizer.reward_id,
            )  # fmt: skip
        network.zero_grad()
        kernel.grad = None
        loss.backward()
        norm = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        yield {
            "dtype": dtype,
            "jrm_jax": run_ours(dtype),
            "torch": {"loss": loss.item(), "grad_norm": norm.item()},
        }


def _finished(run: Callable[[], Any]) -> Callable[[], None]:
    """The same, done when it returns."""

    def finish() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return finish


def _memory() -> Row:
    if not torch.cuda.is_available():
        return {}
    return {"peak_gib": torch.cuda.max_memory_allocated() / GIB}
