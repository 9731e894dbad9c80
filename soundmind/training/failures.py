"""Responses that failed: none of them reaches an update, and too many end the run.

verl logs a session that raises and trains on whatever is left. Left alone, a single survivor of a
group would get its raw score for an advantage, and a reward whose component raised would count 0, as
if the response had earned nothing. Here every failure is noted in a partition of its own in
TransferQueue, with its cause; the trainer takes the notes with the step's batch. [ours]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import transfer_queue as tq

from soundmind.system.errors import UserError

FAILURES = "failures"
CAUSE, SCORED = "cause", "scored"
CAUSE_CHARACTERS = 300


class ScoreError(RuntimeError):
    """A response whose reward could not be computed; the message is the cause."""


class FailedResponsesError(UserError):
    """More responses failed than `train.max_failed_share` allows; the message names the cause."""


@dataclass(frozen=True)
class Failures:
    """What failed in a step or a validation: causes by frequency, and how many were scores."""

    causes: Counter[str]
    scores: int = 0

    @property
    def count(self) -> int:
        return self.causes.total()


async def note(uid: str, session: int, error: BaseException) -> None:
    """Say that session `session` of prompt `uid` failed."""
    cause = f"{type(error).__name__}: {' '.join(str(error).split())}"[:CAUSE_CHARACTERS]
    await tq.async_kv_put(
        key=f"{uid}_{session}",
        partition_id=FAILURES,
        tag={CAUSE: cause, SCORED: isinstance(error, ScoreError)},
    )


def take() -> Failures:
    """What was noted since the last call."""
    noted = tq.kv_list(FAILURES).get(FAILURES, {})
    if noted:
        tq.kv_clear(keys=list(noted), partition_id=FAILURES)
    causes = Counter(str(tag[CAUSE]) for tag in noted.values())
    return Failures(causes, sum(bool(tag[SCORED]) for tag in noted.values()))


def require_few(failures: Failures, asked: int, share: float, where: str) -> None:
    """Raise `FailedResponsesError` if more than `share` of the responses `asked` for failed."""
    if failures.count <= share * asked:
        return
    cause, times = failures.causes.most_common(1)[0]
    raise FailedResponsesError(
        f"{where}: {failures.count} of {asked} responses failed ({failures.count / asked:.1%}), more "
        f"than train.max_failed_share={share:g} allows. Most often ({times} times): {cause}. Mend it "
        "and start the same command again, which continues from the last checkpoint; or train on "
        "without such responses with a higher train.max_failed_share"
    )


def broken_groups(keys: Sequence[str], at_least: int) -> list[str]:
    """Keys, `{uid}_{session}_{output}`, of groups with fewer than `at_least` sessions left."""
    sessions: dict[str, set[str]] = {}
    for key in keys:
        uid, session, _ = key.rsplit("_", 2)
        sessions.setdefault(uid, set()).add(session)
    return [key for key in keys if len(sessions[key.rsplit("_", 2)[0]]) < at_least]
