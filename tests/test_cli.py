"""What all programs share."""

import subprocess
import sys

import pytest

from jrm_jax import cli
from jrm_jax.shell import stop

_FAULTS = """
import ctypes, resource, sys, threading
from jrm_jax import cli

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = (ctypes.c_void_p,)
libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)

def use(rounds):
    for _ in range(rounds):
        buffer = libc.malloc(2**28)
        libc.memset(buffer, 1, 2**28)
        libc.free(buffer)

if sys.argv[1] == "keep":
    cli.keep_memory()
found = []
def measure():
    use(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use(4)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
worker = threading.Thread(target=measure)
worker.start()
worker.join()
print(found[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_freed_memory_is_kept_in_threads_too():
    def faults(how: str) -> int:
        command = [sys.executable, "-c", _FAULTS, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("keep") < 200
    assert faults("give back") > 200  # or the measurement sees nothing


def test_commands_leave_pytorch_alone_and_others_free_to_look_for_it():
    """Newer SciPy, which tensorflow_datasets imports, looks among the imported modules."""
    pytest.importorskip("torch")
    code = """
import sys
from jrm_jax import cli
cli.prepare()
from jrm_jax.data.template import import_transformers
from jrm_jax.shell.packaged import backbones
folder = str(backbones()["tiny_qwen3_vl"])
import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
import scipy.stats, tensorflow_datasets
tensorflow_datasets.features
assert "torch" not in sys.modules, "PyTorch was imported, or is still hidden"
import torch
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile trying to allocate"), MemoryError()],
)
def test_a_lack_of_memory_is_one_line_from_every_command(error):
    assert isinstance(error, cli.REPORTED) and cli.is_expected(error)
    with pytest.raises(SystemExit) as ended, stop.ending():
        raise error
    for line in (cli.in_one_line(error), ended.value.code.removeprefix("error: ")):
        assert line.startswith("out of memory (") and "under Memory" in line and "\n" not in line


def test_a_fault_of_the_program_is_none_of_the_memory():
    assert not cli.is_expected(RuntimeError("INTERNAL: a fault"))
    with pytest.raises(RuntimeError), stop.ending():
        raise RuntimeError("INTERNAL: a fault")


@pytest.mark.parametrize(("error", "said"), [
    ("KeyboardInterrupt", "stopped\n"), ("ValueError('why')", "ValueError: why\n"),
])  # fmt: skip
def test_ctrl_c_before_anybody_listens_is_one_word(error, said):
    command = [sys.executable, "-c", f"from jrm_jax import cli; cli.prepare(); raise {error}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == (-2 if said == "stopped\n" else 1)
    assert done.stderr.endswith(said) and ("Traceback" in done.stderr) == (said != "stopped\n")
