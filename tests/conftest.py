"""Test settings that must stand before jax is imported: CPU, eight simulated devices, and a folder
of this test run.

The workers of pytest-xdist and the commands that tests start inherit all of it. Compiled programs
are kept in the user's cache folder, for the next test run: JAX finds one by the whole program, its
options and its compiler, so that what a change touches is compiled anew. With
JRM_COMPILATION_CACHE=off all of them are; JAX_COMPILATION_CACHE_DIR keeps them elsewhere.
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
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as commands do where programs are kept
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads wait for each other by spinning
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jrm_jax.shell import user_cache  # noqa: E402


def keep_programs() -> None:
    """Also the quick ones: there are thousands."""
    place = user_cache.for_programs("tests")  # None, too, where JAX is told of a folder
    chosen = place or Path(os.environ["JRM_TEST_RUN"], "compiled")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(chosen))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.0")
    os.environ.pop(user_cache.SWITCH, None)
    if place is not None:
        drop_halves(place)


def drop_halves(place: Path) -> None:
    """Programs that a killed process has half written: JAX would warn of each, at every run."""
    from jax._src.compilation_cache import decompress_executable

    for path in user_cache._programs(place):
        try:
            decompress_executable(path.read_bytes())
        except Exception:  # each of the packages that compress has its own
            path.unlink(missing_ok=True)


if _OWNER:
    keep_programs()
os.environ["XDG_CACHE_HOME"] = f"{os.environ['JRM_TEST_RUN']}/cache"  # never the user's own

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


def pytest_sessionfinish():
    """pytest looks for circles ten times more at its end, among all that tests have left."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    if _OWNER:
        shutil.rmtree(os.environ["JRM_TEST_RUN"], ignore_errors=True)
