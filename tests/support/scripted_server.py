"""A server of OpenAI's HTTP protocol whose answers are scripted: one thread a connection.

In a test, `with ScriptedServer(reply) as server:` and `server.url`; as a process of its own,
`python tests/support/scripted_server.py PORT_FILE [SECONDS]` is a teacher that reasons about
whatever it is asked and takes SECONDS for it.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ENDLESS = object()  # as a payload: bytes until the client goes away

# body -> completion text, a whole message, (status, payload), raw bytes, or None: never answer
Reply = Callable[[dict[str, Any]], Any]


def completion(message: str | dict[str, Any], body: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """A response as vLLM sends it."""
    fields = {"role": "assistant", "content": message} if isinstance(message, str) else message
    words = len(str(fields.get("content")).split())
    return {
        "id": "x",
        "model": body["model"],
        "choices": [{"index": 0, "message": fields, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": words},
        **keys,
    }


class ScriptedServer:
    """Keeps what it was asked, and counts what it answered by Idempotency-Key."""

    def __init__(self, reply: Reply, seconds: float = 0.0) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answered: Counter[str] = Counter()
        self.starts: list[float] = []
        self.most_at_once = self._now = 0
        self._stop, self._lock = threading.Event(), threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._answer(self, reply, seconds)

            def _send(self, status: int, payload: bytes, **headers: str) -> None:
                self.send_response(status)
                given = {name.replace("_", "-"): value for name, value in headers.items()}
                for name, value in {"Content-Length": str(len(payload)), **given}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: Any) -> None:
                return

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: Any) -> None:
                return  # a client that went away

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def _answer(self, handler: Any, reply: Reply, seconds: float) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        key = handler.headers["Idempotency-Key"]
        with self._lock:
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.starts.append(time.monotonic())
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            self._stop.wait(seconds)
            answer = reply(body)
            if answer is None:
                self._stop.wait()
                return
            status, payload = answer if isinstance(answer, tuple) else (200, answer)
            if status == 200 and isinstance(payload, str):
                payload = completion(payload, body)
            if payload is ENDLESS:
                handler._send(200, b"", Content_Length="1000000000000")
                while not self._stop.is_set():
                    handler.wfile.write(b" " * 4096)
                    time.sleep(0.001)
                return
            data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            with self._lock:
                self.answered[key] += status == 200
            handler._send(status, data)
        finally:
            with self._lock:
                self._now -= 1

    def __enter__(self) -> ScriptedServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()


def teacher(body: dict[str, Any]) -> str:
    """Reasons about a triple of own_triples; by the seed, one answer in eight is wrong."""
    major, minor, conclusion = re.findall(r' is "(.*)"\.', body["messages"][-1]["content"])
    kind, other = re.findall(r"Every (\w+) .* is a (\w+)", major)[0]
    entailed = f" {kind} " in minor and conclusion.endswith(f" {other}")
    verdict = "entailed" if entailed != (body.get("seed", 1) % 8 == 0) else "not entailed"
    return (
        f"Let us think about whether it follows that {conclusion}. The first premise tells us that "
        f"{major}, and the second one that {minor}. If both of them hold, we ask whether the "
        "conclusion has to hold as well, or whether there is a way around it. Having looked at it "
        f"from both sides I am sure of the verdict.\n\nAnswer: {verdict}."
    )


if __name__ == "__main__":
    delay = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    with ScriptedServer(teacher, delay) as running:
        temporary = Path(sys.argv[1] + ".tmp")
        temporary.write_text(running.url)
        temporary.replace(sys.argv[1])
        while True:
            time.sleep(1)
