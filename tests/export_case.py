"""A run of no steps for each family, its exports, and groups of pictures to score."""

import io
import json
import shutil

import jax
import numpy as np
import PIL.Image
from entry_point import EXAMPLE, make_small_backbone, make_small_hybrid
from safetensors.numpy import load_file, save_file
from shared_case import once, run_on_one_device

from configs import joint
from jrm_jax import export
from jrm_jax.data.world import scenes
from jrm_jax.model.backbone import init_backbone
from jrm_jax.model.config import load_config
from jrm_jax.model.weights import save_params
from jrm_jax.serving.groups import read_picture

FAMILIES = ("qwen3_vl", "qwen2_5_vl", "qwen3_5")
INSTRUCTIONS = ("Make the <|reward|> <think> red.", "Weiß & größer, bitte?", "Remove it.")


def make_folder(parent, family):
    """A Hugging Face folder with random weights: Qwen3-VL tied, Qwen2.5-VL flat and untied, Qwen3.5
    tied, two blocks of three layers."""
    if family == "qwen3_5":
        return give_head(make_small_hybrid(parent / family))
    small = parent / "qwen3_vl"
    if not small.exists():
        give_head(make_small_backbone(small))
        path = small / "config.json"  # tied, as the text part alone states
        config = json.loads(path.read_text())
        assert config.pop("tie_word_embeddings") and config["text_config"]["tie_word_embeddings"]
        path.write_text(json.dumps(config))
    if family == "qwen3_vl":
        return small
    folder = shutil.copytree(small, parent / family)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    flat = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
            "num_key_value_heads", "rms_norm_eps", "vocab_size", "bos_token_id",
            "eos_token_id", "max_position_embeddings", "hidden_act")  # fmt: skip
    config |= {name: text[name] for name in flat}
    config |= {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 1]},
        "vision_config": {
            "model_type": "qwen2_5_vl", "depth": 3, "hidden_size": 32, "intermediate_size": 48,
            "num_heads": 2, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "in_channels": 3, "out_hidden_size": 32, "window_size": 64, "hidden_act": "silu",
            "fullatt_block_indexes": [1],
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    parsed = load_config(folder)
    params = jax.jit(lambda key: init_backbone(key, parsed))(jax.random.key(5))
    save_params(folder, params, parsed, dtype="float32")
    return give_head(folder)


def give_head(folder):
    """A reward head, as if a run had trained it: a run of no steps that begins here can score."""
    path = folder / "model.safetensors"
    width = load_config(folder).text.hidden
    head = np.random.default_rng(3).normal(0, 3 / np.sqrt(width), (1, width))
    save_file({**load_file(path), "score.weight": head.astype(np.float32)}, path)
    return folder


def start(parent, folder, name, config=joint, steps=0):
    """The folder of a run; of no steps: its checkpoint 0 is what it starts from."""
    config = config.get_config()
    config.backbone.path, config.data.cache = str(folder), str(parent / "world")
    config.data.world.train = 8
    config.data.world.valid = config.data.world.test = config.data.world.hard = 0
    config.batch_size, config.total_steps, config.optimizer.warmup_steps = 8, steps, 0
    config.backbone.scan_unroll = 1
    config.lock()
    assert run_on_one_device(config, parent / name) == 0
    return parent / name


def family_run(family):
    """`start` of a family's `make_folder`, once for all test files."""

    def make(folder):
        start(folder, make_folder(folder, family), "run")

    return once(f"run-{family}", make) / "run"


def write(workdir, out, *options):
    export.main([f"--checkpoint={workdir}", f"--out={out}", *options])
    return out


def make_groups(count):
    """(instruction, source, 2 or 4 candidates): built-in pictures and real ones, of mixed sizes."""
    groups = []
    for index in range(count):
        # the same scenes in three sizes, mixed within the group
        drawn = [scenes.make_example("test", index, 5, pixels) for pixels in (128, 64, 96)]
        words, source = drawn[index % 2].prompt
        text = INSTRUCTIONS[index % 7] if index % 7 < len(INSTRUCTIONS) else words.text
        pictures = [drawn[i % 3].candidates[i].parts[0].data
                    for i in range(len(drawn[0].candidates) // 2 * 2)]  # fmt: skip
        groups.append((text, source.data, pictures))
    if EXAMPLE.exists():
        real = sorted((EXAMPLE / "images").rglob("*.*")) or sorted(EXAMPLE.rglob("*.png"))
        groups[0] = ("Make it snow.", str(real[0]), [str(path) for path in real[1:3]])
    noise = np.random.default_rng(0).integers(0, 256, (70, 190, 3), np.uint8)
    groups[1] = (groups[1][0], noise, [PIL.Image.fromarray(noise[::-1].copy()), noise[:, ::-1]])
    return groups


def picture(given):
    """A Pillow image of what a group holds."""
    return PIL.Image.open(io.BytesIO(read_picture(given))).convert("RGB")
