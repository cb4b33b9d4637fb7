"""The parity case of `test_parity.py`: one tiny model a family, in torch and here.

One case per family: a tiny random model, a prompt with one image and two candidates with one image
each, all of different sizes, with padding at the end of the prompt, the candidates and the images.
Torch runs the two sequences prompt + candidate unpacked, the backbone runs them packed.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jrm_jax.model.backbone import Backbone
from jrm_jax.model.config import load_config
from jrm_jax.model.layers import matmul
from jrm_jax.model.rope import image_tables, mrope_positions
from jrm_jax.model.weights import load_params

torch = pytest.importorskip("torch")

IMAGE, START, END, REWARD, PAD, VOCAB = 90, 91, 92, 95, 0, 96
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
# patch grids of the prompt's image and of the candidates'; windows of 4 x 4 patches are partial
GRIDS = ((6, 10), (10, 6), (4, 14))
PATCH, MERGE = 4, 2
PROMPT, CANDIDATE, PATCHES = 26, 30, 64  # slots, all with padding left over
# compiling takes most of the time of these tests, running none
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def torch_model(family: str):
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen3_5Config,
        Qwen3_5ForConditionalGeneration,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )

    qwen3 = family != "qwen2_5_vl"
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope | ({"mrope_interleaved": True} if qwen3 else {}),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {
        "depth": 4,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
    }
    if qwen3:
        text |= {"head_dim": 16}
        vision |= {"num_position_embeddings": 49, "deepstack_visual_indexes": [0, 2]}
        kinds = (Qwen3VLConfig, Qwen3VLForConditionalGeneration)
        if family == "qwen3_5":  # half of a head turns; two blocks of three layers
            text["head_dim"] = 32
            text["rope_parameters"]["partial_rotary_factor"] = 0.5
            text |= {
                "num_hidden_layers": 6,
                "layer_types": [*["linear_attention"] * 2, "full_attention"] * 2,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 32,
                "linear_value_head_dim": 40,
                "linear_conv_kernel_dim": 4,
            }
            vision["deepstack_visual_indexes"] = []
            kinds = (Qwen3_5Config, Qwen3_5ForConditionalGeneration)
    else:
        vision |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [1, 3]}
        kinds = (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration)
    config = kinds[0](
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=93,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=qwen3,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = kinds[1](config).eval()
    with torch.no_grad():  # spreads that make every norm, bias and attention weight matter
        for name, parameter in model.named_parameters():
            gain = 0.8 if family == "qwen3_5" else 1.2
            spread = 0.3 if parameter.ndim == 1 else gain * parameter[0].numel() ** -0.5
            noise = spread * torch.randn_like(parameter)
            # norms start at one, or at zero where they are zero-centred
            norm = "norm" in name and "weight" in name
            parameter.copy_(parameter + noise if norm else noise)
    return model


def make_sequences(family: str):
    """Token runs of the prompt and of two candidates: (image number or None, tokens)."""
    rng = np.random.default_rng(1)

    def text(length: int):
        return None, rng.integers(1, 90, length).tolist()

    def image(number: int):
        rows, columns = GRIDS[number]
        return number, [IMAGE] * (rows * columns // MERGE**2)

    start, end = (None, [START]), (None, [END])
    prompt = [text(2), start, image(0), end, text(3)]
    candidates = [
        [start, image(1), end, text(2), (None, [REWARD]), text(5)],
        [text(1), start, image(2), end, (None, [REWARD]), text(3)],
    ]
    return prompt, candidates


def pack_images(family: str, vision, pixels: list[np.ndarray], slots: int) -> dict:
    """The batch's image arrays of one group, in tower order, padded to `slots`."""
    images = []
    for patches, grid in zip(pixels, GRIDS, strict=True):
        tables = image_tables(grid, vision)
        ones = np.ones(len(patches), np.int32)
        image = {
            "patches": patches[tables.order],
            "patch_segments": ones,
            "patch_positions": tables.positions,
        }
        if family == "qwen2_5_vl":
            image["window_segments"] = tables.windows
        else:
            image["position_index"] = tables.position_index
            image["position_weight"] = tables.position_weight
        images.append(image)

    def pad(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, slots - len(x)),) + ((0, 0),) * (x.ndim - 1))

    return {key: np.stack([pad(image[key]) for image in images])[None] for key in images[0]}


def pack_part(runs, vision, start: int, slots: int, patches: int) -> tuple[dict, int]:
    """Arrays of a prompt or a candidate and the next position."""
    tokens, visual, shapes = [], [], []
    for number, run in runs:
        tokens += run
        if number is None:
            visual += [-1] * len(run)
            shapes.append(len(run))
        else:
            rows, columns = GRIDS[number]
            token_slots = image_tables(GRIDS[number], vision).token_slots
            visual += (number * (patches // MERGE**2) + token_slots).tolist()
            shapes.append((rows // MERGE, columns // MERGE))
    positions, start = mrope_positions(shapes, start)
    empty = slots - len(tokens)
    part = {
        "tokens": np.pad(tokens, (0, empty), constant_values=PAD),
        "visual": np.pad(visual, (0, empty), constant_values=-1),
        "segments": np.pad(np.ones(len(tokens), int), (0, empty)),
        "positions": np.pad(positions, ((0, 0), (0, empty))),
    }
    return {key: value.astype(np.int32) for key, value in part.items()}, start


def pack(case, prompt=PROMPT, candidate=CANDIDATE, patches=PATCHES, share=True):
    """The batch of one group; without `share` each candidate repeats the prompt and P is 0."""
    vision = case.config.vision
    prompt_runs, candidate_runs = case.runs
    head, start = pack_part(prompt_runs, vision, 0, prompt, patches)
    if not share:
        head = {key: value[..., :0] for key, value in head.items()}
        candidate_runs = [prompt_runs + runs for runs in candidate_runs]
        start, candidate = 0, prompt + candidate
    parts = [pack_part(runs, vision, start, candidate, patches)[0] for runs in candidate_runs]
    batch = {f"prompt_{key}": value[None] for key, value in head.items()}
    batch |= {f"candidate_{key}": np.stack([p[key] for p in parts])[None] for key in parts[0]}
    return batch | pack_images(case.family, vision, case.pixels, patches)


@functools.cache
def make_case(family: str, folder: str) -> SimpleNamespace:
    """Model, its parameters as loaded from its saved folder, and inputs of both sides."""
    model = torch_model(family)
    model.save_pretrained(folder)
    config = load_config(folder)
    rng = np.random.default_rng(2)
    features = 3 * PATCH**2
    pixels = [rng.normal(size=(h * w, features)).astype(np.float32) for h, w in GRIDS]
    params = load_params(folder, config)
    case = SimpleNamespace(
        family=family, model=model, config=config, folder=folder, pixels=pixels, params=params,
        runs=make_sequences(family), reward=params["backbone"]["embed"]["embedding"][REWARD],
    )  # fmt: skip
    lengths = [sum(len(tokens) for _, tokens in runs) for runs in [case.runs[0], *case.runs[1]]]
    case.prompt_length, case.lengths = lengths[0], lengths[1:]
    case.loss_weights = rng.normal(size=(2, sum(lengths), VOCAB)).astype(np.float32)
    return case


@pytest.fixture(params=FAMILIES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / request.param
    return make_case(request.param, str(folder))


def run_torch(case) -> SimpleNamespace:
    """Both sequences as one padded batch, with inner states and gradients of `loss_of`."""
    sequences = [case.runs[0] + runs for runs in case.runs[1]]
    ids = [sum((tokens for _, tokens in runs), []) for runs in sequences]
    longest = max(map(len, ids))
    input_ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    shape = (-1, 3, 1, PATCH**2)
    leaves = [torch.tensor(p, requires_grad=True) for p in case.pixels]
    frames = [leaf.reshape(shape).expand(-1, 3, 2, -1).reshape(len(leaf), -1) for leaf in leaves]
    numbers = [n for runs in sequences for n, _ in runs if n is not None]
    case.model.zero_grad()

    states = {"vision": [], "decoder": [], "visual": [], "deepstack": []}
    inner = case.model.model
    hooks = [
        block.register_forward_hook(lambda _, args, out: states["vision"].append(out))
        for block in inner.visual.blocks
    ]
    for layer in [*inner.language_model.layers, inner.language_model.norm]:

        def keep(_, args, kwargs):
            states["decoder"].append(args[0] if args else kwargs["hidden_states"])

        hooks.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
    for merger, name in [(inner.visual.merger, "visual")] + [
        (merger, "deepstack") for merger in getattr(inner.visual, "deepstack_merger_list", [])
    ]:
        hooks.append(
            merger.register_forward_hook(lambda _, args, out, n=name: states[n].append(out))
        )
    hooks.append(
        inner.language_model.norm.register_forward_hook(
            lambda _, args, out: states.update(hidden=out)
        )
    )
    logits = case.model(
        input_ids=input_ids,
        attention_mask=mask,
        pixel_values=torch.cat([frames[n] for n in numbers]),
        image_grid_thw=torch.tensor([(1, *GRIDS[n]) for n in numbers]),
        mm_token_type_ids=(input_ids == IMAGE).int(),
    ).logits
    for hook in hooks:
        hook.remove()
    start, loss = case.prompt_length, 0.0
    weights = torch.tensor(case.loss_weights)
    for row, length in enumerate(case.lengths):
        span = logits[row, start : start + length]
        loss = loss + (span * weights[row, start : start + length]).sum()
    loss = loss + (logits[0, :start] * weights[0, :start]).sum()
    loss.backward()
    return SimpleNamespace(
        states={
            k: [x.detach().numpy() for x in v] if isinstance(v, list) else v.detach().numpy()
            for k, v in states.items()
        },
        logits=logits.detach().numpy(),
        loss=loss.item(),
        pixel_grads=[leaf.grad.numpy() for leaf in leaves],
        numbers=numbers,
    )


def logits_of(case, params, hidden):
    head = params["language_head"]
    kernel = head["kernel"] if head else params["backbone"]["embed"]["embedding"].T
    return matmul(hidden, kernel)  # which knows that float32 means float32


def backbone_of(case, **fields) -> Backbone:
    return Backbone(case.config, **({"reward_token_id": REWARD, "attention": "xla"} | fields))


@functools.cache
def compiled(config):
    """One compilation per family and shape serves all tests that need values only."""
    backbone = Backbone(config, reward_token_id=REWARD, attention="xla")

    def states(params, batch, reward):
        inputs = {key: value for key, value in batch.items() if key != "patches"}
        call = (inputs, reward, batch["patches"])
        return backbone.apply({"params": params}, *call, method="intermediates")

    return jax.jit(states, compiler_options=QUICK)


def run_states(case, batch, params=None) -> dict[str, np.ndarray]:
    params = case.params if params is None else params
    states = compiled(case.config)(params["backbone"], batch, case.reward)
    return {key: np.asarray(value) for key, value in states.items()}


def run_hidden(case, batch, params=None) -> np.ndarray:
    return run_states(case, batch, params)["hidden"][0]


def relative(ours, theirs) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def sequence_slots(case, row: int) -> np.ndarray:
    """Packed slots of prompt + candidate `row`, padding left out."""
    own = PROMPT + row * CANDIDATE + np.arange(case.lengths[row])
    return np.concatenate([np.arange(case.prompt_length), own])
