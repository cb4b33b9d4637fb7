"""What a run says about itself: its results as a table, numbers in a line, changed settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jrm_jax.shell.terminal import duration, print_table


def print_results(results: dict[str, Any]) -> None:
    """The held-out numbers as a table."""
    splits = list(dict.fromkeys(k.split("/")[0] for k in results if "/" in k))
    if not splits:
        print("nothing was measured: the data have neither 'valid' nor 'test' nor 'hard'")
        return
    columns = {
        "pair_accuracy": ("pair accuracy", "{:.4f}"),
        "pairs": ("pairs", "{:.0f}"),
        "ties": ("ties (outside)", "{:.0f}"),
        "groups": ("groups", "{:.0f}"),
        "preference": ("preference loss", "{:.4f}"),
        "language": ("language loss / token", "{:.4f}"),
    }
    columns = {n: c for n, c in columns.items() if any(f"{s}/{n}" in results for s in splits)}
    rows = []
    for split in splits:
        found = [(results.get(f"{split}/{name}"), form) for name, (_, form) in columns.items()]
        rows.append((split, *("-" if v is None else form.format(v) for v, form in found)))
    print_table(
        f"{results['config']}: held-out numbers of step {results['step']}",
        {"split": {}, **{title: {"justify": "right"} for title, _ in columns.values()}},
        rows,
    )
    print(f"{results['seconds']:.0f} s ({duration(results['seconds'])}) in this last session")


def describe_run(data: Any, state: Any, mesh: Any) -> str:
    """What is trained, on what, and the sizes that batches are padded to; a few lines."""
    import jax  # here: commands say what is wrong with their arguments without it

    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.trainable, state.frozen)
    ]
    lines = [
        f"{sizes[0]:,} parameters train, {sizes[1]:,} are frozen;"
        f" {mesh.size} x {mesh.devices.flat[0].device_kind};"
        f" {sum(map(len, data.train_sets)):,} training groups,"
        f" {data.train_plan.steps_per_epoch:,} steps an epoch",
        "every group is padded to the first of these buckets that holds it:",
    ]
    lines += [f"  bucket {n}: {bucket.words}" for n, bucket in enumerate(data.buckets, 1)]
    shares = [f"{share:.0%} of the {part}'s" for part, share in data.real.items()]
    lines.append(f"  of an epoch's slots {' and '.join(shares)} are real, the others are padding")
    return "\n".join(lines)


def in_words(values: Mapping[str, float]) -> str:
    """'preference 0.69  language -': a dash for not-a-number, the mean of nothing."""
    return "  ".join(
        f"{name} {'-' if math.isnan(value) else format(value, '.4g')}"
        for name, value in values.items()
    )


def json_safe(values: Any) -> Any:
    """With null for what JSON has no number for, however deep in dicts, lists and tuples."""
    if isinstance(values, dict):
        return {name: json_safe(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [json_safe(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def difference(before: dict, now: dict) -> str:
    """'seed: 0 -> 1; loss.margin: 0.0 -> 0.5'."""
    old, new = flat(before), flat(now)
    changed = [k for k in dict.fromkeys([*old, *new]) if old.get(k) != new.get(k)]
    return "; ".join(f"{k}: {old.get(k, 'absent')} -> {new.get(k, 'absent')}" for k in changed)


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}"""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found
