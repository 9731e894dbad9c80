"""Faults that only show over a whole split, and rows that are left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from soundmind.data.job import Job, ScannedSplit
from soundmind.data.scan import major_premise, text_digest
from soundmind.data.sources import Fault, find_split, read_candidate, read_lines
from soundmind.task.schema import SPLITS, Split

if TYPE_CHECKING:
    import pyarrow as pa


def judge(scanned: dict[Split, ScannedSplit], job: Job) -> list[Fault]:
    """Add the faults that only show over a whole split, set `keep`; all faults in file order."""
    every = []
    for scan in scanned.values():
        scan.keep = np.ones(len(scan.rows), dtype=bool)
        _judge_duplicates(scan)
        _judge_shared_clips(scan)
        _judge_missing_answers(scan)
        place = {where: line for line, where, _ in scan.faulty}
        place.update(
            zip(*(scan.rows[name].to_pylist() for name in ("_where", "_line")), strict=True)
        )
        scan.faults.sort(key=lambda fault: (place[fault.where], fault.kind, fault.detail))
        every += scan.faults
    return every


def _judge_duplicates(scan: ScannedSplit) -> None:
    """The second and later lines with an id are faults, whatever else is wrong with either."""
    good = zip(*(scan.rows[name].to_pylist() for name in ("_line", "_where", "id")), strict=True)
    entries = [(line, where, row_id, index) for index, (line, where, row_id) in enumerate(good)]
    entries += [(line, where, row_id, -1) for line, where, row_id in scan.faulty if row_id]
    first: dict[str, str] = {}
    for _, where, row_id, index in sorted(entries):
        if row_id not in first:
            first[row_id] = where
            continue
        row = f"{scan.source.split}/{row_id}"
        scan.faults.append(Fault("duplicate-id", where, row, f"id is taken by {first[row_id]}"))
        if index >= 0:
            scan.keep[index] = False


def _judge_shared_clips(scan: ScannedSplit) -> None:
    """One clip is one question: rows that name it for different texts are all faults.

    Rows of one id, which share a clip's folder, are judged before.
    """
    names = ("_clip", "_question_digest", "_where", "id")
    rows = list(zip(*(scan.rows[name].to_pylist() for name in names), strict=True))
    users: dict[str, list[int]] = {}
    for index, (clip, *_) in enumerate(rows):
        if clip is not None and scan.keep[index]:
            users.setdefault(clip, []).append(index)
    for clip, indices in users.items():
        if len({rows[index][1] for index in indices}) == 1:
            continue
        places = ", ".join(rows[index][2] for index in indices[:3])
        for index in indices:
            _, _, where, row_id = rows[index]
            row = f"{scan.source.split}/{row_id}"
            detail = f"{clip} is named for {len(indices)} rows with different questions ({places})"
            scan.faults.append(Fault("shared-clip", where, row, detail))
            scan.keep[index] = False


def _judge_missing_answers(scan: ScannedSplit) -> None:
    """A split has recorded answers or has none; with some, every row without one is a fault."""
    missing = np.flatnonzero(scan.rows["_answer_missing"].to_numpy())
    if len(missing) in (0, len(scan.rows)):
        return
    for index in missing.tolist():
        row_id, label, where = (
            scan.rows[name][index].as_py() for name in ("id", "label", "_where")
        )
        scan.keep[index] = False
        scan.faults.append(
            Fault(
                "missing-clip",
                where,
                f"{scan.source.split}/{row_id}",
                f"{scan.source.split}/{row_id}/answer_{label}.wav not found, though other rows "
                "have theirs (--questions-only does without)",
            )
        )


def drop_overlap(scanned: dict[Split, ScannedSplit], job: Job) -> None:
    """Leave out of train what is in dev or test, then out of dev what is in test."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for position, split in enumerate(SPLITS[:-1]):
        if split not in scanned:
            continue
        scan = scanned[split]
        for later in SPLITS[position + 1 :]:
            mine, theirs = scan.rows[f"_{job.drop_overlap}_digest"], _digests(scanned, later, job)
            shared = pc.is_in(mine, value_set=theirs, skip_nulls=True).to_numpy() & scan.keep
            scan.keep &= ~shared
            scan.overlap_dropped += scan.rows["id"].filter(pa.array(shared)).to_pylist()


def _digests(scanned: dict[Split, ScannedSplit], split: Split, job: Job) -> pa.Array:
    """Digests of a split's texts; of the annotation file where the split is not in this run."""
    import pyarrow as pa

    if split in scanned:
        return scanned[split].rows[f"_{job.drop_overlap}_digest"].unique()
    source = find_split(job.root, split)  # a comparison that cannot be made is an error
    found = []
    for line in read_lines(source):
        annotation = read_candidate(line, source, "text", with_answers=False).annotation
        if annotation is not None:
            text: str | None = annotation["user_content"]
            if job.drop_overlap == "premise":
                text = major_premise(annotation["user_content"])
            found += [text_digest(text)] if text is not None else []
    return pa.array(found, pa.binary(16))
