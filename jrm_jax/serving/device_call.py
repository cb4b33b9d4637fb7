"""A model's parameters on the devices, and calls of its programs. Thread-safe.

Letters: see `data/pipeline.py`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import jax

from jrm_jax import build, sharding
from jrm_jax.model.backbone import Backbone
from jrm_jax.model.config import BackboneConfig
from jrm_jax.serving.generate import make_generate
from jrm_jax.serving.placing import mesh_of
from jrm_jax.shell import user_cache
from jrm_jax.shell.terminal import if_slow
from jrm_jax.step import make_score_step, make_state_step

# Programs of a split model talk between devices: two at once may wait for each other for ever.
ONE_AT_A_TIME = threading.Lock()

SCORES, STATES, CRITIQUES = "scores", "states", "critiques"
SHARED = 16  # kinds of programs, of all models, that are remembered for models to come


class DeviceCall:
    """
    Args:
        config: of the backbone. params: with 'reward_head' and 'reward_embedding', as
            `placing.place` has placed them.
        pixels: (mean, std) of the image processor.
        reward_id, end_id: the tokens <|reward|> and <|im_end|>.
        through_reward: see `Trained`; concerns critiques only.
        compute_dtype: 'float32' or 'bfloat16'.
        say: told what is compiled, where that takes long.

    Attributes:
        places: the rows of a batch must be a multiple of these. platform: of the devices.
        compiled: kind and shapes of every program so far.

    """

    def __init__(
        self,
        config: BackboneConfig,
        params: dict[str, Any],
        *,
        pixels: tuple,
        reward_id: int,
        end_id: int = -1,
        through_reward: bool = False,
        compute_dtype: str = "float32",
        say: Callable[[str], None] | None = None,
    ):
        self.params, self._mesh = params, mesh_of(params)
        self._whole = sharding.is_this_device(self._mesh)
        options = sharding.compiler_options(self._mesh)
        self._options = None if options is None else tuple(options.items())
        self._backbone = Backbone(
            config,
            dtype=build.DTYPES[compute_dtype],
            scan_unroll=True if config.text.layers < 8 else 1,
            hidden_sharding=None if self._whole else sharding.batch_sharding(self._mesh),
            reward_token_id=reward_id,
            through_reward=through_reward,
        )
        self.places = math.prod(self._mesh.shape[axis] for axis in sharding.BATCH_AXES)
        self.platform = self._mesh.devices.flat[0].platform
        self._pixels, self._end_id, self._say = pixels, end_id, say or _silent
        self._jitted: dict[tuple, Any] = {}
        self.compiled: set[tuple] = set()
        self._lock = threading.Lock()
        split = not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
        self._turn = ONE_AT_A_TIME if split else None

    def __call__(self, kind: tuple, batch: dict, *more: Any) -> jax.Array:
        """The program's output, which may still be computed when this returns, unless the model is
        split over devices: its programs run one after another.

        Args:
            kind: (SCORES,): batch -> reward_BKR float32; (STATES,): batch -> [B, K, D] float32;
                (CRITIQUES, max_tokens, sample): batch, key, temperature -> int32 [B, K, T].
        """
        with self._turn or contextlib.nullcontext():
            found = self._run(kind, batch, *more)
            return jax.block_until_ready(found) if self._turn else found

    def _run(self, kind: tuple, batch: dict, *more: Any) -> jax.Array:
        shapes = kind, *(array.shape for array in batch.values())
        batch = batch if self._whole else sharding.place_batch(batch, self._mesh)
        if shapes in self.compiled:
            return self._jitted[kind](self.params, batch, *more)
        with self._lock:
            program = self._program(kind)
            rows, candidates = batch["candidate_mask"].shape
            words = f"compiling the program of {kind[0]}, {rows} x {candidates} candidates"
            with if_slow(words, self._say), user_cache.programs_kept():
                found = program(self.params, batch, *more)  # what is compiled is kept for others
            self.compiled.add(shapes)
        return found

    def _program(self, kind: tuple) -> Any:
        if kind not in self._jitted:
            known = (kind, self._backbone, self._pixels, self._end_id, self._options)
            self._jitted[kind] = _make_program(*known)
        return self._jitted[kind]


@functools.lru_cache(maxsize=SHARED)
def _make_program(
    kind: tuple, backbone: Backbone, pixels: tuple, end_id: int, options: tuple | None
) -> Any:
    """One for all models of a process that are alike: a second one finds its programs compiled."""
    name, *own = kind
    make = {SCORES: make_score_step, STATES: make_state_step, CRITIQUES: make_generate}
    step = make[name](backbone, *pixels, *((*own, end_id) if name == CRITIQUES else ()))
    return jax.jit(step, compiler_options=None if options is None else dict(options))


def _silent(words: str) -> None:
    """A library says nothing unless it is asked to."""
