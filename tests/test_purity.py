"""What may import what, and how long a file may be."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jrm_jax"
IO = {
    "absl", "logging", "os", "pathlib", "ml_collections", "orbax", "tensorflow_datasets", "grain",
    "transformers", "torch", "json", "rich", "tensorboardX",
}  # fmt: skip
CORE = [PACKAGE / f"{name}.py" for name in ("step", "losses", "heads", "gaussian")]
CORE += [
    path
    for path in (PACKAGE / "model").glob("*.py")
    if path.name not in ("weights.py", "stored_head.py", "tensor_files.py", "config.py")
]
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path, top: bool = False) -> set[str]:
    """Top-level packages a file imports; `top`: at module level only."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_touches_neither_files_nor_flags(path):
    assert not imports(path) & IO


def test_flax_stays_in_the_model():
    users = {path for path in FILES if "flax" in imports(path)}
    assert users and all(path.parent == PACKAGE / "model" for path in users)


def test_torch_stays_in_the_benchmarks_and_exports_and_tensorflow_out():
    benchmarks = PACKAGE / "benchmarks"
    homes = {benchmarks, benchmarks / "accelerator", PACKAGE / "assets" / "export"}
    assert {path.parent for path in FILES if "torch" in imports(path)} == homes
    assert not [p for p in FILES if "tensorflow" in imports(p)]


def test_one_file_knows_rich():
    """It is where a user's words are kept from being read as markup."""
    assert {path.name for path in FILES if "rich" in imports(path)} == {"terminal.py"}


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
    if "assets" not in path.relative_to(ROOT).parts
}
# A room imports from its own row and from rows below; the package itself only looks RewardModel up.
ROWS = (
    {"main", "score", "export", "evaluate", "aot", "serve", "benchmarks"},
    {"rl"},
    {"study", "service"},
    {"serving", "planning", "evaluation"},
    {"train", "run", "build", "build_data", "checkpoint", "metrics", "watch", "distributed", "cli",
     "reward_head"},
    {"step", "data"},
    {"heads", "losses", "gaussian", "optim", "lora", "sharding", "model"},
    {"shell"},
    {"adapters"},
    {"client", "errors"},
)
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
CORE_ROOMS = {"step", "losses", "heads", "gaussian", "optim", "lora", "sharding", "model", "errors"}
MAY = {  # exceptions that are narrower than their row
    "data": {"data", "model", "shell", "errors"},
    "adapters": {"adapters", "client"},  # they run in other people's processes: no JAX
    "client": {"client"},
    **{room: CORE_ROOMS for room in ("step", "losses", "heads", "gaussian", "model")},
}


def imported_modules(name: str) -> set[str]:
    """The project's modules that a module imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {m if m in MODULES else node.module for m in inner}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {module for module in found - {name} if module in MODULES and module != "jrm_jax"}


def room_of(module: str) -> str:
    return module.split(".")[1]


IMPORTS = {name: imported_modules(name) for name in MODULES}
INNER = {name: found for name, found in IMPORTS.items() if name != "jrm_jax"}


def test_every_file_has_a_room():
    assert {room_of(name) for name in INNER} == set(ROW_OF)
    assert {path.parent for path in MODULES.values()} == {
        path.parent for path in MODULES.values() if path.name == "__init__.py"
    }
    empty = [n for n, p in MODULES.items() if p.name == "__init__.py" and len(p.read_text()) < 80]
    assert not empty  # each says what the room is for


def test_there_is_no_circle():
    order = list(graphlib.TopologicalSorter(IMPORTS).static_order())
    assert len(order) == len(MODULES)


@pytest.mark.parametrize("name", INNER)
def test_imports_run_downwards(name):
    room = room_of(name)
    allowed = MAY.get(room, {other for other in ROW_OF if ROW_OF[other] >= ROW_OF[room]})
    assert {room_of(module) for module in INNER[name]} <= allowed


def test_files_are_short():
    paths = [*FILES, *(ROOT / "configs").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    long = {p.name: n for p in paths if (n := len(p.read_text().splitlines())) > 400}
    assert not long
