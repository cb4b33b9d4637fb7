"""Examples to batches: assembly into static shapes, and the iterator of a host.

A batch is a dict of NumPy arrays. Letters: B groups, K candidates, R reward dimensions, P prompt
slots, C slots of a candidate, T critique target slots of a candidate, I image rows of a group, N
patch slots of an image, V = N / merge^2 visual tokens of an image, F = 3 * patch^2. The sizes K, I,
N, P, C, T are those of the batch's bucket.

    prompt_tokens        [B,P]      int32    pad id in empty slots
    prompt_positions     [B,3,P]    int32    (time, height, width) of MRoPE; 0 in padding
    prompt_segments      [B,P]      int32    1 real, 0 padding (padding attends to padding)
    prompt_visual        [B,P]      int32    row among the group's I*V visual tokens, -1 = text
    candidate_tokens     [B,K,C]    int32    candidate parts, <|reward|>, then the critique
    candidate_positions  [B,K,3,C]  int32    continue after the prompt's last position
    candidate_segments   [B,K,C]    int32    1 real, 0 padding; an absent candidate is all 0
    candidate_visual     [B,K,C]    int32    as prompt_visual
    reward_index         [B,K]      int32    slot of <|reward|> in C; 0 where absent
    candidate_mask       [B,K]      float32  1 = candidate present
    patches              [B,I,N,F]  uint8    0..255, features (channel, row, column), tower order
    patch_segments       [B,I,N]    int32    1 real, 0 padding
    patch_positions      [B,I,N,2]  int32    (row, column) in the patch grid
    window_segments      [B,I,N]    int32    Qwen2.5-VL only: 1 + window, 0 padding
    position_index       [B,I,N,4]  int32    Qwen3 towers only: taps in the learned position table
    position_weight      [B,I,N,4]  float32  Qwen3 towers only: their weights
    critique_index       [B,K,T]    int32    slot in C that predicts the target; first: reward_index
    critique_targets     [B,K,T]    int32    the critique's tokens and <|im_end|>
    critique_weights     [B,K,T]    float32  0 = padding, masked or absent
    preference           [B,K,K,R]  float32  1: i preferred to j, 1/2: tie
    preference_weight    [B,K,K,R]  float32  0 = diagonal, unlabelled or absent
    facts                [B,K,X]    float32  where config.loss.facts_weight > 0; X = facts.COUNT
    teacher_scores       [B,K,R]    float32  where config.loss.teacher_weight > 0; 0 = not stated
    teacher_mask         [B,K,R]    float32  1 = a critique states this score, above in nats
    example_index        [B]        int32    global example id, -1 = filler row (all weights 0)

T = 0 where the language loss is off: then no critique token is fed either, C ends at <|reward|>.
P = 0 after `repeat_prompt`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jrm_jax.data.buckets import Bucket
from jrm_jax.data.encode import EncodedExample, Encoder, TokenRow, make_encoder
from jrm_jax.data.sizes import as_example
from jrm_jax.data.workers import WatchedIterator, init_worker
from jrm_jax.errors import UserError
from jrm_jax.shell import user_cache

__all__ = [
    "Batch", "BatchIterator", "EncodedExample", "Encoder", "HostBatch", "assemble_batch",
    "empty_batch",
    "make_encoder", "make_iterator", "repeat_prompt",
]  # fmt: skip

Batch = dict[str, np.ndarray]
_ENDLESS = 2**40  # steps


def assemble_batch(
    encoded: Sequence[EncodedExample | None],
    bucket: Bucket,
    encoder: Encoder,
    example_index: Sequence[int] | None = None,
) -> Batch:
    """Lay groups into the bucket's static sizes; None is a filler row.

    Args:
        example_index: global example ids; default 0, 1, ... and -1 for fillers.

    Raises:
        UserError: a group does not fit.
    """
    batch = empty_batch(len(encoded), bucket, encoder)
    slots = bucket.patches // encoder.processor.merge**2
    tables_of = {
        "patch_positions": "positions",
        "window_segments": "windows",
        "position_index": "position_index",
        "position_weight": "position_weight",
    }
    tables_of = {key: name for key, name in tables_of.items() if key in batch}
    for b, group in enumerate(encoded):
        if group is None:
            continue
        _check_fit(group, bucket, b if example_index is None else example_index[b])
        _lay(batch, "prompt", (b,), group.prompt, slots)
        for k, row in enumerate(group.candidates):
            _lay(batch, "candidate", (b, k), row, slots)
            batch["reward_index"][b, k] = row.reward
            length = len(row.targets)
            if length:
                batch["critique_index"][b, k, :length] = np.arange(row.reward, row.reward + length)
                batch["critique_targets"][b, k, :length] = row.targets
                batch["critique_weights"][b, k, :length] = 1
                batch["critique_weights"][b, k, slice(*row.masked)] = 0
        for i, (patches, tables) in enumerate(group.images):
            number = len(patches)
            # Only windows make the tower's order differ from the order of arrival.
            ordered = patches if tables.windows is None else patches[tables.order]
            batch["patches"][b, i, :number] = ordered
            batch["patch_segments"][b, i, :number] = 1
            for key, name in tables_of.items():
                batch[key][b, i, :number] = getattr(tables, name)
        count = len(group.candidates)
        batch["candidate_mask"][b, :count] = 1
        batch["preference"][b, :count, :count] = group.preference
        batch["preference_weight"][b, :count, :count] = group.weight
        if "facts" in batch:
            batch["facts"][b, :count] = group.facts
        if "teacher_mask" in batch:
            batch["teacher_mask"][b, :count] = np.isfinite(group.teacher)
            batch["teacher_scores"][b, :count] = np.nan_to_num(group.teacher)
        batch["example_index"][b] = b if example_index is None else example_index[b]
    return batch


def empty_batch(groups: int, bucket: Bucket, encoder: Encoder) -> Batch:
    """All padding: what a filler row looks like."""
    B, K, I, N = groups, bucket.candidates, bucket.images, bucket.patches
    P, C, T, R = bucket.prompt, bucket.candidate, bucket.critique, len(encoder.dimensions)
    int32, float32 = np.int32, np.float32
    batch = {
        "prompt_tokens": np.full((B, P), encoder.tokenizer.pad_id, int32),
        "prompt_positions": np.zeros((B, 3, P), int32),
        "prompt_segments": np.zeros((B, P), int32),
        "prompt_visual": np.full((B, P), -1, int32),
        "candidate_tokens": np.full((B, K, C), encoder.tokenizer.pad_id, int32),
        "candidate_positions": np.zeros((B, K, 3, C), int32),
        "candidate_segments": np.zeros((B, K, C), int32),
        "candidate_visual": np.full((B, K, C), -1, int32),
        "reward_index": np.zeros((B, K), int32),
        "candidate_mask": np.zeros((B, K), float32),
        "patches": np.zeros((B, I, N, encoder.processor.features), np.uint8),
        "patch_segments": np.zeros((B, I, N), int32),
        "patch_positions": np.zeros((B, I, N, 2), int32),
        "critique_index": np.zeros((B, K, T), int32),
        "critique_targets": np.zeros((B, K, T), int32),
        "critique_weights": np.zeros((B, K, T), float32),
        "preference": np.full((B, K, K, R), 0.5, float32),
        "preference_weight": np.zeros((B, K, K, R), float32),
        "example_index": np.full(B, -1, int32),
    }
    if encoder.facts:
        batch["facts"] = np.zeros((B, K, encoder.facts), float32)
    if encoder.teacher is not None:
        batch["teacher_scores"] = np.zeros((B, K, R), float32)
        batch["teacher_mask"] = np.zeros((B, K, R), float32)
    if encoder.vision.family == "qwen2_5_vl":
        batch["window_segments"] = np.zeros((B, I, N), int32)
    else:
        batch["position_index"] = np.zeros((B, I, N, 4), int32)
        batch["position_weight"] = np.zeros((B, I, N, 4), float32)
    return batch


def _lay(batch: Batch, kind: str, at: tuple[int, ...], row: TokenRow, slots: int) -> None:
    length = len(row.tokens)
    batch[f"{kind}_tokens"][at][:length] = row.tokens
    batch[f"{kind}_positions"][at][:, :length] = row.positions
    batch[f"{kind}_segments"][at][:length] = 1
    visual = batch[f"{kind}_visual"][at]
    for first, image, token_slots in row.visual:
        visual[first : first + len(token_slots)] = image * slots + token_slots


def _check_fit(group: EncodedExample, bucket: Bucket, name: int) -> None:
    need = Bucket(
        candidates=len(group.candidates),
        images=len(group.images),
        patches=max((len(patches) for patches, _ in group.images), default=0),
        prompt=len(group.prompt.tokens),
        candidate=max(len(row.tokens) for row in group.candidates),
        critique=max(len(row.targets) for row in group.candidates),
    )
    for field in dataclasses.fields(Bucket):
        found, room = getattr(need, field.name), getattr(bucket, field.name)
        if found > room:
            raise UserError(
                f"example {name} needs {found} {field.name} slots, its bucket has {room}: the data"
                " set has changed since it was measured; remove its sizes-*.npz and contents-*.json"
                f" files, which lie beside it or in {user_cache.folder('sizes')}"
            )


def repeat_prompt(batch: Mapping[str, np.ndarray]) -> Batch:
    """The same groups without prompt sharing: P = 0, every candidate begins with the prompt.

    The prompt's padding goes to the end, as a layer that hands on a state needs it.
    """
    out = dict(batch)
    groups, count = batch["candidate_mask"].shape
    padding = batch["prompt_segments"] == 0
    length = np.sum(~padding, axis=-1, dtype=np.int32)
    own_slots = np.zeros((groups, batch["candidate_tokens"].shape[-1]), bool)
    order = np.argsort(np.concatenate([padding, own_slots], axis=-1), axis=-1, kind="stable")
    present = batch["candidate_mask"] > 0
    fills = {"tokens": 0, "positions": 0, "segments": 0, "visual": -1}
    for name, fill in fills.items():
        own, prompt = batch[f"candidate_{name}"], batch[f"prompt_{name}"]
        repeated = np.repeat(prompt[:, None], count, axis=1)
        if name != "tokens":  # any token will do where the segment says padding
            absent = ~present.reshape(groups, count, *[1] * (own.ndim - 2))
            repeated = np.where(absent, np.asarray(fill, own.dtype), repeated)
        joined = np.concatenate([repeated, own], axis=-1)
        slots = order.reshape(groups, *[1] * (own.ndim - 2), -1)
        out[f"candidate_{name}"] = np.take_along_axis(joined, slots, axis=-1)
        out[f"prompt_{name}"] = prompt[..., :0]
    out["reward_index"] = np.where(present, batch["reward_index"] + length[:, None], 0)
    out["critique_index"] = batch["critique_index"] + length[:, None, None]
    return out


class Batches(Protocol):
    """What `make_iterator` follows: `plan.Plan`, `plan.LabelledPlan` or `plan.EvalPlan`."""

    batch_size: int
    labelled_rows: int | None

    def batch(self, step: int) -> tuple[Bucket, np.ndarray]: ...

    def locate(self, example_id: int) -> tuple[int, int]: ...


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """step -> this host's contiguous rows of the step's batch. Picklable, for worker processes."""

    plan: Batches
    datasets: tuple[Sequence[Any], ...]
    encoder: Encoder
    process_index: int = 0
    process_count: int = 1

    def __call__(self, step: int) -> Batch:
        """Raises UserError for a broken picture; names the example."""
        bucket, ids = self.plan.batch(step)
        rows = len(ids) // self.process_count
        first = self.process_index * rows
        ids = ids[first : first + rows]
        batch = assemble_batch([self._encode(int(i)) for i in ids], bucket, self.encoder, ids)
        if self.plan.labelled_rows is not None:
            batch["preference_weight"][max(0, self.plan.labelled_rows - first) :] = 0
        return batch

    def _encode(self, example_id: int) -> EncodedExample | None:
        if example_id < 0:
            return None
        which, index = self.plan.locate(example_id)
        example = as_example(self.datasets[which][index])
        try:
            return self.encoder.encode_example(example)
        except ValueError as error:  # UserError is one
            raise UserError(f"example {example_id} ({example.id}): {error}") from error

    def or_error(self, step: int) -> Batch:
        """A UserError as an array: it arrives as it is from any thread or process."""
        try:
            return self(int(step))
        except UserError as error:
            return {"error": np.frombuffer(str(error).encode(), np.uint8)}


class BatchIterator:
    """Iterates over a host's batches; close it, or use it in a `with`, to end its workers."""

    def __init__(self, iterator: Any):
        self._iterator = iterator

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        batch = next(self._iterator)
        if "error" in batch:
            self.close()
            raise UserError(bytes(batch["error"]).decode())
        # Out of the shared memory that worker processes hand over, which is thereby freed now.
        return {k: v if type(v) is np.ndarray else np.array(v) for k, v in batch.items()}

    def close(self) -> None:
        iterator, self._iterator = self._iterator, None
        if iterator is not None and hasattr(iterator, "close"):
            iterator.close()

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def make_iterator(
    plan: Batches,
    datasets: Sequence[Sequence[Any]],
    encoder: Encoder,
    *,
    start: int = 0,
    stop: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 2,
) -> BatchIterator:
    """This host's batches of steps start, start + 1, ..., in order, prepared ahead.

    The batches do not depend on workers, threads or prefetch, and the rows of all hosts, put one
    after another, are the rows a single host would get.

    Args:
        datasets: random access to records or examples, in the order of the plan's sources.
        stop: step to end before; default: the end of an `EvalPlan`, never for a `Plan`.
        workers: processes that prepare batches; 0 = threads of this process. The main module must
            be importable (`if __name__ == "__main__":`).
        prefetch: batches kept ready (per worker).

    Raises:
        UserError: the batch does not divide over the hosts; while iterating: a broken picture, or
            a worker process that was killed (see `workers`).
    """
    import grain

    if plan.batch_size % process_count:
        raise UserError(f"batch size {plan.batch_size} does not divide over {process_count} hosts")
    if stop is None:
        stop = len(plan) if hasattr(plan, "__len__") else _ENDLESS
    build = HostBatch(plan, tuple(datasets), encoder, process_index, process_count)
    steps = grain.MapDataset.range(start, max(start, stop)).map(build.or_error)
    if workers == 0:
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(1, prefetch))
        return BatchIterator(iter(steps.to_iter_dataset(options)))
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain's workers read flags
        flags.FLAGS.mark_as_parsed()
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    several = grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(1, prefetch))
    prefetched = steps.to_iter_dataset(options).mp_prefetch(several, init_worker)
    return BatchIterator(WatchedIterator(prefetched))
