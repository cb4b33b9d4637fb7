"""Tiny random models of all families for tests: build, re-save in other layouts, compare."""

import json
import shutil

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from jrm_jax.model.tensors import flatten

VOCAB = 72


def build(family: str, tied: bool):
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 1, 1])
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, vocab_size=VOCAB)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1)
    vision = dict(depth=5, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4)
    tokens = dict(image_token_id=60, video_token_id=61)
    tokens |= dict(vision_start_token_id=62, vision_end_token_id=63, tie_word_embeddings=tied)
    if family == "qwen2_5_vl":
        make_config = transformers.Qwen2_5_VLConfig
        make_model = transformers.Qwen2_5_VLForConditionalGeneration
        vision |= dict(fullatt_block_indexes=[2, 4], window_size=16)
    else:
        make_config = transformers.Qwen3VLConfig
        make_model = transformers.Qwen3VLForConditionalGeneration
        rope |= dict(mrope_interleaved=True)
        text |= dict(head_dim=8)
        vision |= dict(num_position_embeddings=16, deepstack_visual_indexes=[1, 3])
    if family == "qwen3_5":
        make_config = transformers.Qwen3_5Config
        make_model = transformers.Qwen3_5ForConditionalGeneration
        rope |= dict(partial_rotary_factor=0.5)
        kinds = [*["linear_attention"] * 2, "full_attention"]
        text |= dict(head_dim=16, num_hidden_layers=6, layer_types=2 * kinds)
        text |= dict(linear_num_key_heads=2, linear_key_head_dim=8, linear_conv_kernel_dim=4)
        text |= dict(linear_num_value_heads=4, linear_value_head_dim=6)
        vision |= dict(deepstack_visual_indexes=[])
    text |= dict(rope_parameters=rope)
    vision |= dict(out_hidden_size=32)
    torch.manual_seed(3)
    model = make_model(make_config(text_config=text, vision_config=vision, **tokens)).eval()
    with torch.no_grad():  # norms start at one and biases at zero: indistinguishable
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def numbers(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def check_params(params, model, family, tied, atol=0.0):
    """Compare by hand-written paths, independent of the table."""
    want = numbers(model)
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params).items()}

    def same(path, name, change=lambda x: x, row=None):
        got = leaves[path] if row is None else leaves[path][row]
        expected = change(want[name])
        assert got.shape == expected.shape, path
        np.testing.assert_allclose(got, expected, rtol=0, atol=atol, err_msg=path)

    def turned(x):
        return x.T

    text, vision = "model.language_model.", "model.visual."
    same("backbone/embed/embedding", text + "embed_tokens.weight")
    same("backbone/decoder/norm/scale", text + "norm.weight")
    qwen3 = family != "qwen2_5_vl"
    taps = 2 if family == "qwen3_vl" else 0

    def same_layer(layer, at, row, attention=True):
        name = f"{text}layers.{layer}."
        same(at + "norm1/scale", name + "input_layernorm.weight", row=row)
        same(at + "norm2/scale", name + "post_attention_layernorm.weight", row=row)
        for part in "qkvo" if attention else "":
            linear = name + f"self_attn.{part}_proj"
            same(at + f"attn/{part}/kernel", linear + ".weight", change=turned, row=row)
            if not qwen3 and part != "o":
                same(at + f"attn/{part}/bias", linear + ".bias", row=row)
            if qwen3 and part in "qk":
                norm = name + f"self_attn.{part}_norm.weight"
                same(at + f"attn/{part}_norm/scale", norm, row=row)
        for part in ("gate", "up", "down"):
            linear = name + f"mlp.{part}_proj.weight"
            same(at + f"mlp/{part}/kernel", linear, change=turned, row=row)

    def same_delta(layer, at, row):
        name = f"{text}layers.{layer}.linear_attn."
        linears = {"qkv": "in_proj_qkv", "z": "in_proj_z", "a": "in_proj_a", "b": "in_proj_b"}
        for part, linear in (linears | {"out": "out_proj"}).items():
            same(at + f"mixer/{part}/kernel", f"{name}{linear}.weight", change=turned, row=row)
        taps_first = lambda x: x[:, 0].T  # noqa: E731
        same(at + "mixer/conv", name + "conv1d.weight", change=taps_first, row=row)
        same(at + "mixer/norm/scale", name + "norm.weight", row=row)
        for part in ("A_log", "dt_bias"):
            same(at + f"mixer/{part}", name + part, row=row)

    if family == "qwen3_5":
        at = "backbone/decoder/blocks/"
        for row, layer in enumerate((0, 1, 3, 4)):
            same_layer(layer, at + "delta/", row, attention=False)
            same_delta(layer, at + "delta/", row)
        for row, layer in enumerate((2, 5)):
            same_layer(layer, at + "full/", row)
    else:
        for layer in range(3):
            stack, row = ("taps", layer) if layer < taps else ("layers", layer - taps)
            same_layer(layer, f"backbone/decoder/{stack}/", row)
    segments = [(0, 2), (2, 1), (3, 1), (4, 1)] if not qwen3 else [(0, 2), (2, 2), (4, 1)]
    if family == "qwen3_5":
        segments = [(0, 5)]
    for number, (first, length) in enumerate(segments):
        assert len(leaves[f"backbone/vision/blocks_{number}/norm1/scale"]) == length
        for row in range(length):
            at, name = f"backbone/vision/blocks_{number}/", f"{vision}blocks.{first + row}."
            for part in ("norm1", "norm2"):
                same(at + f"{part}/scale", name + f"{part}.weight", row=row)
                if qwen3:
                    same(at + f"{part}/bias", name + f"{part}.bias", row=row)
            linears = {"attn/qkv": "attn.qkv", "attn/proj": "attn.proj"}
            if qwen3:
                linears |= {"mlp/fc1": "mlp.linear_fc1", "mlp/fc2": "mlp.linear_fc2"}
            else:
                linears |= {f"mlp/{p}": f"mlp.{p}_proj" for p in ("gate", "up", "down")}
            for path, linear in linears.items():
                same(at + path + "/kernel", name + linear + ".weight", change=turned, row=row)
                same(at + path + "/bias", name + linear + ".bias", row=row)
    mergers = {"merger": "merger."}
    mergers |= {f"deepstack_{i}": f"deepstack_merger_list.{i}." for i in range(taps)}
    for path, name in mergers.items():
        at, name = f"backbone/vision/{path}/", vision + name
        first, second = ("linear_fc1", "linear_fc2") if qwen3 else ("mlp.0", "mlp.2")
        same(at + "norm/scale", name + ("norm.weight" if qwen3 else "ln_q.weight"))
        for linear, stem in (("fc1", first), ("fc2", second)):
            same(at + linear + "/kernel", name + stem + ".weight", change=turned)
            same(at + linear + "/bias", name + stem + ".bias")
        if qwen3:
            same(at + "norm/bias", name + "norm.bias")
    if qwen3:
        same("backbone/vision/position/embedding", vision + "pos_embed.weight")
        same("backbone/vision/patch_embed/bias", vision + "patch_embed.proj.bias")

    def frames(x):  # [d, c, t, p, p] -> [t, c*p*p, d]
        return np.stack([x[:, :, t].reshape(len(x), -1).T for t in range(2)])

    same("backbone/vision/patch_embed/kernel", vision + "patch_embed.proj.weight", change=frames)
    if tied:
        assert params["language_head"] == {}
    else:
        same("language_head/kernel", "lm_head.weight", change=turned)


def relayout(source, target, change, *, shards=1, config=None):
    """Copy a model folder with its tensors renamed or replaced by `change(name, tensor)`."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    if config is not None:
        (target / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        new = change(name, tensor)
        if new is not None:
            tensors[new[0]] = new[1].contiguous()
    if shards == 1:
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        return target
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    names = sorted(tensors)
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::shards]}, target / file)
    where = {name: files[i % shards] for i, name in enumerate(names)}
    index = {"metadata": {}, "weight_map": where}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def keep(name, tensor):
    return name, tensor


def native(name, tensor):
    if name.startswith("visual."):
        return f"model.{name}", tensor
    if name.startswith("model.") and not name.startswith(("model.language_model.", "model.visual")):
        return name.replace("model.", "model.language_model.", 1), tensor
    return name, tensor


def legacy(name, tensor):
    name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
    return name, tensor
