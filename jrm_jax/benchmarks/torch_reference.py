"""The same joint loss in plain PyTorch on `transformers`' own model: the side to beat.

Needs torch (requirements-test.txt). Every candidate is its own sequence, as in the PyTorch
trainers: the prompt and the source picture are encoded again for each one. The reward token stands
before the critique here too, so one forward pass serves both losses; nothing is made slower than
it need be.

Letters: B groups, K candidates, X = candidates present, S longest sequence, D hidden width.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

PAD, IMAGE_KIND = 0, 1


def load_model(folder: str | Path, reward_token_id: int, reward_embedding_D: np.ndarray):
    """Stock float32 model of `folder`, its spare row holding the reward token's embedding."""
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="sdpa"
    )
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[reward_token_id] = torch.from_numpy(np.array(reward_embedding_D))
    return model


def unpack_sequences(batch: dict[str, np.ndarray], mean: tuple, std: tuple) -> dict:
    """Turns a prompt-shared batch into padded, prompt-repeated PyTorch inputs.

    Returns input_ids, attention_mask, mm_token_type_ids [X,S]; pixel_values [patches, 2*F];
    image_grid_thw; reward_index [X]; critique (rows, positions, targets, weights); owner [X,2].
    """
    groups, candidates = batch["candidate_mask"].shape
    slots = batch["patches"].shape[2] // 4  # visual-token slots per picture, 2 x 2 patches each
    features = batch["patches"].shape[3]
    scale = (np.repeat(np.asarray(mean), features // 3), np.repeat(np.asarray(std), features // 3))
    rows, pixels, grids, rewards, owner, critique = [], [], [], [], [], []
    for b in range(groups):
        prompt = batch["prompt_segments"][b] == 1
        for k in range(candidates):
            if not batch["candidate_mask"][b, k]:
                continue
            own = batch["candidate_segments"][b, k] == 1
            tokens = np.concatenate(
                [batch["prompt_tokens"][b][prompt], batch["candidate_tokens"][b, k][own]]
            )
            visual = np.concatenate(
                [batch["prompt_visual"][b][prompt], batch["candidate_visual"][b, k][own]]
            )
            for image in dict.fromkeys(visual[visual >= 0] // slots):
                real = batch["patch_segments"][b, image] == 1
                patches = batch["patches"][b, image][real].astype(np.float32) / 255.0
                patches = (patches - scale[0]) / scale[1]
                # (channel, row, column) -> (channel, frame, row, column), both frames equal
                frames = patches.reshape(len(patches), 3, 1, -1).repeat(2, axis=2)
                pixels.append(frames.reshape(len(patches), -1))
                grids.append([1, *(batch["patch_positions"][b, image][real].max(0) + 1)])
            start = int(prompt.sum())
            rewards.append(start + int(batch["reward_index"][b, k]))
            kept = batch["critique_weights"][b, k] > 0
            critique += [
                (len(rows), start + position, target, weight)
                for position, target, weight in zip(
                    batch["critique_index"][b, k][kept],
                    batch["critique_targets"][b, k][kept],
                    batch["critique_weights"][b, k][kept],
                    strict=True,
                )
            ]
            owner.append((b, k))
            rows.append((tokens, visual >= 0))
    length = max(len(tokens) for tokens, _ in rows)
    ids = np.full((len(rows), length), PAD, np.int64)
    mask, kind = np.zeros_like(ids), np.zeros_like(ids)
    for row, (tokens, is_visual) in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        kind[row, : len(tokens)] = is_visual * IMAGE_KIND
    tensor = torch.from_numpy
    kinds = [torch.long, torch.long, torch.long, torch.float32]
    columns = list(zip(*critique, strict=True)) if critique else [(), (), (), ()]
    return {
        "input_ids": tensor(ids),
        "attention_mask": tensor(mask),
        "mm_token_type_ids": tensor(kind),
        "pixel_values": tensor(np.concatenate(pixels).astype(np.float32)),
        "image_grid_thw": torch.tensor(np.array(grids), dtype=torch.long),
        "reward_index": torch.tensor(rewards),
        "critique": [torch.tensor(c, dtype=d) for c, d in zip(columns, kinds, strict=True)],
        "owner": torch.tensor(owner),
    }


def joint_loss(model, reward_kernel_DR, inputs: dict, batch: dict, preference_weight: float,
               language_weight: float, reward_token_id: int):
    """Bradley-Terry over all labelled pairs plus cross-entropy on critique tokens."""
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    hidden_XSD = model.model(**{name: inputs[name] for name in names}).last_hidden_state
    device = hidden_XSD.device
    count = torch.arange(len(hidden_XSD), device=device)
    reward_XR = hidden_XSD[count, inputs["reward_index"]] @ reward_kernel_DR
    b, k = inputs["owner"].T
    reward_BKR = torch.zeros(*batch["candidate_mask"].shape, reward_XR.shape[1], device=device)
    reward_BKR = reward_BKR.index_put((b, k), reward_XR.float())
    gap = reward_BKR[:, :, None] - reward_BKR[:, None]
    preference = torch.from_numpy(batch["preference"]).to(device)
    weight = torch.from_numpy(batch["preference_weight"]).to(device)
    weight = torch.triu(weight.movedim(-1, 1), 1).movedim(1, -1)
    softplus = torch.nn.functional.softplus
    nll = preference * softplus(-gap) + (1 - preference) * softplus(gap)
    loss = preference_weight * (nll * weight).sum() / weight.sum().clamp(min=1e-9)
    if language_weight and len(inputs["critique"][0]):
        row, position, target, token_weight = inputs["critique"]
        logits = model.lm_head(hidden_XSD[row, position])
        logits[:, reward_token_id] = -torch.inf
        token_nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        loss = loss + language_weight * (token_nll * token_weight).sum() / token_weight.sum()
    return loss, reward_BKR
