"""Groups per second of the reward service against `RewardModel.score_batch`, and its latency.

    python -m jrm_jax.benchmarks.serve --model=runs/joint --out=FILE.json

On one machine, in turns (`--rounds`; the best of each side counts), on the same groups of the
built-in world (four candidates, pictures of the default model's size):

- `score_batch`: the model in this process, from encoded files to numbers, in programs of its own
  choice, the server idle;
- `program`: one call of the program that the service uses, one group in it;
- `service`: a server process, `--clients` connections that each send their next group when the last
  is answered (the clients' own work is on the same cores);
- `alone`: the same server, one client;
- `one_row`: another server with `--batch_size=1`, so that nothing is ever joined, one client.

Each score is compared with `score_batch`'s. Seconds of CPU for a group are given for both sides:
where other work runs on the machine they say more than rates.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import time
from pathlib import Path

from jrm_jax import cli
from jrm_jax.benchmarks import load
from jrm_jax.shell.arguments import Parser


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def drive(
    port: int, requests: list[bytes], clients: int, seconds: float
) -> tuple[float, list[float], dict[int, list[float]]]:
    """(answers per second, their latencies in s, rewards by index of the request)."""
    latencies: list[float] = []
    found: dict[int, list[float]] = {}
    counter = iter(range(10**9))
    start = time.perf_counter()

    async def client() -> None:
        connection = load.Connection(port)
        while time.perf_counter() < start + seconds:
            index = next(counter) % len(requests)
            sent = time.perf_counter()
            status, body = await connection.ask(requests[index])
            latencies.append(time.perf_counter() - sent)
            if status != 200:
                raise RuntimeError(f"{status}: {body[:200]!r}")
            (found[index],) = load.rewards(body)
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return len(latencies) / (time.perf_counter() - start), latencies, found


def measure(args) -> dict:
    from jrm_jax.serving.reward_model import RewardModel

    groups = load.make_groups(args.groups, 4)
    requests = [load.request_of([group]) for group in groups]
    model = RewardModel.load(args.model, batch_size=args.batch_size)
    bare = model.score_batch(groups)  # first: it plans its programs as if there were no others
    rows = [model.encode(group) for group in groups]
    buckets = {model.bucket_of(row) for row in rows}
    model.warm(sorted(buckets, key=repr))

    def timed(work) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    calls = [timed(lambda r=r: model.score_rows(model.bucket_of(r), [r])) for r in rows[:20]]
    rates: dict[str, list[float]] = {"score_batch": [], "service": []}
    spent, many, found = {"score_batch": 0.0, "server": 0.0, "clients": 0.0}, [], {}
    with load.server_process(args.model, f"--batch_size={args.batch_size}") as (port, pid):
        asyncio.run(drive(port, requests, 8, 2.0))
        for _ in range(args.rounds):
            before = time.process_time()
            rates["score_batch"].append(len(groups) / timed(lambda: model.score_batch(groups)))
            spent["score_batch"] += time.process_time() - before
            before = load.cpu_seconds(pid), time.process_time()
            part = drive(port, requests, args.clients, args.seconds / args.rounds)
            rate, latencies, rewards = asyncio.run(part)
            spent["server"] += load.cpu_seconds(pid) - before[0]
            spent["clients"] += time.process_time() - before[1]
            rates["service"].append(rate)
            many += latencies
            found |= rewards
        alone_rate, alone, _ = asyncio.run(drive(port, requests, 1, args.seconds / 3))
    batch, rate = (max(each) for each in rates.values())
    with load.server_process(args.model, "--batch_size=1") as (port, _):
        asyncio.run(drive(port, requests, 1, 1.0))
        row_rate, row, _ = asyncio.run(drive(port, requests, 1, args.seconds / 3))
    apart = max(
        abs(reward - wanted)
        for index, given in found.items()
        for reward, wanted in zip(given, bare[index].reward_KR[:, 0].tolist(), strict=True)
    )
    return {
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "groups": len(groups), "candidates": 4, "clients": args.clients,
        "batch_size": args.batch_size, "buckets": [bucket.words for bucket in buckets],
        "groups_per_second": {
            "score_batch": batch, "service": rate, "alone": alone_rate, "one_row": row_rate,
            "rounds": rates,
        },
        "seconds": {
            "program": statistics.median(calls),
            "service_p50": percentile(many, 0.5), "service_p99": percentile(many, 0.99),
            "alone_p50": percentile(alone, 0.5), "alone_p99": percentile(alone, 0.99),
            "one_row_p50": percentile(row, 0.5),
        },
        "cpu_seconds_of_a_group": {
            "score_batch": spent["score_batch"] / args.rounds / len(groups),
            "server": spent["server"] / len(many), "clients": spent["clients"] / len(many),
        },
        "ratios": {
            "service/score_batch": rate / batch,
            "service/alone": rate / alone_rate,
            "service/one_row": rate / row_rate,
            "alone_p50/program": percentile(alone, 0.5) / statistics.median(calls),
        },
        "answers": len(many), "largest_difference": apart,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--groups", type=int, default=128, help="different ones")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0, help="of load")
    parser.add_argument("--rounds", type=int, default=4, help="of score_batch and of load in turns")
    args = parser.parse_args(argv)
    if argv is None:
        cli.prepare()
    result = json.dumps(measure(args), indent=1)
    print(result)
    if args.out:
        args.out.write_text(result + "\n")


if __name__ == "__main__":
    main()
