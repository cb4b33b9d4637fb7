"""The base policy, from which all runs start: it imitates a mixture of perfect and flawed edits.

    python -m jrm_jax.rl.base --out=jrm_jax/assets/rl_base.safetensors

made the packaged one, in less than a minute on one core. An imitated edit is PERFECT with that
chance, else one that the built-in world draws by its own weights (`scenes.FLAW_WEIGHTS`), of
instructions of `train`; knobs are drawn from SPREAD and DAMAGE on top. What comes out is worth
about half of what is possible: the policy draws each part of a program by itself, so that it mixes
flaws.

Letters: N programs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file, save_file

from jrm_jax.data.world import scenes
from jrm_jax.data.world.vocabulary import QUALITIES
from jrm_jax.errors import UserError
from jrm_jax.optim import flatten, unflatten
from jrm_jax.rl import policy
from jrm_jax.rl.editing import (
    KNOBS,
    OBJECT_KNOBS,
    PICTURE_KNOBS,
    SHIFTS,
    SLOTS,
    TONES,
    Features,
    Problem,
    Program,
    features,
    from_scene,
    joined,
    take,
)
from jrm_jax.shell.arguments import Parser
from jrm_jax.shell.packaged import ASSETS
from jrm_jax.shell.stop import ending

PACKAGED = ASSETS / "rl_base.safetensors"
SEED = "rl-base"  # of its instructions, which no run meets again
PERFECT = 0.25
ATTEMPTS = 8  # of an instruction, of which flawed edits are drawn
# Deviations of knobs, from the middle; a quality that is not lost is CLEAN below and above it.
SPREAD = {**dict.fromkeys(OBJECT_KNOBS, 0.12), **dict.fromkeys(SHIFTS, 0.1)}
SPREAD |= dict.fromkeys(TONES, 0.1)
DAMAGE, CLEAN = (1.0, 0.2), (-0.5, 0.3)  # mean and deviation of a quality that is lost, and if not
PROBLEMS, DRAWS, STEPS, BATCH, RATE = 4096, 4, 1200, 512, 4e-3


def imitated(count: int, draws: int, seed: str = SEED) -> tuple[list[Problem], Program]:
    """Problems, each `draws` times, and a program to imitate for each."""
    problems, programs = [], []
    rng = np.random.default_rng(0)
    for index in range(count):
        group = scenes.make_contest("train", index, seed, ATTEMPTS)
        problem = Problem(group.source, group.target, group.edits, group.instruction, group.kind)
        pick = random.Random(f"{seed}/imitated/{index}")
        flawed = [a for a in group.attempts if a.kind != "perfect"]
        for _ in range(draws):
            attempt = pick.choice(flawed)
            scene, quality = attempt.scene, attempt.quality
            if pick.random() < PERFECT:
                scene, quality = group.target, None
            program = from_scene(problem, scene)
            if program is not None:
                problems.append(problem)
                programs.append(_with_knobs(program, quality, rng))
    return problems, joined(programs)


def _with_knobs(program: Program, quality: str | None, rng: np.random.Generator) -> Program:
    own = rng.normal(size=(1, SLOTS, KNOBS)) * [SPREAD[name] for name in OBJECT_KNOBS]
    picture = []
    for name in PICTURE_KNOBS:
        mean, deviation = (0.0, SPREAD[name]) if name in SPREAD else CLEAN
        if name == quality:
            mean, deviation = DAMAGE
        picture.append(rng.normal(mean, deviation))
    return program._replace(knobs_NOV=np.float32(own), picture_NW=np.float32([picture]))


def train(
    problems: list[Problem], programs: Program, steps: int = STEPS, seed: int = 0
) -> tuple[dict[str, Any], list[float]]:
    """(parameters, mean negative log-probability by step)."""
    inputs = features(problems)
    params = policy.init(
        jax.random.key(seed), inputs.slots_NOX.shape[-1], inputs.scene_NY.shape[-1]
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(RATE, steps))
    )

    @jax.jit
    def step(params, opt_state, inputs: Features, programs: Program):
        def loss(params):
            return -jnp.mean(policy.log_prob(policy.apply(params, inputs), programs))

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, losses = optimizer.init(params), []
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(0, len(problems), BATCH)
        batch = Features(*(array[rows] for array in inputs)), take(programs, rows)
        params, opt_state, value = step(params, opt_state, *batch)
        losses.append(float(value))
    return params, losses


def save(path: Path, params: Mapping[str, Any]) -> None:
    flat = {name: np.asarray(array) for name, array in flatten(dict(params)).items()}
    save_file(flat, path)


def load(path: Path = PACKAGED) -> dict[str, Any]:
    """
    Raises:
        UserError: it cannot be read, or is the policy of another version.
    """
    try:
        flat = load_file(path)
    except Exception as error:  # safetensors has errors of its own
        raise UserError(f"{path}: the base policy cannot be read ({error})") from error
    params = unflatten({name: jnp.asarray(array) for name, array in flat.items()})
    wanted = jax.eval_shape(lambda: policy.init(jax.random.key(0), *_sizes()))
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, wanted):
        raise UserError(f"{path}: its parameters are not those of this policy: make it anew")
    return params


def _sizes() -> tuple[int, int]:
    found = features([Problem(scenes.Scene("white", ()), scenes.Scene("white", ()), (), "", "")])
    return found.slots_NOX.shape[-1], found.scene_NY.shape[-1]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m jrm_jax.rl.base")
    parser.add_argument("--out", type=Path, required=True)
    with ending():
        args = parser.parse_args(argv)
        began = time.monotonic()
        params, losses = train(*imitated(PROBLEMS, DRAWS))
        save(args.out, params)
        taken = time.monotonic() - began
        print(f"{args.out}: {np.mean(losses[-50:]):.3f} nats an edit, made in {taken:.0f} s")


assert set(SPREAD) | set(QUALITIES) == {*OBJECT_KNOBS, *PICTURE_KNOBS}

if __name__ == "__main__":
    main()
