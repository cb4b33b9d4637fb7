"""What an export is worth: PyTorch reads the same scores, tokens, pixels and critiques."""

import io
import json
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from export_case import FAMILIES, family_run, make_groups, picture, start, write
from safetensors.numpy import load_file

from jrm_jax import export
from jrm_jax.data.schema import Candidate, Image, Text
from jrm_jax.errors import UserError
from jrm_jax.optim import flatten
from jrm_jax.serving.groups import read_picture
from jrm_jax.serving.reward_model import RewardModel
from jrm_jax.serving.trained import load_trained

GROUPS = 32


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(parent, workdir, float32 folder, bfloat16 folder)"""
    parent = tmp_path_factory.mktemp(request.param)
    workdir = family_run(request.param)
    single = write(workdir, parent / "single", "--dtype=float32", "--max_shard_gb=0.0002")
    return parent, workdir, single, write(workdir, parent / "half")


@pytest.fixture(scope="module")
def model(case):
    return RewardModel.load(case[1])


@pytest.fixture(scope="module")
def scored(model):
    groups = make_groups(GROUPS)
    return groups, [scores.reward_KR[:, 0] for scores in model.score_batch(groups)]


def classifier(folder, **options):
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    return loaded.eval(), info


def torch_rewards(loaded, groups):
    with torch.no_grad():
        for text, source, candidates in groups:
            requests = [([text, picture(source)], [picture(c)]) for c in candidates]
            yield loaded(**loaded.prepare(requests)).logits[:, 0].float().numpy()


def test_pytorch_reads_the_same_scores(case, scored):
    groups, ours = scored
    loaded, _ = classifier(case[2], dtype=torch.float32)
    spread = np.std(np.concatenate(ours))
    assert spread > 0.3
    for mine, theirs in zip(ours, torch_rewards(loaded, groups), strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=0, atol=1e-4)
        gap = np.subtract.outer(mine, mine)
        assert not np.any((np.abs(gap) > 2e-4) & (np.subtract.outer(theirs, theirs) * gap <= 0))
    # one padded batch of requests of different lengths
    mixed = [([t, picture(s)], [picture(c[0])]) for t, s, c in groups[:6]]
    with torch.no_grad():
        batch = loaded.prepare(mixed)
        assert (batch["attention_mask"] == 0).any()
        theirs = loaded(**batch).logits[:, 0].numpy()
    np.testing.assert_allclose(theirs, [row[0] for row in ours[:6]], rtol=0, atol=1e-4)


def odd_pictures():
    """Pillow images of the kinds that converters forget."""
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 256, (96, 64, 3), np.uint8)
    file, exif = io.BytesIO(), PIL.Image.Exif()
    exif[0x0112] = 6  # lies on its side
    PIL.Image.fromarray(noise).save(file, "JPEG", exif=exif)
    ramp = np.linspace(0, 1, 96 * 64).reshape(96, 64)
    palette = PIL.Image.fromarray(noise).quantize(16)
    palette.info["transparency"] = 3
    alpha = PIL.Image.fromarray(np.dstack([noise, noise[..., :1]]))
    return {
        "turned": PIL.Image.open(file),
        "16 bits": PIL.Image.fromarray((ramp * 65535).astype(np.uint16)),
        "32 bits": PIL.Image.fromarray((ramp * 65535).astype(np.int32)),
        "float": PIL.Image.fromarray(ramp.astype(np.float32)),
        "palette": palette,
        "alpha": alpha,
        "grey and alpha": alpha.convert("LA"),
        "inks": PIL.Image.fromarray(noise).convert("CMYK"),
        "black and white": PIL.Image.fromarray(noise).convert("1"),
    }


def test_pictures_of_every_kind_score_as_in_jax(case, model):
    loaded, _ = classifier(case[2], dtype=torch.float32)
    given = odd_pictures()
    source = given["turned"]
    theirs = loaded.score_edits("Remove it.", source, list(given.values()))[:, 0].numpy()
    ours = model.score("Remove it.", source, list(odd_pictures().values()))
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
    assert np.ptp(ours) > 1e-2


@pytest.mark.parametrize("source, candidates", [
    ("my cat.png", ["picture"]),
    ("picture", ["a.jpg"]),
    ("picture", "a.jpg"),
    (b"bytes", ["picture"]),
])  # fmt: skip
def test_names_of_files_are_no_pictures(case, source, candidates):
    loaded, _ = classifier(case[2])
    picture = odd_pictures()["inks"]
    put = lambda given: picture if given == "picture" else given  # noqa: E731
    listed = candidates if isinstance(candidates, str) else [put(c) for c in candidates]
    with pytest.raises(TypeError, match="PIL.Image.open|give score_edits"):
        loaded.score_edits("A white cat.", put(source), listed)
    with pytest.raises(TypeError, match="a text here"):
        loaded.prepare([(["A white cat."], ["a.jpg"])])


def test_scores_are_not_rounded_to_bfloat16(case):
    loaded, _ = classifier(case[3], dtype=torch.bfloat16)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
    near = []
    for row in range(64):  # one row of pixels a little brighter: nearly equal
        other = pixels.copy()
        other[row] = np.minimum(other[row], 249) + 6
        near.append(PIL.Image.fromarray(other))
    scores = loaded.score_edits("Remove it.", near[0], near)[:, 0]
    assert loaded.dtype == torch.bfloat16 and scores.dtype == torch.float32
    assert len(set(scores.tolist())) > 60
    assert len(set(scores.bfloat16().tolist())) < 40  # what rounding would have left


def test_the_image_processor_is_pillows_or_none(case, model, scored):
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoImageProcessor.from_pretrained(case[2], trust_remote_code=False)
    processor = transformers.AutoImageProcessor.from_pretrained(case[2], trust_remote_code=True)
    assert processor.backend == "pil"
    loaded, _ = classifier(case[2])
    text, source, candidates = scored[0][4]
    pictures = [picture(source), picture(candidates[0])]
    wanted = loaded.prepare([([text, pictures[0]], [pictures[1]])])
    assert torch.equal(
        processor(images=pictures, return_tensors="pt")["pixel_values"], wanted["pixel_values"]
    )


@pytest.mark.skipif(
    not transformers.utils.is_torchvision_available(), reason="AutoProcessor needs torchvision"
)
def test_the_processor_of_serving_engines_makes_the_same_inputs(case, scored):
    processor = transformers.AutoProcessor.from_pretrained(case[2], trust_remote_code=True)
    loaded, _ = classifier(case[2])
    text, source, candidates = scored[0][4]
    pictures = [picture(source), picture(candidates[0])]
    wanted = loaded.prepare([([text, pictures[0]], [pictures[1]])])
    parts = [{"type": "text", "text": text}, {"type": "image"}, {"type": "image"}]
    rendered = processor.apply_chat_template([{"role": "user", "content": parts}])
    found = processor(text=[rendered], images=pictures, return_tensors="pt")
    for name in ("input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids"):
        assert torch.equal(found[name].to(wanted[name].dtype), wanted[name])


@pytest.mark.parametrize("change, low, high", [(1e-5, 0.0, 0.05), (0.05, 0.99, 1.0)])
def test_what_bfloat16_rounds_away_is_told(case, tmp_path, change, low, high):
    trained = load_trained(case[1])
    flat = flatten(trained.params["backbone"]["decoder"])
    kernel = next(leaf for path, leaf in flat.items() if path.endswith("attn/q/kernel"))
    params = jax.tree.map(lambda leaf: leaf * (1 + change) if leaf is kernel else leaf,
                          trained.params)  # fmt: skip
    found = export.export(trained._replace(params=params), tmp_path / "out", "bfloat16", 10**9)
    nonzero = int(np.count_nonzero(kernel))
    assert 0.9 * nonzero < found.trained <= nonzero and low <= found.kept / found.trained <= high
    assert found.pictures > 8 and 0 < found.difference < found.spread
    words = found.words("bfloat16")
    assert f"of the {found.trained:,} weights that training changed" in words
    assert words in (tmp_path / "out" / "README.md").read_text()


def test_a_run_whose_first_weights_are_gone_is_exported(case, tmp_path):
    """Where nothing is frozen they are needed for nothing but the count of changes."""
    trained, bare = load_trained(case[1]), tmp_path / "bare"
    shutil.copytree(trained.folder, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
    found = export.export(trained._replace(folder=bare), tmp_path / "out", "float32", 10**9)
    assert (found.trained, found.kept) == (0, 0) and found.difference < 1e-5
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_export_stays_where_there_is_no_memory_to_compare(case, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(export, "measure", full)
    assert export.export(load_trained(case[1]), tmp_path / "out", "float32", 10**9) is None
    assert "WARNING: the export was not compared" in capsys.readouterr().err
    assert "no memory for both" in (tmp_path / "out" / "README.md").read_text()


def test_a_bfloat16_folder_means_the_same_on_both_sides(case, scored):
    groups, ours = scored
    loaded, _ = classifier(case[3], dtype=torch.float32)
    found, hybrid = list(torch_rewards(loaded, groups[:8])), "qwen3_5" in str(case[0])
    again = [s.reward_KR[:, 0] for s in RewardModel.load(case[3]).score_batch(groups[:8])]
    for mine, theirs in zip(again, found, strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=0, atol=5e-4 if hybrid else 1e-4)
    if hybrid:
        return  # a random one's norms divide by next to nothing: rounding moved a score by 0.8
    spread = np.std(np.concatenate(ours))
    for mine, theirs in zip(ours[:8], found, strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=0, atol=0.05 * spread)


def test_both_classes_load_strictly(case):
    tied = "qwen2_5_vl" not in str(case[0])
    _, info = classifier(case[2])
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    assert set(info["unexpected_keys"]) == (set() if tied else {"lm_head.weight"})
    _, info = transformers.AutoModelForImageTextToText.from_pretrained(
        case[2], output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    assert set(info["unexpected_keys"]) == {"score.weight"}
    assert len(list(case[2].glob("*.safetensors"))) > 1  # sharded, as asked
    config = json.loads((case[2] / "config.json").read_text())
    assert config["num_labels"] == 1 and config["problem_type"] == "regression"


def test_stock_transformers_scores_a_qwen3_5_folder(case, scored):
    """No remote code: the class of transformers itself takes the inputs that ours prepares."""
    if "qwen3_5" not in str(case[0]):
        pytest.skip("transformers has no such class of its own")
    stock, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        case[2], trust_remote_code=False, output_loading_info=True
    )
    assert type(stock) is transformers.Qwen3_5ForSequenceClassification
    assert not any(info[name] for name in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    loaded, _ = classifier(case[2])
    for (text, source, candidates), ours in list(zip(*scored, strict=True))[:4]:
        batch = loaded.prepare([([text, picture(source)], [picture(c)]) for c in candidates])
        with torch.no_grad():
            theirs = stock.eval()(**batch).logits[:, 0].numpy()
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)


def test_preprocessing_is_that_of_training(case, model, scored):
    loaded, _ = classifier(case[2])
    encoder = model.encoder
    tokenizer = transformers.AutoTokenizer.from_pretrained(case[2])
    for text, source, candidates in scored[0][:10]:
        parts = [Text(text), Image(read_picture(source))]
        answers = [Candidate((Image(read_picture(c)),)) for c in candidates]
        group = encoder.encode_group(parts, answers)
        for k, given in enumerate(candidates):
            batch = loaded.prepare([([text, picture(source)], [picture(given)])])
            wanted = group.prompt.tokens + group.candidates[k].tokens
            assert batch["input_ids"][0].tolist() == wanted
            mean, std = (np.asarray(x).reshape(3, 1, 1) for x in
                         (encoder.processor.mean, encoder.processor.std))  # fmt: skip
            pixels = np.concatenate([group.images[0][0], group.images[1 + k][0]])
            side = encoder.processor.patch
            wanted_pixels = (pixels.reshape(-1, 3, side, side) / 255 - mean) / std
            found = batch["pixel_values"].float().numpy().reshape(-1, 3, 2, side, side)
            for frame in range(2):
                np.testing.assert_allclose(found[:, :, frame], wanted_pixels, rtol=0, atol=1e-6)
            if "<|" in text:
                continue  # a chat template cannot tell text from special tokens
            for messages in (
                [{"role": "user", "content": [
                    {"type": "text", "text": text}, {"type": "image"}, {"type": "image"}]}],
                [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "image"}]},
                 {"role": "candidate", "content": [{"type": "image"}]}],
            ):  # fmt: skip
                rendered = tokenizer.apply_chat_template(messages, tokenize=False)
                assert rendered.endswith("<|reward|>")
                ids = tokenizer(rendered, add_special_tokens=False).input_ids
                counts = iter([len(group.images[0][0]) // 4, len(group.images[1 + k][0]) // 4])
                whole = [[i] * (next(counts) if i == encoder.tokenizer.image_id else 1)
                         for i in ids]  # fmt: skip
                assert sum(whole, []) == wanted


def test_critiques_equal_those_of_pytorch(case, model, scored):
    loaded, _ = classifier(case[2])
    speaker = transformers.AutoModelForImageTextToText.from_pretrained(case[2]).eval()
    for text, source, candidates in scored[0][:3]:
        ours = model.critique_tokens(text, source, candidates, max_tokens=64)
        for mine, given in zip(ours, candidates, strict=True):
            batch = loaded.prepare([([text, picture(source)], [picture(given)])])
            with torch.no_grad():
                found = speaker.generate(**batch, max_new_tokens=64)
            theirs = found[0, batch["input_ids"].shape[1] :].tolist()
            end = model.encoder.tokenizer.end_id
            assert mine == (theirs[: theirs.index(end)] if end in theirs else theirs)
            assert model.encoder.tokenizer.reward_id not in mine


def test_sampled_critiques_follow_the_seed(model, scored):
    text, source, candidates = scored[0][2]
    kinds = [
        model.critique(text, source, candidates, max_tokens=8, temperature=2.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert kinds[0] == kinds[1] != kinds[2]


def test_an_export_can_be_trained_and_exported_again(case):
    parent, workdir, single, half = case
    for folder, dtype in ((single, "float32"), (half, "bfloat16")):
        again = start(parent, folder, f"again-{dtype}")
        out = write(again, parent / f"twice-{dtype}", f"--dtype={dtype}")
        wanted = {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in _raw(f).items()}
        found = {k: v for f in sorted(out.glob("*.safetensors")) for k, v in _raw(f).items()}
        assert list(sorted(found)) == list(sorted(wanted)) and len(found) > 30
        assert all(found[name] == wanted[name] for name in wanted)
    headless = parent / "headless"
    headless.mkdir()
    for path in half.iterdir():
        if path.suffix != ".safetensors":
            (headless / path.name).write_bytes(path.read_bytes())
    tensors = transformers.AutoModelForImageTextToText.from_pretrained(half).state_dict()
    from safetensors.torch import save_file

    names = _names(half / "model.safetensors")
    save_file({k: v.contiguous().clone() for k, v in tensors.items() if k in names},
              headless / "model.safetensors")  # fmt: skip
    assert start(parent, headless, "headless-run").is_dir()
    with pytest.raises(UserError, match="no score.weight"):
        load_trained(headless)


def _raw(path):
    """{name: (dtype, bytes)}"""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    body = data[8 + size :]
    return {k: (v["dtype"], v["shape"], body[slice(*v["data_offsets"])]) for k, v in header.items()}


def _names(path):
    return set(_raw(path)) - {"score.weight"}


def test_an_exported_folder_scores_as_its_run_does(case, scored):
    groups, ours = scored
    again = RewardModel.load(case[2])
    for mine, scores in zip(ours[:8], again.score_batch(groups[:8]), strict=True):
        np.testing.assert_allclose(scores.reward_KR[:, 0], mine, rtol=0, atol=1e-5)
    kernel = load_trained(case[1]).params["reward_head"]["kernel"]
    stored = {k: v for f in case[2].glob("*.safetensors") for k, v in load_file(f).items()}
    np.testing.assert_array_equal(stored["score.weight"], np.asarray(kernel).T)


def test_pictures_without_token_types_are_refused(case, scored):
    text, source, candidates = scored[0][2]
    loaded, _ = classifier(case[2])
    batch = loaded.prepare([([text, picture(source)], [picture(candidates[0])])])
    del batch["mm_token_type_ids"]
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        loaded(**batch)


def test_an_interrupted_export_leaves_nothing(case, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(export.shutil, "copy", fail)
    with pytest.raises(SystemExit, match="No space left"):
        write(case[1], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, words", [
    (["--checkpoint=/nowhere"], "is no folder"),
    (["--step=7"], "no step 7; there are"),
    (["--out={out}"], "exists: give another"),
])  # fmt: skip
def test_what_cannot_be_exported_is_one_line(case, tmp_path, options, words):
    arguments = [f"--checkpoint={case[1]}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit, match=words) as raised:
        export.main(arguments + [option.format(out=case[2]) for option in options])
    assert "\n" not in str(raised.value)
