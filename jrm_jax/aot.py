"""Will it fit, and how fast can it be? Compile a config's steps for a TPU that is not there.

    python -m jrm_jax.aot --config=configs/joint.py:qwen3_vl_8b --topology=v5p:4x4x4
    python -m jrm_jax.aot --config=configs/joint.py:qwen3_vl_8b --topology=v5e:16x16 \\
        --num_slices=2 --config.batch_size=512 --out=fits.json
    python -m jrm_jax.aot --config=configs/joint.py:qwen3_vl_8b --topology=v6e:8x8 --find

Needs `pip install -r requirements-tpu.txt`, no TPU and no weights. Prints one table, and ends with
status 1 where a step does not fit. docs/pods.md explains the rows.
"""

import dataclasses
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from jrm_jax import cli
from jrm_jax.errors import UserError
from jrm_jax.planning.chips import Topology, parse_topology
from jrm_jax.shell import config_cli, disk
from jrm_jax.shell.stop import ending

_CONFIG = config_flags.DEFINE_config_file("config", None, "File[:arguments].", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "CHIP:SHAPE of a slice, such as v5p:4x4x4.")
_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices of that shape.")
_FIND = flags.DEFINE_bool("find", False, "Search the largest batch and cheapest remat that fit.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the numbers.")
_STEPS = flags.DEFINE_list("steps", ["train", "score"], "Which steps to compile.")
_MOST = 1_000_000  # of each of these sizes
_VISUAL = flags.DEFINE_integer(
    "visual_tokens", 0, "Of a picture; default: config.data.max_visual_tokens.", 0, _MOST
)
_TEXT = flags.DEFINE_integer("text_tokens", 256, "Of rubric and instruction.", 1, _MOST)
_CRITIQUE = flags.DEFINE_integer(
    "critique_tokens", 640, "Of a critique, where the losses read critiques.", 1, _MOST
)
_CANDIDATES = flags.DEFINE_integer("candidates", 2, "Of a group.", 2, _MOST)
_IMAGES = flags.DEFINE_integer(
    "images", -1, "Of a group; default: a source and the candidates.", -1, _MOST
)


def _main() -> int:
    config_cli.parse(sys.argv, __doc__)
    if _CONFIG.value is None or _TOPOLOGY.value is None:
        raise UserError(
            "give --config and --topology: --config=configs/joint.py:qwen3_vl_8b "
            "--topology=v5p:4x4x4"
        )
    unknown = set(_STEPS.value) - {"train", "score"}
    if unknown or not _STEPS.value:
        raise UserError(f"--steps={','.join(_STEPS.value)}: use train, score or both")
    topology = parse_topology(_TOPOLOGY.value, _SLICES.value)
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs here, least of all on an accelerator
    from jrm_jax import build
    from jrm_jax.planning import compiling, fitting
    from jrm_jax.run.check_config import check_config
    from jrm_jax.run.fit import OutOfMemory

    config = _CONFIG.value
    check_config(config)
    if _OUT.value:
        disk.check_file(Path(_OUT.value))  # compiling takes minutes
    backbone = compiling.architecture(config)
    devices = compiling.describe_devices(topology)
    case = fitting.Case(
        config=config,
        backbone=backbone,
        topology=topology,
        devices=tuple(devices),
        visual=_VISUAL.value or config.data.max_visual_tokens or 256,
        text=_TEXT.value,
        critique=_CRITIQUE.value,
        candidates=_CANDIDATES.value,
        images=_IMAGES.value if _IMAGES.value >= 0 else 1 + _CANDIDATES.value,
    )
    if _FIND.value:
        case = fitting.find(case, _say)
    elif config.remat == build.AUTO and "train" in _STEPS.value:
        case = fitting.settle(case, _say)
    reports, failed = [], ""
    for which in _STEPS.value:
        try:
            reports.append(fitting.report(case, which))
        except OutOfMemory as error:
            failed = fitting.advice(case, which, error)
    if reports:
        print(fitting.table(case, reports))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"this process used {peak / 2**30:.1f} GiB of memory")
    if _OUT.value:
        _write(Path(_OUT.value), case, topology, reports, failed, peak)
    if failed:
        raise UserError(failed)
    return 0


def _write(
    path: Path, case: Any, topology: Topology, reports: list, failed: str, host_memory: int
) -> None:
    record = {
        "command": " ".join(["python -m jrm_jax.aot", *sys.argv[1:]]),
        "variant": case.config.get("variant", ""),
        "topology": topology.name,
        "num_slices": topology.slices,
        "batch_size": case.config.batch_size,
        "remat": case.config.remat,
        "bucket": dataclasses.asdict(case.bucket("train")),
        "host_memory_bytes": host_memory,
        "steps": {each.which: each.numbers() for each in reports},
        "out_of_memory": failed,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _say(words: str) -> None:
    print(words, flush=True)


def main() -> None:
    """Bad input and a step that does not fit are one line and status 1."""
    try:
        with ending():
            status = _main()
    except cli.REPORTED as error:
        if not cli.is_expected(error) and flags.FLAGS.is_parsed():
            raise
        sys.exit(f"error: {cli.in_one_line(error)}")
    sys.exit(status)


if __name__ == "__main__":
    main()
