"""Stage 1: logic triples from several sources, checked, free of duplicates and of leakage.

    LogiQA 2.0 NLI   {"major_premise": text or list, "minor_premise", "conclusion", "label"}
    ConTRoL, LogiQA 2.0 NLI (new)   {"premise", "hypothesis", "label"}: the last sentence is the minor
    FOLIO            {"premises": list or lines, "conclusion", "label"}: the last one is the minor
    plain            {"major", "minor", "conclusion", "label"}
    released rows    {"user_content", "label"}, taken apart by the template

The kind is seen line by line. Every label but entailment is not-entailed. A row that cannot be used
is dropped with its place and a reason; nothing raises over a row.
"""
# ruff: noqa: RUF001

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from soundmind.making.near import are_alike, find_alike, pairs_of, plain, words_of
from soundmind.making.words import Parts, Wording
from soundmind.system.errors import UserError

LABELS = {
    **dict.fromkeys(("1", "entailed", "entailment", "entails", "e", "true"), 1),
    **dict.fromkeys(("0", "not entailed", "not entailment", "n", "c", "neutral"), 0),
    **dict.fromkeys(("contradiction", "false", "uncertain", "unknown"), 0),
}
_SENTENCES = re.compile(
    r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b(?:Mr|Ms|Dr|St|No|vs)\.)(?<!\bMrs\.)\s+|(?<=[。！？])\s*"
)
# Exam stems are shared by unrelated questions; they give nothing away.
_STEM = re.compile(r"[?？:：]\W*$|\bwhich of\b|\bthe followings?\b", re.IGNORECASE)
_MARGIN = 3.0  # log-likelihood a root of a byte; 20 to 1 for the other language, at any length
TELLING_WORDS = 10  # a sentence of so many words gives a held-out premise away that it is part of
LONGEST_PART = 20_000  # characters


@dataclass(frozen=True)
class Triple:
    """One row of this stage."""

    key: str  # of the parts: the same triple has the same key in every run
    parts: Parts
    label: int
    where: str  # "my/triples.jsonl:12"
    split: str = "train"


@dataclass(frozen=True)
class Dropped:
    """A row that is not in the set, and why."""

    key: str
    where: str
    reason: str  # what is counted
    detail: str = ""


def read(
    path: Path, wording: Wording, needs_label: bool = True
) -> tuple[list[Triple], list[Dropped]]:
    """Triples of one JSON lines file, and the lines that hold none."""
    if not path.is_file():
        raise UserError(f"{path} is no file; --source and --exclude take JSON lines files")
    found: list[Triple] = []
    dropped: list[Dropped] = []
    with path.open("rb") as lines:
        for number, data in enumerate(lines, 1):
            where = f"{path}:{number}"
            if not data.strip():
                continue
            try:
                parts, label = _read_line(data.removeprefix(b"\xef\xbb\xbf"), wording, needs_label)
            except _Unusable as error:
                dropped.append(Dropped("", where, error.reason, str(error)))
                continue
            found.append(Triple(key_of(parts), parts, label, where))
    return found, dropped


def key_of(parts: Parts) -> str:
    """The triple's key."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class _Unusable(ValueError):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _read_line(data: bytes, wording: Wording, needs_label: bool) -> tuple[Parts, int]:
    try:
        record = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _Unusable("broken-line", str(error)[:200]) from error
    if not isinstance(record, dict):
        raise _Unusable("broken-line", f"a {type(record).__name__}, expected an object")
    parts = next((read(record, wording) for keys, read in _READERS if keys <= record.keys()), None)
    if parts is None:
        raise _Unusable("missing-part", f"fields {sorted(record)}: no kind of triple has these")
    for name, part in zip(("major premise", "minor premise", "conclusion"), parts, strict=True):
        if not isinstance(part, str) or not plain(part):
            raise _Unusable("missing-part", f"{name} is empty or no text: {part!r}"[:200])
        if len(part) > LONGEST_PART or not _is_unicode(part):
            raise _Unusable("broken-text", f"{name} has {len(part)} characters or broken ones")
    written = str(record.get("label")).lower().replace("-", " ").replace("_", " ").strip()
    if written not in LABELS and needs_label:
        raise _Unusable("bad-label", f"label {record.get('label')!r}")
    return parts, LABELS.get(written, 0)


def _joined(value: object) -> Any:
    """LogiQA's list of sentences as a text."""
    if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return value
    texts = [item.strip() for item in value if item.strip()]
    return " ".join(t if t[-1] in ".!?;:,。" else f"{t}." for t in texts[:-1]) + (
        f" {texts[-1]}" if len(texts) > 1 else "".join(texts)
    )


def _from_passage(record: dict[str, Any], _: Wording) -> Any:
    premise = record["premise"]
    sentences = _SENTENCES.split(premise.strip()) if isinstance(premise, str) else [premise]
    major = " ".join(sentences[:-1]) if len(sentences) > 1 else ""
    return major, sentences[-1], record["hypothesis"]


def _from_premises(record: dict[str, Any], _: Wording) -> Any:
    premises = record["premises"]
    lines = premises.splitlines() if isinstance(premises, str) else premises
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        return "", "", record["conclusion"]
    lines = [line.strip().removeprefix("[BG]").strip() for line in lines if line.strip()]
    return _joined(lines[:-1]), lines[-1] if lines else "", record["conclusion"]


def _from_question(record: dict[str, Any], wording: Wording) -> Any:
    question = record.get("user_content", record.get("annotation_question"))
    parts = wording.parts(question) if isinstance(question, str) else None
    if parts is None:
        raise _Unusable("missing-part", "the question is not made by the wording's template")
    return parts


def _named(*names: str) -> tuple[set[str], Callable[[dict[str, Any], Wording], Any]]:
    return set(names), lambda record, _: tuple(_joined(record[name]) for name in names)


_READERS: list[tuple[set[str], Callable[[dict[str, Any], Wording], Any]]] = [
    _named("major", "minor", "conclusion"),
    _named("major_premise", "minor_premise", "conclusion"),
    _named("major premise", "minor premise", "conclusion"),
    ({"premises", "conclusion"}, _from_premises),
    ({"premise", "hypothesis"}, _from_passage),
    ({"user_content"}, _from_question),
    ({"annotation_question"}, _from_question),
]


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


# -- which rows stay ------------------------------------------------------------------------------


def keep_usable(
    triples: Sequence[Triple], held_out: Sequence[Triple], language: str
) -> tuple[list[Triple], list[Dropped]]:
    """Rows in the wanted language, once each, with nothing of `held_out` in them."""
    dropped: list[Dropped] = []

    def drop(triple: Triple, reason: str, detail: str = "") -> None:
        dropped.append(Dropped(triple.key, triple.where, reason, detail))

    by_text: dict[str, list[Triple]] = defaultdict(list)
    for triple in triples:
        other = other_language(triple.parts, language)
        if other:
            drop(triple, "other-language", f"looks like {other!r}")
        else:
            by_text["\n".join(map(plain, triple.parts))].append(triple)
    unique: list[Triple] = []
    for same in by_text.values():
        if len({triple.label for triple in same}) > 1:
            places = ", ".join(triple.where for triple in same)
            for triple in same:
                drop(triple, "both-labels", f"the same triple with both labels: {places}")
            continue
        unique.append(same[0])
        for triple in same[1:]:
            drop(triple, "duplicate", f"as {same[0].where}")
    leaks = _leaks(unique, held_out)
    for i, (reason, other) in leaks.items():
        drop(unique[i], reason, f"as {other}")
    kept = [triple for i, triple in enumerate(unique) if i not in leaks]
    near = _near_duplicates(kept)
    for i, j in near.items():
        drop(kept[i], "near-duplicate", f"as {kept[j].where}")
    return [triple for i, triple in enumerate(kept) if i not in near], dropped


def _leaks(triples: Sequence[Triple], held_out: Sequence[Triple]) -> dict[int, tuple[str, str]]:
    """Rows that share a premise, or all, with a held-out row: their reason and that row's place."""
    texts, rows = _premises(triples, with_sentences=True)
    their_texts, their_rows = _premises(held_out, with_sentences=True)
    leaks: dict[int, tuple[str, str]] = {}
    for i, j in find_alike([*map(pairs_of, texts)], [*map(pairs_of, their_texts)]):
        for row in rows[i]:
            same = [
                r
                for r in their_rows[j]
                if plain(held_out[r].parts[2]) == plain(triples[row].parts[2])
            ]
            reason = "held-out-question" if same else "held-out-premise"
            if leaks.get(row, ("",))[0] != "held-out-question":
                leaks[row] = (reason, held_out[(same or their_rows[j])[0]].where)
    # Rows whose premises are nothing but exam stems are held together by their whole text.
    ours, theirs = ([pairs_of(*t.parts) for t in group] for group in (triples, held_out))
    for i, j in find_alike(ours, theirs):
        leaks.setdefault(i, ("held-out-question", held_out[j].where))
    return leaks


def _premises(
    triples: Sequence[Triple], with_sentences: bool = False
) -> tuple[list[str], list[list[int]]]:
    """Different premise texts, and the rows that have each: major, minor, both as one, and their
    longer sentences if wanted."""
    rows: dict[str, list[int]] = defaultdict(list)
    for index, triple in enumerate(triples):
        major, minor, _ = triple.parts
        stem = _STEM.search(minor) is not None or len(plain(minor).split()) < 3
        texts = [major] if stem else [major, minor, f"{major} {minor}"]
        if with_sentences:
            sentences = _SENTENCES.split(texts[-1])
            texts += [s for s in sentences if len(words_of(s)) >= TELLING_WORDS]
        for text in set(map(plain, texts)):
            rows[text].append(index)
    return list(rows), list(rows.values())


def _near_duplicates(triples: Sequence[Triple]) -> dict[int, int]:
    """Rows alike an earlier one in every part, label included; the earlier one.

    With the other label it is a pair of opposites, which teaches more than either.
    """
    result: dict[int, int] = {}
    # What is alike in every part is alike as a whole.
    for a, b in find_alike([pairs_of(*triple.parts) for triple in triples]):
        first, second = triples[a], triples[b]
        if first.label == second.label and a not in result:
            parts = zip(first.parts, second.parts, strict=True)
            if all(are_alike(pairs_of(mine), pairs_of(theirs)) for mine, theirs in parts):
                result.setdefault(b, a)
    return result


def other_language(parts: Sequence[str], language: str) -> str | None:
    """The language that the whole, or a single part, is clearly in instead; None if in none."""
    from py3langid import rank

    try:
        rank("")  # unpacks its model when first asked
    except OSError as error:
        raise UserError(
            f"the model that tells languages apart cannot be unpacked ({error}); make room in "
            f"{gettempdir()}, or name another folder with TMPDIR"
        ) from error
    for text, margin in ((" ".join(parts), _MARGIN), *((part, _MARGIN + 1) for part in parts)):
        scores = dict(rank(text))
        best = str(max(scores, key=scores.__getitem__))
        lead = scores[best] - scores.get(language.partition("_")[0], -math.inf)
        if lead > margin * math.sqrt(len(text.encode())):
            return best
    return None


# -- splits and labels ----------------------------------------------------------------------------


def assign_splits(triples: Sequence[Triple], shares: dict[str, float], seed: int) -> list[Triple]:
    """The same rows with their splits, in order; rows that share a premise are in the same one."""
    texts, rows = _premises(triples)
    parent = list(range(len(triples)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for group in rows:
        for row in group[1:]:
            parent[root(row)] = root(group[0])
    for i, j in find_alike([*map(pairs_of, texts)]):
        parent[root(rows[i][0])] = root(rows[j][0])
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(triples)):
        groups[root(index)].append(index)
    ordered = sorted(groups.values(), key=lambda group: triples[group[0]].key)
    random.Random(seed).shuffle(ordered)
    ordered.sort(key=len, reverse=True)  # large groups first: the small ones fill what is missing
    wanted = {split: share * len(triples) / sum(shares.values()) for split, share in shares.items()}
    chosen: dict[int, str] = {}
    for group in ordered:
        split = max(wanted, key=lambda name: wanted[name])
        wanted[split] -= len(group)
        chosen |= dict.fromkeys(group, split)
    return [replace(triple, split=chosen[i]) for i, triple in enumerate(triples)]


def balance(triples: Sequence[Triple], seed: int) -> tuple[list[Triple], list[Dropped]]:
    """As many rows of each label in every split; which go is drawn by seed."""
    dropped: list[Dropped] = []
    gone: set[str] = set()
    for split in sorted({triple.split for triple in triples}):
        sides = [[t for t in triples if t.split == split and t.label == label] for label in (0, 1)]
        more, less = sorted(sides, key=len, reverse=True)
        excess = random.Random(f"{seed} {split}").sample(more, len(more) - len(less))
        gone |= {triple.key for triple in excess}
    dropped = [Dropped(t.key, t.where, "balance") for t in triples if t.key in gone]
    return [triple for triple in triples if triple.key not in gone], dropped


def as_record(triple: Triple) -> dict[str, Any]:
    """One line of the stage's file."""
    return asdict(triple)


def from_record(record: dict[str, Any]) -> Triple:
    """The triple of one line of a stage's file."""
    values = {item.name: record[item.name] for item in fields(Triple)}
    return Triple(**{**values, "parts": tuple(record["parts"])})


def run(
    sources: Sequence[Path],
    exclude: Sequence[Path],
    wording: Wording,
    *,
    shares: dict[str, float],
    balanced: bool,
    limit: int | None,
    seed: int,
) -> tuple[list[Triple], list[Dropped]]:
    """The stage: read, select, split, balance."""
    found: list[Triple] = []
    dropped: list[Dropped] = []
    for path in sources:
        triples, bad = read(path, wording)
        found += triples
        dropped += bad
    held_out: list[Triple] = []
    for path in exclude:
        triples, bad = read(path, wording, needs_label=False)
        if bad:  # a comparison that cannot be made is an error
            raise UserError(
                f"{path}: {len(bad)} lines cannot be compared, first {bad[0].where}: {bad[0].reason}, "
                f"{bad[0].detail}. Mend them, or exclude another file"
            )
        held_out += triples
    kept, more = keep_usable(found, held_out, wording.language)
    dropped += more
    if limit is not None and len(kept) > limit:
        chosen = set(random.Random(seed).sample([t.key for t in kept], limit))
        dropped += [Dropped(t.key, t.where, "limit") for t in kept if t.key not in chosen]
        kept = [triple for triple in kept if triple.key in chosen]
    kept = assign_splits(kept, shares, seed)
    if balanced:
        kept, more = balance(kept, seed)
        dropped += more
    return kept, dropped


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a stage's file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
