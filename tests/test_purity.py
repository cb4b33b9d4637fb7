"""What may import what, and how long a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jrm_jax"
IO = {
    "absl", "logging", "os", "pathlib", "ml_collections", "orbax", "tensorflow_datasets", "grain",
    "transformers", "torch", "json", "rich", "tensorboardX",
}  # fmt: skip
CORE = [PACKAGE / f"{name}.py" for name in ("step", "losses", "heads")]
CORE += [
    path
    for path in (PACKAGE / "model").glob("*.py")
    if path.name not in ("weights.py", "config.py")
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
    homes = {PACKAGE / "benchmarks", PACKAGE / "assets" / "export"}
    assert {path.parent for path in FILES if "torch" in imports(path)} == homes
    assert not [p for p in FILES if "tensorflow" in imports(p)]


def test_files_are_short():
    paths = [*FILES, *(ROOT / "configs").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    long = {p.name: n for p in paths if (n := len(p.read_text().splitlines())) > 400}
    assert not long
