"""Many questions to a server that speaks OpenAI's HTTP protocol: retries, rate, budget, resume.

    async with Client("http://localhost:8000/v1", "my-model", journal=journal) as client:
        answer = await client.chat([{"role": "user", "content": "Why?"}], max_tokens=512)

* An answer is in the journal before it is returned; asked again, it comes from there, free. A
  request is known by its body, so other words, another model or another seed ask anew.
* Every request carries an `Idempotency-Key`, so that a server that honours it bills a retry once.
* The budget holds across restarts. What a request can cost at most is set aside before it is sent,
  so the budget is never passed; what was sent and never answered (a kill, a timeout) counts in full.
* Trouble of the server (unreachable, 429, 5xx, timeouts) is retried with growing pauses. What stays
  is the `error` of that answer, not kept, so that the next run asks again. What no other request
  would survive (a refused key, an unknown model, no server) raises ServerError.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import httpx

from soundmind.system.errors import UserError
from soundmind.system.journal import Journal

T = TypeVar("T")
R = TypeVar("R")

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
FATAL = (401, 402, 403, 404, 405)  # and redirections: key, money, model or address
LARGEST_RESPONSE = 256 << 20  # bytes; an hour of 16-bit sound at 24 kHz has 173 MB
LONGEST_PAUSE = 60.0  # seconds between two tries, whatever the server says


class ServerError(UserError):
    """No request to this server can succeed; the message says what to do."""


class BudgetReached(UserError):
    """The next request could pass the budget; everything answered so far is kept."""


@dataclass
class Usage:
    """Requests and tokens; a try that was sent and never answered counts at its most."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0  # at the prices of the day

    @property
    def tokens(self) -> int:
        """Of prompts and completions."""
        return self.prompt_tokens + self.completion_tokens

    def add(self, other: Usage, sign: int = 1) -> None:
        """Count what another counted, or with `sign` -1 take it back."""
        self.requests += sign * other.requests
        self.prompt_tokens += sign * other.prompt_tokens
        self.completion_tokens += sign * other.completion_tokens
        self.cost += sign * other.cost


@dataclass(frozen=True)
class Prices:
    """Cost of a million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def used(self, prompt_tokens: int, completion_tokens: int, requests: int = 1) -> Usage:
        """So many tokens with what they cost."""
        cost = (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6
        return Usage(requests, prompt_tokens, completion_tokens, cost)


@dataclass(frozen=True)
class Budget:
    """What may be spent in all, by earlier runs on the same journal too; None: no limit."""

    cost: float | None = None  # in the currency of `Prices`
    tokens: int | None = None  # of prompts and completions
    requests: int | None = None

    def allows(self, usage: Usage) -> bool:
        """Whether so much may be spent."""
        return (
            (self.cost is None or usage.cost <= self.cost)
            and (self.tokens is None or usage.tokens <= self.tokens)
            and (self.requests is None or usage.requests <= self.requests)
        )


@dataclass(frozen=True)
class Completion:
    """One completion. With an `error` there is no text, and nothing was kept."""

    text: str = ""
    reasoning: str = ""  # where the server returns it apart from the text
    finish_reason: str | None = None  # "stop", "length", "content_filter", ...
    refusal: str | None = None
    model: str = ""  # as the server calls itself
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


@dataclass
class Client:
    """One server and one model; see the module docstring. Used as an async context manager."""

    base_url: str  # up to and including /v1
    model: str
    api_key: str | None = field(default=None, repr=False)
    journal: Journal | None = field(default=None, repr=False)
    concurrency: int = 16
    per_minute: float | None = None  # tries, retries included
    timeout: float = 600.0  # seconds for one try
    tries: int = 5
    first_pause: float = 1.0  # seconds before the second try; doubles from there
    budget: Budget = Budget()
    prices: Prices = Prices()
    usage: Usage = field(default_factory=Usage)  # of the whole journal
    lost: int = 0  # tries of the whole journal that were sent and never answered
    retries: int = 0

    def __post_init__(self) -> None:
        self._reserved = Usage()
        self._next_start = 0.0
        for entry in self.journal.entries.values() if self.journal else ():
            self.lost += entry["lost"]
            for _ in range(entry["lost"]):
                self.usage.add(Usage(**entry["most"]))
            if entry["answer"]:
                self.usage.add(Usage(**entry["spent"]))

    async def __aenter__(self) -> Client:
        try:
            self._http = httpx.AsyncClient(
                headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else {},
                timeout=httpx.Timeout(self.timeout, pool=None),
                limits=httpx.Limits(max_connections=self.concurrency),
            )
        except UnicodeEncodeError as error:
            raise ServerError("the key holds characters that no HTTP header can hold") from error
        self._slots = asyncio.Semaphore(self.concurrency)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    def kept(self, body: dict[str, Any]) -> Completion | None:
        """The answer to a request if the journal has it."""
        entry = self.journal.entries.get(_key(body)) if self.journal else None
        return Completion(**entry["answer"]) if entry and entry["answer"] else None

    def is_kept(self, **request: Any) -> bool:
        """Whether `chat` with these arguments would be answered from the journal."""
        return self.kept(self.body(**request)) is not None

    def body(
        self,
        messages: list[dict[str, Any]],
        *,
        max_tokens: int,
        extra: Mapping[str, Any] | None = None,
        **parameters: Any,
    ) -> dict[str, Any]:
        """The body of a chat request: `parameters` (temperature, seed, ...), `extra` over them, and
        nothing that is None."""
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens}
        body |= {**parameters, **(extra or {})}
        return {name: value for name, value in body.items() if value is not None}

    async def chat(
        self, messages: list[dict[str, Any]], *, max_tokens: int, **parameters: Any
    ) -> Completion:
        """Ask one question; arguments as for `body`. Raises ServerError, BudgetReached and
        JournalError; other trouble is in `Completion.error`."""
        body = self.body(messages, max_tokens=max_tokens, **parameters)
        kept = self.kept(body)
        if kept is not None:
            return kept
        # No token is shorter than a byte, and a message adds a few of its own.
        written = len(json.dumps(body).encode()) + 8 * len(messages)
        most = self.prices.used(written, max_tokens)
        answer: Completion = await self._ask("chat/completions", body, most, _read_completion)
        return answer

    async def speech(self, body: dict[str, Any]) -> bytes | str:
        """Sound of `audio/speech` as encoded bytes, or as text why there is none."""
        answer: bytes | Completion = await self._ask("audio/speech", body, Usage(1), _read_sound)
        return answer if isinstance(answer, bytes) else answer.error or "no sound"

    async def _ask(
        self,
        path: str,
        body: dict[str, Any],
        most: Usage,
        read: Callable[[httpx.Response], Any],
    ) -> Any:
        """What `read` makes of the response, after as many tries as it takes; else a Completion
        with an error."""
        url, key = f"{self.base_url.rstrip('/')}/{path}", _key(body)
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        entry = self.journal.entries.get(key) if self.journal else None
        lost = entry["lost"] if entry else 0
        unreachable, problem, pause = False, "", self.first_pause
        for attempt in range(self.tries):
            if attempt:
                self.retries += 1
                await asyncio.sleep(pause * random.uniform(0.8, 1.2))
                pause = min(2 * pause, LONGEST_PAUSE)
            await self._reserve(most)
            answer, was_lost = None, False
            try:
                async with self._slots:
                    await self._turn()
                    self._note(key, most, lost + 1)  # how a kill from here on is remembered
                    unreachable = False
                    try:
                        # A limit on the whole try: a server that goes on sending is one too.
                        response = await asyncio.wait_for(
                            self._post(url, data, headers), self.timeout
                        )
                    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
                        unreachable, problem = True, str(error) or type(error).__name__
                    except (httpx.TimeoutException, asyncio.TimeoutError):
                        was_lost, problem = True, f"timeout: no answer within {self.timeout:g} s"
                    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                        raise ServerError(f"{url} is no address: {error}") from error
                    except httpx.TransportError as error:
                        was_lost, problem = True, f"connection lost: {error}"
                    else:
                        answer, problem = self._judge(response, read)
                        was_lost = response.status_code == 200 and answer is None
                        pause = max(pause, _wanted_pause(response))
                if was_lost:
                    lost += 1
                    self.lost += 1
                    self.usage.add(most)
                if isinstance(answer, Completion) and answer.error is None:
                    spent = self.prices.used(answer.prompt_tokens, answer.completion_tokens)
                    self.usage.add(spent)
                    self._note(key, most, lost, answer, spent)
                else:
                    self._note(key, most, lost)
            finally:
                self._reserved.add(most, sign=-1)
            if answer is not None:
                return answer
        if unreachable:
            raise ServerError(
                f"{url} does not answer ({problem}). Start the server or mend the address, then "
                "run the same command again"
            )
        return Completion(error=problem)

    async def _post(self, url: str, data: bytes, headers: dict[str, str]) -> httpx.Response:
        """The whole response, unless it is larger than any answer is."""
        async with self._http.stream("POST", url, content=data, headers=headers) as response:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > LARGEST_RESPONSE:
                    raise httpx.ReadError(f"more than {LARGEST_RESPONSE} bytes")
        pause = {"Retry-After": response.headers.get("Retry-After", "")}
        return httpx.Response(
            response.status_code, headers=pause, content=bytes(content), request=response.request
        )

    def _judge(
        self, response: httpx.Response, read: Callable[[httpx.Response], Any]
    ) -> tuple[Any, str]:
        """(answer, "") where it is final, (None, what is wrong) where another try may help."""
        status = response.status_code
        if status == 200:
            try:
                return read(response), ""
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                return None, f"unreadable response: {type(error).__name__}: {error}"
        said = response.text[:300].replace(self.api_key or "\0", "***")
        problem = f"HTTP {status}: {' '.join(said.split())}"
        if status in RETRIED:
            return None, problem
        if status in FATAL or 300 <= status < 400:
            raise ServerError(
                f"{response.url} answered {problem}. Check address, model {self.model!r} and key, "
                "then run the same command again"
            )
        return Completion(error=problem), ""

    def _note(
        self,
        key: str,
        most: Usage,
        lost: int,
        answer: Completion | None = None,
        spent: Usage | None = None,
    ) -> None:
        if self.journal is not None:
            self.journal.append(
                key,
                flush=answer is not None,
                lost=lost,
                most=asdict(most),
                asked=self.model,
                answer=asdict(answer) if answer else None,
                spent=asdict(spent) if spent else None,
            )

    async def _reserve(self, most: Usage) -> None:
        """Set aside what a request may cost; waits while others may give some back."""
        while True:
            sum_ = Usage()
            for part in (self.usage, self._reserved, most):
                sum_.add(part)
            if self.budget.allows(sum_):
                self._reserved.add(most)
                return
            if not self._reserved.requests:
                raise BudgetReached(
                    f"{self.usage.requests} requests, {self.usage.tokens} tokens and a cost of "
                    f"{self.usage.cost:.4f} are spent, and the next request could pass the budget. All "
                    "answers are kept; run the same command again with a larger budget"
                )
            await asyncio.sleep(0.02)

    async def _turn(self) -> None:
        """Wait for this request's place in the rate."""
        if self.per_minute is None:
            return
        start = max(time.monotonic(), self._next_start)
        self._next_start = start + 60.0 / self.per_minute
        await asyncio.sleep(start - time.monotonic())


def _key(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]


def _wanted_pause(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    return min(float(value), LONGEST_PAUSE) if value.replace(".", "", 1).isdigit() else 0.0


def _read_completion(response: httpx.Response) -> Completion:
    record = response.json()
    choice, usage = record["choices"][0], record.get("usage") or {}
    message = choice["message"]
    text = message.get("content") or ""
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    if not (isinstance(text, str) and isinstance(reasoning, str)):
        raise TypeError("the content is no text")
    # Where the server counts nothing: English has some four characters a token.
    counted = usage.get("completion_tokens") or -(-len(text + reasoning) // 4)
    return Completion(
        text=text,
        reasoning=reasoning,
        finish_reason=choice.get("finish_reason"),
        refusal=message.get("refusal"),
        model=record.get("model") or "",
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(counted),
    )


def _read_sound(response: httpx.Response) -> bytes:
    if not response.content:
        raise ValueError("no bytes")
    return response.content


async def run_all(work: Callable[[T], Awaitable[R]], items: Iterable[T], workers: int) -> list[R]:
    """Results of `work` in the order of `items`, `workers` at once.

    After a first exception nothing new is begun, what is in hand is finished (it may be paid for),
    and the exception is raised.
    """
    results: dict[int, R] = {}
    failures: list[Exception] = []
    waiting = enumerate(items)

    async def worker() -> None:
        for index, item in waiting:
            try:
                results[index] = await work(item)
            except Exception as error:
                failures.append(error)
            if failures:
                return

    await asyncio.gather(*(worker() for _ in range(workers)))
    if failures:
        raise failures[0]
    return [results[index] for index in sorted(results)]
