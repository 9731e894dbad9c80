"""One row, one right response, and fixtures for whoever tests what a response earns."""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import Any

import pytest
from hypothesis import strategies as st

from soundmind.task import reward
from soundmind.task.labels import ENTAILED
from soundmind.task.reward import compute_score
from soundmind.task.reward_settings import COMPONENTS

RIGHT = "<think>one two three</think>\nAnswer: entailed"
ROW = {"reference_tokens": 10, "reference_words": 6, "response_tokens": 10}
SPEECH = {
    "speech_transcript": "so answer entailed",
    "speech_tokens": 50,
    "reference_speech_tokens": 100,
}
KEYS = [
    "score",
    *COMPONENTS,
    "acc",
    "pred",
    "parsed",
    "response_tokens",
    "reward_error",
    "reward_error_cause",
]

TEXTS = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "Answer:", " entailed", " not-entailed", "\n", " or ", "a b c d e "]
    )
    | st.text(max_size=12),
    max_size=16,
).map("".join)
QUANTITIES = st.none() | st.integers(-5, 3000) | st.floats() | st.text(max_size=3)
ROWS = st.fixed_dictionaries({}, optional=dict.fromkeys(reward.ROW_KEYS, QUANTITIES))


def grade(response: str, truth: str = ENTAILED, row: Any = None, **kwargs: Any) -> dict[str, Any]:
    return compute_score("soundmind/alr", response, truth, ROW if row is None else row, **kwargs)


@pytest.fixture
def plugin_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("reward_plugins_of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """The log of a process that has said nothing yet."""
    monkeypatch.setattr(reward, "_logged", set())
    caplog.set_level(logging.INFO, logger="soundmind.task.reward")
    return caplog
