"""Groups per second: `RewardModel.score_batch`, PyTorch on the exported folder, a generative judge.

    python -m jrm_jax.benchmarks.score --model=runs/joint --out=FILE.json

All sides read the same groups of the built-in world from encoded pictures to numbers, in one
process, one after another in turns. PyTorch scores the float32 export of the same model through the
class that the export carries, one padded batch of all candidates of `--batch_size` groups at a
time. The generative judge is the same model's language head (with a key/value cache): a critique
for each candidate is generated to its end, as its scores would then be read from the words.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import PIL.Image
import torch
import transformers

from jrm_jax.data import scenes
from jrm_jax.export import export
from jrm_jax.score import Group, RewardModel
from jrm_jax.trained import load_trained


def make_groups(count: int) -> list[Group]:
    groups = []
    for index in range(count):
        example = scenes.make_example("valid", index, 0)
        words, source = example.prompt
        pictures = [candidate.parts[0].data for candidate in example.candidates]
        groups.append(Group(words.text, source.data, pictures))
    return groups


def torch_side(folder: Path, groups: list[Group], batch_size: int) -> Callable[[], list]:
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()

    def open_picture(data: bytes):
        return PIL.Image.open(io.BytesIO(data)).convert("RGB")

    def run() -> list:
        rewards = []
        for start in range(0, len(groups), batch_size):
            requests = [
                ([g.instruction, open_picture(g.source)], [open_picture(c)])
                for g in groups[start : start + batch_size]
                for c in g.candidates
            ]
            with torch.inference_mode():
                logits = loaded(**loaded.prepare(requests), use_cache=False).logits
            rewards += logits[:, 0].tolist()
        return rewards

    return run


def judge_side(model: RewardModel, groups: list[Group]) -> Callable[[], list]:
    def run() -> list:
        return [model.critique(*group, max_tokens=64) for group in groups]

    return run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a run's folder")
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--judged", type=int, default=16, help="groups that the judge reads")
    parser.add_argument("--batch_size", type=int, default=8, help="groups at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    groups = make_groups(args.groups)
    trained = load_trained(args.model)
    model = RewardModel(trained, batch_size=args.batch_size)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "export"
        export(trained, folder, "float32", 10**10)
        sides: dict[str, tuple[int, Callable[[], list]]] = {
            "jrm_jax": (len(groups), lambda: model.score_batch(groups)),
            "torch": (len(groups), torch_side(folder, groups, args.batch_size)),
            "judge": (args.judged, judge_side(model, groups[: args.judged])),
        }
        first = {name: run() for name, (_, run) in sides.items()}  # compiles, warms up
        ours = [value for scores in first["jrm_jax"] for value in scores.reward_KR[:, 0].tolist()]
        worst = max(abs(a - b) for a, b in zip(ours, first["torch"], strict=True))
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.repeats):
            for name, (_, run) in sides.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
    rates = {n: sides[n][0] / statistics.median(times) for n, times in seconds.items()}
    result = {
        "groups_per_second": rates,
        "ratios": {f"jrm_jax/{n}": rates["jrm_jax"] / rates[n] for n in ("torch", "judge")},
        "largest_difference_to_torch": worst,
        "groups": args.groups,
        "judged_groups": args.judged,
        "batch_size": args.batch_size,
        "seconds": seconds,
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, rate in rates.items():
        print(f"{name:8} {rate:8.2f} groups/s")
    print(", ".join(f"{name} {ratio:.2f}" for name, ratio in result["ratios"].items()))


if __name__ == "__main__":
    main()
