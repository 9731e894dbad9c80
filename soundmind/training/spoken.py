"""Which rollouts are spoken in a step, and what their speech earns. No torch, no verl.

The reward of a spoken rollout is `compute_score` once more, with its speech in the row. Siblings are
compared with each other, so a group is graded on speech as a whole or not at all: one row that
could not be spoken takes both audio terms from its group, weight and all, and is counted.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FAILED_SHARE = 0.1  # of a step's rows; twice running, the run stops
SPEECH_COLUMNS = ("speech_tokens", "speech_seconds", "speech_transcript")  # the reward reads these


class SpeechFailed(RuntimeError):
    """Too much of the speech failed; the message names the first cause."""


def answer_seed(*what: object) -> int:
    """A seed of 62 bits that depends on `what` alone: run seed, step, row, session."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def chosen_groups(groups: Mapping[str, str], share: float, *what: object) -> set[str]:
    """The share of `groups`, group to row id, that is spoken: at least one, drawn by `what`."""
    ordered = sorted(groups, key=lambda group: (answer_seed(*what, groups[group]), group))
    return set(ordered[: max(1, round(share * len(ordered)))])


@dataclass
class Spoken:
    """Speech of a step's rollouts by key, with what became of it."""

    rows: dict[str, dict[str, Any]]
    groups: dict[str, str]  # key of a rollout to its group
    failed_groups: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.failed_groups = {
            self.groups[key] for key, row in self.rows.items() if "speech_error" in row
        }

    def terms(self, key: str) -> dict[str, Any]:
        """What the reward sees of a rollout's speech; nothing where its group lost the terms."""
        row = self.rows.get(key, {})
        if not row or self.groups[key] in self.failed_groups:
            return {}
        return {name: row[name] for name in SPEECH_COLUMNS if name in row}

    def record(self, key: str) -> dict[str, Any]:
        """What a dump shows of it."""
        row = self.rows.get(key, {})
        return {
            **{
                name: row[name]
                for name in ("speech_ended", "speech_error", "codes_digest")
                if name in row
            },
            **self.terms(key),
        }

    @property
    def first_error(self) -> str | None:
        return next((r["speech_error"] for r in self.rows.values() if "speech_error" in r), None)

    @property
    def failed_share(self) -> float:
        failed = sum("speech_error" in row for row in self.rows.values())
        return failed / max(1, len(self.rows))

    def metrics(self, tokens: Mapping[str, int], words: Mapping[str, int]) -> dict[str, float]:
        """`speech/*` of a step; `tokens` and `words` of the responses by key."""
        said = {key: row for key, row in self.rows.items() if "speech_tokens" in row}
        codes = [row["speech_tokens"] for row in said.values()]
        found: dict[str, float] = {
            "speech/rows": len(self.rows),
            "speech/failed": sum("speech_error" in row for row in self.rows.values()),
            "speech/failed_groups": len(self.failed_groups),
        }
        if said:
            seconds = sum(row["speech_seconds"] for row in said.values())
            found |= {
                "speech/codes/mean": statistics.fmean(codes),
                "speech/codes/max": max(codes),
                "speech/codes_per_token": sum(codes) / max(1, sum(tokens[key] for key in said)),
                "speech/seconds_per_word": seconds / max(1, sum(words[key] for key in said)),
                "speech/ended": statistics.fmean(r["speech_ended"] for r in said.values()),
            }
            correlation = pearson(codes, [tokens[key] for key in said])
            if correlation is not None:
                found["speech/length_correlation"] = correlation
        at_once = [row["rows_at_once"] for row in self.rows.values() if "rows_at_once" in row]
        if at_once:
            found["speech/rows_at_once"] = max(at_once)
        times: dict[str, float] = defaultdict(float)
        for row in self.rows.values():
            for part, seconds in row.get("timing", {}).items():
                times[part] = max(times[part], seconds)  # of the slowest rank
        return found | {f"timing_s/speech/{part}": value for part, value in times.items()}


def pearson(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The correlation of two columns; None where one of them does not vary."""
    try:
        value = statistics.correlation(first, second)
    except statistics.StatisticsError:
        return None
    return value if math.isfinite(value) else None


class Patience:
    """Stops a run whose speech fails for more than `FAILED_SHARE` of the rows twice running."""

    def __init__(self) -> None:
        self._before = False

    def see(self, spoken: Spoken) -> None:
        """Raises `SpeechFailed` with the first cause of the second such step."""
        bad = spoken.failed_share > FAILED_SHARE
        if bad and self._before:
            raise SpeechFailed(
                f"speech failed for {100 * spoken.failed_share:.0f} % of this step's rollouts, and "
                f"for more than {100 * FAILED_SHARE:.0f} % of the step before. The first cause: "
                f"{spoken.first_error}"
            )
        self._before = bad


def group_ids(keys: Iterable[str]) -> dict[str, str]:
    """Key of a rollout, `{uid}_{session}_{output}`, to the uid of its prompt."""
    return {key: key.rsplit("_", 2)[0] for key in keys}
