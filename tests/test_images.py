"""Pictures to patches: equal to transformers' image processor, and what is refused."""

import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image as Pillow

from jrm_jax.data import images
from jrm_jax.data.processor import Processor, load_processor, patchify, smart_resize
from jrm_jax.data.world.draw import encode_png
from jrm_jax.errors import UserError

QWEN2_5 = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 60000,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
QWEN3 = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "size": {"shortest_edge": 4096, "longest_edge": 65536},
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def write(folder, fields, name="preprocessor_config.json"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(fields))
    return folder


def picture(mode: str, width: int, height: int, seed: int = 0) -> Pillow.Image:
    """Smooth colours with noise, so that resampling matters."""
    rng = np.random.default_rng(seed)
    coarse = Pillow.fromarray(rng.integers(0, 256, (5, 4, 4), np.uint8), "RGBA")
    pixels = np.asarray(coarse.resize((width, height), Pillow.Resampling.BICUBIC)).astype(int)
    noisy = (pixels + rng.integers(-20, 20, pixels.shape)).clip(0, 255).astype(np.uint8)
    return Pillow.fromarray(noisy, "RGBA").convert(mode)


def encoded(image: Pillow.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)


def deep_picture(kind: str) -> Pillow.Image:
    """The same grey ramp in a mode of more than 8 bits."""
    if kind == "I;16":
        return Pillow.fromarray((RAMP * 65535).astype(np.uint16))
    if kind == "I":
        return Pillow.fromarray((RAMP * 65535).astype(np.int32))
    if kind == "I8":
        return Pillow.fromarray((RAMP * 255).astype(np.int32))
    return Pillow.fromarray((RAMP * {"F1": 1, "F255": 255}[kind]).astype(np.float32))


@pytest.mark.parametrize("kind", ["I;16", "I", "I8", "F1", "F255"])
def test_deep_modes_are_scaled_to_8_bits(kind):
    image = deep_picture(kind)
    assert images.is_deep(image.mode)
    files = [encoded(image, "TIFF")] + ([encoded(image)] if kind == "I;16" else [])
    for data in files:
        grey = images.decode(data)
        assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 0] == grey[..., 2]).all()
        assert np.abs(grey[..., 0] - RAMP * 255).max() <= 1.0


def test_deep_values_out_of_range_are_clipped():
    odd = np.array([[np.nan, -3.0, 0.5, 1.0, np.inf]], np.float32)
    assert images.eight_bits(odd, "F").tolist() == [[0, 0, 128, 255, 0]]
    beyond = np.array([[0.0, 0.5, 1.04]], np.float32)  # as resizing leaves it
    assert images.eight_bits(beyond, "F").tolist() == [[0, 128, 255]]
    dark = np.array([[0, 255, 256, 65535]], np.uint16)  # the file says 16 bits, however dark
    assert images.eight_bits(dark, "I;16").tolist() == [[0, 0, 1, 255]]


def test_16_bit_colour_keeps_its_upper_bytes(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (8, 9, 3))
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = (9).to_bytes(4, "big") + (8).to_bytes(4, "big") + b"\x10\x02\0\0\0"
    data = images._PNG + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw))
    np.testing.assert_array_equal(images.decode(data + chunk(b"IEND", b"")), values >> 8)


def test_a_broken_exif_tag_does_not_cost_the_picture():
    plain = picture("RGB", 64, 48)
    data = encoded(plain)
    broken = data[:33] + chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff\0") + data[33:]
    np.testing.assert_array_equal(images.decode(broken), np.asarray(plain))
    exif = Pillow.Exif()
    exif[0x0112] = 6
    jpeg = bytearray(encoded(plain, "JPEG", exif=exif))
    at = jpeg.index(b"Exif\0\0")
    jpeg[at + 6 : at + 14] = b"\xff" * 8
    assert images.decode(bytes(jpeg)).shape == (48, 64, 3)


@pytest.mark.parametrize("fields", [QWEN2_5, QWEN3], ids=["qwen2_5", "qwen3"])
@pytest.mark.parametrize(
    "mode, width, height",
    [
        ("RGB", 112, 84), ("RGB", 96, 96), ("RGB", 501, 333), ("RGB", 31, 20), ("RGBA", 150, 100),
        ("P", 77, 140), ("L", 200, 90), ("LA", 64, 65), ("1", 90, 60), ("CMYK", 64, 300),
    ],
)  # fmt: skip
def test_equal_to_transformers(tmp_path, fields, mode, width, height):
    from transformers import Qwen2VLImageProcessorPil

    folder = write(tmp_path / "model", fields)
    image = picture(mode, width, height)
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    theirs = Qwen2VLImageProcessorPil.from_pretrained(folder)
    opened = Pillow.open(io.BytesIO(data))
    raw = theirs(opened, do_rescale=False, do_normalize=False, return_tensors="np")
    ours = load_processor(folder)
    patches_nF, grid = ours.encode(data)
    assert (1, *grid) == tuple(raw["image_grid_thw"][0])
    assert ours.measure(data) == len(patches_nF) and patches_nF.dtype == np.uint8
    frames = raw["pixel_values"].reshape(len(patches_nF), 3, 2, -1)
    np.testing.assert_array_equal(frames[:, :, 0], frames[:, :, 1])
    np.testing.assert_array_equal(patches_nF.reshape(len(patches_nF), 3, -1), frames[:, :, 0])

    normal = theirs(opened, return_tensors="np")["pixel_values"].reshape(frames.shape)[:, :, 0]
    mine = patches_nF.reshape(normal.shape) / 255.0
    mine = (mine - np.reshape(ours.mean, (3, 1))) / np.reshape(ours.std, (3, 1))
    np.testing.assert_allclose(mine, normal, atol=1e-6)


def test_exif_orientation_as_transformers_loads_files(tmp_path):
    from transformers import Qwen2VLImageProcessorPil

    exif = Pillow.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees
    data = encoded(picture("RGB", 128, 64), "JPEG", exif=exif)
    (tmp_path / "turned.jpg").write_bytes(data)
    folder = write(tmp_path / "model", QWEN3)
    theirs = Qwen2VLImageProcessorPil.from_pretrained(folder)
    raw = theirs([str(tmp_path / "turned.jpg")], do_rescale=False, do_normalize=False)
    patches, grid = load_processor(folder).encode(data)
    assert grid == (8, 4)
    frames = np.asarray(raw["pixel_values"]).reshape(len(patches), 3, 2, -1)[:, :, 0]
    np.testing.assert_array_equal(patches.reshape(frames.shape), frames)
    assert load_processor(folder).measure(data) == 32


def test_smart_resize_equals_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    rng = np.random.default_rng(0)
    for _ in range(500):
        height, width = (int(np.exp(rng.uniform(0, 8))) for _ in range(2))
        if max(height, width) > 200 * min(height, width):
            continue
        factor = int(rng.choice([8, 28, 32]))
        bounds = (factor**2 * int(rng.integers(1, 9)), factor**2 * int(rng.integers(16, 999)))
        assert smart_resize(height, width, factor, *bounds) == theirs(
            height, width, factor, *bounds
        )


def test_patch_order():
    """Value of pixel (row, column, channel) found at its place; 2 x 1 blocks of 2 x 2 patches."""
    pixels = np.arange(12 * 6 * 3).reshape(12, 6, 3).astype(np.uint8)
    patches = patchify(pixels, 3, 2)
    assert patches.shape == (8, 27)
    for number, (row, column) in enumerate(
        [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    ):
        block = pixels[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        np.testing.assert_array_equal(patches[number], block.transpose(2, 0, 1).reshape(-1))


def test_nothing_is_resampled_when_the_size_fits(monkeypatch):
    processor = Processor(16, 2, 4096, 65536)
    pixels = np.asarray(picture("RGB", 96, 64))
    assert processor.resize(pixels) is pixels
    monkeypatch.setattr(images, "open_image", None)  # the plain path does without Pillow
    patches, grid = processor.encode(encode_png(pixels))
    assert grid == (4, 6)
    np.testing.assert_array_equal(patches, patchify(pixels, 16, 2))


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def test_plain_png_path_is_exact_or_not_taken():
    pixels = np.asarray(picture("RGB", 50, 40))
    plain = encode_png(pixels)
    np.testing.assert_array_equal(images._plain_png(plain), pixels)
    filtered = encoded(Pillow.fromarray(pixels))
    assert images._plain_png(filtered) is None
    np.testing.assert_array_equal(images.decode(filtered), pixels)
    end = len(plain) - 12
    transparent = plain[:33] + chunk(b"tRNS", bytes(6)) + plain[33:]
    flipped = bytearray(plain)
    flipped[60] ^= 1
    for odd in (transparent, plain[:end], plain[: end - 5], bytes(flipped), plain[:30], b""):
        assert images._plain_png(odd) is None
    split = plain[:33]
    body = plain[41 : end - 4]
    split += chunk(b"IDAT", body[:9]) + chunk(b"IDAT", body[9:]) + plain[end:]
    np.testing.assert_array_equal(images._plain_png(split), pixels)
    short = plain[:33] + chunk(b"IDAT", zlib.compress(bytes(100))) + plain[end:]
    assert images._plain_png(short) is None


def test_cap_override(tmp_path):
    folder = write(tmp_path / "model", QWEN3)
    data = encoded(picture("RGB", 640, 480))
    small = [encoded(picture("RGB", *size)) for size in ((20, 20), (40, 30), (64, 64), (50, 70))]
    for cap in (1, 2, 4, 5, 7, 40):
        processor = load_processor(folder, max_visual_tokens=cap)
        assert processor.min_pixels <= 4096 and processor.max_pixels == cap * 1024
        assert 0 < processor.measure(data) // 4 <= cap
        assert len(processor.encode(data)[0]) == processor.measure(data)
        assert all(processor.measure(data) // 4 <= cap for data in small)
    with pytest.raises(UserError, match="at least 1"):
        load_processor(folder, max_visual_tokens=0)


def test_settings_are_read_from_either_file(tmp_path):
    plain = load_processor(write(tmp_path / "a", QWEN3))
    nested = {"image_processor": QWEN3, "processor_class": "Qwen3VLProcessor"}
    assert load_processor(write(tmp_path / "b", nested, "processor_config.json")) == plain
    assert (plain.min_pixels, plain.max_pixels, plain.features) == (4096, 65536, 768)
    old = load_processor(write(tmp_path / "c", QWEN2_5))
    assert (old.min_pixels, old.max_pixels, old.patch) == (3136, 60000, 14)
    bare = load_processor(write(tmp_path / "d", {**QWEN3, "do_normalize": False}))
    assert bare.mean == (0, 0, 0) and bare.std == (1, 1, 1)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"do_rescale": False}, "do_rescale"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"resample": 2}, "resample"),
        ({"patch_size": "16"}, "patch_size"),
        ({"image_mean": 0.5}, "image_mean"),
        ({"image_mean": ["a", 0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.0, 0.5, 0.5]}, "image_std"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"size": 448}, "size"),
    ],
)
def test_unsupported_settings(tmp_path, change, words):
    with pytest.raises(UserError, match=f"preprocessor_config.json: field '{words}'"):
        load_processor(write(tmp_path / "model", {**QWEN3, **change}))


def test_missing_or_broken_settings(tmp_path):
    with pytest.raises(UserError, match="preprocessor_config.json not found"):
        load_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_processor(tmp_path)


def test_a_picture_with_two_sizes_is_refused_before_it_is_decoded(monkeypatch):
    """Room is made for the first header's, and Pillow reads the last one's."""
    data = encoded(picture("RGB", 300, 200))
    small = data[:8] + chunk(b"IHDR", (32).to_bytes(4, "big") * 2 + data[24:29]) + data[8:]
    assert images.image_size(small) == (32, 32)
    monkeypatch.setattr(images, "to_rgb", None)
    with pytest.raises(ValueError, match="two headers, of .32, 32. and of .300, 200. pixels"):
        images.decode(small)


def test_bad_pictures():
    processor = Processor(16, 2, 4096, 65536)
    whole = encoded(picture("RGB", 64, 64))
    bomb = bytearray(whole)
    bomb[16:24] = (50000).to_bytes(4, "big") * 2
    cases = [
        (whole[: len(whole) // 2], "not a readable image"),
        (b"GIF89a", "not a readable image"),
        (b"", "not a readable image"),
        (encoded(picture("RGB", 401, 2)), "at most 200 times"),
        (bytes(bomb), "50000 x 50000 pixels"),
    ]
    for data, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            processor.encode(data)
        assert "\n" not in str(error.value)
    for data, words in cases[1:4]:
        with pytest.raises(ValueError, match=words):
            processor.measure(data)
