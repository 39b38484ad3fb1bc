"""The scripts of the recipes, which are no package, as modules."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

RECIPES = Path(__file__).parents[2] / "recipes"


def script(name: str) -> ModuleType:
    """A script under `recipes/`, loaded but not run."""
    location = importlib.util.spec_from_file_location(name.replace("/", "_").removesuffix(".py"), RECIPES / name)
    assert location is not None and location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


prepare_hub = script("models/prepare_hub.py")
