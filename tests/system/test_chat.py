"""The client of OpenAI's protocol against a scripted server: retries, rate, budget, resume."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted_server import ENDLESS, ScriptedServer, completion

from soundmind.system import chat
from soundmind.system.chat import (
    Budget,
    BudgetReached,
    Client,
    Completion,
    Prices,
    ServerError,
    run_all,
)
from soundmind.system.journal import Journal, JournalError


def ask(server: ScriptedServer | str, questions: list[str], **settings: Any) -> list[Completion]:
    """One answer a question; a client that tries again at once."""
    url = server if isinstance(server, str) else server.url
    keys: dict[str, Any] = {"first_pause": 0.01, "tries": 3, **settings}

    async def all_answers() -> list[Completion]:
        async with Client(url, "m", **keys) as client:

            async def one(question: str) -> Completion:
                message = {"role": "user", "content": question}
                return await client.chat([message], max_tokens=20)

            return await run_all(one, questions, client.concurrency)

    return asyncio.run(all_answers())


def echo(body: dict[str, Any]) -> str:
    return "about " + body["messages"][-1]["content"]


def test_answers_come_in_the_order_of_the_questions_with_tokens_and_model() -> None:
    def slow_first(body: dict[str, Any]) -> str:
        time.sleep(0.2 if body["messages"][-1]["content"] == "0" else 0)
        return echo(body)

    with ScriptedServer(slow_first) as server:
        answers = ask(server, [str(i) for i in range(20)])
    assert [a.text for a in answers] == [f"about {i}" for i in range(20)]
    assert {(a.model, a.prompt_tokens, a.completion_tokens) for a in answers} == {("m", 100, 2)}


def test_as_many_requests_as_allowed_are_under_way_and_no_more() -> None:
    three_at_once = threading.Barrier(3, timeout=30)

    def reply(body: dict[str, Any]) -> str:
        three_at_once.wait()
        return echo(body)

    with ScriptedServer(reply) as server:
        ask(server, [str(i) for i in range(12)], concurrency=3)
        assert server.most_at_once == 3


def test_requests_keep_their_distance_under_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    with ScriptedServer(echo) as server:
        monkeypatch.setattr(chat, "time", SimpleNamespace(monotonic=lambda: 100.0))
        monkeypatch.setattr(chat.asyncio, "sleep", note)
        ask(server, [str(i) for i in range(5)], per_minute=1200)
    assert pauses == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_server_in_trouble_is_asked_again(status: int) -> None:
    left = [2]

    def reply(body: dict[str, Any]) -> Any:
        left[0] -= 1
        return (status, {"error": "later"}) if left[0] >= 0 else echo(body)

    with ScriptedServer(reply) as server:
        assert ask(server, ["x"])[0].text == "about x"
        assert len({h["Idempotency-Key"] for h in server.headers}) == 1


def test_what_stays_wrong_is_the_answers_error_and_is_asked_again_by_the_next_run(
    tmp_path: Path,
) -> None:
    with Journal(tmp_path / "j") as journal, ScriptedServer(lambda _: (500, "sick")) as server:
        answer = ask(server, ["x"], journal=journal)[0]
    assert answer.text == "" and "HTTP 500" in (answer.error or "")
    with Journal(tmp_path / "j") as journal, ScriptedServer(echo) as server:
        assert ask(server, ["x"], journal=journal)[0].text == "about x"


@pytest.mark.parametrize(
    "payload",
    [b"<html>", {"choices": []}, {"choices": [{"message": {"content": 7}}]}, b"[1]", b""],
)
def test_an_unreadable_response_is_an_error_of_its_answer(payload: Any) -> None:
    with ScriptedServer(lambda _: (200, payload)) as server:
        assert "unreadable response" in (ask(server, ["x"], tries=1)[0].error or "")


def test_a_request_the_server_refuses_is_an_error_of_its_answer_and_not_repeated() -> None:
    with ScriptedServer(lambda _: (400, {"error": "too long"})) as server:
        assert "too long" in (ask(server, ["x"])[0].error or "")
        assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [301, 401, 402, 404])
def test_what_no_request_survives_ends_the_run_without_showing_the_key(status: int) -> None:
    with ScriptedServer(lambda _: (status, "key sk-secret is wrong")) as server:
        with pytest.raises(ServerError, match=str(status)) as error:
            ask(server, ["x"] * 50, api_key="sk-secret", concurrency=2)
        assert "sk-secret" not in str(error.value)
        assert len(server.bodies) <= 2
        assert server.headers[0]["Authorization"] == "Bearer sk-secret"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "nonsense", "ftp://x/v1", "http://[/v1"])
def test_an_address_where_nothing_answers_is_said(url: str) -> None:
    with pytest.raises(ServerError, match="address"):
        ask(url, ["x"], tries=2)


def test_a_server_that_never_answers_is_a_timeout_and_counts_in_full(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal, ScriptedServer(lambda _: None) as server:
        answer = ask(server, ["x"], journal=journal, timeout=0.1, tries=2)[0]
    assert "timeout" in (answer.error or "")
    with Journal(tmp_path / "j") as journal:
        client = Client("http://x", "m", journal=journal)
    assert client.lost == 2 and client.usage.completion_tokens == 2 * 20


def test_a_server_that_never_stops_sending_is_a_timeout() -> None:
    with ScriptedServer(lambda _: (200, ENDLESS)) as server:
        assert "timeout" in (ask(server, ["x"], timeout=0.3, tries=1)[0].error or "")


def test_an_answer_is_paid_once_over_restarts_and_another_question_is_not_it(
    tmp_path: Path,
) -> None:
    with ScriptedServer(echo) as server:
        for questions in (["a", "b"], ["b", "c"]):
            with Journal(tmp_path / "j") as journal:
                answers = ask(server, questions, journal=journal)
            assert [a.text for a in answers] == [f"about {q}" for q in questions]
        assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("budget", "most"),
    [
        (Budget(requests=7), 7),
        (Budget(tokens=1000), 9),  # 102 a request
        (Budget(cost=0.001), 9),  # at a price of one a million
    ],
)
def test_the_budget_stops_in_time_and_holds_over_restarts(
    budget: Budget, most: int, tmp_path: Path
) -> None:
    with ScriptedServer(echo) as server:
        for _ in range(2):
            with Journal(tmp_path / "j") as journal, pytest.raises(BudgetReached):
                questions = [str(i) for i in range(30)]
                ask(server, questions, journal=journal, budget=budget, prices=Prices(1, 1))
        assert most - 2 <= len(server.bodies) <= most


def test_a_reasoning_that_the_server_returns_apart_is_kept_apart() -> None:
    message = {"content": "Answer: entailed.", "reasoning_content": "Hmm."}
    with ScriptedServer(lambda body: completion(message, body)) as server:
        answer = ask(server, ["x"])[0]
    assert (answer.reasoning, answer.text) == ("Hmm.", "Answer: entailed.")


def test_a_journal_forgets_the_line_a_kill_cut_and_appends_after_the_last_whole_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.append("a", value="ä")
        journal.append("b", value=2)
    os.truncate(path, path.stat().st_size - 3)
    with Journal(path) as journal:
        assert set(journal.entries) == {"a"}
        journal.append("c", value=3)
    with Journal(path) as journal:
        assert [entry["value"] for entry in journal.entries.values()] == ["ä", 3]


def test_a_journal_belongs_to_one_process_and_says_where_it_is_broken(tmp_path: Path) -> None:
    with Journal(tmp_path / "j"), pytest.raises(JournalError, match="in use"):
        Journal(tmp_path / "j")
    (tmp_path / "j").write_text('{"key": "a"}\nnot json\n')
    with pytest.raises(JournalError, match="j:2"):
        Journal(tmp_path / "j")


def test_a_full_disk_leaves_whole_lines_and_says_what_to_do() -> None:
    journal = Journal.__new__(Journal)
    journal.path, journal.entries = Path("/dev/full"), {}
    journal._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with journal, pytest.raises(JournalError, match="make room"):
        journal.append("a", value=1)
    assert journal.entries == {}
