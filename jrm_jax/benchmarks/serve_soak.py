"""Many requests, good and bad, at a reward service: is each answered once, and rightly?

    python -m jrm_jax.benchmarks.serve_soak --model=runs/joint [--requests=20000] --out=FILE.json

Clients send at random: good groups as forms and in UniRL's format; groups with one broken picture;
JSON cut off; headers that promise a hundred million pixels; bodies that are too large; routes that
are none; and they hang up in the middle of a request, or as soon as it is sent. Good answers are
compared with the same program's scores in this process, to the bit. The report has counts by kind,
what was wrong (nothing should be), and the server's memory and open files over time.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jrm_jax import cli
from jrm_jax.benchmarks import load
from jrm_jax.service.limits import Limits
from jrm_jax.serving.groups import Group
from jrm_jax.shell.arguments import Parser

BODY = Limits().max_body_bytes
HANG_UP = 0  # in place of a status
SHARES = {
    "form": 50, "unirl": 15, "broken picture": 8, "cut JSON": 4, "huge picture": 4,
    "large body": 3, "no route": 3, "hang up within": 6, "hang up after": 7,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A request and what must come back. rewards: float32 [K], NaN where an error belongs."""

    kind: str
    request: bytes
    status: int
    rewards: np.ndarray | None = None


def make_cases(groups: Sequence[Group], wanted: Sequence[np.ndarray]) -> dict[str, list[Case]]:
    """By kind. `wanted`: rewards of each group, float32 [K]."""
    cases: dict[str, list[Case]] = {kind: [] for kind in SHARES}

    def add(kind: str, request: bytes, status: int, rewards: np.ndarray | None = None) -> None:
        cases[kind].append(Case(kind, request, status, rewards))

    for group, rewards_K in zip(groups, wanted, strict=True):
        request = load.request_of([group])
        add("form", request, 200, rewards_K)
        add("hang up within", request[: len(request) // 2], HANG_UP)
        add("hang up after", request, HANG_UP)
        add("unirl", load.raw_request("/score", _unirl(group)), 200, rewards_K)
        broken = group.candidates[0][:-40]
        mixed = group._replace(candidates=[*group.candidates, broken])
        add("broken picture", load.request_of([mixed]), 200, np.append(rewards_K, np.nan))
        huge = bytearray(group.candidates[0])
        huge[16:24] = (10_000).to_bytes(4, "big") * 2
        mixed = group._replace(candidates=[bytes(huge)])
        add("huge picture", load.request_of([mixed]), 422)
    add("cut JSON", load.raw_request("/v1/score", b'{"groups": [{"instruct'), 422)
    add("large body", _announced(BODY + 1), 413)
    add("no route", load.raw_request("/mode/pickle", b"\x80\x04K\x01."), 404)
    return cases


def _announced(length: int) -> bytes:
    """The head of a request with so long a body."""
    head = "POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode()


def _unirl(group: Group) -> bytes:
    def turn(picture: bytes) -> dict[str, str]:
        return {"text": group.instruction, "image_b64": base64.b64encode(picture).decode()}

    ask = {"required_rewards": ["jrm"], "metadata": None}
    turns = [[turn(group.source), turn(candidate)] for candidate in group.candidates]
    return json.dumps({"requests": [{"history": two, **ask} for two in turns]}).encode()


def _rewards(kind: str, body: bytes) -> np.ndarray:
    if kind == "unirl":
        found = [result["jrm"]["reward"] for result in json.loads(body)["results"]]
    else:
        (found,) = load.rewards(body)
    return np.array(found, np.float32)


async def soak(
    port: int, pid: int, cases: dict[str, list[Case]], count: int, clients: int, seed: int = 0
) -> dict:
    """The report."""
    chance = random.Random(seed)
    kinds = chance.choices(list(SHARES), SHARES.values(), k=count)
    plan = iter([chance.choice(cases[kind]) for kind in kinds])
    answered: Counter[str] = Counter()
    wrong: list[str] = []
    samples: list[tuple[int, float, int]] = []
    done = 0
    start = time.perf_counter()

    async def client() -> None:
        nonlocal done
        connection = load.Connection(port)
        for case in plan:
            if case.status == HANG_UP:
                await connection.send_part(case.request)
            else:
                try:
                    status, body = await connection.ask(case.request)
                    if status == 429:  # the queue is full: it is allowed to say so
                        answered["429"] += 1
                        await asyncio.sleep(0.2)
                        status, body = await connection.ask(case.request)
                    _check(case, status, body, wrong)
                    answered[case.kind] += 1
                except (OSError, asyncio.IncompleteReadError) as error:
                    wrong.append(f"{case.kind}: no answer ({type(error).__name__})")
                    connection = load.Connection(port)
            done += 1
            if done % 250 == 0:
                samples.append((done, load.memory_mib(pid), load.open_files(pid)))
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    await asyncio.sleep(1)
    samples.append((done, load.memory_mib(pid), load.open_files(pid)))
    return {
        "requests": count, "clients": clients, "seconds": time.perf_counter() - start,
        "planned": dict(Counter(kinds)), "answered": dict(answered),
        "wrong": len(wrong), "wrong_examples": wrong[:10],
        "memory_mib": _ends(samples, 1), "open_files": _ends(samples, 2), "samples": samples,
    }  # fmt: skip


def _check(case: Case, status: int, body: bytes, wrong: list[str]) -> None:
    if status != case.status:
        wrong.append(f"{case.kind}: {status} in place of {case.status}: {body[:100]!r}")
    elif case.rewards is not None:
        found = _rewards(case.kind, body)
        if not np.array_equal(found, case.rewards, equal_nan=True):
            wrong.append(f"{case.kind}: {found} in place of {case.rewards}")


def _ends(samples: Sequence[tuple], column: int) -> dict[str, float]:
    """The mean of the first thousand requests' samples and of the last, and the end."""
    values = [sample[column] for sample in samples]
    return {
        "first": float(np.mean(values[:4])),
        "last": float(np.mean(values[:-1][-4:])) if len(values) > 1 else values[0],
        "end": values[-1],
    }


def measure(args) -> dict:
    from jrm_jax.serving.reward_model import RewardModel

    groups = load.make_groups(args.groups, args.candidates)
    model = RewardModel.load(args.model, batch_size=args.batch_size)
    wanted = []
    for group in groups:
        row = model.encode(group)
        (scores,) = model.score_rows(model.bucket_of(row), [row])
        wanted.append(scores.reward_KR[:, 0])
    del model
    cases = make_cases(groups, wanted)
    with load.server_process(args.model, f"--batch_size={args.batch_size}") as (port, pid):
        return asyncio.run(soak(port, pid, cases, args.requests, args.clients))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--groups", type=int, default=64, help="different ones")
    parser.add_argument("--candidates", type=int, default=2, help="of each")
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args(argv)
    if argv is None:
        cli.prepare()
    result = measure(args)
    shown = {name: value for name, value in result.items() if name != "samples"}
    print(json.dumps(shown, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
