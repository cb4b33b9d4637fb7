"""The iterator: the plan's batches, from any number of hosts, threads and worker processes."""

import dataclasses
import pickle

import numpy as np
import pytest
from test_pipeline import encoder, equal, example, folder, replace  # noqa: F401  fixtures

from jrm_jax.data.buckets import make_buckets
from jrm_jax.data.pipeline import (
    HostBatch,
    assemble_batch,
    make_iterator,
)
from jrm_jax.data.plan import EvalPlan, Plan, Source
from jrm_jax.data.schema import to_record
from jrm_jax.data.sizes import measure
from jrm_jax.data.template import render
from jrm_jax.errors import UserError


@pytest.fixture(scope="module")
def run(encoder):
    """(plan, data set of records, encoder): two buckets, 22 groups."""
    small = [example(s) for s in range(12)]
    large = [example(s, sizes=((32, 32),) * 5) for s in range(12, 22)]
    records = [to_record(e) for e in small + large]
    sizes = measure(records, encoder.sizes, encoder.key, name="train")
    buckets = make_buckets([sizes], language=True)
    assert len(buckets) == 2
    return Plan([Source(sizes)], buckets, 4, 0), records, encoder


def take(count, *args, **kwargs):
    with make_iterator(*args, **kwargs) as batches:
        return [next(batches) for _ in range(count)]


def test_iterator_follows_the_plan(run):
    plan, records, encoder = run
    got = take(8, plan, [records], encoder, start=3)
    for step, batch in enumerate(got, 3):
        bucket, ids = plan.batch(step)
        assert batch["example_index"].tolist() == ids.tolist()
        assert batch["candidate_tokens"].shape == (4, bucket.candidates, bucket.candidate)
        equal(batch, HostBatch(plan, (records,), encoder)(step))
    later = take(2, plan, [records], encoder, start=9)  # resumed: nothing but the step is needed
    equal(later[0], got[6])


def test_hosts_together_equal_one(run):
    plan, records, encoder = run
    whole = take(6, plan, [records], encoder)
    for hosts in (2, 4):
        parts = [
            take(6, plan, [records], encoder, process_index=h, process_count=hosts, threads=1)
            for h in range(hosts)
        ]
        for step in range(6):
            rows = [part[step] for part in parts]
            equal({k: np.concatenate([r[k] for r in rows]) for k in rows[0]}, whole[step])
    with pytest.raises(UserError, match="does not divide over 3 hosts"):
        make_iterator(plan, [records], encoder, process_count=3)


def test_worker_processes_change_nothing(run):
    plan, records, encoder = run
    alone = take(7, plan, [records], encoder, start=2)
    batches = make_iterator(plan, [records], encoder, start=2, workers=2)
    for batch in alone:
        equal(next(batches), batch)
    batches.close()
    batches.close()
    assert next(batches, None) is None


def test_eval_iterator_ends(run):
    plan, records, encoder = run
    plan = EvalPlan([Source(measure(records, encoder.sizes, encoder.key, name="v"))],
                     plan.buckets, 8)  # fmt: skip
    batches = list(make_iterator(plan, [records], encoder))
    assert len(batches) == len(plan) == 4
    ids = np.concatenate([b["example_index"] for b in batches])
    assert sorted(ids[ids >= 0]) == list(range(22)) and (ids < 0).sum() == 10


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named(run, workers):
    plan, records, encoder = run
    records = [dict(record) for record in records]
    broken = next(i for i in range(22) if i not in plan.batch(0)[1])
    step = next(s for s in range(99) if broken in plan.batch(s)[1])
    image = records[broken]["images"][0]
    records[broken]["images"] = [image[: len(image) // 2], *records[broken]["images"][1:]]
    words = rf"^example {broken} \(ex-{broken}\): not a readable image"
    batches = make_iterator(plan, [records], encoder, workers=workers)
    for _ in range(step):
        next(batches)
    with pytest.raises(UserError, match=words) as error:
        next(batches)
    assert "\n" not in str(error.value)
    assert next(batches, None) is None


def test_several_data_sets(run):
    plan, records, encoder = run
    first, second = records[:12], records[12:]
    sizes = [measure(part, encoder.sizes, encoder.key, name="x") for part in (first, second)]
    mixed = Plan([Source(sizes[0]), Source(sizes[1], 2)], plan.buckets, 4, 0)
    for step in range(mixed.steps_per_epoch):
        batch = HostBatch(mixed, (first, second), encoder)(step)
        single = HostBatch(mixed, (first, second), pickle.loads(pickle.dumps(encoder)))(step)
        equal(batch, single)
        for b, number in enumerate(batch["example_index"]):
            alone = assemble_batch(
                [encoder.encode_example(example(
                    int(number), *([((32, 32),) * 5] if number >= 12 else [])
                ))],
                mixed.batch(step)[0], encoder, [number],
            )  # fmt: skip
            equal({k: v[b : b + 1] for k, v in batch.items()}, alone)


def test_key_changes_with_what_sizes_depend_on(encoder):
    keys = {
        encoder.key,
        replace(encoder, template=dataclasses.replace(encoder.template, rubric="x")).key,
        replace(encoder, processor=dataclasses.replace(encoder.processor, max_pixels=512)).key,
    }
    assert len(keys) == 3
    assert replace(encoder, language=False).key == encoder.key  # both are measured at once


def test_whole_text_of_an_example(encoder):
    """What the batch holds, decoded, reads like the template."""
    group = example(1)
    head, bodies = encoder.template.split(group.prompt, [c.parts for c in group.candidates])
    assert render([*head, *bodies[0]]).endswith(
        "Make the circle blue 1.<|vision_start|><|image_pad|><|vision_end|>\nResult:"
        "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n<|reward|>"
    )
