"""What comes with the code and is known by a name: configs and backbones."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from jrm_jax.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ASSETS = Path(__file__).resolve().parents[1] / "assets"


def backbones() -> dict[str, Path]:
    """{'tiny_qwen3_vl': its Hugging Face folder, ...}"""
    return {path.parent.name: path.parent for path in sorted(ASSETS.glob("*/config.json"))}


def config_names() -> list[str]:
    """['discriminative', 'generative', 'joint', ...]"""
    return sorted(p.stem for p in CONFIGS.glob("*.py") if "def get_config(" in p.read_text())


def find_config(value: str) -> str:
    """'configs/joint.py', 'joint.py' or 'joint', each with or without ':ARGUMENTS', with the path
    of the file: the one that is there, else the one that comes with the code.

    Raises:
        UserError: neither is there.
    """
    name, colon, arguments = value.partition(":")
    path, known = Path(name), config_names()
    if path.is_file():
        return value
    if path.parent in (Path(), Path("configs")) and path.stem in known:
        _import_configs()
        return f"{CONFIGS / path.stem}.py{colon}{arguments}"
    close = difflib.get_close_matches(path.stem, known, 1, 0.5)
    hint = f"did you mean configs/{close[0]}.py?" if close else f"known: {', '.join(known)}"
    raise UserError(f"--config={name}: no such file; {hint}")


def load_config_module(name: str) -> ModuleType:
    """configs/NAME.py, whatever else is called `configs` where Python looks."""
    return _load(f"jrm_jax_configs_{name}", CONFIGS / f"{name}.py")


def _import_configs() -> None:
    """Configs import each other as `configs`, which may also be a folder of the user's."""
    if str(CONFIGS) not in getattr(sys.modules.get("configs"), "__path__", ()):
        sys.modules["configs"] = _load("configs", CONFIGS / "__init__.py", [str(CONFIGS)])


def _load(name: str, path: Path, inner: list[str] | None = None) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=inner)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
