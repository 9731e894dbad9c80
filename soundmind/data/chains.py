"""Prepared rows beside their annotated reasoning: what supervised fine-tuning learns from.

A Parquet file holds prompts and truths, never annotated text. It records where its annotations lie;
this module reads them again, holds them against the numbers stored in the rows, and makes the
response of each row (`soundmind.task.targets`). Rows are left out under a reason and counted, and
chains beyond the budget are left out, cut or refused, as asked, and counted too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soundmind.data.reread import data_roots
from soundmind.data.rows import read_rows
from soundmind.data.sources import SourceError, find_split, read_candidate, read_lines
from soundmind.system.errors import UserError
from soundmind.task.targets import LeftOutError, taught_reasoning, taught_text

LONG_CHAINS = ("leave_out", "cut", "error")

Encode = Callable[[Sequence[str]], list[list[int]]]  # texts to token ids, no special tokens


class ChainError(UserError):
    """Annotations that cannot be learned from, with what to do about it."""


@dataclass
class Chains:
    """The rows of one Parquet file that are taught, and the response of each."""

    path: str
    rows: list[dict[str, Any]] = field(default_factory=list)  # as `read_rows` gives them
    responses: list[list[int]] = field(default_factory=list)  # token ids, the end token included
    counts: Counter[str] = field(default_factory=Counter)  # rows, taught, and every reason


@dataclass(frozen=True)
class ChainSettings:
    """How chains are read: `data.max_response_length`, `data.long_chains` and two folders."""

    max_response_length: int
    long_chains: str = "leave_out"
    audio_root: str | None = None
    annotation_root: str | None = None

    @classmethod
    def of(cls, data: Any) -> ChainSettings:
        """From a run's `data` block."""
        return cls(
            int(data["max_response_length"]),
            str(data.get("long_chains", "leave_out")),
            data.get("audio_root"),
            data.get("annotation_root"),
        )


def chains_of(
    files: str | Sequence[str] | None,
    data: Any,
    tokenizer: Any,
    limit: int = -1,
) -> list[Chains]:
    """The chains of each file, read with the settings of a run's `data` block."""
    if not files:
        return []

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    paths = [files] if isinstance(files, str) else list(files)
    settings = ChainSettings.of(data)
    return [read_chains(path, encode, tokenizer.eos_token_id, settings, limit) for path in paths]


def read_chains(
    path: str, encode: Encode, end: int, settings: ChainSettings, limit: int = -1
) -> Chains:
    """Rows of the Parquet file `path` with the responses that are taught, in the file's order.

    `end` is the token that ends a response; `limit` takes the first so many rows (-1: all). Raises
    `ChainError` where annotations are missing, are others than the rows were made from, or none
    is left to teach.
    """
    table = read_rows(path, root=settings.audio_root)
    rows: list[dict[str, Any]] = table.slice(0, limit if limit > 0 else None).to_pylist()
    roots = [settings.annotation_root] if settings.annotation_root else data_roots(path)
    answers: dict[str, dict[str, str]] = {}
    chains = Chains(path)
    chains.counts["rows"] = len(rows)
    reasonings: list[str] = []
    for row in rows:
        info = row["extra_info"]
        split = info["split"]
        if split not in answers:
            answers[split] = annotated_answers(roots, split)
        answer = answers[split].get(info["id"])
        if answer is None or len(answer.split()) != info["reference_words"]:
            raise ChainError(
                f"{path}: row {split}/{info['id']} "
                + ("has no annotation" if answer is None else "was made from another annotation")
                + f" in {roots[0]}; run soundmind.preprocess again, or set data.annotation_root"
            )
        try:
            reasonings.append(taught_reasoning(answer, info["label"]))
        except LeftOutError as reason:
            chains.counts[reason.reason] += 1
        else:
            chains.rows.append(row)
    _encode_within_budget(chains, reasonings, encode, end, settings)
    chains.counts["taught"] = len(chains.rows)
    if not chains.rows:
        raise ChainError(f"{path}: nothing is left to teach: {describe_counts(chains.counts)}")
    return chains


def annotated_answers(roots: Sequence[str], split: Any) -> dict[str, str]:
    """Annotated answers of a split by row id, from the first folder of `roots` that has them.

    Faulty lines, which made no row, are not among them.
    """
    for root in roots:
        try:
            source = find_split(Path(root), split)
        except SourceError:
            if root == roots[-1]:
                raise
        else:
            break
    candidates = (read_candidate(line, source, "text", False) for line in read_lines(source))
    return {found.row_id: found.annotation["answer"] for found in candidates if found.annotation}


def _encode_within_budget(
    chains: Chains, reasonings: list[str], encode: Encode, end: int, settings: ChainSettings
) -> None:
    """Fill `chains.responses`; rows beyond the budget go, are cut, or are an error."""
    labels = [row["extra_info"]["label"] for row in chains.rows]
    texts = [taught_text(text, label) for text, label in zip(reasonings, labels, strict=True)]
    kept = []
    for row, label, ids in zip(chains.rows, labels, encode(texts), strict=True):
        ids = [*ids, end]
        if len(ids) > settings.max_response_length:
            info = row["extra_info"]
            if settings.long_chains == "error":
                raise ChainError(
                    f"{chains.path}: row {info['split']}/{info['id']} needs {len(ids)} tokens and "
                    f"data.max_response_length is {settings.max_response_length}; raise it, or set "
                    "data.long_chains to leave_out or cut"
                )
            if settings.long_chains == "leave_out":
                chains.counts["too_long"] += 1
                continue
            # The verdict stays and the end of the reasoning goes: a response without a close would
            # teach never to come to one.
            closing = [*encode([taught_text("", label).removeprefix("<think>")])[0], end]
            ids = ids[: max(0, settings.max_response_length - len(closing))] + closing
            chains.counts["cut"] += 1
        kept.append(row)
        chains.responses.append(ids)
    chains.rows = kept


def describe_counts(counts: Counter[str] | dict[str, int]) -> str:
    """One line: `573 of 606 rows taught; left out: 33 contradicts_label`."""
    others = {name: n for name, n in counts.items() if name not in ("rows", "taught", "cut") and n}
    left = ", ".join(f"{count} {name}" for name, count in sorted(others.items()))
    cut = f"; {counts['cut']} cut at the budget" if counts.get("cut") else ""
    return (
        f"{counts.get('taught', 0)} of {counts['rows']} rows taught"
        + (f"; left out: {left}" if left else "")
        + cut
    )
