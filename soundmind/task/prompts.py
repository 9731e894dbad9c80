"""What the model is asked, written once: training, evaluation and inspection all import it.

    audio   clip + written instruction
    text    question + written instruction
    dual    clip + question + written instruction

The written instruction is in EVERY mode: it is the only place where the form that the reward pays
for (`<think>` ... `</think>`, then `Answer: ...`) is announced to the model. Content is always a
list of typed parts, since the Qwen2.5-Omni processor indexes into the system message's parts.
"""

from __future__ import annotations

from typing import Any

from soundmind.task.schema import MODES, Mode, Task

# [ours] The model makers' own system line; the released scripts use a shortened form of it, and
# the speech half of Qwen2.5-Omni expects the full one.
SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of "
    "perceiving auditory and visual inputs, as well as generating text and speech."
)

# [ours] in wording, [release] in what is demanded: inner monologue first, think tags, a closing
# answer line whatever the output modality, and the warning that nothing else counts.
INSTRUCTIONS: dict[Task, str] = {
    "alr": (
        "Work the problem out before you commit to a verdict: talk it through with yourself as an "
        "inner monologue, weigh the premises against the conclusion from several sides, and put "
        "all of this thinking between <think> and </think>. Then close your reply, spoken or "
        "written, with exactly one line: 'Answer: entailed' or 'Answer: not-entailed'. "
        "A reply that does not end with that line is not accepted."
    ),
    # Short, because the stand-in model pays for every token of it on a CPU.
    "practice": (
        "Think between <think> and </think>, then end with 'Answer: entailed' or "
        "'Answer: not-entailed'."
    ),
}


def build_messages(
    mode: Mode, question: str, clip: str | bytes | None, task: Task = "alr"
) -> list[dict[str, Any]]:
    """Chat messages of one prompt, as Hugging Face processors and verl expect them.

    `clip` is carried untouched (a path, a reference or encoded bytes) and ignored in text mode.
    The practice task has no system message and, in audio mode, exactly one text part.
    Question and instruction are separate parts; the instruction then opens with a blank line,
    because chat templates join parts without a separator.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    content: list[dict[str, Any]] = []
    if mode in ("audio", "dual"):
        if clip is None:
            raise ValueError(f"mode {mode!r} needs a clip, got None")
        content.append({"type": "audio", "audio": clip})
    if mode in ("text", "dual"):
        content.append({"type": "text", "text": question})
    separator = "\n\n" if mode in ("text", "dual") else ""
    content.append({"type": "text", "text": separator + INSTRUCTIONS[task]})
    user = {"role": "user", "content": content}
    if task == "practice":
        return [user]
    return [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]}, user]
