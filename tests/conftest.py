"""Fixtures that several test files share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from alr_data import (  # noqa: F401  # fixtures: data folders made of noise
    alr_dev,
    bpe_folder,
    make_github,
    make_huggingface,
    noise_clip,
)
from graded import log, plugin_module  # noqa: F401  # fixtures of the reward's tests
from model_folders import with_spare_rows
from processes import REPOSITORY, clean_environment


@pytest.fixture(scope="session")
def random_stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete small Qwen2.5-Omni folder with random weights; the path has a space in it."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("stand in") / "tiny"
    subprocess.run(
        [sys.executable, "-m", "soundmind.tiny", "--no-warmup", "--output", str(folder)],
        check=True,
        cwd=REPOSITORY,
        env=clean_environment(),
    )
    return folder


@pytest.fixture(scope="session")
def spare_rows_stand_in(random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random stand-in with rows of the head that no token has, as published folders have them."""
    return with_spare_rows(random_stand_in, tmp_path_factory.mktemp("spare rows") / "tiny")
