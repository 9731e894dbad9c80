"""What of a teacher's answers is kept, and what a teacher that misbehaves costs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own_triples import own_triples
from scripted_server import ScriptedServer, completion, teacher

from soundmind.making.reasoning import (
    Reasoned,
    Settings,
    ask_rows,
    estimate,
    find_fault,
    full_text,
)
from soundmind.making.words import Wording
from soundmind.system.chat import BudgetReached, Client, Completion, Prices
from soundmind.system.errors import UserError
from soundmind.system.journal import Journal

WORDING = Wording.load()
REASONS = (
    "Let us think about it step by step. The first premise speaks of all of them, the second one of "
    "a single case, and the case is among those of which the first one speaks. So what holds for all "
    "of them holds for this one, too, and there is no way around it as far as I can see."
)
GOOD = f"{REASONS}\n\nAnswer: entailed."


def fault_of(text: str, label: int = 1, **fields: Any) -> str | None:
    """Verdict of the stage on one answer of a teacher called m."""
    answer = Completion(**{"text": text, "finish_reason": "stop", "model": "m", **fields})
    return find_fault(answer, label, Settings(), WORDING, "m")


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD.replace("entailed.", "entailed"),
        f"<think>{REASONS}</think>\nAnswer: entailed",
        GOOD.replace("Let us", "About 3 < 5, and 50 % of it; A & B, so let us"),
        GOOD + "\n",
    ],
)
def test_an_answer_that_can_be_spoken_and_agrees_is_kept(text: str) -> None:
    assert fault_of(text) is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (GOOD.replace("step", "**step**"), "markup"),
        (f"# Thoughts\n{GOOD}", "markup"),
        (f"- one\n- two\n{GOOD}", "markup"),
        (f"1. one\n2. two\n{GOOD}", "markup"),
        (GOOD.replace("step", "`step`"), "markup"),
        (GOOD.replace("step", "$x_1 = 2$"), "markup"),
        (GOOD.replace("step", r"\frac{1}{2}"), "markup"),
        (GOOD.replace("step", "<b>step</b>"), "markup"),
        (GOOD.replace("step", "[step](http://x.org)"), "markup"),
        (f"| a | b |\n{GOOD}", "markup"),
        (GOOD.replace("step", "step \U0001f600"), "markup"),
        (REASONS, "no-verdict"),
        (f"{REASONS} It is entailed.", "no-verdict"),
        (f"{REASONS}\nAnswer: perhaps", "no-verdict"),
        (GOOD.replace("entailed.", "not entailed."), "wrong-verdict"),
        (f"Answer: entailed.\n{GOOD}", "no-single-closing-line"),
        (f"{GOOD}\nI hope this helps!", "no-single-closing-line"),
        ("I'm sorry, but I can't help with that.", "refused"),
        ("I cannot assist with this request.", "refused"),
        ("", "empty"),
        ("Answer: entailed.", "too-short"),
        (REASONS * 120 + "\n\nAnswer: entailed.", "too-long"),
        (GOOD.replace("step", "st\ufffdp"), "broken-text"),
        (
            "Alle Menschen sind sterblich, und weil Sokrates ein Mensch ist, muss auch er sterblich "
            "sein. Daran gibt es nichts zu deuteln, denn was für alle gilt, das gilt auch für einen "
            "von ihnen, und mehr ist hier gar nicht zu sagen. Also folgt der Schluss aus den beiden "
            "Voraussetzungen, wie man es auch drehen und wenden mag.\n\nAnswer: entailed.",
            "other-language",
        ),
    ],
)
def test_an_answer_that_breaks_a_rule_is_counted_by_its_reason(text: str, fault: str) -> None:
    assert fault_of(text) == fault


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"finish_reason": "length"}, "cut"),
        ({"finish_reason": "content_filter"}, "refused"),
        ({"refusal": "no"}, "refused"),
        ({"model": "m-mini"}, "model-changed"),
        ({"error": "timeout: no answer within 600 s"}, "timeout"),
        ({"error": "HTTP 500: sick"}, "server-error"),
    ],
)
def test_what_the_server_says_of_an_answer_counts(fields: dict[str, Any], fault: str) -> None:
    assert fault_of(GOOD, **fields) == fault


def test_a_thinking_that_comes_apart_is_part_of_the_answer() -> None:
    answer = Completion(text="Answer: entailed.", reasoning=f"{REASONS}\n")
    assert full_text(answer) == GOOD


def test_of_the_released_answers_those_against_their_label_are_told_apart(alr_dev: Path) -> None:
    faults = []
    for line in alr_dev.read_text("utf-8").splitlines():
        row = json.loads(line)
        faults.append(fault_of(row["answer"], row["label"]))
    assert faults.count("wrong-verdict") == 33
    assert faults.count(None) > 500 and "no-verdict" not in faults


# -- asking ---------------------------------------------------------------------------------------


def rows(count: int) -> list[dict[str, Any]]:
    """Rows as the stage before leaves them."""
    return [
        {
            "key": f"k{i}",
            "where": f"x:{i}",
            "label": t["label"],
            "user_content": WORDING.question((t["major"], t["minor"], t["conclusion"])),
        }
        for i, t in enumerate(own_triples(count))
    ]


def ask(
    server: ScriptedServer, folder: Path, count: int, settings: Settings | None = None, **keys: Any
) -> Reasoned:
    """The stage on `count` rows."""
    with Journal(folder / "teacher.jsonl") as journal:
        client = Client(server.url, "m", journal=journal, first_pause=0.01, **{"tries": 2, **keys})

        async def run() -> Reasoned:
            async with client:
                return await ask_rows(rows(count), client, WORDING, settings or Settings())

        return asyncio.run(run())


def test_a_row_is_asked_until_an_answer_is_kept_and_other_tries_are_counted(
    tmp_path: Path,
) -> None:
    with ScriptedServer(teacher) as server:
        result = ask(server, tmp_path, 60)
    assert len(result.answers) + len(result.dropped) == 60 and len(result.answers) >= 58
    assert result.faults["wrong-verdict"] == len(server.bodies) - len(result.answers) > 0
    assert len({body["seed"] for body in server.bodies}) == len(server.bodies)


def test_a_row_whose_tries_are_all_in_vain_is_dropped_with_each_reason(tmp_path: Path) -> None:
    replies = iter(["no verdict here", "**bold**\nAnswer: entailed.", "Answer: not entailed."])
    with ScriptedServer(lambda _: next(replies)) as server:
        result = ask(server, tmp_path, 1)
    dropped = result.dropped[0]
    assert (dropped.where, dropped.reason) == ("x:0", "wrong-verdict")
    assert dropped.detail == "tries: no-verdict, markup, wrong-verdict"


def test_a_teacher_that_changes_its_name_is_not_kept_from_then_on(tmp_path: Path) -> None:
    asked = []

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        asked.append(body)
        body = {**body, "seed": 1}
        return completion(teacher(body), body, model="m-1" if len(asked) <= 10 else "m-2")

    with ScriptedServer(reply) as server:
        result = ask(server, tmp_path, 12, Settings(tries=1), concurrency=1)
        assert len(result.answers) == 10
        assert {item.reason for item in result.dropped} == {"model-changed"}
        # Neither is it by the next run, which has the first name from the journal.
        assert ask(server, tmp_path, 13, Settings(tries=1)).faults == {"model-changed": 3}


@pytest.mark.parametrize(
    "reply",
    [lambda _: "I'm sorry, I can't.", lambda _: (400, "max_tokens is too large"), lambda _: "?"],
)
def test_a_teacher_that_gives_nothing_usable_is_given_up_soon(
    reply: Callable[[Any], Any], tmp_path: Path
) -> None:
    with ScriptedServer(reply) as server, pytest.raises(UserError, match="10 answers in a row"):
        ask(server, tmp_path, 200, Settings(patience=10), concurrency=4)
    assert len(server.bodies) < 20


def test_another_limit_judges_the_same_answers_anew_and_asks_nothing(tmp_path: Path) -> None:
    with ScriptedServer(teacher) as server:
        ask(server, tmp_path, 10)
        asked = len(server.bodies)
        result = ask(server, tmp_path, 10, Settings(min_words=5000, patience=99, tries=1))
        assert len(server.bodies) == asked
    assert {item.reason for item in result.dropped} <= {"too-short", "wrong-verdict"}


def test_a_budget_that_is_reached_keeps_what_was_answered(tmp_path: Path) -> None:
    from soundmind.system.chat import Budget

    settings = Settings(max_tokens=200)
    with ScriptedServer(teacher) as server:
        with pytest.raises(BudgetReached):
            ask(server, tmp_path, 60, settings, budget=Budget(tokens=8_000), concurrency=2)
        asked = len(server.bodies)
        assert 10 < asked < 45
        assert len(ask(server, tmp_path, 60, settings).answers) >= 58
        assert len(server.bodies) < 80  # and those are not asked again


def test_what_it_will_cost_is_known_before_and_shrinks_with_what_is_answered(
    tmp_path: Path,
) -> None:
    with ScriptedServer(teacher) as server:
        ask(server, tmp_path, 10)
        with Journal(tmp_path / "teacher.jsonl") as journal:
            client = Client(server.url, "m", journal=journal, prices=Prices(1, 2))
            left, likely, most = estimate(rows(30), client, WORDING, Settings())
    assert left == 20 and likely.requests == 20 and most.requests == 60
    assert 60 < likely.completion_tokens / 20 < 120  # as those before
    assert most.cost > likely.cost > 0


def test_another_model_in_the_same_folder_is_asked_anew_and_has_a_name_of_its_own(
    tmp_path: Path,
) -> None:
    with ScriptedServer(teacher) as server:
        for model in ("m", "other"):
            with Journal(tmp_path / "teacher.jsonl") as journal:
                client = Client(server.url, model, journal=journal, prices=Prices(1, 1))

                async def run(client: Client = client) -> Reasoned:
                    async with client:
                        return await ask_rows(rows(10), client, WORDING, Settings())

                result = asyncio.run(run())
            assert len(result.answers) >= 9 and "model-changed" not in result.faults
        # What the first one cost does not change with the price of the second.
        with Journal(tmp_path / "teacher.jsonl") as journal:
            later = Client(server.url, "other", journal=journal, prices=Prices(100, 100))
        assert later.usage.cost == pytest.approx(client.usage.cost) and later.usage.cost > 0


def test_more_can_be_put_into_the_request_and_taken_out_of_it(tmp_path: Path) -> None:
    extra = {"max_completion_tokens": 9, "max_tokens": None, "reasoning_effort": "low"}
    with ScriptedServer(teacher) as server:
        ask(server, tmp_path, 1, Settings(extra=extra))
        body = server.bodies[0]
    assert "max_tokens" not in body
    assert (body["max_completion_tokens"], body["reasoning_effort"]) == (9, "low")
