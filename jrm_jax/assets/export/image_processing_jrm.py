"""Pictures as this folder's training saw them; exported by jrm_jax for transformers 5.

    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)

(its image processor alone: `AutoImageProcessor`) resizes with Pillow though torchvision is there,
which would resize to other pixels. transformers' processors with videos need torchvision to load.
"""

import numpy as np
import PIL.Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

RANGES = {"I": (2.0**8, 2.0**16, 2.0**32), "F": (1.0, 2.0**8, 2.0**16, 2.0**32)}
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # by EXIF tag; what turns a picture upright


class JrmImageProcessor(Qwen2VLImageProcessorPil):
    def process_image(self, image, *args, **kwargs):
        if isinstance(image, PIL.Image.Image):
            image = to_rgb(image)
        return super().process_image(image, *args, **kwargs)


def to_rgb(image):
    """Upright by its EXIF tag, deep modes scaled to 8 bits, transparency laid on white."""
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(0x0112))
    except Exception:  # a broken tag of a good picture
        turn = None
    if turn is not None:
        image = image.transpose(turn)
    if image.mode[0] in "IF":
        values = np.asarray(image).astype(np.float32)
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        ranges, room = RANGES.get(image.mode, (2.0**16,)), 2.0 if image.mode == "F" else 1.0
        span = next((r for r in ranges if values.max(initial=0.0) <= r * room), ranges[-1])
        image = PIL.Image.fromarray(np.clip(values * (256.0 / span), 0, 255).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image)
    return image.convert("RGB")
