"""The encoder: sizes that it measures, dimensions that it picks, folders that it refuses."""

import dataclasses

import numpy as np
import pytest
from test_pipeline import (  # noqa: F401  some are fixtures
    VISION,
    encoder,
    example,
    folder,
    labels,
    picture,
    replace,
)
from test_template import ROWS

from jrm_jax.data.buckets import Bucket, make_buckets
from jrm_jax.data.pipeline import assemble_batch, make_encoder
from jrm_jax.data.schema import Candidate, PreferenceExample, Text
from jrm_jax.data.sizes import measure
from jrm_jax.errors import UserError
from jrm_jax.model.config import BackboneConfig


def test_dimensions_are_picked_by_name(encoder):
    group = example(1)
    one = replace(encoder, dimensions=("quality",)).encode_example(group)
    np.testing.assert_array_equal(one.preference, group.preference[..., 1:])
    np.testing.assert_array_equal(one.weight, group.weight[..., 1:])
    two = replace(encoder, dimensions=("beauty", "overall")).encode_example(group)
    assert not two.weight[..., 0].any() and (two.preference[..., 0] == 0.5).all()
    np.testing.assert_array_equal(two.weight[..., 1], group.weight[..., 0])


def text_only(seed):
    candidates = (Candidate((Text("yes"),), "fine"), Candidate((Text("no, never"),)))
    return PreferenceExample(f"t{seed}", (Text("Is it?"),), candidates, *labels(2, 2, 0),
                             ("overall", "quality"))  # fmt: skip


def several_images(seed):
    parts = (picture(32, 32, 1), Text("and"), picture(48, 32, 2))
    candidates = (Candidate(parts), Candidate((Text("none"),)))
    return PreferenceExample(f"s{seed}", (picture(40, 64, 3), Text("Mix them.")), candidates,
                             *labels(2, 2, 0), ("overall", "quality"))  # fmt: skip


@pytest.mark.parametrize("make", [example, text_only, several_images])
@pytest.mark.parametrize("language", [True, False])
def test_measured_sizes_fit_exactly(encoder, make, language):
    """A bucket of the measured sizes holds the example, and one slot less does not."""
    own = replace(encoder, language=language)
    sizes = measure([make(1)], own.sizes, own.key, name="x")
    (bucket,) = make_buckets([sizes], language=language, round_to=1)
    encoded = own.encode_example(make(1))
    batch = assemble_batch([encoded], bucket, own)
    assert batch["prompt_segments"].all() and batch["candidate_mask"].all()
    assert batch["candidate_segments"].any(axis=1).all()
    for field in dataclasses.fields(Bucket):
        size = getattr(bucket, field.name)
        if size == 0:
            continue
        less = size - 4 if field.name == "patches" else size - 1
        with pytest.raises(UserError, match=f"needs {size} {field.name} slots"):
            assemble_batch([encoded], dataclasses.replace(bucket, **{field.name: less}), own)


def test_make_encoder_checks_the_folder(folder, encoder):
    vision = VISION["qwen3_vl"]

    @dataclasses.dataclass
    class Vocabulary:
        vocab: int = ROWS

    good = BackboneConfig("qwen3_vl", vision, Vocabulary(), encoder.tokenizer.image_id, 0, 0)
    made = make_encoder(folder, good, max_visual_tokens=4, dimensions=["overall", "quality"])
    assert made.dimensions == ("overall", "quality")
    assert made.encode_example(example(1)).images[0][0].shape == (16, 192)
    with pytest.raises(UserError, match=r"<\|image_pad\|> is token"):
        make_encoder(folder, dataclasses.replace(good, image_token_id=1))
    other = dataclasses.replace(good, vision=dataclasses.replace(vision, patch=16))
    with pytest.raises(UserError, match="patches of 8"):
        make_encoder(folder, other)
