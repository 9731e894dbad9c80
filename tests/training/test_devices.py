"""No pass of an engine mixes a GPU with host memory, where FSDP2 keeps what is offloaded.

On a CPU every device is equal, so the engine runs on labelled ones (tests/support/device_labels.py):
real FSDP2, bfloat16 under autocast, a forward and, where the engine trains, a backward and the weights
on their way to the rollout.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("verl")

from processes import REPOSITORY, start_ranks

ROLES = ("policy", "policy-offloaded", "reference", "lora")
CASES = [
    f"{batch} {way}"
    for batch in ("mixed", "text")
    for way in ("padded", "packed", "shared", "checkpointed")
]


@pytest.fixture(scope="module")
def found(
    random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("devices")
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "tests/support/device_rank.py")]
    command += ["--model", str(random_stand_in), "--ranks", "1", "--output", str(folder / "out.pt")]
    command += ["--rendezvous", str(folder / "rendezvous"), *ROLES]
    return start_ranks(command, 1, folder / "out.pt")[0]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("case", CASES)
def test_no_operation_mixes_devices(found: dict[str, dict[str, str]], role: str, case: str) -> None:
    assert found[role][case] == "none"


def test_labels_tell_devices_apart(found: dict[str, dict[str, str]]) -> None:
    assert found["labels"]["mixed"] == "aten::add: (2,) on cuda:0, (2,) on cpu"


def test_what_is_gathered_ahead_is_what_runs_next(found: dict[str, dict[str, str]]) -> None:
    assert found["prefetch"]["in vain"] == ""
