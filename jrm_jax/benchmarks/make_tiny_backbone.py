r"""Make the tiny Qwen3-VL backbone's folder: config, tokenizer, image processor, weights.

The packaged folder, jrm_jax/assets/tiny_qwen3_vl, was made by these commands (seed 0), the last two
for each STAGE of describe, describe_lookups, describe_comparisons and describe_changes:

    python -m jrm_jax.benchmarks.make_tiny_backbone --out=FOLDER --no-weights
    python -m jrm_jax.main --config=configs/generative.py:STAGE --config.backbone.path=FOLDER
    python -m jrm_jax.benchmarks.make_tiny_backbone --out=FOLDER --run=runs/generative-STAGE

That is jrm_jax/assets/study_qwen3_vl, from which the study's runs start. Then the last stage three
times more, each followed by the third command with its RUN:

    python -m jrm_jax.main --config=configs/generative.py:describe_changes --config.seed=1 \
        --config.data.world.seed=1 --config.backbone.path=FOLDER --workdir=RUN
    (stopped with Ctrl-C after step 1,050 of 3,200; the best step was 1,000)
    python -m jrm_jax.main --config=configs/generative.py:describe_changes --config.seed=2 \
        --config.data.world.seed=2 --config.data.world.train=16000 --config.total_steps=1000 \
        --config.optimizer.learning_rate=1e-3 --config.backbone.path=FOLDER --workdir=RUN
    python -m jrm_jax.main --config=configs/generative.py:describe_changes --config.seed=3 \
        --config.data.world.seed=3 --config.data.world.train=32000 --config.total_steps=2000 \
        --config.eval_interval=500 --config.save_interval=250 \
        --config.optimizer.learning_rate=1e-3 --config.backbone.path=FOLDER --workdir=RUN

The folder has the layout of a Qwen3-VL folder on the Hugging Face hub. The tokenizer is a
byte-level BPE trained on the words of the built-in world, so that each of its words is one token
while any other text still encodes. The stages pretrain on descriptions of pictures, on single
things in them, and on pairs of them; --run writes the weights of a run's best step into the folder.
Without --no-weights or --run the weights are random. With --interval=N the folder is one of
Qwen3.5: every N-th layer is attention, the others are Gated DeltaNets.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from jrm_jax.data.template import import_transformers
from jrm_jax.data.world import describe, scenes
from jrm_jax.data.world import text as world_text
from jrm_jax.shell.arguments import Parser

# Qwen's split of text into pieces, before any merge.
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
THINKING_TOKENS = ("<think>", "</think>")  # of Qwen3.5; words, not special ones
SPARE_ROWS = 16  # at least this many vocabulary rows stay unused, as in the real models
# Chat roles, the rubric's words and what usually surrounds them, as they stand at a line's start
# and inside a line; each becomes one token like the words of the world.
TEMPLATE_WORDS = """
system user assistant You judge rate image images edit edits edited picture pictures source
original result candidate instruction Instruction Source Edited Result Candidate Image Picture
Original Score Judge Rate How how well does do is are it its was were the The a an of in on to for
by with and or not from between each one that this what What asked follows follow following
preserves preserve preservation preserved rest overall quality score scores critique Critique Then
write Write say Say describe Describe as good bad better best kept unchanged
""".split()

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}
{{- message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' or 'image' in part %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' or 'video' in part %}
{{- '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif 'text' in part %}
{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def world_corpus(count: int, seed: int):
    """The world's text: instruction, critiques and descriptions of `count` training groups."""
    for index in range(count):
        group = scenes.make_group("train", index, seed)
        yield group.instruction
        yield from scenes.group_critiques(group)
        # 'changes' has no word that the others have not; with it the rows would be numbered anew
        for kind in ("descriptions", "lookups", "comparisons"):
            example = describe.make_description(index, seed, kind)
            yield example.prompt[0].text
            yield from (candidate.critique for candidate in example.candidates)
    yield from describe.WHOLE
    yield world_text.template_words()
    yield " ".join(("", *world_text.NUMBERS))


def train_tokenizer(count: int, seed: int):
    """A `tokenizers.Tokenizer`: NFC, Qwen's pieces, byte-level BPE with all 256 byte tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: merging stops when every piece of the corpus is whole
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    roles = ["system\n", "user\n", "assistant\n", ":\n", ".\n", "\n\n", "?\n"]
    words = [w for word in TEMPLATE_WORDS for w in (word, " " + word)]
    tokenizer.train_from_iterator([*world_corpus(count, seed), *roles, *words], trainer)
    return tokenizer


def save_tokenizer(
    folder: pathlib.Path, count: int, seed: int, thinking: bool = False
) -> dict[str, int]:
    """Train and save; returns the ids of the special tokens and 'rows', the vocabulary rows."""
    from tokenizers import AddedToken

    base = train_tokenizer(count, seed)
    base.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    if thinking:
        base.add_tokens([AddedToken(t, special=False, normalized=False) for t in THINKING_TOKENS])
    wrapped = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=base,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t != "<|endoftext|>"],
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    ids = {token: base.token_to_id(token) for token in SPECIAL_TOKENS}
    return ids | {"rows": -(-(len(wrapped) + SPARE_ROWS) // 64) * 64}


def _sections(frequencies: int) -> list[int]:
    """Rotary frequencies, shared out to time, rows and columns."""
    side = frequencies * 5 // 16
    return [frequencies - 2 * side, side, side]


def backbone_config(args: argparse.Namespace, ids: dict[str, int]) -> dict:
    """config.json as Qwen3-VL folders on the hub write it."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "dtype": "float32",
            "head_dim": args.head_dim,
            "hidden_act": "silu",
            "hidden_size": args.hidden,
            "initializer_range": 0.02,
            "intermediate_size": args.mlp,
            "max_position_embeddings": 8192,
            "num_attention_heads": args.heads,
            "num_hidden_layers": args.layers,
            "num_key_value_heads": args.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": _sections(args.head_dim // 2),
                "rope_type": "default",
            },
            "rope_theta": args.rope_theta,
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": ids["rows"],
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "deepstack_visual_indexes": args.deepstack,
            "depth": args.vision_depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": args.vision_hidden,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": args.vision_mlp,
            "num_heads": args.vision_heads,
            "num_position_embeddings": args.positions,
            "out_hidden_size": args.hidden,
            "patch_size": args.patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def hybrid_config(args: argparse.Namespace, config: dict) -> dict:
    """`backbone_config` as Qwen3.5 folders on the hub write it; half of a head turns."""
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    rope = text.pop("rope_scaling") | {
        "rope_theta": text.pop("rope_theta"),
        "partial_rotary_factor": 0.5,
        "mrope_section": _sections(args.head_dim // 4),
    }
    kinds = ["linear_attention"] * (args.interval - 1) + ["full_attention"]
    text |= {
        "model_type": "qwen3_5_text",
        "attn_output_gate": True,
        "full_attention_interval": args.interval,
        "layer_types": kinds * (args.layers // args.interval),
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": args.head_dim,
        "linear_num_key_heads": args.kv_heads,
        "linear_num_value_heads": 2 * args.kv_heads,
        "linear_value_head_dim": args.head_dim,
        "rope_parameters": rope,
    }
    vision |= {"model_type": "qwen3_5", "deepstack_visual_indexes": []}
    return config | {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": text,
        "vision_config": vision,
    }


def processor_config(args: argparse.Namespace) -> dict:
    """preprocessor_config.json; `size` counts pixels: 96 x 96 stays, larger pictures shrink."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_size": 2,
        "patch_size": args.patch,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": args.max_pixels, "shortest_edge": args.min_pixels},
        "temporal_patch_size": 2,
    }


def save_random_weights(folder: pathlib.Path, seed: int) -> int:
    """Random weights by transformers' initialisation rules; returns the number of parameters."""
    import jax

    from jrm_jax.model.backbone import init_backbone
    from jrm_jax.model.config import load_config
    from jrm_jax.model.weights import save_params

    config = load_config(folder)
    params = jax.jit(lambda key: init_backbone(key, config))(jax.random.key(seed))
    save_params(folder, params, config, max_shard_bytes=1 << 30, dtype="float32")
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def save_run_weights(folder: pathlib.Path, run: pathlib.Path) -> int:
    """The backbone of a pretraining run's best step; returns the step."""
    import jax

    from jrm_jax.checkpoint import read_checkpoint
    from jrm_jax.model.config import load_config
    from jrm_jax.model.weights import abstract_params, save_params
    from jrm_jax.run.workdir import CHECKPOINTS

    config = load_config(folder)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    width = config.text.hidden
    tree = {
        **abstract_params(config),
        "reward_head": {"kernel": jax.ShapeDtypeStruct((width, 1), "float32")},
        "reward_embedding": jax.ShapeDtypeStruct((width,), "float32"),
    }
    tree = {name: leaf for name, leaf in tree.items() if leaf != {}}
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)
    step, params, _ = read_checkpoint(run / CHECKPOINTS, tree)
    backbone = {"backbone": params["backbone"], "language_head": params.get("language_head", {})}
    fresh = folder / "fresh"  # weights that are there already stay until these are whole
    save_params(fresh, backbone, config, max_shard_bytes=1 << 30, dtype="float32")
    (fresh / "model.safetensors").replace(folder / "model.safetensors")
    fresh.rmdir()
    return step


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the text and of the weights")
    parser.add_argument(
        "--corpus", type=int, default=1500, help="training groups whose text it reads"
    )
    parser.add_argument("--no-weights", action="store_true", help="config and tokenizer only")
    parser.add_argument("--run", type=pathlib.Path, help="pretraining run whose weights to write")
    for name, size in (
        ("hidden", 128), ("layers", 6), ("heads", 4), ("kv-heads", 4), ("head-dim", 32),
        ("mlp", 256), ("vision-hidden", 96), ("vision-depth", 2), ("vision-heads", 4),
        ("vision-mlp", 256), ("patch", 16), ("positions", 36),
        ("min-pixels", 64 * 64), ("max-pixels", 128 * 128),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--rope-theta", type=float, default=10000.0)
    parser.add_argument("--deepstack", type=int, nargs="*", default=[0])
    parser.add_argument("--interval", type=int, default=0, help="of attention; 0: every layer")
    args = parser.parse_args(argv)
    if args.interval and args.layers % args.interval:
        parser.error(f"--interval={args.interval} must divide --layers={args.layers}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.run:
        print(f"{args.out}: weights of step {save_run_weights(args.out, args.run)} of {args.run}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    ids = save_tokenizer(args.out, args.corpus, args.seed, bool(args.interval))
    config = backbone_config(args, ids)
    files = {
        "config.json": hybrid_config(args, config) if args.interval else config,
        "preprocessor_config.json": processor_config(args),
    }
    for name, content in files.items():
        (args.out / name).write_text(json.dumps(content, indent=2) + "\n")
    print(f"{args.out}: {ids['rows']} vocabulary rows")
    if not args.no_weights:
        print(f"{save_random_weights(args.out, args.seed):,} parameters")


if __name__ == "__main__":
    main()
