"""What every device holds of a run, by arithmetic alone: a table of models, ways to train, devices.

    python -m jrm_jax.planning.memory

Bytes come from the shardings of the state that a run would have; nothing is compiled, no weights
are needed. Activations come on top: `python -m jrm_jax.aot` compiles the step and says how much.
"""

from __future__ import annotations

import os

MODELS = (
    "qwen3_vl_2b", "qwen3_vl_4b", "qwen3_vl_8b", "qwen2_5_vl_3b", "qwen2_5_vl_7b", "qwen3_5_0_8b",
    "qwen3_5_2b", "qwen3_5_4b", "qwen3_5_9b", "qwen3_5_27b",
)  # fmt: skip
WAYS = {"everything": {}, "adapters": {"lora.rank": 16}}
DEVICES = (1, 8, 16)
GB = 1e9


def held(model: str, way: dict[str, object], count: int) -> tuple[float, float]:
    """(bytes of a device between steps, the same with gradients), everything split over fsdp."""
    import jax

    from configs import joint
    from jrm_jax import build
    from jrm_jax.model.published import PUBLISHED
    from jrm_jax.run.fit import bytes_per_device

    config = joint.get_config(model)
    config.update_from_flattened_dict({**way, "mesh.data": 1, "mesh.fsdp": count})
    mesh = build.make_mesh(config, PUBLISHED[model], jax.devices()[:count], check_batch=False)
    state, _ = build.abstract_state(config, PUBLISHED[model], mesh)
    between = bytes_per_device(state)
    return between, between + bytes_per_device(state.trainable)


def table() -> list[str]:
    """Lines of a Markdown table, in GB (10^9 bytes) a device: between steps / with gradients."""
    heads = ["model", "trains", *(f"{n} device{'s' if n > 1 else ''}" for n in DEVICES)]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---|" * len(DEVICES)]
    for model in MODELS:
        for name, way in WAYS.items():
            cells = [held(model, way, count) for count in DEVICES]
            words = [f"{between / GB:.1f} / {most / GB:.1f}" for between, most in cells]
            lines.append(f"| {model} | {name} | {' | '.join(words)} |")
    return lines


def main() -> None:
    # before jax starts: devices that are only counted
    os.environ["JAX_PLATFORMS"] = "cpu"
    flag = f"--xla_force_host_platform_device_count={max(DEVICES)}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    print("\n".join(table()))


if __name__ == "__main__":
    main()
