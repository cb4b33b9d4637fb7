"""Reading the held-out splits of a run: every example once, with the parameters of one step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jrm_jax import build_data, distributed
from jrm_jax.metrics import Accumulator
from jrm_jax.run import workdir as files
from jrm_jax.run.programs import EVALUATE, Programs
from jrm_jax.shell.stop import StopRequest
from jrm_jax.watch import Watchdog


class HeldOut:
    """`step`: the jitted evaluation. `show`: for a few words that change, '' when it is over."""

    def __init__(
        self,
        config: ConfigDict,
        data: build_data.Data,
        mesh: jax.sharding.Mesh,
        step: Any,
        programs: Programs,
        *,
        stop: StopRequest,
        watchdog: Watchdog,
        show: Callable[[str], None],
    ):
        self._config, self._data, self._mesh, self._step = config, data, mesh, step
        self._programs, self._stop, self._watchdog, self._show = programs, stop, watchdog, show

    def read(self, split: str, trainable: Any, frozen: Any) -> dict[str, float] | None:
        """Metrics of a split, see `Accumulator.summary`, and 'groups', the number of its examples.

        None if it was given up, because the run is to stop.
        """
        totals, plan = Accumulator(), self._data.eval_plans[split]
        groups = sum(int((plan.batch(i)[1] >= 0).sum()) for i in range(len(plan)))  # of all hosts
        with (
            self._watchdog.aside(f"evaluating {split!r}"),
            self._stop.answering("stopping: the evaluation is given up"),
            build_data.batches(self._config, self._data, split, self._mesh) as batches,
        ):
            for number, batch in enumerate(batches):
                if self._stop.now():
                    return None
                where = f"{number + 1} of {len(plan)}"
                self._watchdog.beat()
                self._watchdog.pulse(f", batch {where}")
                self._show(f"{split}: {where}")
                placed = build_data.place(self._config, batch, self._mesh)
                program = EVALUATE, plan.batch(number)[0]
                if not self._programs.prepare({program: (trainable, frozen, placed)}):
                    return None
                terms, _ = self._step(trainable, frozen, placed)
                totals.add(jax.device_get(terms))
        self._show("")
        return totals.summary() | {"groups": float(groups)}

    def read_all(
        self, workdir: Path, step: int, trainable: Any, frozen: Any
    ) -> dict[str, dict[str, float]] | None:
        """{split: metrics} of all splits, for the results of a run; None if it was given up.

        `step`: where the parameters come from. Splits that were read before a stop are not read
        again.
        """
        done = files.read_final(workdir, step)
        for split in self._data.eval_plans:
            if split in done:
                continue
            values = self.read(split, trainable, frozen)
            if values is None:
                return None
            done[split] = values
            if distributed.is_leader():
                files.write_final(workdir, step, done)
        return done
