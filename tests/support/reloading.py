"""What a test says of an engine that was scrambled and then loaded again (parts_rank.py)."""

from __future__ import annotations

from typing import Any


def assert_loaded_again(found: dict[str, Any]) -> None:
    """Every weight, moment, step and random number is the saved one, and none was by chance."""
    import torch

    assert found["after_load"].keys() == found["after"].keys()
    for name, tensor in found["after"].items():
        assert torch.equal(found["after_load"][name], tensor), name
        assert not torch.equal(found["scrambled"][name], tensor), name
    saved, scrambled = found["progress"], found["scrambled_progress"]
    loaded = found["progress_after_load"]
    assert loaded["moments"].keys() == saved["moments"].keys() != set()
    for name, tensor in saved["moments"].items():
        assert torch.equal(loaded["moments"][name], tensor), name
        assert not torch.equal(scrambled["moments"][name], tensor), name
    assert loaded["schedule"] == saved["schedule"] != scrambled["schedule"]
    assert torch.equal(loaded["random"], saved["random"])
    assert not torch.equal(scrambled["random"], saved["random"])
