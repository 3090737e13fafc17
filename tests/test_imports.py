"""Every module can be imported, and what must be light stays light."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import mu

HEAVY = ("torch", "transformers", "pytorch_lightning", "open_clip", "torchvision", "wandb", "diffusers")

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(mu.__path__, prefix="mu.")
    if not module.name.endswith("__main__")
)

# Read before anything heavy is wanted: by `import mu`, by --help, and by the checks of a config.
LIGHT = [
    "mu",
    *(
        name
        for name in MODULES
        if name
        in {"mu.config", "mu.run_folder", "mu.errors", "mu.datasets.data_sets", "mu.unlearning.config"}
        or name in {"mu.commands.forget", "mu.forgetting.forget", "mu.forgetting.plan"}
        or (name.startswith("mu.algorithms.") and ".configs" in name)
        or ".scripts" in name
    ),
]


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.parametrize("name", LIGHT)
def test_light_module_loads_nothing_heavy(name: str) -> None:
    program = f"import sys, {name}; print(*sorted(set(sys.modules) & {set(HEAVY)!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
