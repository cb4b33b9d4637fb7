"""Several processes: start-up, who leads, taking turns, agreeing.

On Cloud TPU everything is found by JAX itself. Elsewhere each process is told by its environment:

    JAX_COORDINATOR_ADDRESS=HOST:PORT   of process 0, the same for all
    JAX_NUM_PROCESSES=N
    JAX_PROCESS_ID=0 ... N-1
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from jrm_jax.errors import UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PATIENCE = 24 * 3600  # seconds at a barrier; a leader may have a large data set to measure


def is_wanted(mode: str, environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several: 'on', 'off', or 'auto' by the environment."""
    if mode != "auto":
        return mode == "on"
    hosts = environment.get("TPU_WORKER_HOSTNAMES") or environment.get("TPU_PROCESS_ADDRESSES")
    return (
        "," in (hosts or "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
        or VARIABLES[0] in environment
    )


def read_environment(environment: Mapping[str, str]) -> dict[str, str | int]:
    """Arguments of jax.distributed.initialize; none of the variables set: JAX finds everything.

    Raises:
        UserError: some are set and others are not, or their numbers make no sense.
    """
    absent = [name for name in VARIABLES if not environment.get(name)]
    if len(absent) == len(VARIABLES):
        return {}
    if absent:
        raise UserError(f"{', '.join(absent)} not set: several processes need all of {VARIABLES}")
    address, *numbers = (environment[name] for name in VARIABLES)
    if ":" not in address or not all(number.isdecimal() for number in numbers):
        raise UserError(f"{', '.join(VARIABLES)}: need HOST:PORT and two numbers")
    count, index = map(int, numbers)
    if not index < count:
        raise UserError(f"{VARIABLES[2]} is {index}: it counts from 0 to {count - 1}")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def start(mode: str) -> None:
    """Join the other processes. Must run before anything asks JAX for its devices.

    Raises:
        UserError: the environment is incomplete, or the others cannot be reached.
    """
    if not is_wanted(mode, os.environ):
        return
    arguments = read_environment(os.environ)
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        words = " ".join(str(error).split())[:300]
        where = arguments.get("coordinator_address", "the coordinator")
        raise UserError(
            f"cannot join the other processes at {where} ({words}): check {', '.join(VARIABLES)}, "
            "that the port is open, and that all processes were started; --distributed=off runs "
            "this one alone"
        ) from error
    sys.excepthook = _end_with_traceback
    barrier("start")  # a half-started pod fails here, and not in its first collective
    print(
        f"process {jax.process_index()} of {jax.process_count()} holds "
        f"{jax.local_device_count()} of {jax.device_count()} devices",
        flush=True,
    )


def fail(words: str, at_once: bool = False) -> NoReturn:
    """Say it and end with status 1: at once where there are other processes. Leaving politely, this
    one would wait for them, while they wait for it in a collective."""
    if at_once or jax.distributed.is_initialized():
        print(words, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
    sys.exit(words)


def _end_with_traceback(*raised: Any) -> None:
    traceback.print_exception(*raised)
    fail("error: this process has failed, see above")


def is_leader() -> bool:
    """The one process that writes logs, and that goes first."""
    return jax.process_index() == 0


_passed = 0  # barriers have names of their own; all processes pass the same ones in order


def barrier(name: str) -> None:
    """Wait for all processes. Through the coordinator, not the devices: those give up sooner."""
    global _passed
    if jax.process_count() == 1:
        return
    from jax._src import distributed  # no public way; Orbax waits like this too

    _passed += 1
    distributed.global_state.client.wait_at_barrier(f"jrm_jax/{_passed}/{name}", PATIENCE * 1000)


@contextlib.contextmanager
def leader_first(name: str) -> Iterator[None]:
    """The leader does it first; then the others, who find files that it left on a shared disk."""
    if not is_leader():
        barrier(name)
    yield
    if is_leader():
        barrier(name)


def from_leader(name: str, make: Callable[[], str]) -> str:
    """What `make` returns, in every process; the leader alone calls it, however long it takes."""
    global _passed
    if jax.process_count() == 1:
        return make()
    from jax._src import distributed

    _passed += 1
    client, key = distributed.global_state.client, f"jrm_jax/{_passed}/{name}"
    if is_leader():
        value = make()
        client.key_value_set(key, value)
        return value
    return client.blocking_key_value_get(key, PATIENCE * 1000)


def all_agree(yes: bool) -> bool:
    """Whether every process says yes."""
    if jax.process_count() == 1:
        return yes
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(yes)).all())
