"""Stage 3: a teacher reasons through each question; what agrees with the label and can be spoken stays.

A row is asked up to `tries` times, each with a seed of its own, until an answer is kept. An answer is
kept where it ends, once, with the verdict of the label, is plain text that can be read out, and is
neither cut nor too short nor too long. Where a server returns its thinking apart from the text, or in
<think> tags, the answer is both, as in the released rows. Judged anew in every run, so other limits
cost nothing; what was asked is asked once (soundmind.system.chat).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from soundmind.making.near import words_of
from soundmind.making.triples import Dropped, other_language
from soundmind.making.words import Wording
from soundmind.system.chat import Client, Completion, Usage, run_all
from soundmind.system.errors import UserError
from soundmind.task.labels import label_of, split_response

EXPECTED_TOKENS = (
    1_424  # of an answer, for the estimate shown before anything is asked; [paper] table 3
)

_THINK_TAGS = re.compile(r"\s*</?think>\s*")
_REFUSAL = re.compile(
    r"^\W*(?:i['\u2019]?m (?:very )?sorry|sorry|i (?:can(?:no|['\u2019])?t|am unable)|as an ai)",
    re.I,
)
_MARKUP = re.compile(
    r"\*\*|__|`|^\s{0,3}#{1,6}\s|^\s*[-*\u2022+]\s|^\s*\|.*\||^\s*(?:-{3,}|={3,}|\*{3,})\s*$"  # markdown
    r"|^\s*\d{1,2}[.)]\s|\]\(|^>\s"
    r"|\\[A-Za-z()\[\]{]|\$[^$\n]*[\\^_=][^$\n]*\$"  # LaTeX
    r"|</?[A-Za-z][^<>\n]*>|&[a-z]+;"  # HTML
    r"|[\U0001F000-\U0001FAFF\u2600-\u27BF\uFE0F]",  # emoji
    re.MULTILINE,
)


@dataclass(frozen=True)
class Settings:
    """How a row is asked, and what is kept."""

    tries: int = 3
    max_tokens: int = 8192
    temperature: float = 0.6
    seed: int = 0
    min_words: int = 50
    max_words: int = 6000
    reported_model: str | None = None  # as the server calls itself; None: as in its first answer
    extra: Mapping[str, Any] = field(default_factory=dict)  # into the body; null takes a key out
    patience: int = 50  # answers in a row that are not kept before the stage stops

    def request(self, wording: Wording, key: str, question: str, attempt: int) -> dict[str, Any]:
        """Arguments of `Client.chat` for one try of one row."""
        digest = hashlib.sha256(f"{self.seed} {key} {attempt}".encode()).digest()
        return {
            "messages": [
                {"role": "system", "content": wording.teacher},
                {"role": "user", "content": question},
            ],
            "max_tokens": self.max_tokens,
            "extra": self.extra,
            "temperature": self.temperature,
            "seed": int.from_bytes(digest[:4], "big") >> 1,
        }


def full_text(answer: Completion) -> str:
    """Thinking and text as one, without tags."""
    parts = [part.strip() for part in (answer.reasoning, answer.text)]
    return _THINK_TAGS.sub("\n\n", "\n\n".join(part for part in parts if part)).strip()


def find_fault(
    answer: Completion, label: int, settings: Settings, wording: Wording, model: str
) -> str | None:
    """Why an answer is not kept, as it is counted; None if it is."""
    if answer.error is not None:
        return "timeout" if answer.error.startswith("timeout") else "server-error"
    text = full_text(answer)
    if answer.refusal or answer.finish_reason == "content_filter":
        return "refused"
    if answer.model != model:
        return "model-changed"
    if answer.finish_reason == "length":
        return "cut"
    if not text:
        return "empty"
    response = split_response(text)
    if response.verdict is None:
        return "refused" if _REFUSAL.search(text) else "no-verdict"
    if label_of(response.verdict) != label:
        return "wrong-verdict"
    if not response.closes_with_verdict:
        return "no-single-closing-line"
    if _MARKUP.search(text):
        return "markup"
    if "\ufffd" in text or any("\ud800" <= character <= "\udfff" for character in text):
        return "broken-text"
    num_words = len(words_of(text))
    if num_words < settings.min_words:
        return "too-short"
    if num_words > settings.max_words:
        return "too-long"
    return "other-language" if other_language([text], wording.language) else None


@dataclass
class Reasoned:
    """What the stage made."""

    answers: dict[str, str] = field(default_factory=dict)  # by row key
    dropped: list[Dropped] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)  # of single answers


async def ask_rows(
    rows: Sequence[dict[str, Any]],
    client: Client,
    wording: Wording,
    settings: Settings,
    on_done: Callable[[], object] = lambda: None,
) -> Reasoned:
    """Ask for all rows ({key, where, user_content, label}); raises what the client raises."""
    result = Reasoned()
    model = settings.reported_model or ""
    if not model and client.journal is not None:
        model = first_model(client)
    in_vain = 0

    async def ask(row: dict[str, Any]) -> None:
        nonlocal model, in_vain
        faults: list[str] = []
        for attempt in range(settings.tries):
            answer = await client.chat(
                **settings.request(wording, row["key"], row["user_content"], attempt)
            )
            if not model and answer.error is None:
                model = answer.model
            fault = find_fault(answer, row["label"], settings, wording, model)
            if fault is None:
                result.answers[row["key"]] = full_text(answer)
                in_vain = 0
                break
            faults.append(fault)
            result.faults[fault] += 1
            in_vain += 1
            if in_vain >= settings.patience:
                counted = ", ".join(f"{n} {name}" for name, n in result.faults.most_common())
                said = answer.error or f"{answer.model}: {full_text(answer)[-150:]!r}"
                raise UserError(
                    f"{in_vain} answers in a row were not kept ({counted}); the last: {said}. Mend the "
                    "teacher or its instruction, or raise --patience; what was answered is kept"
                )
        else:
            result.dropped.append(
                Dropped(row["key"], row["where"], faults[-1], "tries: " + ", ".join(faults))
            )
        on_done()

    await run_all(ask, rows, client.concurrency)
    return result


def first_model(client: Client) -> str:
    """How the server called itself in the first answer of the model that is asked."""
    entries = client.journal.entries.values() if client.journal else ()
    found = (entry for entry in entries if entry["answer"] and entry["asked"] == client.model)
    return next((str(entry["answer"]["model"]) for entry in found), "")


def estimate(
    rows: Sequence[dict[str, Any]], client: Client, wording: Wording, settings: Settings
) -> tuple[int, Usage, Usage]:
    """Rows still to be asked; what a first try of each probably takes, and what all tries can."""
    left, likely, most = 0, Usage(), Usage()
    answered = (
        [e["answer"] for e in client.journal.entries.values() if e["answer"]]
        if client.journal
        else []
    )
    expected = EXPECTED_TOKENS
    if answered:
        expected = round(sum(a["completion_tokens"] for a in answered) / len(answered))
    for row in rows:
        request = settings.request(wording, row["key"], row["user_content"], 0)
        if client.is_kept(**request):
            continue
        left += 1
        written, tries = len((wording.teacher + row["user_content"]).encode()), settings.tries
        likely.add(client.prices.used(written // 4, min(expected, settings.max_tokens)))
        most.add(client.prices.used(tries * written, tries * settings.max_tokens, tries))
    return left, likely, most
