from __future__ import annotations

import pytest

from soundmind.task import labels
from soundmind.task.prompts import INSTRUCTIONS, SYSTEM, build_messages
from soundmind.task.schema import MODES, TASKS, Mode, Task


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", TASKS)
def test_every_mode_carries_the_written_instruction(mode: Mode, task: Task) -> None:
    user = build_messages(mode, "Does it follow?", "clip.wav", task)[-1]
    assert INSTRUCTIONS[task] in user["content"][-1]["text"]


@pytest.mark.parametrize("task", TASKS)
def test_instruction_announces_what_the_parser_reads(task: Task) -> None:
    for verdict in labels.VERDICTS:
        assert labels.answer_line(verdict) in INSTRUCTIONS[task]
    assert "<think>" in INSTRUCTIONS[task] and "</think>" in INSTRUCTIONS[task]


@pytest.mark.parametrize(
    "mode,kinds",
    [("audio", ["audio", "text"]), ("text", ["text", "text"]), ("dual", ["audio", "text", "text"])],
)
def test_mode_decides_the_parts(mode: Mode, kinds: list[str]) -> None:
    content = build_messages(mode, "Does it follow?", "clip.wav")[-1]["content"]
    assert [part["type"] for part in content] == kinds
    assert ("Does it follow?" in [part.get("text") for part in content]) == (mode != "audio")


def test_content_is_structured_and_parts_have_no_foreign_keys() -> None:
    for message in build_messages("dual", "Q", "clip.wav"):
        for part in message["content"]:
            assert set(part) == {"type", part["type"]}  # a null `audio` key would render a clip


def test_alr_opens_with_the_system_line_and_practice_has_none() -> None:
    assert build_messages("text", "Q", None)[0]["content"][0]["text"] == SYSTEM
    assert [m["role"] for m in build_messages("audio", "Q", "c", "practice")] == ["user"]


def test_question_and_instruction_do_not_run_together() -> None:
    parts = build_messages("text", "premises", None)[-1]["content"]
    assert "".join(part["text"] for part in parts).startswith("premises\n\n")


def test_a_mode_with_sound_needs_a_clip() -> None:
    with pytest.raises(ValueError, match="needs a clip"):
        build_messages("audio", "Q", None)
