"""`metrics.jsonl`: what a run measured, a line a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from soundmind.system.files import write_text


class MetricsFile:
    """`metrics.jsonl`: one JSON object a step, flat, under verl's own keys plus `step`.

    Appending keeps the steps of an earlier attempt; `forget_after` drops those that a resumed run
    is about to repeat.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def forget_after(self, step: int) -> None:
        """Drop lines of steps beyond `step`, and an incomplete last line."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line, step) <= step]
        write_text(self.path, "".join(line + "\n" for line in kept))

    def append(self, step: int, metrics: dict[str, Any]) -> None:
        """Write one line and flush it to disk."""
        line = {"step": step, **{name: _plain(value) for name, value in sorted(metrics.items())}}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _step_of(line: str, limit: int) -> int:
    """The line's step; beyond `limit` for a line that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return limit + 1


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
