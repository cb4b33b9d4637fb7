"""An export of a run whose positions are 1d: PyTorch numbers pictures like text, too."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from export_case import family_run, make_groups, picture

from jrm_jax import export
from jrm_jax.serving.reward_model import RewardModel
from jrm_jax.serving.trained import load_trained

MODES = ("mrope", "1d")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{position mode: an export of the same weights}"""
    parent, trained = tmp_path_factory.mktemp("positions"), load_trained(family_run("qwen3_vl"))
    for mode in MODES:
        encoder = dataclasses.replace(trained.encoder, positions=mode)
        card = trained.card | {"stamp": trained.card["stamp"] | {"positions": mode}}
        told = trained._replace(encoder=encoder, card=card)
        export.export(told, parent / mode, "float32", 10**9, check=False)
    return {mode: parent / mode for mode in MODES}


def load(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()


def rewards(loaded, batch):
    with torch.no_grad():
        return loaded(**batch).logits[:, 0].numpy()


def test_pytorch_reads_the_scores_of_the_positions_of_training(folders):
    groups = make_groups(2)
    ours = [s.reward_KR[:, 0] for s in RewardModel.load(folders["1d"]).score_batch(groups)]
    models, far = {mode: load(folders[mode]) for mode in MODES}, 0.0
    for (text, source, candidates), mine in zip(groups, ours, strict=True):
        requests = [([text, picture(source)], [picture(c)]) for c in candidates]
        batches = {mode: model.prepare(requests) for mode, model in models.items()}
        np.testing.assert_allclose(rewards(models["1d"], batches["1d"]), mine, rtol=0, atol=1e-4)
        # inputs of others, which say where pictures are: those of `AutoProcessor`
        given = rewards(models["1d"], batches["mrope"])
        np.testing.assert_allclose(given, mine, rtol=0, atol=1e-4)
        far = max(far, np.abs(rewards(models["mrope"], batches["mrope"]) - mine).max())
    assert far > 1e-2  # the positions matter


def test_config_and_card_say_the_positions(folders):
    configs = {mode: json.loads((folders[mode] / "config.json").read_text()) for mode in MODES}
    assert configs["1d"].pop("position_mode") == "1d" and configs["1d"] == configs["mrope"]
    said = {mode: (folders[mode] / "README.md").read_text() for mode in MODES}
    assert "numbered like text" in said["1d"] and "numbered like text" not in said["mrope"]
    assert "must pass `mm_token_type_ids`" in said["mrope"]
