"""Checkpoints: the one module that knows Orbax.

    checkpoints = open_checkpoints(folder); checkpoints.save(...); checkpoints.restore(...)
    step, trainable, meta = read_checkpoint(folder, tree)         of a run that may be training

A checkpoint holds `trainable`, `opt_state` and `meta` (step, metrics, protocol stamp). Frozen
parameters are not in it: they come from the backbone's folder. The two latest and the best by the
chosen metric are kept; a metric that is not finite ranks last.

A checkpoint is written by threads while training goes on. It has its final name, and counts, once
all of it is on the disk; only then is an older one removed. One that is found damaged is renamed,
never removed; where the disk or a lack of memory is at fault the run ends, and all stays as it is.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from jrm_jax import distributed, sharding
from jrm_jax.errors import UserError, one_line
from jrm_jax.run import saved
from jrm_jax.run.saved import META, METRICS, RANK, WORST, complete_steps, pick
from jrm_jax.shell import disk

# What comes late: writes of a save that was given up, reads of what was removed meanwhile
LATE = ("Event loop is closed", "Encountered error while reading array")
TRIES, PAUSE = 5, 0.2  # a reader's, at a checkpoint that may be about to be removed; seconds
LOOK = 5.0  # seconds between looks at what a save has written
AGAIN = (0.2, 1.0)  # the trainer's; seconds before it reads a checkpoint again


class _Manager(ocp.CheckpointManager):
    """Orbax's, which does not ask JAX whether the run is to stop. `StopRequest` does, and JAX takes
    the number of the last question, by whatever thread, for the place where the process is."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """A run's checkpoints. Close it before the program ends."""

    def __init__(self, folder: Path, manager: ocp.CheckpointManager, say: Callable[[str], None]):
        self.folder, self._manager, self._say = folder, manager, say
        self._writing: int | None = None  # the step of a save that is not known to be complete
        # called whenever a save has got on that is waited for
        self.alive: Callable[[], Any] = lambda: None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending. Waits for one that is being written; so do
        the methods below that read."""
        self.wait()
        return sorted(self._manager.all_steps())

    def ranked(self) -> list[int]:
        """All steps, see `saved.ranked`."""
        return saved.ranked(self.folder, self.steps())

    def save(
        self, step: int, trainable: Any, opt_state: Any, meta: Mapping[str, Any], metric: float
    ) -> None:
        """Begin to write one checkpoint. What the arrays hold now is written, even where their
        memory is given (donated) to the next step. Waits for the save before this one.

        Args:
            metric: larger is better; NaN where nothing was measured.

        Raises:
            UserError: this one or the one before could not be written; earlier ones are untouched.
        """
        self.wait()
        self._writing = step
        with self._explained():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    trainable=ocp.args.StandardSave(trainable),
                    opt_state=ocp.args.StandardSave(opt_state),
                    # written later, while the loop goes on counting
                    meta=ocp.args.JsonSave(copy.deepcopy(dict(meta))),
                ),
                metrics={RANK: _finite(metric)},
                force=True,
            )

    def check(self) -> bool:
        """Whether all that was to be saved is on the disk; does not wait for it.

        Raises:
            UserError: the last save has failed.
        """
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.wait()
        return self._writing is None

    def wait(self) -> None:
        """Until the last save is complete.

        Raises:
            UserError: it could not be written; earlier ones are untouched.
        """
        if self._writing is not None:
            with self._explained(), self._showing_life():
                self._manager.wait_until_finished()
                self._manager.check_for_errors()
            self._writing = None

    @contextlib.contextmanager
    def _showing_life(self) -> Iterator[None]:
        """Call `alive` whenever more is on the disk."""
        ended = threading.Event()

        def watch() -> None:
            size = -1
            while not ended.wait(LOOK):
                before, size = size, saved.unfinished_bytes(self.folder)
                if size != before:
                    self.alive()

        thread = threading.Thread(target=watch, name="saving", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """An error of the save under way, in words."""
        try:
            yield
        except Exception as error:  # tensorstore and Orbax raise many kinds for a full disk
            step, self._writing = self._writing, None
            # What Orbax leaves unfinished would be reported a second time when the program ends.
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            left = complete_steps(self.folder)
            words = disk.explain(error, self.folder)
            if step in left:  # whole: an older one could not be removed
                self._say(f"WARNING: after checkpoint {step} was saved: {words}")
                self._manager.reload()
                return
            raise UserError(
                f"checkpoint {step} could not be written to {self.folder} ({words}); then run the "
                f"same command again; complete checkpoints: {', '.join(map(str, left)) or 'none'}"
            ) from error

    def rate(self, step: int, meta: Mapping[str, Any], metric: float) -> None:
        """Write down the evaluation of a checkpoint that was saved without: its rank, then its meta
        (each whole, or not at all). Parameters are not touched, so that nothing can be lost."""
        self.wait()
        with distributed.leader_first("rate"):
            if distributed.is_leader():
                folder = self.folder / str(step)
                disk.write_whole(folder / METRICS, json.dumps({RANK: _finite(metric)}))
                disk.write_whole(folder / META, json.dumps(dict(meta)))
        self._manager.reload()

    def restore(
        self, trainable: Any, opt_state: Any | None = None, steps: Sequence[int] | None = None
    ) -> tuple[int, Any, Any, dict]:
        """(step, trainable, opt_state, meta), placed as the abstract trees say.

        A damaged checkpoint is reported, and the next one is taken. Once that is read, damaged ones
        get another name: training may come to their steps again, and nothing of them is lost.

        Args:
            trainable, opt_state: trees of jax.ShapeDtypeStruct with shardings; opt_state None is
                not read.
            steps: what is tried, in this order; None: all, the latest first.

        Raises:
            UserError: none can be read; or the disk or a lack of memory is at fault.
        """
        failures: dict[int, str] = {}
        for step in reversed(self.steps()) if steps is None else steps:
            items = {"trainable": ocp.args.StandardRestore(trainable)}
            items["meta"] = ocp.args.JsonRestore()
            if opt_state is not None:
                items["opt_state"] = ocp.args.StandardRestore(opt_state)
            found, problem = self._read(step, ocp.args.Composite(**items))
            if not problem:
                for damaged in failures:
                    self._set_aside(damaged)
                return step, found["trainable"], found.get("opt_state"), found["meta"]
            failures[step] = problem
            self._say(f"WARNING: checkpoint {step} cannot be read ({problem})")
        words = "; ".join(f"{step}: {problem}" for step, problem in failures.items())
        raise UserError(
            f"{self.folder}: no checkpoint can be read ({words or 'there is none'}); "
            "choose another --workdir to start anew"
        )

    def _read(self, step: int, items: Any) -> tuple[Any, str]:
        """(what is in a checkpoint, ''), or (None, what is damaged)."""
        for pause in (*AGAIN, 0.0):
            found, problem, passing = None, "", False
            try:
                found = self._manager.restore(step, args=items)
            except Exception as error:  # whatever is wrong with it, the one before may be whole
                problem, passing = disk.explain(error, self.folder), disk.is_passing(error)
            if distributed.all_agree(not problem):
                return found, ""
            time.sleep(pause)
        problem = problem or "another process cannot read its part"
        if distributed.all_agree(not passing):
            return None, problem
        raise UserError(
            f"checkpoint {step} cannot be read now ({problem}). Nothing was changed: run the same "
            f"command again; if it stays so, move {self.folder / str(step)} elsewhere, and the run "
            "goes on from another one"
        )

    def _set_aside(self, step: int) -> None:
        with distributed.leader_first("set aside"):
            if distributed.is_leader():
                place = saved.set_aside(self.folder / str(step))
                self._say(f"checkpoint {step} is kept as {place}; the run needs it no more")
        self._manager.reload()

    def read_meta(self, step: int) -> dict:
        self.wait()
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items)["meta"]


@contextlib.contextmanager
def open_checkpoints(
    folder: Path, say: Callable[[str], None] = print, keep_interval: int = 0
) -> Iterator[Checkpoints]:
    """The checkpoints in `folder`, which is made if need be, for the one process that trains there:
    half-written ones are removed. `keep_interval`: those at multiples of so many steps are kept
    too; 0: none.

    Raises:
        UserError: checkpoints cannot be written there.
    """
    _quieten()
    with distributed.leader_first("checkpoints"):
        if distributed.is_leader():
            disk.check_folder(folder)
            saved.clean(folder, say)
    options = ocp.CheckpointManagerOptions(
        best_fn=_read_rank,  # without it Orbax does not write the metrics
        preservation_policy=policies.AnyPreservationPolicy(
            [
                policies.LatestN(2),
                policies.BestN(
                    get_metric_fn=_read_rank, n=1, keep_checkpoints_without_metrics=False
                ),
                *([policies.EveryNSteps(keep_interval)] if keep_interval else []),
            ]
        ),
    )
    try:
        manager = _Manager(folder.resolve(), options=options)
    except OSError as error:
        raise UserError(f"{folder} cannot be used for checkpoints ({error})") from error
    checkpoints = Checkpoints(folder, manager, say)
    try:
        yield checkpoints
        checkpoints.wait()
    except BaseException:
        try:  # what ends the run must not cost a checkpoint, nor be hidden by one that fails
            checkpoints.wait()
        except UserError as error:
            say(f"WARNING: {error}")
        with contextlib.suppress(Exception):  # a failed save has been reported already
            manager.close()
        raise
    manager.close()


def read_checkpoint(
    folder: Path, trainable: Any | None, which: int | str = "best"
) -> tuple[int, Any, dict]:
    """(step, trainable, meta) of a run that may be training: nothing is changed or printed.

    A checkpoint that the trainer removes meanwhile makes way for the one that is then meant.

    Args:
        trainable: tree of jax.ShapeDtypeStruct with shardings; None: as it was saved, whole on the
            first device.
        which: see `pick`.

    Raises:
        UserError: there is no such checkpoint, or it stays and cannot be read.
    """
    _quieten()
    failed: dict[int, int] = {}
    while True:
        step = pick(folder, which)
        checkpoint = (folder / str(step)).resolve()
        try:
            meta = json.loads((checkpoint / META).read_text())
            if trainable is None:
                return step, _read_tree(checkpoint / "trainable"), meta
            with ocp.StandardCheckpointer() as checkpointer:
                return step, checkpointer.restore(checkpoint / "trainable", trainable), meta
        except Exception as error:  # half of it may be gone: any kind
            failed[step] = failed.get(step, 0) + 1
            if failed[step] == TRIES and checkpoint.exists():
                others = ", ".join(map(str, complete_steps(folder)))
                raise UserError(
                    f"{checkpoint} cannot be read ({one_line(error)}): give another --step (there "
                    f"are {others})"
                ) from error
        time.sleep(PAUSE)


def read_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by path, parameters and optimizer state; to compare runs,
    however many processes wrote it."""
    _quieten()
    folder = (workdir / "checkpoints" / str(step)).resolve()
    restored = {name: _read_tree(folder / name) for name in ("trainable", "opt_state")}
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored)
    }


def _read_tree(folder: Path) -> Any:
    """A tree of a checkpoint as it was saved, whole on the first device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            checkpointer.metadata(folder).item_metadata.tree,
        )
        return checkpointer.restore(folder, target)


def give_up(tree: Any) -> Any:
    """Shapes with shardings of a tree of arrays, whose memory is free then: what is read in their
    place need not fit beside them."""
    jax.tree.map(lambda leaf: leaf.delete(), tree)
    return sharding.placed(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))


def _finite(metric: float) -> float:
    return float(metric) if math.isfinite(metric) else WORST


def _read_rank(metrics: Mapping[str, float]) -> float:
    return metrics[RANK]


def _quieten() -> None:
    """What fails in a save is raised: it is not to be printed again by each thread that saw it."""
    for name in ("absl", "orbax", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = sys.unraisablehook
    if getattr(before, "quiet", False):
        return

    def hook(raised):
        if not str(raised.exc_value).startswith(LATE):
            before(raised)

    hook.quiet = True
    sys.unraisablehook = hook
