"""Groups per second: `RewardModel.score_batch`, PyTorch on the exported folder, generative judges.

    python -m jrm_jax.benchmarks.score --model=runs/joint --out=FILE.json

All sides read the same groups of the built-in world from encoded pictures to numbers, in one
process, one after another in turns. PyTorch scores the float32 export of the same model through the
class that the export carries, one padded batch of all candidates of `--batch_size` groups at a
time. A generative judge is the same model's language head with a key/value cache, greedy: a
critique for each candidate is generated to its end, as its scores would then be read from the
words; `judge` is this project's, `torch judge` is `generate` on the exported folder, each with the
candidates of a group as its batch.

It also compares the scores: the largest difference between JAX and PyTorch for the float32 export,
whether every group is ranked the same where scores differ by more than 2e-4, and the largest
difference for the bfloat16 export in units of the spread of the rewards, computing in float32
('weights') and in bfloat16 ('compute').
"""

from __future__ import annotations

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
import numpy as np
import PIL.Image
import torch
import transformers

from jrm_jax import cli
from jrm_jax.data.world import scenes
from jrm_jax.export import export
from jrm_jax.serving.groups import Group
from jrm_jax.serving.reward_model import RewardModel
from jrm_jax.serving.trained import load_trained
from jrm_jax.shell.arguments import Parser


def make_groups(count: int) -> list[Group]:
    groups = []
    for index in range(count):
        example = scenes.make_example("valid", index, 0)
        words, source = example.prompt
        pictures = [candidate.parts[0].data for candidate in example.candidates]
        groups.append(Group(words.text, source.data, pictures))
    return groups


def open_picture(data: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(data)).convert("RGB")


def torch_inputs(loaded, groups: list[Group]) -> dict:
    """One padded batch of all candidates of the groups."""
    return loaded.prepare([
        ([group.instruction, open_picture(group.source)], [open_picture(candidate)])
        for group in groups
        for candidate in group.candidates
    ])  # fmt: skip


def load_classifier(folder: Path, dtype: torch.dtype = torch.float32):
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=True, dtype=dtype
    ).eval()


def torch_side(loaded, groups: list[Group], batch_size: int) -> Callable[[], list]:
    def run() -> list:
        rewards = []
        for start in range(0, len(groups), batch_size):
            inputs = torch_inputs(loaded, groups[start : start + batch_size])
            with torch.inference_mode():
                rewards += loaded(**inputs, use_cache=False).logits[:, 0].tolist()
        return rewards

    return run


def torch_judge_side(loaded, folder: Path, groups: list[Group]) -> Callable[[], list]:
    speaker = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32
    ).eval()

    def run() -> list:
        # candidates of one group are equally long in the built-in world: nothing to pad
        with torch.inference_mode():
            return [
                speaker.generate(**torch_inputs(loaded, [group]), max_new_tokens=64)
                for group in groups
            ]

    return run


def judge_side(model: RewardModel, groups: list[Group]) -> Callable[[], list]:
    def run() -> list:
        return [model.critique(*group, max_tokens=64) for group in groups]

    return run


def compare(ours: list[np.ndarray], theirs: np.ndarray, rough: dict[str, np.ndarray]) -> dict:
    """JAX's rewards by group against PyTorch's in one row.

    theirs: from the float32 export; rough: from the bfloat16 one, computing in float32
    ('weights') and in bfloat16 ('compute').
    """
    flat, changed, start = np.concatenate(ours), 0, 0
    for rewards in ours:
        other = theirs[start : start + len(rewards)]
        gap = rewards[:, None] - rewards[None]
        changed += int(np.sum((np.abs(gap) > 2e-4) & (gap * (other[:, None] - other[None]) <= 0)))
        start += len(rewards)
    return {
        "largest_difference_float32": float(np.abs(flat - theirs).max()),
        "pairs_ranked_differently": changed // 2,
        "largest_difference_bfloat16_in_spreads": {
            name: float(np.abs(flat - rewards).max() / flat.std())
            for name, rewards in rough.items()
        },
    }


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a run's folder")
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--judged", type=int, default=16, help="groups that the judge reads")
    parser.add_argument("--batch_size", type=int, default=8, help="groups at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    cli.keep_memory()
    groups = make_groups(args.groups)
    trained = load_trained(args.model)
    model = RewardModel(trained, batch_size=args.batch_size)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "export"
        export(trained, folder, "float32", 10**10)
        half = Path(parent) / "half"
        export(trained, half, "bfloat16", 10**10)
        loaded = load_classifier(folder)
        sides: dict[str, tuple[int, Callable[[], list]]] = {
            "jrm_jax": (len(groups), lambda: model.score_batch(groups)),
            "torch": (len(groups), torch_side(loaded, groups, args.batch_size)),
            "judge": (args.judged, judge_side(model, groups[: args.judged])),
            "torch judge": (
                args.judged, torch_judge_side(loaded, folder, groups[: args.judged])
            ),
        }
        first = {name: run() for name, (_, run) in sides.items()}  # compiles, warms up
        ours = [scores.reward_KR[:, 0] for scores in first["jrm_jax"]]
        rough = {
            name: np.array(torch_side(load_classifier(half, dtype), groups, args.batch_size)())
            for name, dtype in (("weights", torch.float32), ("compute", torch.bfloat16))
        }
        agreement = compare(ours, np.array(first["torch"]), rough)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.repeats):
            for name, (_, run) in sides.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
    rates = {n: sides[n][0] / statistics.median(times) for n, times in seconds.items()}
    result = {
        "groups_per_second": rates,
        "ratios": {
            f"jrm_jax/{n}": rates["jrm_jax"] / rate
            for n, rate in rates.items()
            if n != "jrm_jax"
        },
        "agreement": agreement,
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
        print(f"{name:12} {rate:8.2f} groups/s")
    print(", ".join(f"{name} {ratio:.2f}" for name, ratio in result["ratios"].items()))
    print(json.dumps(agreement))


if __name__ == "__main__":
    main()
