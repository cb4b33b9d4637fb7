"""Reward model for image edits, exported by jrm_jax; loads in transformers 5 without jrm_jax.

    model = AutoModelForSequenceClassification.from_pretrained(FOLDER, trust_remote_code=True)
    scores = model.score_edits("Make the cat white.", source, [first, second])   # PIL images

`forward` takes what `prepare` makes: input_ids that end in the reward token, attention_mask,
mm_token_type_ids, pixel_values, image_grid_thw. The score is read from the last hidden state at the
last token that is not padding, by one bias-free linear, or by hidden layers where config.json names
some; larger is better, and only differences between candidates of one source and instruction carry
meaning. Where rewards are Gaussians, the outputs are their means, then their log-deviations.
Where config.json says `"position_mode": "1d"`, tokens of pictures are numbered like text, as in
training: `prepare` gives position_ids instead of mm_token_type_ids, `forward` obeys no others.
"""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLPreTrainedModel
from transformers.utils import cached_file

from .image_processing_jrm import JrmImageProcessor

try:
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5PreTrainedModel
except ImportError:  # an older transformers 5, which loads the other families
    Qwen3_5PreTrainedModel = None

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# Without this the names of Qwen2.5-VL's files match nothing, and its decoder stays random.
for _family in ("Qwen2_5_VL", "Qwen3VL", "Qwen3_5"):
    _mapping = get_checkpoint_conversion_mapping(f"{_family}ForConditionalGeneration")
    if _mapping is not None:
        register_checkpoint_conversion_mapping(
            f"{_family}ForSequenceClassification", _mapping, overwrite=True
        )


class _Score(torch.nn.Linear):
    """The reward head, in float32 whatever the model's dtype: bfloat16 would make ties."""

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden.float(), self.weight.float())


class _Layer(torch.nn.Linear):
    """The same with a bias."""

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())


class _Layers(torch.nn.Module):
    """A reward head with hidden layers."""

    def __init__(self, sizes, outputs):
        super().__init__()
        self.hidden = torch.nn.ModuleList(map(_Layer, sizes[:-1], sizes[1:]))
        self.out = _Layer(sizes[-1], outputs)

    def forward(self, hidden):
        for layer in self.hidden:
            hidden = torch.relu(layer(hidden))
        return self.out(hidden)


LOG_DEVIATION = 20.0  # as in training, log-deviations lie within this


class _RewardModel(GenericForSequenceClassification):
    _keep_in_fp32_modules_strict = ("score",)

    def __init__(self, config):
        super().__init__(config)
        head = getattr(config, "reward_head", None) or {}
        width, outputs = self.score.in_features, self.score.out_features
        self.is_gaussian = bool(head.get("deviation"))
        self.is_numbered = getattr(config, "position_mode", "mrope") == "1d"
        if head.get("hidden"):
            self.score = _Layers((width, *head["hidden"]), outputs)
        else:
            self.score = _Score(width, outputs, bias=False)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        *args,
        pixel_values=None,
        mm_token_type_ids=None,
        **kwargs,
    ):
        if self.is_numbered:
            mm_token_type_ids = None
            position_ids = None if input_ids is None else _numbers(input_ids)
        elif pixel_values is not None and mm_token_type_ids is None:
            raise ValueError(
                "pixel_values came without mm_token_type_ids (1 at image tokens, 0 elsewhere): "
                "positions would be those of plain text, and the score wrong"
            )
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            *args,
            pixel_values=pixel_values,
            mm_token_type_ids=mm_token_type_ids,
            **kwargs,
        )

    @torch.inference_mode()
    def score_edits(self, instruction, source, candidates, with_deviation=False):
        """float32 [candidates, dimensions]: a score for each candidate picture of one edit.

        source: a PIL image, a list of them, or None where the instruction stands alone.
        with_deviation: of a model whose rewards are Gaussians, return (scores, deviations).

        Raises TypeError for a picture that is not a PIL image (or an array), a file's name for one;
        ValueError for deviations of a model that has none.
        """
        if with_deviation and not self.is_gaussian:
            raise ValueError("this model's rewards are plain numbers: they have no deviation")
        sources = source if isinstance(source, (list, tuple)) else [source]
        sources = [picture for picture in sources if picture is not None]
        if isinstance(candidates, str) or not isinstance(instruction, str):
            raise TypeError("give score_edits(instruction, source, [candidate, ...])")
        for picture in (*sources, *candidates):
            if isinstance(picture, (str, bytes, Path)):
                raise TypeError(f"{picture!r:.80} is no picture: give PIL.Image.open(FILE)")
        prompt = [instruction, *sources]
        batch = self.prepare([(prompt, [candidate]) for candidate in candidates])
        logits = self(**batch, use_cache=False).logits.float()
        if not self.is_gaussian:
            return logits
        scores, log_deviations = logits.chunk(2, dim=-1)
        if not with_deviation:
            return scores
        return scores, log_deviations.clamp(-LOG_DEVIATION, LOG_DEVIATION).exp()

    def prepare(self, requests):
        """Model inputs, padded on the right, for [(prompt parts, candidate parts), ...].

        A part is a text or a PIL image. Text is text: special tokens in it are not obeyed.

        Raises TypeError for a text that looks like a picture's file name.
        """
        tokenizer, processor, stamp = self._tools()
        tokens, pictures = [], []
        for prompt, candidate in requests:
            ids, images = _encode(tokenizer, processor, stamp, prompt, candidate)
            tokens.append(ids)
            pictures += images
        length = max(map(len, tokens))
        padding = tokenizer.pad_token_id
        ids = torch.tensor([row + [padding] * (length - len(row)) for row in tokens])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in tokens])
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.is_numbered:
            batch["position_ids"] = _numbers(ids)
        if pictures:
            image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
            if not self.is_numbered:
                batch["mm_token_type_ids"] = (ids == image_id).int() * mask
            batch["pixel_values"] = torch.cat([p["pixel_values"] for p in pictures]).to(self.dtype)
            batch["image_grid_thw"] = torch.cat([p["image_grid_thw"] for p in pictures])
        return {name: value.to(self.device) for name, value in batch.items()}

    def _tools(self):
        if not hasattr(self, "_loaded_tools"):
            folder = self.config._name_or_path
            stamp = json.loads(Path(cached_file(folder, "jrm.json")).read_text())["stamp"]
            self._loaded_tools = (
                AutoTokenizer.from_pretrained(folder),
                JrmImageProcessor.from_pretrained(folder),
                stamp,
            )
        return self._loaded_tools


def _numbers(ids):
    """[rows, tokens]: 0, 1, 2, ... in every row; what one row's padding adds turns nothing."""
    return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)


def _encode(tokenizer, processor, stamp, prompt, candidate):
    """(token ids, processed pictures) of one request, by the template of the training."""
    special = tokenizer.convert_tokens_to_ids
    ids, pictures, text = [], [], ""

    def flush():
        nonlocal text
        if text:
            plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            ids.extend(plain.input_ids)
        text = ""

    def lay(parts, joined):
        nonlocal text
        for part in parts:
            if isinstance(part, str):
                if part.lower().endswith(SUFFIXES) and len(part.split()) == 1:
                    raise TypeError(f"{part!r} is a text here, no picture: PIL.Image.open it first")
                text += ("\n" if joined else "") + part
                joined = True
                continue
            flush()
            picture = processor(images=[part], return_tensors="pt")
            pictures.append(picture)
            count = int(picture["image_grid_thw"].prod()) // processor.merge_size**2
            ids.append(special("<|vision_start|>"))
            ids.extend([special("<|image_pad|>")] * count)
            ids.append(special("<|vision_end|>"))
            joined = False

    def end_turn():
        nonlocal text
        flush()
        ids.append(special("<|im_end|>"))
        text = "\n"
        flush()

    if stamp["rubric"]:
        ids.append(special("<|im_start|>"))
        text = f"system\n{stamp['rubric']}"
        end_turn()
    ids.append(special("<|im_start|>"))
    text = "user\n"
    lay(prompt, False)
    text += stamp["result"]
    lay(candidate, True)
    end_turn()
    ids.append(special("<|im_start|>"))
    text = "assistant\n"
    flush()
    if stamp.get("thinking"):
        for token in ("<think>", "</think>"):
            ids.append(special(token))
            text = "\n\n"
            flush()
    ids.append(stamp["reward_token_id"])
    return ids, pictures


class Qwen2_5_VLForSequenceClassification(_RewardModel, Qwen2_5_VLPreTrainedModel):
    pass


class Qwen3VLForSequenceClassification(_RewardModel, Qwen3VLPreTrainedModel):
    pass


if Qwen3_5PreTrainedModel is not None:

    class Qwen3_5ForSequenceClassification(_RewardModel, Qwen3_5PreTrainedModel):
        pass
