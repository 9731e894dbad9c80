"""The light modules import without torch, verl, vLLM or transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest
from processes import REPOSITORY, clean_environment

LIGHT = [
    "soundmind",
    "soundmind.labels",
    "soundmind.schema",
    "soundmind.prompts",
    "soundmind.audio",
    "soundmind.rewards",
    "soundmind.preprocess",
    "soundmind.inspect",
    "soundmind.practice",
    "soundmind.speech",
    "soundmind.tokens",
    "soundmind.features",
    "soundmind.selection",
    "soundmind.run_folder",
    "soundmind.report",
    "soundmind.doctor",
    "soundmind.tiny",
    "soundmind.parts",
    "soundmind.checkpoints",
    "soundmind.lora",
    "soundmind.export",
    "soundmind.metrics",
    "soundmind.evaluate",
    "soundmind.random_thinker",
    "soundmind.sizes",
    "soundmind.flops",
    "soundmind.memory",
    "soundmind.plan",
]
HEAVY = ("torch", "verl", "vllm", "transformers", "ray")

BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ImportError(f"a light module imports {{name}}")
sys.meta_path.insert(0, Block())
import {module}
"""


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_imports_without_the_heavy_packages(module: str) -> None:
    code = BLOCK.format(heavy=HEAVY, module=module)
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-1500:]


def test_only_verl_ext_dataset_and_the_launcher_import_verl() -> None:
    allowed = {"verl_ext", "dataset.py", "train.py", "patches.py"}
    offenders = [
        path.name
        for path in (REPOSITORY / "soundmind").rglob("*.py")
        if path.name not in allowed and path.parent.name not in allowed
        for line in path.read_text().splitlines()
        if line.lstrip().startswith(("import verl", "from verl"))
    ]
    assert offenders == []
