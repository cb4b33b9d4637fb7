"""Test settings that must stand before jax is imported: CPU, eight simulated devices, and a folder
of this test run, in which compiled programs are kept.

The workers of pytest-xdist and the commands that tests start inherit all of it, so that a program
is compiled once per test run. The folder is new each time: nothing old can hide a failure. Who
sets JAX_COMPILATION_CACHE_DIR keeps compiled programs there instead, between test runs, too.
"""

import gc
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# JRM_PLATFORM=gpu (or tpu): on this machine's accelerator, for the tests that compare with PyTorch.
# Those of several devices and of whole runs need the simulated ones.
if "JRM_PLATFORM" in os.environ:
    names = {"gpu": "cuda,cpu", "tpu": "tpu,cpu"}
    asked = os.environ["JRM_PLATFORM"]
    os.environ["JAX_PLATFORMS"] = names.get(asked, asked)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiling takes most of the time of these tests, running what was compiled very little.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
if version("jaxlib").startswith("0.10."):  # the older emitters, left out of 0.11, are quicker
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
if os.environ.get("JRM_OPTIMISED"):  # as users compile: three times as long
    FLAGS = FLAGS[:1]
if os.environ.get("JRM_PLATFORM") == "gpu":  # as `sharding.compiler_options`
    FLAGS.append("--xla_gpu_enable_triton_gemm=false")
_ASKED = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in FLAGS if flag not in _ASKED), *_ASKED])

_OWNER = "JRM_TEST_RUN" not in os.environ  # not a worker, which finds it set
if _OWNER:
    os.environ["JRM_TEST_RUN"] = tempfile.mkdtemp(prefix="jrm_jax-tests-")
os.environ["XDG_CACHE_HOME"] = f"{os.environ['JRM_TEST_RUN']}/cache"  # never the user's own
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{os.environ['JRM_TEST_RUN']}/compiled")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags  # noqa: E402

if not flags.FLAGS.is_parsed():  # grain's worker processes read absl flags
    flags.FLAGS(["pytest"])


# Tracing makes and drops very many small objects: looking for circles as often as Python does takes
# a tenth of its time.
gc.set_threshold(50_000, 20, 100)

# The longest files first: the two workers then end together. With `--no-loadscope-reorder`.
LONGEST = (
    "study", "mesh8", "export", "end_to_end", "processes", "run_data", "step", "stopping",
    "evaluate",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_unconfigure():
    if _OWNER:
        shutil.rmtree(os.environ["JRM_TEST_RUN"], ignore_errors=True)
