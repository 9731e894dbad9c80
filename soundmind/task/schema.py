"""The words of the data: modes, splits, tasks, and what one annotation and one row hold.

    annotation   one published line: id, question text, annotated reasoning, label
    row          one Parquet line in verl's layout, made from one annotation by soundmind.preprocess
    mode         what the prompt carries: the clip, the question text, or both

Only the standard library is imported, so that every other module can start from here.
For readers of a Parquet file: data/README.md lists every column with its unit.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, get_args

Mode = Literal["audio", "text", "dual"]
Split = Literal["train", "dev", "test"]
Task = Literal["alr", "practice"]

MODES: tuple[Mode, ...] = get_args(Mode)
SPLITS: tuple[Split, ...] = get_args(Split)  # dev selects, test is only reported
TASKS: tuple[Task, ...] = get_args(Task)

DATA_SOURCES: dict[Task, str] = {"alr": "soundmind/alr", "practice": "soundmind/practice"}
ABILITY = "logic"

# Key of the Parquet schema metadata under which preprocessing leaves what a reader needs beside
# the rows: data root relative to the file, tokenizer, task. A JSON object, see soundmind.training.dataset.
METADATA_KEY = b"soundmind"


class Annotation(TypedDict):
    """One annotation, in the field names of the published JSON lines (`{split}.jsonl`)."""

    id: str  # names the clip folder; restarts in every split
    user_content: str  # premises, conclusion and task, as spoken in question.wav
    answer: str  # annotated reasoning; its last line is the teacher's verdict, not the truth
    label: int  # 0 not-entailed, 1 entailed; this is the truth


class ExtraInfo(TypedDict):
    """`extra_info` of a row. None means "not measured": no sound in text mode, no tokenizer."""

    id: str
    split: str
    index: int  # position in the split's Parquet file, from 0
    mode: str
    label: int
    question_seconds: float | None
    audio_tokens: int  # placeholder tokens of the clip in this row's prompt; 0 in text mode
    question_tokens: int | None  # of the question text, in every mode, without chat template
    question_words: int
    reference_tokens: int | None  # of the annotated reasoning
    reference_words: int
    reference_seconds: float | None  # of the recorded reasoning
    teacher_verdict: str | None  # what the annotated reasoning itself concludes


class Row(TypedDict):
    """One Parquet line: verl's five columns and ours."""

    data_source: str
    prompt: list[dict[str, Any]]  # messages; audio parts name the clip relative to the data root
    ability: str
    reward_model: dict[str, str]  # {"style": "rule", "ground_truth": verdict of the label}
    extra_info: ExtraInfo
    audio: dict[str, Any] | None  # {"path": relative path, "bytes": encoded file if embedded}
